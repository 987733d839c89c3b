"""What an estimate is made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from ip2p_ray.errors import ConfigError

STAGES = ("captions", "triplets", "pairs", "latents", "training", "evaluation")
"""In the order of the flow."""


def _require(holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"{rule}, got {value!r}")


def _require_amount(name: str, value: object) -> None:
    holds = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
    _require(holds, f"{name} is a finite number of at least 0", value)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How much is to be made, and how much of it survives."""

    captions: int
    """Captions that triplets are written of, one each."""
    reply_share: float = 1.0
    """Share of replies, in (0, 1], that become triplets."""
    candidates: int = 100
    """Candidates of each triplet."""
    steps: int = 100
    """Sampling steps of a candidate."""
    acceptance: float = 0.2
    """Share of candidates, in [0, 1], that reach every threshold."""
    hopeless: float = 0.0
    """Share of triplets, in [0, 1), no candidate of which ever does; the others accept more."""
    keep: int = 4
    """Most pairs of a triplet."""
    held_out: float = 0.05
    """Share of pairs, in [0, 1), that are not encoded and not trained on."""
    train_steps: int = 10_000
    """Optimizer steps of the editor."""
    batch_size: int = 1024
    """Samples of an optimizer step."""
    answers: int = 2_000
    """Edits that evaluation asks for."""
    answer_steps: int = 100
    """Denoising steps of each of them."""
    prompt_tokens: float | None = None
    """Of a request to a language model at an endpoint; None where a model in the cluster writes."""
    reply_tokens: float | None = None
    """Of its reply."""

    def __post_init__(self) -> None:
        counts = ("captions", "candidates", "steps", "keep", "train_steps", "batch_size")
        for name in (*counts, "answer_steps"):
            _require(getattr(self, name) >= 1, f"{name} is at least 1", getattr(self, name))
        _require(self.answers >= 0, "answers is at least 0", self.answers)
        _require(0 < self.reply_share <= 1, "reply_share lies in (0, 1]", self.reply_share)
        _require(0 <= self.acceptance <= 1, "acceptance lies in [0, 1]", self.acceptance)
        _require(0 <= self.hopeless < 1, "hopeless lies in [0, 1)", self.hopeless)
        _require(0 <= self.held_out < 1, "held_out lies in [0, 1)", self.held_out)
        both = (self.prompt_tokens is None) == (self.reply_tokens is None)
        _require(both, "prompt_tokens and reply_tokens go together", self.prompt_tokens)
        for name in ("prompt_tokens", "reply_tokens"):
            _require_amount(name, getattr(self, name) or 0.0)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What one device of a pool takes for a unit of its work."""

    seconds: float
    """Of one device, for a unit."""
    source: str
    """Where that is from: "measured ..." or "reckoned ..."."""

    def __post_init__(self) -> None:
        _require_amount("seconds", self.seconds)


EXPLODED = Speed(
    seconds=15e-6,
    source="measured: 4.6 us of CPU each for scores, rejects and pairs, on one core of two",
)
"""Of a candidate that is read off its triplet (`jobs/benchmark.py scale`)."""


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """How fast the pools work, and what a stage takes however little it has to do."""

    caption: Speed | None
    """A caption that a model in the cluster answers; None where an endpoint does."""
    candidate_step: Speed
    """A sampling step of a candidate."""
    candidate: Speed
    """What a candidate takes beside its steps, such as decoding."""
    judgement: Speed
    """A candidate that is judged; 0 where that is in the generator's time."""
    latent: Speed
    """A pair that is encoded."""
    sample: Speed
    """A sample of an optimizer step, by one worker of training."""
    answer_step: Speed
    """A denoising step of an answer."""
    score: Speed
    """A candidate that is read off its triplet, by a task of the explosion; no device's time."""
    fixed: Mapping[str, float]
    """Wall seconds by stage until the first unit is worked on and after the last: processes begin,
    models are loaded, files are put in order, checkpoints are written."""
    start: float = 0.0
    """Wall seconds before the first stage and after the last one: libraries, Ray, the report."""

    def __post_init__(self) -> None:
        unknown = set(self.fixed) - set(STAGES)
        _require(not unknown, f"fixed has stages of {', '.join(STAGES)}", sorted(unknown))
        for name, seconds in {**self.fixed, "start": self.start}.items():
            _require_amount(f"the time of {name}", seconds)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes that a row of each dataset takes where it lies, and those of what training makes."""

    caption: float
    reply: float
    triplet: float
    score: float
    reject: float
    """Of a candidate."""
    picture: float
    """One encoded picture."""
    latent: float
    """All arrays of a pair and of the mirrored one."""
    checkpoint: float
    editor: float
    answer: float
    """With its pictures."""
    source: str
    """Where these are from."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name != "source":
                _require_amount(each.name, getattr(self, each.name))


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What things cost, in one currency; there are no defaults, for prices change."""

    device_hour: float
    """Of a device of the pools that make pairs, encode, train and evaluate."""
    storage_gb_month: float
    """Of 10^9 bytes in the bucket."""
    put_1000: float
    """Of a thousand requests that write or list."""
    get_1000: float
    """Of a thousand requests that read."""
    transfer_gb: float
    """Of 10^9 bytes between bucket and nodes; often 0 within a region."""
    prompt_million: float = 0.0
    """Of a million tokens that an endpoint reads; required where one writes."""
    reply_million: float = 0.0
    """Of a million tokens that it writes."""
    months: float = 1.0
    """For how long everything is kept."""
    currency: str = "USD"
    as_of: str = ""
    """Whose prices these are, and of when."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in ("currency", "as_of"):
                _require(isinstance(value, str), f"{each.name} is text", value)
            else:
                _require_amount(each.name, value)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices of each pool: processes of the stage that work at the same time."""

    writers: int = 1
    """That write triplets."""
    requests_per_minute: float | None = None
    """Of an endpoint, where one writes."""
    generators: int = 1
    """That make candidates."""
    judges: int | None = None
    """That judge them at the same time; None judges where the pictures are made."""
    encoders: int = 1
    trainers: int = 1
    training_efficiency: float = 1.0
    """Speed of several trainers together, as a share, in (0, 1], of so many times one."""
    editors: int = 1
    """That answer the evaluation's questions."""
    tasks: int = 8
    """Of the explosion that run at the same time; the code has 8 at most."""
    nodes: int = 1
    """That trainers are spread over; each reads all latents once."""

    def __post_init__(self) -> None:
        for name in ("writers", "generators", "encoders", "trainers", "editors", "tasks", "nodes"):
            _require(getattr(self, name) >= 1, f"{name} is at least 1", getattr(self, name))
        _require(self.judges is None or self.judges >= 1, "judges is at least 1", self.judges)
        rate = self.requests_per_minute
        _require(rate is None or 0 < rate < math.inf, "requests_per_minute is positive", rate)
        efficient = 0 < self.training_efficiency <= 1
        _require(efficient, "training_efficiency lies in (0, 1]", self.training_efficiency)


@dataclass(frozen=True, kw_only=True)
class Basis:
    """Everything that an estimate is made from but the prices."""

    workload: Workload
    speeds: Speeds
    sizes: Sizes
    cluster: Cluster = field(default_factory=Cluster)

    def __post_init__(self) -> None:
        if self.speeds.caption is None and self.workload.prompt_tokens is None:
            raise ConfigError(
                "nobody writes the triplets: a speed of captions or prompt_tokens is needed"
            )
