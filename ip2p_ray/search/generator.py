"""The tensors of a search: candidates by the diffusion model, similarities by CLIP."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ip2p_ray.candidates import CandidateRequest, Candidates
from ip2p_ray.clip import Clip
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.pairs import PairConfig, Pictures, begin, decode_pairs, proceed
from ip2p_ray.search.options import SearchConfig
from ip2p_ray.search.schedule import schedule
from ip2p_ray.search.triplet import Made, Searched

Scores = list[Mapping[str, float]]


def search(
    model: StableDiffusion,
    clip: Clip,
    triplets: Iterable[Mapping[str, Any]],
    config: PairConfig,
    options: SearchConfig,
    recipe: str,
    *,
    batch_size: int,
    decode_batch: int | None = None,
    shown_below: str = "",
    filled: Callable[[int, int], object] | None = None,
) -> Iterator[Searched]:
    """Each triplet with its judged candidates, as soon as its search has ended.

    Arguments are those of `schedule`; `recipe` is `options.search_recipe`. With all options off
    the candidates are those of `candidate_requests`, made by `generate_candidates`, judged by
    `Clip.similarities` and `filtering.select`. Seeds, noise and which candidates are begun do not
    depend on `batch_size` or the order of triplets, as far as scores do not: they do by rounding,
    as in any batch, which counts for a score within rounding of where a rule decides. `filled` is
    told, of each batch, how many rows it has and how many it can have.
    """
    generator = PairGenerator(model, clip, config, options, decode_batch)
    if filled is not None:
        generator.filled = lambda rows: filled(rows, 2 * batch_size)
    yield from schedule(
        generator,
        triplets,
        config,
        options,
        recipe,
        batch_size=batch_size,
        shown_below=shown_below,
    )


class PairGenerator:
    """What `schedule` asks for candidates; counts the work it did."""

    def __init__(
        self,
        model: StableDiffusion,
        clip: Clip,
        config: PairConfig,
        options: SearchConfig,
        decode_batch: int | None = None,
    ) -> None:
        self._model, self._clip, self._config = model, clip, config
        self._decode_batch = decode_batch
        self._prune_step = options.prune_step(config.steps)
        self.unet_rows = 0
        """Rows that went through the UNet: two a step and row of latents."""
        self.filled: Callable[[int], object] | None = None
        """Told of the rows of latents of each batch."""

    def predict(
        self, groups: Sequence[Sequence[CandidateRequest]]
    ) -> list[tuple[Candidates, Scores]]:
        """The candidates at the step of pruning, with what the model then takes for finished."""
        requests = [request for group in groups for request in group]
        part = self._proceed(begin(self._model, requests, self._config), self._prune_step)
        source, edited = self._decoded(part, part.rows.denoised)
        scores = self._judge(requests, source, edited)
        found, first = [], 0
        for group in groups:
            places = range(first, first + len(group))
            found.append((part.take(places), [scores[place] for place in places]))
            first += len(group)
        return found

    def take(self, begun: Candidates, places: Sequence[int]) -> Candidates:
        """The candidates at these places."""
        return begun.take(places)

    def finish(self, groups: Sequence[Sequence[CandidateRequest]], begun: list[Any]) -> list[Made]:
        """The candidates after their last step, judged; all of them begun, or none."""
        requests = [request for group in groups for request in group]
        if begun[0] is None:
            part = begin(self._model, requests, self._config)
        else:
            part = Candidates.join(begun)
        part = self._proceed(part, None)
        source, edited = self._decoded(part, part.rows.x)
        scores = self._judge(requests, source, edited)
        return [
            Made(similarities=row, source_image=source[place], edited_image=edited[place])
            for place, row in enumerate(scores)
        ]

    def _proceed(self, part: Candidates, stop: int | None) -> Candidates:
        if self.filled is not None:
            self.filled(len(part.generators))
        done = proceed(self._model, part, self._config, stop=stop)
        self.unet_rows += 2 * len(part.generators) * (done.step - part.step)
        return done

    def _decoded(self, part: Candidates, latents: Tensor) -> tuple[Pictures, Pictures]:
        return decode_pairs(self._model, part, latents, decode_batch=self._decode_batch)

    def _judge(
        self, requests: Sequence[CandidateRequest], source: Pictures, edited: Pictures
    ) -> Scores:
        captions = [request.caption for request in requests]
        edited_captions = [request.edited_caption for request in requests]
        return [*self._clip.similarities(source, edited, captions, edited_captions).rows()]
