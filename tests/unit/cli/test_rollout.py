"""Shares of traffic, samples of a smoke test, and the exported file: the pure parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tidegate.cli.exit_codes import UsageError
from tidegate.cli.export import selected, text_of
from tidegate.cli.manage import documents
from tidegate.cli.rollout import chosen, percent, rolled, weights
from tidegate.cli.smoke import back_to, read_samples
from tidegate.kernel.errors import BadRequest, NotFound
from tidegate.kernel.protocol.golden import Sample, close, differences
from tidegate.kernel.protocol.models import CanaryOptions, Deployment, Endpoint, LlmSpec, Rollout, Target

HELD = [
    {"name": "digits-v1", "model": "digits", "version": 1},
    {"name": "digits-v2", "model": "digits", "version": 2},
    {"name": "canary", "model": "digits", "version": 2},
    {"name": "other-v3", "model": "other", "version": 3},
]
ENDPOINT = {"name": "digits", "targets": [{"deployment": "digits-v1", "weight": 100}], "previous": []}


@pytest.mark.parametrize(
    ("shares", "whole", "parts"),
    [
        (["v1=90", "v2=10"], {"v1": 90, "v2": 10}, [90, 10]),
        (["v1=3", "v2=1"], {"v1": 3, "v2": 1}, [75, 25]),
        (["v1=99.5%", "v2=0.5%"], {"v1": 9950, "v2": 50}, [99.5, 0.5]),
        (["v1=1", "v2=0"], {"v1": 1, "v2": 0}, [100, 0]),
    ],
)
def test_shares_are_parts_of_their_sum(shares: list[str], whole: dict[str, int], parts: list[float]) -> None:
    assert weights(shares) == whole
    assert percent(whole) == parts


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        (["v1"], "write VERSION=NUMBER"),
        (["=5"], "write VERSION=NUMBER"),
        (["v1=much"], "write VERSION=NUMBER"),
        (["v1=-1"], "write VERSION=NUMBER"),
        (["v1=nan"], "write VERSION=NUMBER"),
        (["v1=0", "v2=0"], "All shares are 0"),
        (["v1=1", "v1=2"], "named twice"),
        (["v1=1", "v2=0.001"], "share of v2 is too small"),
    ],
)
def test_shares_that_are_none(shares: list[str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        weights(shares)


def test_an_exported_canary_is_stated_as_it_began() -> None:
    rollout = Rollout(
        deployment="digits-v2", base=[Target(deployment="digits-v1")], options=CanaryOptions(steps=[5, 100])
    )
    held = Endpoint(
        name="digits",
        targets=[Target(deployment="digits-v1", weight=95), Target(deployment="digits-v2", weight=5)],
        rollout=rollout,
        revision=1,
    ).model_dump(mode="json")
    (stated,) = selected({"deployments": [], "endpoints": [held]}, None)["endpoints"]
    assert stated["targets"] == [{"deployment": "digits-v1", "weight": 100}]
    assert stated["rollout"] == {"deployment": "digits-v2", "options": {"steps": [5, 100]}}
    ended = {**held, "rollout": {**held["rollout"], "phase": "promoted"}}
    (stated,) = selected({"deployments": [], "endpoints": [ended]}, None)["endpoints"]
    assert "rollout" not in stated
    assert len(stated["targets"]) == 2


def test_versions_become_deployments() -> None:
    assert [t["deployment"] for t in chosen(ENDPOINT, HELD, {"v1": 1, "2": 1})] == ["digits-v1", "digits-v2"]
    assert chosen(ENDPOINT, HELD, {"canary": 7}) == [{"deployment": "canary", "weight": 7}]
    serves = {**ENDPOINT, "targets": [{"deployment": "canary", "weight": 1}]}
    assert chosen(serves, HELD, {"v2": 1})[0]["deployment"] == "canary", "the one that serves comes first"


def test_a_version_without_a_deployment_is_told_with_the_command_that_makes_one() -> None:
    with pytest.raises(BadRequest) as refused:
        chosen(ENDPOINT, HELD, {"v1": 90, "v3": 10})
    assert "v3 of digits has no Deployment. Existing: v1 (digits-v1), v2 (canary), v2 (digits-v2)" in str(
        refused.value
    )
    assert "tidegate deploy digits --version 3 --no-traffic" in str(refused.value)
    with pytest.raises(UsageError, match="2 is digits-v2, which already has a share"):
        chosen(ENDPOINT, HELD, {"v2": 90, "2": 10})


def test_a_rollback_in_words() -> None:
    placed: dict[str, Any] = {"deployment": HELD[0], "replaced": ["digits-v2"], "remade": True}
    assert (
        rolled(placed)
        == "from digits-v2 to digits-v1 (version 1); digits-v1 was deleted and is created again"
    )
    assert rolled({**placed, "replaced": []}) == "version 1 serves already"


def sample(**expected: Any) -> Sample:
    return Sample({"inputs": []}, expected)


ANSWER = {"outputs": [{"name": "label", "data": [3, 4]}, {"name": "p", "data": [0.25, 1.0]}]}


@pytest.mark.parametrize(
    ("expected", "told"),
    [
        ({}, []),
        ({"label": [3, 4], "p": [0.250001, 1]}, []),
        ({"label": [3, 5]}, ["label[1] is 4, expected 5 (tolerance 1e-05); 1 of 2 values differ"]),
        ({"q": [1]}, ["output 'q' is missing; the answer has label, p"]),
        ({"p": [1]}, ["output 'p' has 2 values, expected 1"]),
    ],
)
def test_differences(expected: dict[str, Any], told: list[str]) -> None:
    assert differences(sample(**expected), ANSWER) == told


@pytest.mark.parametrize(
    ("value", "wanted", "tolerance", "same"),
    [
        (1.0, 1.001, 0.001, True),
        (1.0, 1.01, 0.001, False),
        (1e6, 1e6 + 100, 1e-3, True),
        (float("nan"), 1.0, 1.0, False),
        (True, 1, 0.0, True),
        ("a", "b", 10.0, False),
        (None, 0, 1.0, False),
    ],
)
def test_close(value: Any, wanted: Any, tolerance: float, same: bool) -> None:
    assert close(value, wanted, tolerance) is same


def test_samples_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "sample.json"
    file.write_text(
        '[{"inputs": [], "id": "7"},'
        ' {"inputs": [], "expected": {"y": [[1, 2], [3, 4]]}, "tolerance": 0.1},'
        ' {"inputs": [], "expected": [{"name": "y", "datatype": "FP32", "shape": [1], "data": [5]}]}]'
    )
    first, second, third = read_samples(file)
    assert (first.request, first.expected) == ({"inputs": [], "id": "7"}, {})
    assert (second.request, second.expected, second.tolerance) == ({"inputs": []}, {"y": [1, 2, 3, 4]}, 0.1)
    assert third.expected == {"y": [5]}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}", "sample 1 is not an inference request"),
        ("[]", "has no sample"),
        ('[{"inputs": []}, 5]', "sample 2 is not an inference request"),
        ('{"inputs": [], "expected": {"y": 1}}', "write the expected outputs as"),
        ('{"inputs": [], "tolerance": "x"}', "the tolerance is 'x'; it must be a number"),
        ("{", "is not JSON"),
    ],
)
def test_files_that_hold_no_samples(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(UsageError, match=told):
        read_samples(tmp_path / "s.json")


def test_the_patch_back() -> None:
    old = {"threads": 1, "env": {"A": "1"}, "scaling": {"forecast": "off"}, "image": None}
    new = {"threads": 4, "env": {"A": "2", "B": "3"}, "scaling": {"forecast": "off"}, "image": None}
    assert back_to(old, new) == {"threads": 1, "env": {"A": "1", "B": None}}
    assert back_to(old, old) == {}


def stored(name: str, **fields: Any) -> dict[str, Any]:
    given = {"model": "digits", "version": 1, "revision": 3, "created_at": "2024-05-31T10:00:00Z", **fields}
    return Deployment.model_validate({"name": name, **given}).model_dump(mode="json")


INTENTION = {
    "deployments": [
        stored("digits-v1", threads=2, env={"A": "1"}, batching={"max_batch": 8, "window_ms": 0.0}),
        stored("mnist-v1", model="mnist", override={"replicas": 4}),
    ],
    "endpoints": [
        Endpoint.model_validate(
            {"name": name, "targets": [{"deployment": f"{name}-v1"}], "revision": 4, **more}
        ).model_dump(mode="json")
        for name, more in (("digits", {"default_timeout_ms": 5}), ("mnist", {}))
    ],
}


def test_an_export_states_what_differs_from_the_defaults() -> None:
    stated = selected(INTENTION, "digits")
    assert stated["deployments"] == [
        {
            "name": "digits-v1",
            "model": "digits",
            "version": 1,
            "min_replicas": 1,
            "max_replicas": 1,
            "batching": {"max_batch": 8},
            "threads": 2,
            "env": {"A": "1"},
        }
    ]
    targets = [{"deployment": "digits-v1", "weight": 100}]
    assert stated["endpoints"] == [{"name": "digits", "targets": targets, "default_timeout_ms": 5}]


def test_an_export_of_a_language_model_states_what_differs_from_the_defaults() -> None:
    deployment = INTENTION["deployments"][0] | {"llm": LlmSpec(slots=8).model_dump(mode="json")}
    stated = selected({"deployments": [deployment], "endpoints": []}, None)
    assert stated["deployments"][0]["llm"] == {"slots": 8}
    assert "llm" not in selected(INTENTION, None)["deployments"][0]


def test_an_export_is_what_apply_reads() -> None:
    stated = selected(INTENTION, None)
    text = text_of(stated, INTENTION["deployments"])
    assert documents(text, "state.yaml") == stated
    assert "# Needs the registered versions: digits 1, mnist 1" in text
    assert "mnist-v1 is held at 4 replicas" in text


def test_names_of_an_export() -> None:
    assert [d["name"] for d in selected(INTENTION, "mnist-v1")["deployments"]] == ["mnist-v1"]
    assert selected(INTENTION, "mnist-v1")["endpoints"] == []
    with pytest.raises(NotFound, match="deployed model 'absent'"):
        selected(INTENTION, "absent")
