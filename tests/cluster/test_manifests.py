"""What cluster/ sends to Kubernetes: valid by every schema, and everything it names is there."""

import gzip
import json
import os
import re
from collections import Counter
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.cluster.manifests import (
    CLUSTER,
    TREES,
    containers,
    documents,
    files,
    of_kind,
    pods,
    ray_cluster,
    rendered,
)
from tests.cluster.rules import insecure, problems

OF_RAY = ("RayCluster", "RayJob", "RayService")
SECRETS = {"ip2p-redis": {"password"}, "ip2p-keys": None, "ip2p-api-keys": {"keys"}}
"""Those that the operator of the cluster makes, by README; with the keys that pods want."""
VERSIONS = ("1.32", "1.37")
"""Of Kubernetes, the oldest and the newest whose schemas are asked."""


def kustomizations():
    return [path for path in files() if path.name == "kustomization.yaml"]


def test_each_file_is_part_of_a_tree_and_each_part_is_there():
    named = set()
    for path in kustomizations():
        (tree,) = documents(path)
        parts = [*tree.get("resources", []), *tree.get("components", [])]
        parts += [patch["path"] for patch in tree.get("patches", []) if "path" in patch]
        for part in parts:
            place = (path.parent / part).resolve()
            named.add(place / "kustomization.yaml" if place.is_dir() else place)
    tops = {CLUSTER / tree / "kustomization.yaml" for tree in TREES}
    assert named | tops == set(files())


def test_documents_say_what_they_are():
    for path in files():
        if path.name != "kustomization.yaml":
            for doc in documents(path):
                assert doc["apiVersion"], path
                assert doc["metadata"]["name"], path


@pytest.mark.parametrize("tree", TREES)
def test_names_are_one_document_s(tree):
    names = Counter((doc["kind"], doc["metadata"]["name"]) for doc in rendered(tree))
    assert {name for name, count in names.items() if count > 1} == set()


@pytest.fixture(scope="module")
def ray_schemas():
    path = os.environ.get("KUBERAY_SCHEMAS")
    if not path:
        pytest.skip(
            "KUBERAY_SCHEMAS names no file of KubeRay's schemas: a gzipped JSON object with a "
            'strict schema for each "RayJob|ray.io/v1", made from the CRDs that KubeRay publishes'
        )
    schemas = json.loads(gzip.decompress(Path(path).read_bytes()))
    return {kind: schemas[f"{kind}|ray.io/v1"] for kind in OF_RAY}


def written():
    """The documents as they stand in the files, where nothing renders them."""
    docs = [doc for path in files() if path.name != "kustomization.yaml" for doc in documents(path)]
    assert {doc["kind"] for doc in docs} >= {*OF_RAY, "StatefulSet", "NetworkPolicy"}
    return docs


def test_the_operator_takes_ray_s_kinds_as_they_are_written(ray_schemas):
    for doc in written():
        if doc["kind"] in OF_RAY:
            assert refused(doc, ray_schemas, whole=doc["kind"] != "RayService") == []


def refused(doc, schemas, *, whole=True):
    """Where a schema refuses a document, and why; one that is not whole may lack something."""
    return [
        f"{error.json_path}: {error.message[:300]}"
        for error in jsonschema.Draft7Validator(schemas[doc["kind"]]).iter_errors(doc)
        if whole or error.validator != "required"
    ]


def test_kubernetes_takes_its_own_kinds_as_they_are_written():
    for doc in written():
        if _of_kubernetes(doc):
            kubernetes_validate.validate(doc, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("tree", TREES)
def test_the_operator_takes_ray_s_kinds(tree, ray_schemas):
    found = [doc for doc in rendered(tree) if doc["kind"] in OF_RAY]
    assert found
    for doc in found:
        assert refused(doc, ray_schemas) == []
    # the schemas are strict: what is misspelt is seen
    found[0]["spec"]["suspended"] = False
    (told,) = refused(found[0], ray_schemas)
    assert "'suspended' was unexpected" in told


@pytest.mark.parametrize("tree", TREES)
def test_the_operator_s_rules_are_kept(tree):
    for doc in rendered(tree):
        if doc["kind"] in OF_RAY:
            assert problems(doc) == [], doc["metadata"]["name"]


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_its_own_kinds(version):
    own = [doc for doc in rendered("overlays/gpu") if _of_kubernetes(doc)]
    kinds = {"ConfigMap", "ServiceAccount", "Service", "StatefulSet"}
    assert {doc["kind"] for doc in own} == kinds | {"PodDisruptionBudget", "NetworkPolicy"}
    for doc in own:
        kubernetes_validate.validate(doc, version, strict=True)
    own[0]["metadata"]["labelz"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(own[0], version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("tree", TREES)
def test_kubernetes_takes_the_pods_of_ray_s_kinds(tree, version):
    for doc in rendered(tree):
        for pod in pods(doc):
            whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod.spec}
            kubernetes_validate.validate(whole, version, strict=True)


def _of_kubernetes(doc):
    return not re.match(r"(ray\.io|monitoring\.coreos\.com)/", doc["apiVersion"])


@pytest.mark.parametrize("tree", TREES)
def test_pods_are_locked(tree):
    for doc in rendered(tree):
        assert insecure(doc) == []


@pytest.mark.parametrize("tree", TREES)
def test_containers_say_what_they_need_and_have_where_to_write(tree):
    for doc in rendered(tree):
        for where, container in containers(doc):
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), where
            assert "memory" in container["resources"]["limits"], where
            if "redis" not in where:
                assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]], where


