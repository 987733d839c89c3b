"""Each rule of the operator catches a manifest that breaks it, and lets a good one be."""

import copy

import pytest
import yaml

from tests.cluster.manifests import Pod
from tests.cluster.rules import RULES, problems, restricted_problems

POD = {"spec": {"containers": [{"name": "ray", "ports": [{"name": "serve"}]}]}}
SPEC = {
    "rayVersion": "2.60.0",
    "enableInTreeAutoscaling": True,
    "authOptions": {"mode": "token"},
    "autoscalerOptions": {"version": "v2"},
    "gcsFaultToleranceOptions": {"redisAddress": "redis:6379"},
    "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": POD},
    "workerGroupSpecs": [
        {
            "groupName": "gpu",
            "replicas": 0,
            "minReplicas": 0,
            "maxReplicas": 2,
            "resources": {"generator": "1"},
            "rayStartParams": {},
            "template": POD,
        }
    ],
}


def good(kind):
    """A small document that the operator takes."""
    metadata = {"name": "ip2p", "annotations": {}}
    spec = {
        "RayCluster": SPEC,
        "RayJob": {
            "entrypoint": "python x.py",
            "runtimeEnvYAML": "env_vars: {A: b}",
            "rayClusterSpec": SPEC,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 60,
            "backoffLimit": 2,
        },
        "RayService": {"rayClusterConfig": SPEC, "upgradeStrategy": {"type": "NewCluster"}},
    }[kind]
    return copy.deepcopy(
        {"apiVersion": "ray.io/v1", "kind": kind, "metadata": metadata, "spec": spec}
    )


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
def test_a_good_document_breaks_no_rule(kind):
    assert problems(good(kind)) == []


