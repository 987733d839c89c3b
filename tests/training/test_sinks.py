import sys
from types import SimpleNamespace

import pytest

from ip2p_ray.errors import ConfigError
from ip2p_ray.training.sinks import open_sinks, require_sinks

CONFIG = {"steps": 4}


class Recorder:
    """In place of a library: what was called, in order."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*arguments, **named):
            self.calls.append((name, arguments, named))
            return SimpleNamespace(
                info=SimpleNamespace(run_id="run 7"), log=self.log, finish=self.finish
            )

        return call


@pytest.fixture
def library(monkeypatch):
    """The modules wandb and mlflow, one recorder for both: neither is a dependency."""
    found = Recorder()
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, found)
    return found


def write(folder, name, step, *steps):
    with open_sinks([name], folder, step=step, config=CONFIG) as (sink,):
        for each in steps:
            sink.write(each, {"loss": 1.0 / each})


def test_a_resumed_run_of_wandb_has_the_same_name(library, tmp_path):
    write(tmp_path, "wandb", 0, 1)
    write(tmp_path, "wandb", 1, 2)
    opened = [named for name, _, named in library.calls if name == "init"]
    assert opened[0] == opened[1]
    assert opened[0]["config"] == CONFIG
    logged = [
        (*arguments, named["step"]) for name, arguments, named in library.calls if name == "log"
    ]
    assert logged == [({"loss": 1.0}, 1), ({"loss": 0.5}, 2)]
    assert [name for name, _, _ in library.calls].count("finish") == 2


def test_a_resumed_run_of_mlflow_is_the_same(library, tmp_path):
    write(tmp_path, "mlflow", 0, 1)
    write(tmp_path, "mlflow", 1, 2)
    opened = [named["run_id"] for name, _, named in library.calls if name == "start_run"]
    assert opened == [None, "run 7"]
    names = [name for name, _, _ in library.calls]
    assert names.count("log_params") == 1
    assert names.count("end_run") == 2


def test_tensorboard_forgets_the_steps_that_are_taken_again(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    write(tmp_path, "tensorboard", 0, 1, 2)
    write(tmp_path, "tensorboard", 1, 2)
    told = []
    for file in sorted((tmp_path / "tensorboard").glob("events.*")):
        data = file.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            told += [
                (value.tag, event.step, round(value.simple_value, 3))
                for value in event.summary.value
            ]
            if event.session_log.status:
                told.append(("purged", event.step, event.session_log.status))
    losses = [line for line in told if line[0] == "loss"]
    assert sorted(losses) == [("loss", 1, 1.0), ("loss", 2, 0.5), ("loss", 2, 0.5)]
    assert ("purged", 2, 1) in told


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match="pip install mlflow"):
        require_sinks(["mlflow"])
    with pytest.raises(ConfigError, match="got 'paper'"):
        require_sinks(["paper"])
