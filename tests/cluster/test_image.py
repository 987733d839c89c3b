"""The image: everything it copies exists, nothing secret does, and it runs as what pods run as."""

import importlib.metadata
import re
import tomllib

import pytest
from dockerfile_parse import DockerfileParser

import ip2p_ray
from tests.cluster.manifests import CLUSTER, ROOT, TREES, containers, pods, ray_cluster, rendered

IMAGE = CLUSTER / "image"


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """The instructions of the Dockerfile, in order."""
    parser = DockerfileParser(path=str(tmp_path_factory.mktemp("image")))
    parser.content = (IMAGE / "Dockerfile").read_text("utf-8")
    return [
        (step["instruction"], step["value"])
        for step in parser.structure
        if step["instruction"] != "COMMENT"
    ]


def values(steps, instruction):
    return [value for name, value in steps if name == instruction]


def copied(steps):
    """What is copied of the checkout, and where to."""
    for value in values(steps, "COPY"):
        *sources, target = value.split()
        if not sources[0].startswith("--from="):
            yield from ((source, target) for source in sources)


def test_what_is_copied_exists_and_is_let_into_the_build(steps):
    ignore = (IMAGE / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {line.removeprefix("!") for line in rules if line.startswith("!")}
    sources = [source for source, _ in copied(steps)]
    assert {source.split("/")[0] for source in sources} == let_in
    for source in sources:
        assert (ROOT / source).exists(), source


def test_scripts_lie_where_jobs_look_for_them(steps):
    workdirs = values(steps, "WORKDIR")
    assert workdirs[-1] == "/app"
    assert {("jobs", "jobs"), ("serve", "serve"), ("ip2p_ray", "ip2p_ray")} <= set(copied(steps))
    (environment,) = values(steps, "ENV")
    assert "PYTHONPATH=/app" in environment.split()
    (command,) = values(steps, "CMD")
    assert (ROOT / re.search(r'"(jobs/\w+\.py)"', command)[1]).is_file()


def test_it_runs_as_the_user_that_pods_name_and_writes_where_they_let_it(steps):
    (user,) = values(steps, "USER")
    variables = dict(part.split("=") for part in values(steps, "ENV")[0].split())
    (volume,) = values(steps, "VOLUME")
    assert variables["HF_HOME"] == volume
    for tree in TREES:
        for doc in rendered(tree):
            for pod in pods(doc):
                if doc["kind"] == "StatefulSet":
                    continue  # Redis has an image of its own
                context = pod.spec["securityContext"]
                assert f"{context['runAsUser']}:{context['runAsGroup']}" == user
            for where, container in containers(doc):
                if where.split()[-1] in ("ray-head", "ray-worker"):
                    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
                    assert {variables["HOME"], variables["HF_HOME"]} <= mounts


def test_bases_are_pinned_and_what_python_installs_is_what_readme_installs(steps):
    (base, *others) = values(steps, "FROM")
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+ AS base", base)
    assert all(other.split()[0] == "base" for other in others)
    (install,) = [value for value in values(steps, "RUN") if "pip install" in value]
    words = install.split("&&")[0].split()
    assert words[:2] == ["pip", "install"]
    # README installs -e .; the image has the code itself in /app, and here its dependencies
    assert words[2:] == [
        *("--no-cache-dir", "--prefix=/packages", "-c", "constraints.txt", "."),
    ]
    assert "pip install -q -c constraints.txt -e ." in (ROOT / "README.md").read_text("utf-8")
    minor = re.search(r"python:(\d+\.\d+)", base)[1]
    assert f"/packages/lib/python{minor}/site-packages/ip2p_ray" in install


def test_the_base_s_python_is_one_that_the_project_takes(steps):
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    least = tuple(map(int, wanted["requires-python"].removeprefix(">=").split(".")))
    version = tuple(map(int, re.search(r"python:(\d+)\.(\d+)", values(steps, "FROM")[0]).groups()))
    assert version >= least


def test_versions_agree():
    pins = (ROOT / "constraints.txt").read_text("utf-8")
    (ray,) = re.findall(r"^ray==(\S+)$", pins, re.MULTILINE)
    assert ray == importlib.metadata.version("ray")
    for tree in TREES:
        for doc in rendered(tree):
            if doc["apiVersion"].startswith("ray.io/"):
                assert ray_cluster(doc)["rayVersion"] == ray
            for _, container in containers(doc):
                if "ip2p-ray" in container.get("image", ""):
                    assert container["image"].endswith(f":{ip2p_ray.__version__}")


def test_no_secret_is_built_in(steps):
    told = "\n".join(f"{name} {value}" for name, value in steps)
    assert not re.search(r"(?i)secret|token|password|aws_|api_key", told)
    assert "ARG" not in {name for name, _ in steps}
