"""Test the list of workers for Prometheus's service discovery."""

from services.autoscaler.domain.prometheus_targets import targets
from tidegate.kernel.protocol.presence import ReplicaReport


def report(replica: str, **given) -> ReplicaReport:
    usual = {"deployment": "m-v1", "generation": 1, "host": "1f2e", "pid": 7, "state": "ready"}
    return ReplicaReport(replica=replica, **{**usual, "metrics_port": 8040, **given})


def test_one_group_for_each_worker_that_listens():
    reports = [
        report("m-v1-1-1"),
        report("m-v1-0-1", state="draining"),
        report("m-v1-2-1", state="failed"),
        report("m-v1-3-1", metrics_port=0),
    ]
    found = targets(reports, local=False)
    assert [group["labels"]["replica"] for group in found] == ["m-v1-0-1", "m-v1-1-1"]
    assert found[0] == {
        "targets": ["1f2e:8040"],
        "labels": {"deployment": "m-v1", "replica": "m-v1-0-1"},
    }
    assert targets(reports, local=True)[0]["targets"] == ["127.0.0.1:8040"]
