"""What Ray does when it is slow to start."""

import pytest
import ray
from ray._private import services

from ip2p_ray.errors import StageError
from ip2p_ray.stages import starting


def answering(monkeypatch, refusals):
    """A Ray whose node is there after so many questions, and that asks once, as Ray's last time."""
    left = [RuntimeError("no node yet")] * refusals

    def get_node(*arguments):
        if left:
            raise left.pop()
        return {"asked": arguments}

    found = []

    def init(**options):
        try:
            found.append(services.get_node("gcs", "node"))
        except RuntimeError:
            raise Exception("The current node timed out during startup.") from None

    monkeypatch.setattr(services, "get_node", get_node)
    monkeypatch.setattr(ray, "init", init)
    return found, get_node


def test_a_node_that_is_slow_to_come_is_waited_for(monkeypatch):
    found, asked = answering(monkeypatch, 3)
    starting.start(local=True)
    assert found == [{"asked": ("gcs", "node")}]
    assert services.get_node is asked


def test_one_that_never_comes_is_told_in_a_sentence(monkeypatch):
    _, asked = answering(monkeypatch, 1000)
    monkeypatch.setattr(starting, "PATIENCE_S", 0.5)
    with pytest.raises(StageError, match="Ray did not start in 0.5 s: this machine is too busy"):
        starting.start(local=True)
    assert services.get_node is asked


def test_other_errors_of_ray_are_raised_as_they_are(monkeypatch):
    def refusing(**options):
        raise ConnectionError("there is no cluster")

    monkeypatch.setattr(ray, "init", refusing)
    with pytest.raises(ConnectionError, match="there is no cluster"):
        starting.start(local=False)
