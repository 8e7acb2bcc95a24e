"""The price file, and the rate of a replica."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Any

import pytest

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.price_file import PriceFile, read_prices
from tidegate.kernel.protocol.models import Deployment
from tidegate.kernel.protocol.prices import PriceList, rate_of

pytestmark = pytest.mark.unit

FILE = """
currency: EUR
core_hour: 0.1
gib_hour: 0.01
gpu_hour: {"*": 1, H100: 4, "H100 NVL": {per_hour: 3, memory_gib: 94}}
tokens: {gpt: {in: 0.15, out: 0.6, cached: 0.075}}
managed: {cloud: {per_replica_hour: 0.2}}
"""


def a_deployment(**given: Any) -> Deployment:
    return Deployment.model_validate(
        {"name": "d", "model": "m", "version": 1, "revision": 1, "created_at": datetime.now(UTC), **given}
    )


def test_a_price_file(tmp_path):
    path = tmp_path / "prices.yaml"
    path.write_text(FILE)
    prices = read_prices(path)
    assert (prices.currency, prices.core_hour, prices.tokens["gpt"].cached) == ("EUR", 0.1, 0.075)
    assert [prices.gpu(name).per_hour for name in ("NVIDIA H100 NVL", "NVIDIA H100 80GB", "A10")] == [3, 4, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("core_hour: -1", "core_hour"),
        ("cores_hour: 1", "cores_hour"),
        ("core_hour: .nan", "core_hour"),
        ("gpu_hour: {H100: 4}", 'needs an entry "\\*"'),
        ("[", "not YAML"),
        ("- 1", "the file"),
    ],
)
def test_a_wrong_price_file(tmp_path, text, message):
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(BadRequest, match=message):
        read_prices(path)


def test_a_missing_price_file(tmp_path):
    with pytest.raises(BadRequest, match="cannot be read"):
        read_prices(tmp_path / "none.yaml")


def test_a_price_file_that_cannot_be_used_stops_nothing(tmp_path):
    path = tmp_path / "prices.yaml"
    file = PriceFile(path)
    assert file.current() == PriceList()
    assert "The default prices are used" in (file.problem or "")
    path.write_text("core_hour: 2")
    assert (file.current().core_hour, file.problem) == (2, None)


def test_a_changed_price_file_counts_if_it_can_be_used(tmp_path):
    path = tmp_path / "prices.yaml"
    path.write_text("core_hour: 1")
    file = PriceFile(path)
    path.write_text("core_hour: no")
    os.utime(path, (1, 1))
    assert (file.current().core_hour, "prices from before" in (file.problem or "")) == (1, True)
    path.write_text("core_hour: 2.5")
    assert (file.current().core_hour, file.problem) == (2.5, None)


@pytest.mark.parametrize(
    ("given", "device", "per_hour"),
    [
        ({}, "", 1 * 0.1 + 0.25 * 0.01),
        ({"resources": {"cpus": 2, "memory_mb": 2048}}, "", 0.2 + 0.02),
        (
            {"resources": {"cpus": 1, "memory_mb": 1024, "gpus": 2}},
            "cuda:0 (NVIDIA H100 80GB HBM3)",
            0.11 + 8,
        ),
        ({"resources": {"cpus": 1, "memory_mb": 1024, "gpu_memory_mb": 47 * 1024}}, "H100 NVL", 0.11 + 1.5),
        ({"scaling": {"price_per_hour": 7}}, "", 7),
    ],
)
def test_rate(given, device, per_hour):
    prices = PriceList.model_validate(
        {
            "core_hour": 0.1,
            "gib_hour": 0.01,
            "gpu_hour": {"*": 1, "H100": 4, "H100 NVL": {"per_hour": 3, "memory_gib": 94}},
        }
    )
    rate = rate_of(a_deployment(**given), prices, device)
    assert rate.per_hour == pytest.approx(per_hour)
    assert rate.cost(3_600_000_000_000) == pytest.approx(per_hour)
    assert rate.source == ("deployment" if "scaling" in given else "prices")
