"""Where measured figures go besides the run's own file: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from ip2p_ray.atomic import atomic_file
from ip2p_ray.errors import ConfigError

SinkName = Literal["tensorboard", "wandb", "mlflow"]

_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


class Sink(Protocol):
    """Takes the figures of a step."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures by name."""

    def close(self) -> None:
        """Nothing comes any more."""


def require_sinks(names: Sequence[str]) -> None:
    """Returns if the libraries of all of them are installed.

    Raises:
        ConfigError: one is not, or there is no such sink.
    """
    for name in names:
        if name not in _MODULES:
            raise ConfigError(f"metrics go to {', '.join(get_args(SinkName))}, got {name!r}")
        try:
            import_module(_MODULES[name])
        except ImportError as error:
            raise ConfigError(
                f"metrics to {name} need the library {_MODULES[name]}: pip install {_MODULES[name]}"
            ) from error


@contextmanager
def open_sinks(
    names: Sequence[str],
    folder: Path,
    *,
    step: int,
    config: Mapping[str, Any],
    run: str | None = None,
) -> Iterator[list[Sink]]:
    """The sinks of the run in `folder`, which goes on after `step`; closed after the block.

    `run` is what the run is known by, where its folder may be another one next time.

    A run that is resumed goes on under the same name. Figures after `step` are written anew in
    TensorBoard and MLflow; Weights & Biases keeps those that it has of a step.
    """
    with ExitStack() as stack:
        found: list[Sink] = []
        for name in names:
            sink = _OPEN[name](folder, step, config, run or str(folder))
            stack.callback(sink.close)
            found.append(sink)
        yield found


class _TensorBoard:
    def __init__(self, folder: Path, step: int, config: Mapping[str, Any], _run: str) -> None:
        writer = import_module("tensorboardX").SummaryWriter
        self._writer = writer(
            logdir=str(folder / "tensorboard"),
            purge_step=step + 1,
            filename_suffix=f".{step}",  # else a file of the same second is written over
        )
        if not step:
            self._writer.add_text("config", str(dict(config)), 0)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path, _step: int, config: Mapping[str, Any], run: str) -> None:
        name = blake2b(run.encode(), digest_size=8).hexdigest()
        options = {"id": name, "resume": "allow", "dir": str(folder), "config": dict(config)}
        self._run = import_module("wandb").init(project="ip2p_ray", **options)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, folder: Path, _step: int, config: Mapping[str, Any], _run: str) -> None:
        self._mlflow = import_module("mlflow")
        note = folder / "mlflow-run"
        if "MLFLOW_TRACKING_URI" not in os.environ:  # else it lies where the worker happens to be
            self._mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        self._mlflow.set_experiment("ip2p_ray")
        known = note.read_text(encoding="utf-8") if note.exists() else None
        run = self._mlflow.start_run(run_id=known)
        if known is None:
            with atomic_file(note) as new:
                new.write_text(run.info.run_id, encoding="utf-8")
            self._mlflow.log_params({key: str(value) for key, value in config.items()})

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(figures), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


_OPEN: dict[str, Any] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
}
