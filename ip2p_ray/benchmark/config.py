"""What is measured, and where; nothing heavy is imported, so that flags are read at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ip2p_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PairBenchmark:
    """Candidates of one model made the reference's way and ours, in turns."""

    preset: Literal["miniature", "paper", "fast"] = "miniature"
    """Whose generator, judge and settings; both ways take Euler-ancestral steps, as the
    reference does."""
    sd15: bool = False
    """Random weights in the shapes of Stable Diffusion 1.5 instead of the preset's generator; no
    judge. Nothing is downloaded."""
    device: str = "cpu"
    """Where the models lie, for example "cpu" or "cuda"."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the generator's weights, both ways."""
    resolution: int | None = None
    """Height and width in pixels; by default the preset's."""
    steps: int | None = None
    """Sampling steps; by default the preset's."""
    candidates: int = 32
    """How many each way makes in a turn."""
    batch_size: int | None = None
    """Candidates of our way's batch; by default the fastest of 1, 2, 4, ... is searched."""
    decode_batch: int | None = None
    """Pictures that our way decodes at a time; by default as many as candidates in its batch."""
    compile: bool = False
    """Our way's UNet goes through torch.compile; needs a batch size that divides the candidates."""
    channels_last: bool = False
    """Our way's UNet and autoencoder keep channels last in memory."""
    rounds: int = 3
    """Turns of each way; medians are reported."""

    def __post_init__(self) -> None:
        for name in ("resolution", "steps", "candidates", "batch_size", "decode_batch", "rounds"):
            value = getattr(self, name)
            flag = "--" + name.replace("_", "-")
            if value is not None and value < 1:
                raise ConfigError(f"{flag} is at least 1, got {value}")
        if self.batch_size is not None and self.batch_size > self.candidates:
            raise ConfigError(
                f"--batch-size {self.batch_size} is more than --candidates {self.candidates}"
            )
        if self.compile and (self.batch_size is None or self.candidates % self.batch_size):
            raise ConfigError(
                "--compile needs a --batch-size that divides --candidates: another shape is "
                f"compiled anew; got {self.batch_size} and {self.candidates}"
            )
        if self.device == "cpu" and self.dtype == "float16":
            raise ConfigError("--dtype float16 is for CUDA; on a CPU take float32 or bfloat16")


@dataclass(frozen=True, kw_only=True)
class TrainingBenchmark:
    """Optimizer steps of one model taken the plain way and ours, in turns."""

    preset: Literal["miniature", "paper", "fast"] = "miniature"
    """Whose generator is trained, and with which batch."""
    sd15: bool = False
    """Random weights in the shapes of Stable Diffusion 1.5 instead; nothing is downloaded."""
    device: str = "cpu"
    """Where the models lie, for example "cpu" or "cuda"."""
    resolution: int | None = None
    """Height and width in pixels; by default the preset's, with --sd15 256."""
    batch_size: int | None = None
    """Samples of a step, both ways; by default the preset's."""
    micro_batch: int = 64
    """Samples that ours computes at a time, at most; the plain way takes the whole batch."""
    pairs: int | None = None
    """Pairs of noise that are trained on; by default so many that none is met twice, and every
    instruction is a new one."""
    steps: int = 5
    """Optimizer steps of each way in a turn."""
    rounds: int = 3
    """Turns of each way; medians are reported."""
    bf16: bool = False
    """Ours computes in bfloat16; the plain way stays float32."""
    channels_first: bool = False
    """Ours does not keep channels last in memory."""
    gradient_checkpointing: bool = False
    """Ours computes activations twice."""
    compile: bool = False
    """Ours compiles the UNet; the plain way stays eager."""
    text: Literal["tokens", "embeddings"] = "tokens"
    """What ours reads of instructions: tokens, which it encodes in every step, or embeddings."""
    ranks: int = 1
    """On a CPU also compare one process with so many that share its threads."""

    def __post_init__(self) -> None:
        counts = ("resolution", "batch_size", "micro_batch", "pairs", "steps", "rounds", "ranks")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is at least 1, got {value}")
        if self.ranks > 1 and self.device != "cpu":
            raise ConfigError(f"--ranks is for the CPU, got --device {self.device}")


@dataclass(frozen=True, kw_only=True)
class EditorBenchmark:
    """The editor behind HTTP: requests one by one, whole requests batched, steps batched."""

    model: str | None = None
    """Folder or hub id of the editor; by default the shipped miniature's."""
    sd15: bool = False
    """Random weights in the shapes of Stable Diffusion 1.5 instead; nothing is downloaded."""
    device: str = "cpu"
    """Where the models lie, for example "cpu" or "cuda"; all three lie there at once."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights, all three ways."""
    resolution: int | None = None
    """Height and width in pixels; by default the model's."""
    steps: int | None = None
    """Denoising steps of every request; by default the model's, with --sd15 20."""
    batch_size: int = 8
    """Requests in a batch at most, both ways that have one."""
    batch_waits_s: tuple[float, ...] = ()
    """Seconds that a batch of whole requests waits to become full: the one of these that gives it
    the least p95 at `compare_at`; by default 0.01 and 0.5, 1, 2 and 4 times what a picture
    takes one by one."""
    threads: tuple[int, ...] = ()
    """Of torch: each way gets the quickest of these; by default one and, on a CPU, all cores."""
    rates: tuple[float, ...] = (0.5, 0.9, 1.2, 1.6)
    """Requests a second that are offered, in multiples of what one by one can do."""
    compare_at: float = 1.2
    """Which of the rates the latencies in the first lines are of, at Poisson arrivals."""
    requests: int = 120
    """Sent at each rate."""
    saturation: int = 48
    """Requests of a turn that measures throughput, with two batches of them under way."""
    rounds: int = 3
    """Turns of each way at saturation, and at `compare_at`; medians are reported."""
    sequential: int = 50
    """Requests that are sent one after another, through HTTP and to the bare engine."""
    seed: int = 0
    """Of the arrivals."""

    def __post_init__(self) -> None:
        counts = ("batch_size", "requests", "saturation", "rounds", "sequential")
        for name in (*counts, "resolution", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is at least 1, got {value}")
        if self.model is not None and self.sd15:
            raise ConfigError("--model and --sd15 are two models; give one of them")
        if any(wait < 0 for wait in self.batch_waits_s):
            raise ConfigError(f"--batch-waits-s are not negative, got {min(self.batch_waits_s):g}")
        if any(count < 1 for count in self.threads):
            raise ConfigError(f"--threads are at least 1, got {min(self.threads)}")
        if not self.rates or any(rate <= 0 for rate in self.rates):
            raise ConfigError(f"--rates are numbers above 0, got {list(self.rates)}")
        if self.compare_at not in self.rates:
            raise ConfigError(
                f"--compare-at is one of --rates {list(self.rates)}, got {self.compare_at:g}"
            )
        if self.device == "cpu" and self.dtype == "float16":
            raise ConfigError("--dtype float16 is for CUDA; on a CPU take float32 or bfloat16")
