"""What the jobs and the service of cluster/ run: scripts, flags and settings that exist."""

import importlib
import shlex

import pytest
import yaml

from tests.cluster.jobs import parsed
from tests.cluster.manifests import CLUSTER, ROOT, containers, documents, ray_cluster, rendered

JOBS = {
    "generate": "jobs/generate_pairs.py",
    "encode": "jobs/encode_latents.py",
    "train": "jobs/train_editor.py",
    "evaluate": "jobs/evaluate_editor.py",
}
"""Script of each rayjob-*.yaml."""


def entrypoint(which):
    """Script and flags of a RayJob, and the RayJob."""
    (doc,) = documents(CLUSTER / "jobs" / f"rayjob-{which}.yaml")
    python, script, *flags = shlex.split(doc["spec"]["entrypoint"])
    assert python == "python"
    return script, flags, doc


def test_there_is_a_job_for_each_step():
    names = {path.name for path in (CLUSTER / "jobs").glob("rayjob-*.yaml")}
    assert names == {f"rayjob-{which}.yaml" for which in JOBS}


@pytest.mark.parametrize("which", JOBS)
def test_a_job_s_script_and_flags_exist(which):
    script, flags, doc = entrypoint(which)
    # the image has jobs/ in /app, see test_image.py
    assert script == f"/app/{JOBS[which]}"
    job = parsed(JOBS[which], flags)
    assert job.gpus == 1
    assert str(job.out).startswith("s3://example-bucket/")
    assert doc["metadata"]["labels"]["app.kubernetes.io/component"] == which
    with pytest.raises(SystemExit):  # and a flag that is none is told apart
        parsed(JOBS[which], [*flags, "--nodes", "3"])


