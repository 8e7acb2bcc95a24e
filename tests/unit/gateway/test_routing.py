"""The choice of a Deployment."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.domain.routing import parse_table, require
from services.gateway.domain.traffic_split import TrafficSplitter
from tidegate.kernel.errors import NoRoutes, NotFound

pytestmark = pytest.mark.unit


def deployment(version: int = 1, **given_: Any) -> dict[str, Any]:
    return {
        "model": "digits",
        "version": version,
        "queue": f"requests.v1.digits-v{version}",
        "format": "onnx",
        "signature": None,
        "max_queue": 100,
        "retry": "safe",
        "wakeable": True,
        "ready": 1,
        **given_,
    }


def table(weights: list[int], **endpoint: Any):
    names = [f"digits-v{at}" for at in range(1, len(weights) + 1)]
    targets = [{"deployment": n, "weight": w} for n, w in zip(names, weights, strict=True)]
    versions = {str(at): name for at, name in enumerate(names, 1)}
    entry = {"targets": targets, "versions": versions, "default_timeout_ms": 1000, **endpoint}
    return parse_table(
        {
            "epoch": "e",
            "n": 3,
            "endpoints": {"digits": entry},
            "deployments": {name: deployment(at) for at, name in enumerate(names, 1)},
        }
    )


def shares(weights: list[int], draws: int = 1000) -> list[int]:
    """Return how many of the draws each target gets."""
    compiled, splitter = table(weights), TrafficSplitter(seed=1)
    seen = Counter(compiled.pick("digits", "", splitter)[1].name for _ in range(draws))
    return [seen[f"digits-v{at}"] for at in range(1, len(weights) + 1)]


def test_one_target_takes_all():
    assert shares([100]) == [1000]
    assert shares([1]) == [1000]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([50, 50], [500, 500]),
        ([90, 10], [900, 100]),
        ([1, 1, 2], [250, 250, 500]),
        ([0, 100], [0, 1000]),
        ([100, 0], [1000, 0]),
        ([7, 0, 3], [700, 0, 300]),
        ([999, 1], [999, 1]),
        ([90, 9, 1], [900, 90, 10]),
    ],
)
def test_weights_are_shares(weights, expected):
    assert shares(weights) == expected


@given(st.lists(st.integers(0, 1_000_000), min_size=1, max_size=6).filter(any))
def test_shares_follow_any_weights(weights):
    draws = 500
    for got, weight in zip(shares(weights, draws), weights, strict=True):
        assert abs(got - draws * weight / sum(weights)) < 2


@given(
    st.lists(st.integers(0, 1_000_000), min_size=1, max_size=6).filter(any),
    st.integers(0, 1000),
)
def test_every_draw_finds_a_target_with_weight(weights, seed):
    _, found = table(weights).pick("digits", "", TrafficSplitter(seed))
    assert weights[int(found.version) - 1] > 0


def test_weights_of_zero_take_nothing():
    with pytest.raises(NotFound, match="no deployment of model 'digits' gets traffic"):
        table([0, 0]).pick("digits", "", TrafficSplitter())


def test_no_targets():
    with pytest.raises(NotFound, match="no deployment of model 'digits' gets traffic"):
        table([1], targets=[]).pick("digits", "", TrafficSplitter())


def test_an_explicit_version_ignores_weights():
    compiled = table([100, 0])
    endpoint, found = compiled.pick("digits", "2", TrafficSplitter())
    assert (endpoint.name, found.name) == ("digits", "digits-v2")


@pytest.mark.parametrize(
    ("model", "version", "message"),
    [
        ("letters", "", "Request for unknown model: 'letters' is not found: GET /v2/models lists all"),
        ("letters", "1", "Request for unknown model: 'letters' is not found: GET /v2/models lists all"),
        ("", "", "Request for unknown model: '' is not found: GET /v2/models lists all"),
        ("digits", "3", "Request for unknown model: 'digits' version 3 is not found; it has ['1', '2']"),
        (
            "digits",
            "latest",
            "failed to get model version from specified version string 'latest': model 'digits' has the "
            "versions ['1', '2']",
        ),
    ],
)
def test_unknown_names_and_versions(model, version, message):
    with pytest.raises(NotFound) as caught:
        table([1, 1]).pick(model, version, TrafficSplitter())
    assert caught.value.message == message


def test_a_label_is_an_alias_of_a_version():
    compiled = table([100, 0], labels={"champion": "2", "old": "7"})
    assert compiled.pick("digits", "champion", TrafficSplitter())[1].name == "digits-v2"
    with pytest.raises(NotFound, match=r"'old' of model 'digits' is version 7, which has no deployment"):
        compiled.find("digits", "old")
    with pytest.raises(
        NotFound, match=r"version string 'new': .* has the versions .*, and the aliases \['champion', 'old'\]"
    ):
        compiled.find("digits", "new")


def test_stable_is_the_endpoints_own_choice_unless_it_is_an_alias():
    endpoint = table([100, 0], labels={"champion": "2"}).endpoints["digits"]
    assert (endpoint.labelled("champion"), endpoint.labelled("stable")) == ("2", "")
    assert table([1], labels={"stable": "1"}).endpoints["digits"].labelled("stable") == "1"
    with pytest.raises(NotFound, match="use one of champion, stable"):
        endpoint.labelled("canary")


def test_a_table_is_required():
    with pytest.raises(NoRoutes) as caught:
        require(None)
    assert caught.value.retry_after_s == 1.0
    assert require(table([1])).revision == ("e", 3)


def test_the_table_keeps_the_settings_of_a_deployment():
    signature = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [2]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": []}],
        "max_batch_size": 8,
    }
    raw = deployment(7, signature=signature, retry="never", wakeable=False, ready=2)
    compiled = parse_table(
        {
            "epoch": "e",
            "n": 1,
            "deployments": {"d": raw},
            "endpoints": {
                "m": {
                    "targets": [{"deployment": "d", "weight": 5}],
                    "versions": {},
                    "default_timeout_ms": 77,
                }
            },
        }
    )
    endpoint, found = compiled.find("m", "")
    assert endpoint.timeout_ms == 77
    assert (found.name, found.version, found.queue.name) == ("d", "7", "requests.v1.d")
    assert (found.retry_safe, found.wakeable, found.ready) == (False, False, 2)
    assert found.contract.max_batch == 8


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"epoch": "e", "n": 1, "endpoints": {}},
        {"epoch": "e", "n": 1, "deployments": {"d": {}}, "endpoints": {}},
        {
            "epoch": "e",
            "n": 1,
            "deployments": {},
            "endpoints": {
                "m": {
                    "targets": [{"deployment": "gone", "weight": 1}],
                    "versions": {},
                    "default_timeout_ms": 1,
                }
            },
        },
    ],
)
def test_a_malformed_table_raises_the_documented_errors(broken):
    with pytest.raises((ValueError, KeyError, TypeError)):
        parse_table(broken)
