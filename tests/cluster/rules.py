"""What KubeRay 1.7 refuses although its schemas allow it, and what a locked namespace refuses.

Each rule takes a document of kind RayCluster, RayJob or RayService, or a pod, and tells what is
wrong in sentences; none where nothing is.

Source: ray-operator/controllers/ray/utils/validation.go of KubeRay; Pod Security Standards of
Kubernetes, level restricted.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.cluster.manifests import Doc, Pod, containers, ray_cluster

LONGEST = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 36}
"""Characters of a name."""
TOKENS_SINCE = (2, 52)
"""Version of Ray that knows token authentication."""


def name_problems(doc: Doc) -> Iterator[str]:
    """Names are labels of DNS, and short enough for what the operator appends."""
    name, most = doc["metadata"]["name"], LONGEST[doc["kind"]]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"{name} is no DNS-1035 label"
    if len(name) > most:
        yield f"{name} has more than {most} characters"


def group_problems(doc: Doc) -> Iterator[str]:
    """Pools: how many, what of, by one way of saying so."""
    cluster = ray_cluster(doc) or {}
    groups = [("head", cluster.get("headGroupSpec", {}))]
    scales = cluster.get("enableInTreeAutoscaling", False)
    v2 = scales and cluster.get("autoscalerOptions", {}).get("version") == "v2"
    for group in cluster.get("workerGroupSpecs", []):
        name = group["groupName"]
        groups.append((name, group))
        least, most = group.get("minReplicas"), group.get("maxReplicas")
        if least is None or most is None:
            yield f"{name} sets no minReplicas or no maxReplicas"
        elif not 0 <= least <= most:
            yield f"{name} has minReplicas {least} and maxReplicas {most}"
        elif not least <= group.get("replicas", least) <= most:
            yield f"{name} has replicas {group['replicas']}, not between {least} and {most}"
        if "idleTimeoutSeconds" in group and not v2:
            yield f"{name} has idleTimeoutSeconds without autoscaler v2"
    for name, group in groups:
        params = group.get("rayStartParams", {})
        if "labels" in params:
            yield f"{name} has labels in rayStartParams"
        told = {"num-cpus", "num-gpus", "memory", "resources"}.intersection(params)
        if told and group.get("resources"):
            yield f"{name} has resources and {', '.join(sorted(told))} in rayStartParams"
        if not all(isinstance(value, str) for value in params.values()):
            yield f"{name} has rayStartParams that are no strings"
        pod = group.get("template", {}).get("spec", {})
        if not pod.get("containers"):
            yield f"{name} has no container"
        if v2 and pod.get("restartPolicy", "Never") != "Never":
            yield f"{name} has a restartPolicy with autoscaler v2"
    names = [name for name, _ in groups]
    if len(set(names)) < len(names):
        yield "two groups have one name"


def auth_problems(doc: Doc) -> Iterator[str]:
    """Tokens: from Ray 2.52 on; Kubernetes' own only for a RayCluster."""
    cluster = ray_cluster(doc) or {}
    auth = cluster.get("authOptions", {})
    version = tuple(int(part) for part in cluster.get("rayVersion", "0").split(".")[:2])
    if auth.get("mode") == "token" and version < TOKENS_SINCE:
        yield f"authOptions.mode token with rayVersion {cluster.get('rayVersion')}"
    if auth.get("enableK8sTokenAuth") and doc["kind"] != "RayCluster":
        yield f"enableK8sTokenAuth in a {doc['kind']}"


def redis_problems(doc: Doc) -> Iterator[str]:
    """Redis is told of through gcsFaultToleranceOptions alone."""
    cluster = ray_cluster(doc) or {}
    head = cluster.get("headGroupSpec", {})
    for name in ("redis-password", "redis-username"):
        if name in head.get("rayStartParams", {}):
            yield f"{name} in rayStartParams"
    for container in head.get("template", {}).get("spec", {}).get("containers", [])[:1]:
        for variable in container.get("env", []):
            if variable["name"] in {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}:
                yield f"{variable['name']} in the environment of the head"
    annotations = doc["metadata"].get("annotations", {})
    for name in ("ray.io/ft-enabled", "ray.io/external-storage-namespace"):
        if name in annotations and cluster.get("gcsFaultToleranceOptions"):
            yield f"annotation {name} beside gcsFaultToleranceOptions"
    options = cluster.get("gcsFaultToleranceOptions", {})
    if options.get("backend", "redis") != "redis":
        yield "a backend that is behind a feature gate which is off"
    elif "storage" in options:
        yield "storage is of the backend rocksdb"


