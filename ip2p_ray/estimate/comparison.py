"""What was predicted from one run, beside what another one took."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ip2p_ray import storage
from ip2p_ray.estimate.arithmetic import HOUR, Estimate, estimate
from ip2p_ray.estimate.config import STAGES, Basis, Cluster, Workload
from ip2p_ray.estimate.measured import Run

SURVIVAL = ("reply_share", "acceptance", "held_out")
"""What is not known of a run before it is made."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A figure that was predicted, and what it was."""

    name: str
    predicted: float
    took: float

    @property
    def error(self) -> float | None:
        """The prediction's excess, as a share of what it was; None where that is 0."""
        return self.predicted / self.took - 1 if self.took else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The predictions of one run from another."""

    predicted: Estimate
    walls: tuple[Line, ...]
    """Seconds by stage, and "all" of them."""
    rows: tuple[Line, ...]
    bytes: tuple[Line, ...]
    device: tuple[Line, ...]
    """Seconds of devices, where both runs tell them."""


def compare(known: Run, other: Run, cluster: Cluster) -> Comparison:
    """Predicts `other` from `known`, on the cluster that made `other`.

    What `other` was asked for is its own; how much survives, speeds and sizes are those of `known`.

    Raises:
        ConfigError: one of them lacks a stage.
    """
    survival = {name: known.work[name] for name in SURVIVAL if name in known.work}
    work = Workload(**{**other.work, **survival})
    basis = Basis(
        workload=work,
        speeds=known.speeds_or(None),
        sizes=known.sizes_or(None),
        cluster=cluster,
    )
    made = estimate(basis)
    stages = {stage.name: stage for stage in made.stages}
    walls = [
        Line(name=name, predicted=HOUR * stages[name].wall_hours, took=other.walls[name])
        for name in STAGES
        if name in other.walls
    ]
    walls.append(Line(name="start and end", predicted=HOUR * made.start_hours, took=other.start))
    whole = Line(
        name="all",
        predicted=sum(line.predicted for line in walls),
        took=sum(line.took for line in walls),
    )
    stored = {each.name: each for each in made.stored}
    datasets = {name: found for name, found in other.manifests.items() if name in stored}
    return Comparison(
        predicted=made,
        walls=(*walls, whole),
        rows=tuple(
            Line(name=name, predicted=stored[name].rows, took=found.rows)
            for name, found in datasets.items()
            if found.rows and name != "checkpoints"
        ),
        bytes=tuple(
            Line(name=name, predicted=stored[name].bytes, took=_bytes(found))
            for name, found in datasets.items()
            if _bytes(found)
        ),
        device=_device(made, other, cluster),
    )


def _bytes(manifest: storage.Manifest) -> float:
    return float(sum(shard.bytes for shard in manifest.shards))


def _device(made: Estimate, other: Run, cluster: Cluster) -> tuple[Line, ...]:
    """Of the stages whose speed is that of devices: units of `other` at its own speed."""
    own = Basis(
        workload=Workload(**other.work),
        speeds=replace(other.speeds_or(None)),
        sizes=other.sizes_or(None),
        cluster=cluster,
    )
    took = {stage.name: stage.device_hours for stage in estimate(own).stages}
    lines = [
        Line(name=stage.name, predicted=HOUR * stage.device_hours, took=HOUR * took[stage.name])
        for stage in made.stages
        if took[stage.name]
    ]
    whole = Line(
        name="all",
        predicted=sum(line.predicted for line in lines),
        took=sum(line.took for line in lines),
    )
    return (*lines, whole)