@pytest.mark.parametrize("tree", TREES)
def test_volumes_secrets_and_accounts_that_pods_name_are_there(tree):
    made = rendered("overlays/gpu")  # has all that a namespace needs once
    maps = {doc["metadata"]["name"] for doc in of_kind(made, "ConfigMap")}
    accounts = {doc["metadata"]["name"] for doc in of_kind(made, "ServiceAccount")}
    for doc in rendered(tree):
        claims = {each["metadata"]["name"] for each in doc.get("spec", {}).get(_CLAIMS, [])}
        for pod in pods(doc):
            assert pod.spec.get("serviceAccountName", "ip2p-worker") in accounts
            volumes = {volume["name"] for volume in pod.spec.get("volumes", [])} | claims
            for container in pod.spec["containers"]:
                mounted = {mount["name"] for mount in container["volumeMounts"]}
                assert mounted <= volumes, pod.where
        for kind, name, key in _references(doc):
            if kind == "secret":
                assert name in SECRETS
                assert key is None or key in (SECRETS[name] or ())
            else:
                assert name in maps


_CLAIMS = "volumeClaimTemplates"


def _references(node):
    """Kind, name and key of every secret and config map that a document names."""
    if isinstance(node, list):
        for each in node:
            yield from _references(each)
    elif isinstance(node, dict):
        for name, value in node.items():
            if name in ("secretKeyRef", "secretRef"):
                yield "secret", value["name"], value.get("key")
            elif name == "secret" and "secretName" in value:
                yield "secret", value["secretName"], None
            elif name in ("configMapRef", "configMapKeyRef"):
                yield "map", value["name"], None
            else:
                yield from _references(value)


def test_pools_start_from_zero_and_say_what_they_are():
    (cluster,) = of_kind(rendered("overlays/gpu"), "RayCluster")
    spec = cluster["spec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    names = [group["groupName"] for group in spec["workerGroupSpecs"]]
    assert names == ["cpu", "generator", "clip", "trainer"]
    for group in spec["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == 0
        pod = group["template"]["spec"]
        held = pod["containers"][0]["resources"]
        if group["groupName"] != "cpu":
            assert group["resources"] == {group["groupName"]: held["limits"]["nvidia.com/gpu"]}
            assert held["limits"]["nvidia.com/gpu"] == held["requests"]["nvidia.com/gpu"]
            assert pod["nodeSelector"]
            assert pod["tolerations"]
    (small,) = of_kind(rendered("overlays/small"), "RayCluster")
    assert [group["groupName"] for group in small["spec"]["workerGroupSpecs"]] == ["cpu"]


@pytest.mark.filterwarnings("ignore")  # of Ray's own modules, while they are imported
def test_start_parameters_are_flags_of_ray_start():
    from ray.scripts.scripts import start

    flags = {flag.removeprefix("--") for option in start.params for flag in option.opts}
    found = [
        group.get("rayStartParams", {})
        for tree in TREES
        for doc in rendered(tree)
        if doc["kind"] in OF_RAY
        for group in (ray_cluster(doc)["headGroupSpec"], *ray_cluster(doc)["workerGroupSpecs"])
    ]
    assert {"num-cpus"} <= {name for params in found for name in params} <= flags


def test_jobs_in_a_queue_are_the_jobs_with_its_label():
    plain, queued = rendered("jobs"), rendered("overlays/jobs-kueue")
    assert [doc["spec"] for doc in queued] == [doc["spec"] for doc in plain]
    for doc in queued:
        assert doc["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "ip2p"
        # what Kueue itself demands of a RayJob
        assert doc["spec"]["shutdownAfterJobFinishes"]
        assert "clusterSelector" not in doc["spec"]
        assert len(doc["spec"]["rayClusterSpec"]["workerGroupSpecs"]) <= 7


def test_dashboards_are_all_there():
    (made,) = [
        doc
        for doc in of_kind(rendered("overlays/gpu"), "ConfigMap")
        if doc["metadata"]["name"] == "ip2p-dashboards"
    ]
    assert set(made["data"]) == {path.name for path in (CLUSTER / "grafana").glob("*.json")}
    assert made["metadata"]["labels"] == {"grafana_dashboard": "1"}
    for text in made["data"].values():
        assert json.loads(text)["uid"].startswith("ip2p-")


@pytest.mark.parametrize("tree", TREES)
def test_no_secret_and_no_place_of_ours_stands_in_a_manifest(tree):
    docs = rendered(tree)
    assert "Secret" not in {doc["kind"] for doc in docs}
    for doc in docs:
        for _, container in containers(doc):
            for variable in container.get("env", []):
                if re.search("KEY|TOKEN|PASSWORD|SECRET", variable["name"]):
                    value = variable.get("value", "")
                    assert "valueFrom" in variable or value.startswith("/etc/"), variable["name"]
            if "image" in container:
                assert re.fullmatch(
                    r"(registry\.example\.com/ip2p-ray:\d+\.\d+\.\d+|redis:[\w.-]+(@sha256:[0-9a-f]{64})?)",
                    container["image"],
                )
    text = yaml.safe_dump_all(docs)
    assert set(re.findall(r"s3://([^/\s]+)", text)) <= {"example-bucket"}
    assert set(re.findall(r"\b\d+\.\d+\.\d+\.\d+\b", text)) <= {"0.0.0.0", "169.254.0.0"}
