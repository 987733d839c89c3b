import pickle

import pytest

from ip2p_ray.errors import ConfigError, DatasetError, ImageError, ModelError
from ip2p_ray.miniature import weights
from ip2p_ray.mirror import upload_file
from ip2p_ray.storage import join

# importing ray.serve warns of pydantic's own changes
pytestmark = pytest.mark.filterwarnings("ignore")


def load(model):
    from serve.deployment import ReplicaConfig, load_editor

    return load_editor(model, ReplicaConfig())


def test_the_shipped_editor_is_what_is_served_by_default():
    editor = load(None)
    assert editor.settings == weights.load_editor().settings


def test_a_folder_or_a_bucket_may_hold_the_model(tiny_weights, tmp_path, bucket):
    weights.load_editor(tiny_weights).save(tmp_path / "editor")
    local = load(str(tmp_path / "editor"))
    for path in sorted((tmp_path / "editor").rglob("*")):
        if path.is_file():
            below = path.parent.relative_to(tmp_path).as_posix()
            upload_file(path, join(bucket, below))
    remote = load(f"{bucket}/editor")
    assert remote.model.fingerprint() == local.model.fingerprint()
    with pytest.raises(DatasetError, match="nothing lies below"):
        load(f"{bucket}/nothing")


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match="nothing"):
        load(str(tmp_path / "nothing"))


def test_other_hosts_need_keys():
    from serve.deployment import _require_loopback

    for host in ("127.0.0.1", "::1", "localhost", None):
        _require_loopback(host)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(ConfigError, match="without API keys"):
            _require_loopback(host)


def test_what_ray_wraps_around_an_error_is_taken_off():
    from ray.exceptions import ActorDiedError, RayTaskError
    from ray.serve.exceptions import BackPressureError

    from serve.deployment import _plain
    from serve.orders import BusyError, ReplicaLostError

    cause = ImageError("image is broken")
    assert _plain(RayTaskError("edit", "trace", cause).as_instanceof_cause()) is cause
    assert isinstance(_plain(ActorDiedError()), ReplicaLostError)
    full = BackPressureError(num_queued_requests=3, max_queued_requests=3)
    assert isinstance(_plain(full), BusyError)
    other = KeyError("x")
    assert _plain(other) is other


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"min_replicas": 3, "max_replicas": 2}, "less than min_replicas"),
        ({"device": "cuda"}, "needs num_gpus"),
        ({"modle": "x"}, "modle"),
        ({"batch_size": 0}, "batch_size"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_a_service_that_cannot_be_is_refused(settings, told):
    from serve.app import ServiceConfig

    with pytest.raises(ValueError, match=told):
        ServiceConfig(**settings)


def test_the_model_has_a_name_for_clients():
    from serve.app import ServiceConfig

    assert ServiceConfig().served_name == "miniature"
    assert ServiceConfig(model="runs/a/editor/").served_name == "editor"
    assert ServiceConfig(model="s3://bucket/boats", name="b").served_name == "b"


def test_what_a_deployment_is_told_pickles_and_holds_no_key(monkeypatch):
    from serve.app import ServiceConfig

    monkeypatch.setenv("IP2P_API_KEYS", "a-secret-of-some-length")
    told = pickle.dumps((ServiceConfig().api, ServiceConfig().replica))
    assert b"a-secret" not in told
