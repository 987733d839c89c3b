"""What chooses pods by their labels finds those that it is meant for, and their ports."""

import json
import re

import kubernetes_validate
import yaml

from tests.cluster.manifests import CLUSTER, of_kind, pods, ray_cluster, rendered


def all_pods():
    """Every pod of the trees that differ."""
    trees = ("overlays/gpu", "jobs", "service")
    return [pod for tree in trees for doc in rendered(tree) for pod in pods(doc)]


def chosen(selector, found):
    labels = selector.get("matchLabels", {}).items()
    return [pod for pod in found if labels <= pod.labels.items()]


def test_what_selects_pods_finds_them():
    every, docs = all_pods(), rendered("overlays/gpu")
    for doc in docs:
        spec, name = doc.get("spec", {}), doc["metadata"]["name"]
        if doc["kind"] == "Service":
            (pod,) = chosen({"matchLabels": spec["selector"]}, every)
            ports = {port["name"]: port["containerPort"] for port in _ports(pod)}
            assert [ports[port["targetPort"]] for port in spec["ports"]] == [6379]
        elif doc["kind"] == "StatefulSet":
            (pod,) = pods(doc)
            assert chosen(spec["selector"], [pod])
        elif doc["kind"] == "PodDisruptionBudget":
            assert chosen(spec["selector"], every), name
            # of pods that no built-in controller has
            assert isinstance(spec["minAvailable"], int)
            assert "maxUnavailable" not in spec
        elif doc["kind"] == "NetworkPolicy":
            assert chosen(spec["podSelector"], every), name
            for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
                for peer in [*rule.get("from", []), *rule.get("to", [])]:
                    if "podSelector" in peer and "namespaceSelector" not in peer:
                        assert chosen(peer["podSelector"], every), peer


def test_budgets_are_those_of_the_head_that_stays_and_of_editors():
    every = all_pods()
    budgets = {
        doc["metadata"]["name"]: doc["spec"]
        for doc in of_kind(rendered("overlays/gpu"), "PodDisruptionBudget")
    }
    held = {
        name: [pod.where for pod in chosen(spec["selector"], every)]
        for name, spec in budgets.items()
    }
    assert held == {
        "ip2p-head": ["RayCluster/ip2p head"],
        "ip2p-editor": ["RayService/ip2p-editor editor"],
    }
    (service,) = rendered("service")
    (group,) = ray_cluster(service)["workerGroupSpecs"]
    assert budgets["ip2p-editor"]["minAvailable"] < group["minReplicas"]


def _ports(pod):
    return [port for each in pod.spec["containers"] for port in each.get("ports", [])]


def test_prometheus_finds_ports_that_pods_have_and_that_are_let_through():
    every, docs = all_pods(), rendered("overlays/gpu")
    monitors = of_kind(docs, "PodMonitor")
    assert len(monitors) == 2
    scraped = set()
    for monitor in monitors:
        spec = monitor["spec"]
        assert set(spec) == {"selector", "podMetricsEndpoints"}
        found = chosen(spec["selector"], every)
        assert found
        for endpoint in spec["podMetricsEndpoints"]:
            assert set(endpoint) == {"port", "relabelings"}
            for rule in endpoint["relabelings"]:
                assert set(rule) == {"sourceLabels", "targetLabel"}
            for pod in found:
                ports = {port["name"]: port["containerPort"] for port in _ports(pod)}
                assert endpoint["port"] in ports, pod.where
                scraped.add(ports[endpoint["port"]])
    (policy,) = [
        doc for doc in of_kind(docs, "NetworkPolicy") if doc["metadata"]["name"] == "ip2p-ray"
    ]
    (rule,) = [
        rule
        for rule in policy["spec"]["ingress"]
        if any("prometheus" in json.dumps(peer) for peer in rule["from"])
    ]
    assert {port["port"] for port in rule["ports"]} == scraped


def test_every_ray_pod_is_behind_a_network_policy():
    policies = of_kind(rendered("overlays/gpu"), "NetworkPolicy")
    for pod in all_pods():
        if "submitter" not in pod.where:
            assert any(chosen(each["spec"]["podSelector"], [pod]) for each in policies), pod.where


def test_rules_that_stand_as_comments_are_rules():
    text = (CLUSTER / "base" / "network.yaml").read_text("utf-8")
    freed = re.sub(r"^    # (?=- to:| )", "    ", text, flags=re.MULTILINE)
    policy, written = next(yaml.safe_load_all(freed)), next(yaml.safe_load_all(text))
    kubernetes_validate.validate(policy, "1.37", strict=True)
    before = written["spec"]["egress"]
    assert policy["spec"]["egress"][: len(before)] == before
    identity, model = policy["spec"]["egress"][len(before) :]
    assert identity["to"] == [{"ipBlock": {"cidr": "169.254.170.23/32"}}]
    assert identity["ports"] == [{"port": 80}]
    assert model["ports"] == [{"port": 8000}]