BAD = [
    # kind, what is set (by dots), to what, what is told
    ("RayCluster", "metadata.name", "2p", "DNS-1035"),
    ("RayCluster", "metadata.name", "a" * 54, "more than 53"),
    ("RayJob", "metadata.name", "a" * 48, "more than 47"),
    ("RayService", "metadata.name", "a" * 48, "more than 47"),
    ("RayCluster", "spec.workerGroupSpecs.0.minReplicas", 3, "minReplicas 3"),
    ("RayCluster", "spec.workerGroupSpecs.0.minReplicas", None, "no minReplicas"),
    ("RayCluster", "spec.workerGroupSpecs.0.replicas", 3, "replicas 3"),
    ("RayCluster", "spec.workerGroupSpecs.0.rayStartParams.num-cpus", "4", "gpu has resources"),
    ("RayCluster", "spec.workerGroupSpecs.0.rayStartParams.labels", "a=b", "labels"),
    ("RayCluster", "spec.workerGroupSpecs.0.rayStartParams.block", True, "no strings"),
    ("RayCluster", "spec.workerGroupSpecs.0.groupName", "head", "one name"),
    ("RayCluster", "spec.workerGroupSpecs.0.template.spec.containers", [], "no container"),
    ("RayCluster", "spec.workerGroupSpecs.0.template.spec.restartPolicy", "Always", "v2"),
    ("RayJob", "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy", "OnFailure", "v2"),
    ("RayCluster", "spec.headGroupSpec.resources", {"CPU": "1"}, "head has resources"),
    ("RayCluster", "spec.rayVersion", "2.51.1", "rayVersion 2.51.1"),
    ("RayJob", "spec.rayClusterSpec.authOptions.enableK8sTokenAuth", True, "in a RayJob"),
    ("RayService", "spec.rayClusterConfig.authOptions.enableK8sTokenAuth", True, "RayService"),
    ("RayCluster", "spec.headGroupSpec.rayStartParams.redis-password", "$P", "redis-password"),
    (
        *("RayCluster", "spec.headGroupSpec.template.spec.containers.0.env"),
        *([{"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}], "RAY_REDIS_ADDRESS"),
    ),
    ("RayCluster", "metadata.annotations", {"ray.io/ft-enabled": "true"}, "ft-enabled"),
    ("RayCluster", "spec.gcsFaultToleranceOptions.backend", "rocksdb", "gate"),
    ("RayCluster", "spec.gcsFaultToleranceOptions.storage", {"size": "1Gi"}, "storage"),
    ("RayJob", "spec.rayClusterSpec", None, "neither"),
    ("RayJob", "spec.shutdownAfterJobFinishes", False, "without shutdownAfterJobFinishes"),
    ("RayJob", "spec.deletionStrategy", {"deletionRules": [{}]}, "deletionRules"),
    ("RayJob", "spec.clusterSelector", {"ray.io/cluster": "ip2p"}, "backoffLimit with"),
    ("RayJob", "spec.submissionMode", "InteractiveMode", "backoffLimit with"),
    ("RayJob", "spec.backoffLimit", -1, "backoffLimit is negative"),
    ("RayJob", "spec.activeDeadlineSeconds", 0, "not above 0"),
    ("RayJob", "spec.runtimeEnvYAML", "pip: 3", "runtimeEnvYAML"),
    ("RayJob", "spec.runtimeEnvYAML", "envvars: [", "runtimeEnvYAML"),
    ("RayJob", "spec.rayClusterSpec.upgradeStrategy", {"type": "Recreate"}, "upgradeStrategy"),
    ("RayService", "spec.rayClusterDeletionDelaySeconds", -1, "negative"),
    ("RayService", "spec.upgradeStrategy.type", "Rolling", "upgradeStrategy Rolling"),
    (
        *("RayService", "spec.upgradeStrategy.type", "NewClusterWithIncrementalUpgrade"),
        "without a gateway",
    ),
    (
        *("RayService", "spec.rayClusterConfig.headGroupSpec.template.spec.containers.0.ports"),
        *([], "no port serve"),
    ),
]


@pytest.mark.parametrize(("kind", "place", "value", "told"), BAD)
def test_a_bad_document_is_caught(kind, place, value, told):
    doc = good(kind)
    _set(doc, place, value)
    assert any(told in problem for problem in problems(doc)), problems(doc)


def test_what_sidecars_and_incremental_upgrades_exclude_is_caught():
    job = good("RayJob")
    job["spec"] |= {"submissionMode": "SidecarMode", "submitterPodTemplate": POD}
    assert problems(job) == ["submitterPodTemplate in SidecarMode"]
    service = good("RayService")
    options = {"gatewayClassName": "istio", "stepSizePercent": 50, "maxSurgePercent": 20}
    service["spec"]["upgradeStrategy"] = {
        "type": "NewClusterWithIncrementalUpgrade",
        "clusterUpgradeOptions": options | {"intervalSeconds": 10},
    }
    assert problems(service) == ["stepSizePercent is not between 0 and maxSurgePercent"]


def test_every_rule_is_broken_here_once():
    broken = set()
    for kind, place, value, _ in BAD:
        doc = good(kind)
        _set(doc, place, value)
        broken |= {rule.__name__ for rule in RULES if list(rule(doc))}
    assert broken == {rule.__name__ for rule in RULES}


LOCKED = yaml.safe_load("""
securityContext: {runAsNonRoot: true, runAsUser: 1000, seccompProfile: {type: RuntimeDefault}}
containers:
  - securityContext:
      allowPrivilegeEscalation: false
      readOnlyRootFilesystem: true
      capabilities: {drop: [ALL]}
""")


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("containers.0.securityContext.allowPrivilegeEscalation", None, "Escalation"),
        ("containers.0.securityContext.capabilities", {}, "capabilities"),
        ("containers.0.securityContext.capabilities.add", ["SYS_PTRACE"], "added"),
        ("containers.0.securityContext.readOnlyRootFilesystem", False, "written"),
        ("containers.0.securityContext.privileged", True, "privileged"),
        ("securityContext.runAsNonRoot", None, "runAsNonRoot"),
        ("securityContext.runAsUser", 0, "root"),
        ("securityContext.seccompProfile", {}, "seccomp"),
        ("hostNetwork", True, "host"),
        ("volumes", [{"name": "x", "hostPath": {"path": "/"}}], "host"),
    ],
)
def test_an_unlocked_container_is_caught(place, value, told):
    spec = copy.deepcopy(LOCKED)
    assert list(restricted_problems(Pod("x", {}, spec), spec["containers"][0])) == []
    _set(spec, place, value)
    found = list(restricted_problems(Pod("x", {}, spec), spec["containers"][0]))
    assert len(found) == 1
    assert told in found[0]


def _set(doc, place, value):
    """Sets what is at a dotted place; None takes it away."""
    *path, last = place.split(".")
    for part in path:
        doc = doc[int(part) if isinstance(doc, list) else part]
    if value is None:
        del doc[last]
    else:
        doc[last] = value
