"""The gauges of a Deployment: they follow its status, and leave with it."""

from __future__ import annotations

import math
import shutil
from collections import namedtuple

import pytest
from prometheus_client import REGISTRY

from services.autoscaler.adapters import metrics
from tidegate.kernel.protocol.deployment_status import DeploymentStatus

pytestmark = pytest.mark.unit


def value(name: str, deployment: str) -> float | None:
    return REGISTRY.get_sample_value(f"tidegate_autoscaler_{name}", {"deployment": deployment})


def status(name: str, **fields: object) -> DeploymentStatus:
    return DeploymentStatus.model_validate({"deployment": name, "revision": 1} | fields)


def test_memory_and_gpus_are_shown_until_the_deployment_is_deleted():
    replicas = [{"memory_mb": 100}, {"memory_mb": 50}, {}]
    on_gpu = status("g", replicas=replicas, gpu_utilization=0.5, gpu_memory_bytes=2**30)
    metrics.show({"g": on_gpu, "c": status("c", replicas=replicas[:1])}, ())
    assert (value("memory_bytes", "g"), value("memory_bytes", "c")) == (150 * 2**20, 100 * 2**20)
    assert (value("gpu_utilization", "g"), value("gpu_memory_bytes", "g")) == (0.5, 2**30)
    assert value("gpu_utilization", "c") is None, "a replica on the CPU has no GPU that is idle"
    metrics.show({}, ["g", "c"])
    assert {value(name, "g") for name in ("memory_bytes", "gpu_utilization", "gpu_memory_bytes")} == {None}


def test_the_disk_is_measured_at_each_reading(tmp_path, monkeypatch):
    def shown() -> tuple[float | None, ...]:
        names = ("disk_bytes", "disk_free_bytes")
        return tuple(REGISTRY.get_sample_value(f"tidegate_autoscaler_{name}") for name in names)

    metrics.measure_disk(tmp_path)
    assert shown()[0] == shutil.disk_usage(tmp_path).total
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 60, 40))
    assert shown() == (100, 40)
    metrics.measure_disk(tmp_path / "missing")
    monkeypatch.undo()
    assert all(math.isnan(each) for each in shown() if each is not None)
