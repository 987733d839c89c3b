"""Speeds of devices: reckoned from arithmetic, peaks and the share of a peak that is reached.

The shares were measured on one device, an H200 (LOG.md, 2026-11-27). The operations are counted
(torch's FlopCounterMode, attention as matrix products, a multiplication and an addition are two) on
the shapes of Stable Diffusion 1.5 and of CLIP ViT-L/14, without running them. The peaks are those
of the makers' data sheets for dense bfloat16 (float16 where there is none). That another device
reaches the same shares of its own is an assumption, and the estimate is no better than it.
"""

from __future__ import annotations

from ip2p_ray.errors import ConfigError
from ip2p_ray.estimate.config import EXPLODED, Sizes, Speed, Speeds

PEAK_FLOPS = {
    "h200": 989e12,
    "h100": 989e12,
    "a100": 312e12,
    "l40s": 362e12,
    "l4": 121e12,
    "a10g": 70e12,
    "t4": 65e12,
}
"""Of a device, in a second: SXM where there are several."""

MEASURED_ON = "h200"

SHARES = {
    "sampling": 0.277,
    "decoding": 0.187,
    "judging": 0.043,
    "encoding": 0.140,
    "training": 0.093,
    "answering": 0.247,
}
"""Of the peak, by kind of work, as measured in bfloat16, the judge in float32, and not compiled.

Sampling and decoding 16 candidates of 512 pixels at a time (11.7 ms a step and 27 ms each), judging
128 (8.3 ms), encoding 32 pairs of 256 pixels (7.9 ms a pair), training with the activations
computed twice in micro-batches of 32 (125 samples/s; micro-batches of 64 without that: 257),
answering 16 requests of 512 pixels at a time (10 ms a step). Compiled, sampling and decoding
together reach 0.347.
"""

UNET_512 = 803.3e9
"""Operations of a row of the UNet on latents of 64 x 64, which are pictures of 512 pixels."""
UNET_256 = 180.1e9
"""On latents of 32 x 32, with the editor's 8 channels."""
DECODE_512 = 2514.5e9
ENCODE_256 = 272.7e9
TEXT = 13.1e9
"""A text of 77 tokens in the text encoder of either."""
CLIP_IMAGE = 162.0e9
"""A picture in ViT-L/14: 81 billion multiplications and additions, as its makers' papers say."""

HOPELESS = 0.307
"""Share of the paper's triplets without a pair: 313,010 of 451,990 have some, as published."""

TRAINED = 4
"""Passes of a sample: forward, backward as two, and the forward pass that checkpointing repeats."""
UNET_PARAMETERS = 859_532_484
PARAMETERS = UNET_PARAMETERS + 83_653_863 + 123_060_480


def reckon(device: str, utilisation: float | None = None, *, fixed_s: float = 120.0) -> Speeds:
    """Speeds of the paper's models on a device; `fixed_s` is what each stage takes beside its work.

    `utilisation` is the share of the peak that all work reaches, by default SHARES.

    Raises:
        ConfigError: the device is not in the table, or the share is not in (0, 1].
    """
    if device not in PEAK_FLOPS:
        raise ConfigError(f"the devices are {', '.join(PEAK_FLOPS)}, got {device!r}")
    if utilisation is not None and not 0 < utilisation <= 1:
        raise ConfigError(f"utilisation lies in (0, 1], got {utilisation}")
    peak = PEAK_FLOPS[device]
    known = "as measured" if device == MEASURED_ON else f"as measured on a {MEASURED_ON}"
    if utilisation is not None:
        known = "as given"

    def speed(work: str, operations: float) -> Speed:
        share = SHARES[work] if utilisation is None else utilisation
        source = f"reckoned: {share:.0%} of {peak / 1e12:g} TFLOP/s of a {device}, {known}"
        return Speed(seconds=operations / (peak * share), source=source)

    stages = ("triplets", "pairs", "latents", "training", "evaluation")
    return Speeds(
        caption=None,
        # source and edited picture, with and without text
        candidate_step=speed("sampling", 4 * UNET_512),
        candidate=speed("decoding", 2 * DECODE_512),
        judgement=speed("judging", 2 * (CLIP_IMAGE + TEXT)),
        latent=speed("encoding", 4 * ENCODE_256),  # both pictures, and both mirrored
        sample=speed("training", TRAINED * UNET_256 + TEXT),
        answer_step=speed("answering", 3 * UNET_512),
        score=EXPLODED,
        fixed=dict.fromkeys(stages, fixed_s),
        start=0.0,
    )


def sizes(resolution: int = 512, latent_side: int = 32) -> Sizes:
    """Of the paper's datasets: of pictures and texts assumed, of arrays by their shapes."""
    return Sizes(
        caption=120.0,
        reply=260.0,
        triplet=300.0,
        score=110.0,
        reject=80.0,
        picture=1.75 * resolution**2,  # PNG of photographs: some 14 bits a pixel
        latent=6 * 2 * 4 * latent_side**2 + 200,  # six arrays of float16 in four channels
        checkpoint=16.0 * UNET_PARAMETERS,  # weights, average and two moments in float32
        editor=4.0 * PARAMETERS,
        answer=2 * 1.75 * resolution**2,
        source="assumed, but for arrays and weights",
    )
