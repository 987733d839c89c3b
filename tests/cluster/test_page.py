"""cluster/README.md: what it types exists, and what it names is what the manifests name."""

import re
import shlex
import subprocess
import sys

import pytest

from tests.cluster.jobs import parsed
from tests.cluster.manifests import CLUSTER, ROOT, TREES, of_kind, rendered
from tests.cluster.test_manifests import SECRETS

PAGE = (CLUSTER / "README.md").read_text("utf-8")
SCALE = (CLUSTER / "SCALE.md").read_text("utf-8")
LINES = [
    shlex.split(line.removesuffix(" &"), comments=True)
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]
"""What an operator types, word by word."""
CREATE = ["kubectl", "create", "secret", "generic"]


def job_lines():
    inline = [shlex.split(text) for text in re.findall(r"`(python jobs/[^`]+)`", PAGE)]
    typed = [line[line.index("python") :] for line in LINES if "python" in line]
    return [line[1:] for line in (*typed, *inline)]


def test_every_job_that_is_typed_takes_its_flags():
    scripts = {script for script, *_ in job_lines()}
    assert {"jobs/quickstart.py", "jobs/status.py", "jobs/plan.py"} <= scripts
    for script, *flags in job_lines():
        parsed(script, flags)
    with pytest.raises(SystemExit):
        parsed("jobs/status.py", ["--datasets", "s3://example-bucket/run"])


def test_every_plan_that_is_typed_is_made():
    plans = [line for line in job_lines() if line[0] == "jobs/plan.py"]
    assert plans
    for line in plans:
        done = subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "cost, USD" in done.stdout


def test_the_objects_of_the_largest_run_are_those_of_its_plan():
    (typed,) = re.findall(r"^    python (jobs/plan\.py (?:.*\\\n)*.*)$", SCALE, re.MULTILINE)
    largest = typed.replace("--captions 450000", "--captions 10000000")
    line = shlex.split(largest.replace("\\\n", " "))
    done = subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, text=True)
    (row,) = [row.split() for row in done.stdout.splitlines() if row.startswith("all that stays")]
    assert f"all {row[-1]} objects of a run" in SCALE


def test_the_trees_that_are_applied_exist_and_no_other_does():
    typed = [line[line.index("-k") + 1] for line in LINES if "-k" in line]
    named = re.findall(r"`((?:overlays|service|components|base|pods|grafana)/[\w./-]+)`", PAGE)
    assert typed
    assert {place.removeprefix("cluster/") for place in typed} <= set(TREES)
    for place in (*typed, *(f"cluster/{name}" for name in named)):
        assert (ROOT / place).exists(), place


def test_labels_that_choose_a_job_choose_one():
    found = [doc["metadata"]["labels"] for doc in rendered("jobs")]
    chosen = [
        line[line.index("-l") + 1] for line in LINES if "cluster/jobs" in line and "-l" in line
    ]
    assert chosen
    for name, _, value in (each.partition("=") for each in chosen):
        assert len([labels for labels in found if labels[name] == value]) == 1


def test_secrets_are_made_with_the_keys_that_pods_want():
    made = {line[4]: line[5:] for line in LINES if line[:4] == CREATE}
    assert set(made) == set(SECRETS)
    for name, keys in SECRETS.items():
        for key in keys or ():
            assert re.search(rf"--from-(literal|file)={key}=", " ".join(made[name]))


def test_services_are_those_that_the_operator_makes():
    (cluster,) = of_kind(rendered("overlays/gpu"), "RayCluster")
    (service,) = rendered("service")
    forwarded = {line[2]: line[3] for line in LINES if line[:2] == ["kubectl", "port-forward"]}
    assert forwarded == {
        f"service/{cluster['metadata']['name']}-head-svc": "8265",
        f"service/{service['metadata']['name']}-serve-svc": "8000",
    }


def test_redis_is_deleted_after_the_clusters_that_it_holds_tables_of():
    (service,) = rendered("service")
    (cluster,) = of_kind(rendered("overlays/gpu"), "RayCluster")
    made_by = f"ray.io/originated-from-cr-name={service['metadata']['name']}"
    line = ["kubectl", "wait", "--for=delete", "raycluster", "-l", made_by, "--timeout=10m"]
    places = [each[each.index("-k") + 1] if "-k" in each else "" for each in LINES]
    last = len(LINES) - 1 - places[::-1].index("cluster/overlays/gpu")
    assert LINES[last][1] == "delete"
    assert LINES.index(line) < last
    assert ["kubectl", "delete", "raycluster", cluster["metadata"]["name"]] in [
        each[:4] for each in LINES[:last]
    ]


def test_the_image_that_is_built_is_the_one_that_pods_run():
    (line,) = [line for line in LINES if line[:2] == ["docker", "build"]]
    assert line[line.index("-f") + 1] == "cluster/image/Dockerfile"
    (cluster,) = of_kind(rendered("overlays/small"), "RayCluster")
    (container,) = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert line[line.index("-t") + 1] == container["image"]


def test_the_driver_is_that_of_the_cuda_that_is_pinned():
    pins = (ROOT / "constraints.txt").read_text("utf-8")
    (major,) = re.findall(r"^cuda-toolkit==(\d+)\.", pins, re.MULTILINE)
    # the oldest driver by NVIDIA's table of compatibility
    oldest = {"12": "525", "13": "580"}[major]
    assert f"built for CUDA {major}: nodes with GPUs want NVIDIA's driver {oldest} or newer" in PAGE


def test_it_is_plain_that_nothing_of_it_ran():
    assert "**Nothing here has run on a Kubernetes" in PAGE