def job_problems(doc: Doc) -> Iterator[str]:
    """A RayJob: where it runs, how often, and what is left of it."""
    if doc["kind"] != "RayJob":
        return
    spec = doc["spec"]
    mode, chosen = spec.get("submissionMode", "K8sJobMode"), spec.get("clusterSelector")
    stops = spec.get("shutdownAfterJobFinishes", False)
    rules = spec.get("deletionStrategy", {}).get("deletionRules")
    if not (spec.get("rayClusterSpec") or chosen):
        yield "neither rayClusterSpec nor clusterSelector"
    if not stops and (spec.get("ttlSecondsAfterFinished", 0) > 0 or spec.get("suspend")):
        yield "ttlSecondsAfterFinished or suspend without shutdownAfterJobFinishes"
    if stops and rules:
        yield "shutdownAfterJobFinishes and deletionRules"
    if spec.get("backoffLimit", 0) > 0 and (chosen or mode == "InteractiveMode"):
        yield "backoffLimit with clusterSelector or InteractiveMode"
    if chosen and spec.get("suspend"):
        yield "suspend with clusterSelector"
    if mode == "SidecarMode":
        for name in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
            if name in spec:
                yield f"{name} in SidecarMode"
    for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(name, 1) <= 0:
            yield f"{name} is not above 0"
    for name in ("backoffLimit", "ttlSecondsAfterFinished"):
        if spec.get(name, 0) < 0:
            yield f"{name} is negative"
    if (ray_cluster(doc) or {}).get("upgradeStrategy"):
        yield "upgradeStrategy in a cluster of a RayJob"


def runtime_env_problems(doc: Doc) -> Iterator[str]:
    """runtimeEnvYAML is what Ray takes for a runtime environment."""
    from ray.runtime_env import RuntimeEnv

    text = doc["spec"].get("runtimeEnvYAML") if doc["kind"] == "RayJob" else None
    if text is not None:
        try:
            RuntimeEnv(**yaml.safe_load(text))
        except (TypeError, ValueError, yaml.YAMLError) as error:
            yield f"runtimeEnvYAML: {error}"


def service_problems(doc: Doc) -> Iterator[str]:
    """A RayService: how it is upgraded, and that Serve's port has a Service."""
    if doc["kind"] != "RayService":
        return
    spec, cluster = doc["spec"], ray_cluster(doc) or {}
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "rayClusterDeletionDelaySeconds is negative"
    if cluster.get("upgradeStrategy"):
        yield "upgradeStrategy in the cluster of a RayService"
    head = cluster.get("headGroupSpec", {})
    if head.get("headService", {}).get("metadata", {}).get("name"):
        yield "headService has a name"
    containers_of_head = head.get("template", {}).get("spec", {}).get("containers", [])
    ports = [port["name"] for each in containers_of_head[:1] for port in each.get("ports", [])]
    if "serve" not in ports:
        yield "the head has no port serve: no Service would be made"
    strategy = spec.get("upgradeStrategy", {})
    kind = strategy.get("type", "NewCluster")
    if kind not in {"NewCluster", "None", "NewClusterWithIncrementalUpgrade"}:
        yield f"upgradeStrategy {kind}"
    if kind == "NewClusterWithIncrementalUpgrade":
        options = strategy.get("clusterUpgradeOptions", {})
        if not cluster.get("enableInTreeAutoscaling"):
            yield "an incremental upgrade without autoscaling"
        if not options.get("gatewayClassName"):
            yield "an incremental upgrade without a gateway"
        if (
            not 0
            <= options.get("stepSizePercent", -1)
            <= options.get("maxSurgePercent", 100)
            <= 100
        ):
            yield "stepSizePercent is not between 0 and maxSurgePercent"
        if options.get("intervalSeconds", 0) <= 0:
            yield "intervalSeconds is not above 0"


RULES = (
    *(name_problems, group_problems, auth_problems, redis_problems),
    *(job_problems, runtime_env_problems, service_problems),
)


def problems(doc: Doc) -> list[str]:
    """Everything that the operator would refuse."""
    return [problem for rule in RULES for problem in rule(doc)]


def restricted_problems(pod: Pod, container: dict[str, Any]) -> Iterator[str]:
    """What a namespace with Pod Security "restricted" refuses, and a root that can be written."""
    held = container.get("securityContext", {})
    whole = pod.spec.get("securityContext", {})
    if held.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if "ALL" not in held.get("capabilities", {}).get("drop", []):
        yield "not all capabilities are dropped"
    if held.get("capabilities", {}).get("add"):
        yield "capabilities are added"
    if not held.get("runAsNonRoot", whole.get("runAsNonRoot")):
        yield "runAsNonRoot is not true"
    if held.get("runAsUser", whole.get("runAsUser")) in (None, 0):
        yield "runAsUser is root, or nobody knows"
    if held.get("seccompProfile", whole.get("seccompProfile", {})).get("type") != "RuntimeDefault":
        yield "no seccomp profile"
    if held.get("readOnlyRootFilesystem") is not True:
        yield "its root can be written"
    if held.get("privileged"):
        yield "it is privileged"
    if any(pod.spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
        yield "it shares the host's namespaces"
    if any("hostPath" in volume for volume in pod.spec.get("volumes", [])):
        yield "it mounts a path of the host"


def insecure(doc: Doc) -> list[str]:
    """`restricted_problems` of every container that a document leads to."""
    from tests.cluster.manifests import pods

    by_place = {pod.where: pod for pod in pods(doc)}
    heads = [pod for where, pod in by_place.items() if where.endswith(" head")]
    found = []
    for where, container in containers(doc):
        pod = by_place.get(where.rpartition(" ")[0]) or heads[0]  # the autoscaler is the head's
        found += [f"{where}: {problem}" for problem in restricted_problems(pod, container)]
    return found
