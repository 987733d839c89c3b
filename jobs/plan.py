"""What a dataset and an editor will take: device hours, storage, network, money and time.

    python jobs/plan.py --measured runs/small --captions 400 --train-steps 600
    python jobs/plan.py --measured runs/small --check runs/quickstart
    python jobs/plan.py --device h100 --captions 450000 --prices cluster/prices.example.toml \
        --prompt-tokens 500 --reply-tokens 40 --cluster.generators 64 --cluster.trainers 8
    ray job submit --working-dir . -- python jobs/plan.py --measured /shared/small --captions 450000

Speeds are those of a run that was made (--measured, with --measured-on for the processes it had),
or reckoned from what one H200 reached (--device). No Ray and no model is needed. Amounts that are
not given are those of the run, or else the paper's. --check tells how far the prediction of a
second run was from what that run took. The status is 0, 1 where a run cannot be read and 2 for a
wrong flag.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.command import loading, require_place, require_uri
from ip2p_ray.estimate.config import Cluster

OF_THE_WORKLOAD = (
    *("captions", "candidates", "steps", "acceptance", "hopeless", "keep"),
    *("train_steps", "batch_size", "answers", "answer_steps", "prompt_tokens", "reply_tokens"),
)
"""Flags that take the place of what the run had, or of the paper's."""

QUICKSTART = Cluster(generators=2, judges=1, trainers=2, editors=2)
"""How jobs/quickstart.py works with two workers."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Amounts, speeds and prices in; device hours, bytes, money and time out."""

    measured: tuple[str, ...] = ()
    """Folders of a run that was made; of a stage that several have, the first one counts."""
    measured_on: Cluster = QUICKSTART
    """The processes that made it, by default the quickstart's with two workers."""
    device: str | None = None
    """Reckoned speeds of the paper's models: h200, h100, a100, l40s, l4, a10g or t4; with
    --measured only of the stages that the run does not have."""
    utilisation: float | None = None
    """Share of --device's peak that all work reaches; by default what each kind of work reached on
    an H200."""
    cluster: Cluster = field(default_factory=Cluster)
    """The processes that are there; one device each."""
    prices: Path | None = None
    """TOML file of prices, see cluster/prices.example.toml; without it no cost is told."""
    check: str | None = None
    """Folder of another run: predict what that one took, and compare."""
    captions: int | None = None
    """Captions to write triplets of."""
    candidates: int | None = None
    """Candidates of each triplet."""
    steps: int | None = None
    """Sampling steps of a candidate."""
    acceptance: float | None = None
    """Share of candidates that reach every threshold."""
    hopeless: float | None = None
    """Share of triplets that never get a pair; without a run that of the paper's triplets."""
    keep: int | None = None
    """Most pairs of a triplet."""
    train_steps: int | None = None
    """Optimizer steps of the editor."""
    batch_size: int | None = None
    """Samples of an optimizer step."""
    answers: int | None = None
    """Edits that evaluation asks for."""
    answer_steps: int | None = None
    """Denoising steps of each of them."""
    prompt_tokens: float | None = None
    """Of a request, where an endpoint writes triplets."""
    reply_tokens: float | None = None
    """Of a reply."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        if not self.measured and self.device is None:
            raise ValueError("give --measured RUN, --device NAME, or both")
        if self.check is not None and not self.measured:
            raise ValueError("--check compares with a run that was --measured; give one")
        for uri in (*self.measured, *([] if self.check is None else [self.check])):
            require_uri("--check" if uri == self.check else "--measured", uri)
        if self.json is not None:
            require_place("--json", self.json, folder=False)


def main(job: Plan) -> int:
    """Print the plan; returns the exit status."""
    with loading("plan"):
        from ip2p_ray.errors import ConfigError, Ip2pError
    try:
        found, told = _compared(job) if job.check is not None else _planned(job)
        if job.json is not None:
            from ip2p_ray.atomic import atomic_file

            with atomic_file(job.json) as new:
                new.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except (Ip2pError, OSError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print("\n".join(told))
    return 0


def _planned(job: Plan) -> tuple[dict[str, Any], list[str]]:
    from ip2p_ray.errors import ConfigError
    from ip2p_ray.estimate import devices, text
    from ip2p_ray.estimate.arithmetic import estimate
    from ip2p_ray.estimate.config import Basis, Workload
    from ip2p_ray.estimate.measured import read, workload
    from ip2p_ray.estimate.sensitivity import sensitivity

    speeds = None if job.device is None else devices.reckon(job.device, job.utilisation)
    sizes = None if job.device is None else devices.sizes()
    given = {name: getattr(job, name) for name in OF_THE_WORKLOAD}
    if job.measured:
        run = read(job.measured, job.measured_on)
        work = workload(run, **given)
        speeds, sizes = run.speeds_or(speeds), run.sizes_or(sizes)
    else:
        if job.captions is None:
            raise ConfigError("give --captions: how many triplets are wanted")
        paper = {"hopeless": devices.HOPELESS}
        told = {name: value for name, value in given.items() if value is not None}
        work = Workload(**{**paper, **told})
    assert speeds is not None
    assert sizes is not None
    basis = Basis(workload=work, speeds=speeds, sizes=sizes, cluster=job.cluster)
    prices = None if job.prices is None else _prices(job.prices)
    made, changed = estimate(basis, prices), sensitivity(basis, prices)
    return text.as_json(basis, prices, made, changed), text.lines(basis, prices, made, changed)


def _compared(job: Plan) -> tuple[dict[str, Any], list[str]]:
    from dataclasses import asdict

    from ip2p_ray.estimate import text
    from ip2p_ray.estimate.comparison import compare
    from ip2p_ray.estimate.measured import read

    assert job.check is not None
    known, other = read(job.measured, job.measured_on), read([job.check], job.measured_on)
    found = compare(known, other, job.measured_on)
    return asdict(found), text.comparison_lines(found)


def _prices(path: Path) -> Any:
    import tomllib

    from ip2p_ray.errors import ConfigError
    from ip2p_ray.estimate.config import Prices

    try:
        return Prices(**tomllib.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:  # TOML, its encoding, and what prices may be
        raise ConfigError(f"--prices {path} holds no prices: {error}") from error


if __name__ == "__main__":
    with loading("plan"):
        import tyro

        asked = tyro.cli(Plan, config=(tyro.conf.FlagCreatePairsOff,))
    sys.exit(main(asked))
