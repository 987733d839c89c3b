"""The manifests of cluster/, as they are written and as kustomize renders them."""

import functools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
TREES = (
    *("overlays/small", "overlays/gpu", "jobs", "overlays/jobs-kueue"),
    *("service", "overlays/service-in-place"),
)
"""What an operator applies."""
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The fast one, where PyYAML has it."""

Doc = dict[str, Any]


def files() -> list[Path]:
    """Every YAML file of cluster/."""
    return sorted(CLUSTER.rglob("*.yaml"))


def documents(path: Path) -> list[Any]:
    """What stands in a file."""
    return list(yaml.safe_load_all(path.read_text("utf-8")))


@functools.cache
def _rendered(tree: str) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on the PATH: nothing renders the kustomize trees")
    done = subprocess.run(
        ["kubectl", "kustomize", str(CLUSTER / tree)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(tree: str) -> list[Doc]:
    """What `kubectl apply -k` would send of a tree; skipped without kubectl."""
    return list(yaml.load_all(_rendered(tree), Loader=LOADER))


def of_kind(docs: list[Doc], kind: str) -> list[Doc]:
    """Those of one kind."""
    return [doc for doc in docs if doc["kind"] == kind]


def ray_cluster(doc: Doc) -> Doc | None:
    """The spec of the Ray cluster that a document of Ray's makes."""
    spec = doc["spec"]
    return {
        "RayCluster": spec,
        "RayJob": spec.get("rayClusterSpec"),
        "RayService": spec.get("rayClusterConfig"),
    }.get(doc["kind"])


class Pod(NamedTuple):
    """A pod that a document leads to."""

    where: str
    labels: dict[str, str]
    """As they will be, with the operator's."""
    spec: Doc


def pods(doc: Doc) -> Iterator[Pod]:
    """The pods that Kubernetes or the operator makes of a document."""
    name, spec = f"{doc['kind']}/{doc['metadata']['name']}", doc.get("spec", {})
    if doc["kind"] == "StatefulSet":
        yield _pod(name, spec["template"])
    if "submitterPodTemplate" in spec:
        yield _pod(f"{name} submitter", spec["submitterPodTemplate"])
    cluster = ray_cluster(doc) if doc["apiVersion"].startswith("ray.io/") else None
    if cluster is None:
        return
    # those of jobs and services get names of their own
    own = doc["metadata"]["name"] if doc["kind"] == "RayCluster" else "made-by-the-operator"
    if "headGroupSpec" in cluster:
        yield _pod(f"{name} head", cluster["headGroupSpec"]["template"], own, "head", "headgroup")
    for group in cluster.get("workerGroupSpecs", []):
        yield _pod(
            f"{name} {group['groupName']}", group["template"], own, "worker", group["groupName"]
        )


def _pod(where: str, template: Doc, cluster: str = "", kind: str = "", group: str = "") -> Pod:
    labels = {}
    if cluster:
        labels = {
            "app.kubernetes.io/name": "kuberay",
            "app.kubernetes.io/created-by": "kuberay-operator",
        }
    labels |= template.get("metadata", {}).get("labels", {})
    if cluster:
        labels |= {
            "ray.io/is-ray-node": "yes",
            "ray.io/cluster": cluster,
            "ray.io/node-type": kind,
            "ray.io/group": group,
        }
    return Pod(where, labels, template["spec"])


def containers(doc: Doc) -> Iterator[tuple[str, Doc]]:
    """Every container with its place, that of the operator's autoscaler among them."""
    for pod in pods(doc):
        for container in pod.spec["containers"]:
            yield f"{pod.where} {container['name']}", container
    cluster = ray_cluster(doc) if doc["apiVersion"].startswith("ray.io/") else None
    if cluster and cluster.get("enableInTreeAutoscaling"):
        yield f"{doc['metadata']['name']} autoscaler", cluster.get("autoscalerOptions", {})
