"""``tidegate shadow`` and ``rollout --shadow``: options and words."""

from __future__ import annotations

from typing import Any

import pytest

from tidegate.cli.exit_codes import UsageError
from tidegate.cli.export import selected
from tidegate.cli.shadow import line_of, options_of, show
from tidegate.kernel.protocol.models import Deployment, Endpoint, EndpointSpec

MADE = "2024-05-31T10:00:00Z"

SHADOW = {"deployment": "digits-v2", "rate": 20.0, "max_per_s": None, "until": None}
REPORT: dict[str, Any] = {
    "offered": 10, "copied": 8, "answered": 7, "in_flight": 0, "failed": {"no answer": 1},
    "refused": {"no ready replica": 2}, "compared": 7, "agreed": 6, "agreement": 6 / 7,
    "agreement_at_least": 0.5,
    "last_failure": "broken", "verdict": "too few", "why": "7 answers were compared",
    "outputs": {
        "y": {"compared": 7, "agreement": 6 / 7, "rows": 14, "top1": 1.0, "max_abs": 0.5, "max_rel": 0.1},
        "t": {"compared": 7, "agreement": 1.0, "texts": 7, "exact": 6 / 7, "edit_distance": 0.25},
    },
    "latency_ms": {
        "primary": {"p50": 1.0, "p90": 2.0, "p99": 3.0}, "shadow": {"p50": 1.5, "p90": 2.5, "p99": 3.5},
        "primary_call": None, "shadow_call": None,
    },
    "differing": [{"request": "r1", "output": "y", "difference": "1 of 2 values differ", "at": 0.0}],
}  # fmt: skip


def found(**more: Any) -> dict[str, Any]:
    return {"endpoint": "digits", "shadow": SHADOW, "problem": "", "report": REPORT, **more}


def test_options():
    options = options_of(20, 5, "1e-3", "2h", wake=True)
    assert {key: options[key] for key in ("rate", "max_per_s", "tolerance", "wake")} == {
        "rate": 20, "max_per_s": 5, "tolerance": {"rtol": 1e-3, "atol": 1e-3}, "wake": True,
    }  # fmt: skip
    assert options["until"].endswith("+00:00")
    assert options_of(None, None, "1e-3,1e-5", None, wake=False)["tolerance"] == {"rtol": 1e-3, "atol": 1e-5}
    with pytest.raises(UsageError, match="write one number"):
        options_of(None, None, "some", None, wake=False)
    with pytest.raises(UsageError, match="write one number"):
        options_of(None, None, "1,2,3", None, wake=False)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (found(), "digits-v2 gets 20% copies: too few: 7 answers were compared"),
        (found(report=None), "digits-v2 gets 20% copies: the router has not counted copies yet"),
        (found(problem="no region"), "digits-v2 gets 20% copies: no region"),
        (found(shadow=None), "the shadow has ended: too few: 7 answers were compared"),
        (found(shadow=None, report=None), "no shadow"),
    ],
)
def test_the_line(given, line):
    assert line_of(given) == line


def test_the_page_names_what_to_do_next(capsys):
    show(found())
    printed = capsys.readouterr().out
    for words in (
        "copies: 8 of 10 answered requests; 7 answered, 1 failed, 0 in flight",
        "Use --wake, or start one: tidegate scale digits-v2 1",
        "85.71% of 7",
        "100.00% of 14",
        "edit distance of the others 25.0%",
        "copies        1.5",
        "differs: request r1, y: 1 of 2 values differ",
    ):
        assert words in printed, printed
    show(found(shadow=None, report=None))
    assert "digits has no shadow. Start one: tidegate rollout digits" in capsys.readouterr().out


def test_an_export_has_the_shadow_with_its_deployment_but_not_the_id():
    shadow = {"deployment": "digits-v2", "rate": 20, "id": "s1"}
    endpoint = Endpoint.model_validate(
        {"name": "digits", "targets": [{"deployment": "digits-v1"}], "revision": 4, "shadow": shadow}
    )
    held = [
        Deployment.model_validate(
            {"name": f"digits-v{n}", "model": "digits", "version": n, "revision": 1, "created_at": MADE}
        ).model_dump(mode="json")
        for n in (1, 2)
    ]
    stated = selected({"deployments": held, "endpoints": [endpoint.model_dump(mode="json")]}, "digits")
    assert [each["name"] for each in stated["deployments"]] == ["digits-v1", "digits-v2"]
    (found,) = stated["endpoints"]
    assert (found["shadow"]["deployment"], found["shadow"]["rate"], "id" in found["shadow"]) == (
        "digits-v2",
        20,
        False,
    )
    EndpointSpec.model_validate(found)