def test_each_job_reads_what_the_one_before_it_writes():
    jobs = {which: parsed(JOBS[which], entrypoint(which)[1]) for which in JOBS}
    assert jobs["encode"].pairs == f"{jobs['generate'].out}/pairs"
    assert jobs["train"].latents == f"{jobs['encode'].out}/latents"
    assert jobs["evaluate"].editor == f"{jobs['train'].out}/editor"
    assert jobs["evaluate"].data == f"{jobs['generate'].out}/pairs"
    assert {job.preset for job in jobs.values()} == {"fast"}
    (service,) = documents(CLUSTER / "service" / "rayservice.yaml")
    (editor,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert editor["args"]["model"] == jobs["evaluate"].editor


POOLS = {
    # flag of the resource -> of GPUs, of the most processes
    "actor_resources": ("gpus", "most_actors", "actors"),
    "judge_resources": ("judge_gpus", "most_judges", "judge_actors"),
    "worker_resources": ("gpus", "most_workers", "workers"),
}


@pytest.mark.parametrize("which", JOBS)
def test_the_pools_have_what_the_actors_ask_for(which):
    flags = entrypoint(which)[1]
    job = parsed(JOBS[which], flags)
    (doc,) = [doc for doc in rendered("jobs") if doc["metadata"]["name"] == f"ip2p-{which}"]
    groups = {group["groupName"]: group for group in ray_cluster(doc)["workerGroupSpecs"]}
    asked = [flag for flag in flags if flag.endswith("-resources")]
    assert asked
    for flag in asked:
        name, _, amount = flags[flags.index(flag) + 1].partition("=")
        gpus, most, least = POOLS[flag.removeprefix("--").replace("-", "_")]
        (group,) = [each for each in groups.values() if name in each.get("resources", {})]
        held = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        each = int(group["resources"][name]) // int(amount)
        assert each >= 1
        assert getattr(job, gpus) * each <= int(held["nvidia.com/gpu"])
        wanted = getattr(job, most, None) or getattr(job, least)
        assert wanted <= group["maxReplicas"] * each


def service_config():
    (doc,) = rendered("service")
    return doc, yaml.safe_load(doc["spec"]["serveConfigV2"])


@pytest.mark.filterwarnings("ignore")  # of Ray's own modules, while they are imported
def test_ray_takes_the_service_s_configuration():
    from pydantic import ValidationError
    from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

    _, config = service_config()
    schema = ServeDeploySchema(**config)
    assert [app.import_path for app in schema.applications] == ["serve.app:build"]
    # fields that it does not know it passes over
    assert set(config) <= set(ServeDeploySchema.model_fields)
    assert set(config["applications"][0]) <= set(ServeApplicationSchema.model_fields)
    config["applications"][0]["import_path"] = "serve"
    with pytest.raises(ValidationError):
        ServeDeploySchema(**config)


@pytest.mark.filterwarnings("ignore")
def test_the_builder_takes_the_service_s_arguments_and_its_pods_can_hold_them():
    doc, config = service_config()
    (app,) = config["applications"]
    module, _, name = app["import_path"].partition(":")
    builder = getattr(importlib.import_module(module), name)
    settings = builder.__annotations__["args"](**app["args"])

    (group,) = ray_cluster(doc)["workerGroupSpecs"]
    pod = group["template"]["spec"]["containers"][0]
    assert settings.num_gpus == int(pod["resources"]["limits"]["nvidia.com/gpu"])
    assert settings.num_cpus + 0.1 <= int(pod["resources"]["limits"]["cpu"])  # and a front
    assert settings.min_replicas <= group["minReplicas"]
    assert settings.max_replicas <= group["maxReplicas"]
    # requests that the old cluster has begun end there
    assert doc["spec"]["rayClusterDeletionDelaySeconds"] > settings.deadline_s
    assert not settings.allow_unauthenticated


def test_the_service_s_port_is_that_of_its_pods_and_of_the_network_policy():
    doc, config = service_config()
    port = config["http_options"]["port"]
    found = {
        each["containerPort"]
        for _, container in containers(doc)
        for each in container.get("ports", [])
        if each["name"] == "serve"
    }
    assert found == {port}
    (policy,) = [
        each
        for each in rendered("overlays/gpu")
        if each["kind"] == "NetworkPolicy" and each["metadata"]["name"] == "ip2p-editor"
    ]
    ((rule,),) = [each["ports"] for each in policy["spec"]["ingress"]]
    assert rule["port"] == port


def test_the_service_reads_its_keys_from_a_secret():
    from serve.keys import KEYS, KEYS_FILE

    doc, _ = service_config()
    (group,) = ray_cluster(doc)["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert KEYS not in variables
    folder, _, key = variables[KEYS_FILE].rpartition("/")
    (mount,) = [each for each in container["volumeMounts"] if each["mountPath"] == folder]
    (volume,) = [each for each in pod["volumes"] if each["name"] == mount["name"]]
    assert volume["secret"] == {"secretName": "ip2p-api-keys"}
    assert key == "keys"


def test_in_place_and_beside_differ_in_nothing_else():
    (beside,), (in_place,) = rendered("service"), rendered("overlays/service-in-place")
    assert in_place["spec"].pop("upgradeStrategy") == {"type": "None"}
    assert beside["spec"].pop("upgradeStrategy") == {"type": "NewCluster"}
    assert in_place == beside


def test_variables_of_ours_are_read_by_someone():
    code = [*ROOT.glob("ip2p_ray/**/*.py"), *ROOT.glob("serve/*.py")]
    read = "\n".join(path.read_text("utf-8") for path in code)
    found = {
        variable["name"]
        for tree in ("overlays/gpu", "jobs", "service")
        for doc in rendered(tree)
        for _, container in containers(doc)
        for variable in container.get("env", [])
    }
    assert {name for name in found if name.startswith("IP2P_")} == {
        "IP2P_LOG",
        "IP2P_API_KEYS_FILE",
    }
    for name in ("IP2P_LOG", "IP2P_API_KEYS_FILE"):
        assert f'"{name}"' in read
