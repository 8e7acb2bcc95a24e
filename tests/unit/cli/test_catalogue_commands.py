"""Whole commands of the catalogue against a control plane in memory."""

from __future__ import annotations

from typing import Any

import httpx
import orjson

from tests.unit.cli.test_commands import VERSION, deployable  # noqa: F401

PATH = "/v1/models/digits/versions"
NUMBERED = {**VERSION, "number": 3, "requirements": ["torch"], "aliases": ["champion"]}
VIEW = {
    "stage": "staging",
    "approvals": [{"stage": "production", "by": "ann", "at": "2026-01-01T00:00:00Z", "comment": "fine"}],
    "next": "production",
    "missing": ["it has 1 of 2 approvals"],
}


def sent(plane: Any) -> Any:
    """Return the last body that a command sent."""
    return orjson.loads(plane.bodies[-1])


def test_search_reads_all_pages(plane: Any, tidegate: Any) -> None:
    def page(request: httpx.Request) -> httpx.Response:
        query = dict(request.url.params)
        following = None if "cursor" in query else "next-page"
        assert query["filter"] == "accuracy > 0.9"
        return httpx.Response(200, json={"items": [VERSION], "next": following})

    plane.answers["GET /v1/versions"] = page
    code, out, _ = tidegate("search", "accuracy > 0.9", "--json")
    assert (code, len(orjson.loads(out)["items"])) == (0, 2)
    code, out, _ = tidegate("search", "accuracy > 0.9", "-n", "1")
    assert (code, len(out.splitlines())) == (0, 2)
    assert "accuracy=0.98" in out


def test_show_describe_and_card(plane: Any, tidegate: Any) -> None:
    plane.answers |= {
        f"GET {PATH}/latest": NUMBERED,
        f"GET {PATH}/champion": NUMBERED,
        f"PATCH {PATH}/3": NUMBERED,
        f"GET {PATH}/3/card": {"text": "# Digits\n"},
        f"DELETE {PATH}/3/card": None,
    }
    code, out, _ = tidegate("show", "digits@champion")
    assert code == 0
    assert [
        line.split() for line in out.splitlines() if line.startswith(("version ", "metrics", "requ"))
    ] == [
        ["version", "digits@3"],
        ["metrics.accuracy", "0.98"],
        ["requirement", "torch"],
    ]
    code, _, _ = tidegate(
        "describe", "digits", "--tag", "team=a", "--remove", "owner", "--remove", "tags.old"
    )
    assert code == 0
    assert sent(plane) == {"metadata_patch": {"tags": {"team": "a", "old": None}, "owner": None}}
    code, _, error = tidegate("describe", "digits")
    assert (code, "Name a change" in error) == (2, True)
    assert tidegate("card", "digits")[1] == "# Digits\n"
    assert tidegate("card", "digits", "--set", "absent.md")[0] == 2
    assert tidegate("card", "digits", "--set", "a.md", "--delete")[0] == 2


def test_aliases(plane: Any, tidegate: Any) -> None:
    path = "/v1/models/digits/aliases"
    move = {"at": "2026-01-01T00:00:00Z", "by": "ann", "from_version": None, "to_version": 3}
    plane.answers |= {
        f"GET {PATH}/latest": NUMBERED,
        f"PUT {path}/champion": {"alias": "champion", "version": 3},
        f"GET {path}": {"items": [{"alias": "champion", "version": 3}]},
        f"GET {path}/champion": {"alias": "champion", "version": 3, "moves": [move]},
    }
    code, out, _ = tidegate("alias", "set", "digits", "champion", "latest", "--expected", "2")
    assert (code, out) == (0, "digits@champion is version 3 now.\n")
    assert sent(plane) == {"version": 3, "expected": 2}
    assert tidegate("alias", "list", "digits")[1].splitlines()[1].split() == ["champion", "3"]
    assert tidegate("alias", "history", "digits", "champion")[1].splitlines()[1].split()[2:] == [
        "ann",
        "-",
        "3",
    ]


def test_a_version_with_an_alias_keeps_its_deployments(plane: Any, tidegate: Any) -> None:
    plane.answers[f"GET {PATH}/3"] = NUMBERED
    code, _, error = tidegate("delete", "digits", "--version", "3", "--yes")
    assert (code, "has the alias champion, so nothing was deleted" in error) == (7, True)
    assert not any("DELETE" in call for call in plane.seen)


def test_undelete_and_retention(plane: Any, tidegate: Any) -> None:
    fate = {"version": 1, "delete": True, "reason": "this version is not among the newest 3"}
    policy = {"retention": {"keep_last": 3, "max_age_days": None, "sleeping": False}}
    plane.answers |= {
        f"POST {PATH}/3/restore": {"versions": [3]},
        "POST /v1/models/digits/restore": {"versions": [1, 3]},
        "GET /v1/models/digits/policy": policy,
        "PATCH /v1/models/digits/policy": policy,
        "POST /v1/models/digits/retention": {"applied": False, "items": [fate]},
    }
    assert "restored: digits version 3" in tidegate("undelete", "digits@3")[1]
    assert "version 1, 3" in tidegate("undelete", "digits")[1]
    assert tidegate("undelete", "digits@champion")[0] == 2
    code, out, _ = tidegate("retention", "digits", "--keep-last", "3", "--dry-run")
    assert (code, out.splitlines()[-1].split()[:2]) == (0, ["1", "delete"])
    assert sent(plane) == {"retention": {**policy["retention"], "keep_last": 3}}
    assert "autoscaler" not in " ".join(plane.seen)
    assert not any("PATCH" in call for call in plane.seen), "a dry run changes nothing"
    assert tidegate("retention", "digits", "--keep-last", "3", "--now")[0] == 0
    assert plane.seen[-3:] == [
        f"registry {call}"
        for call in (
            "PATCH /v1/models/digits/policy",
            "GET /v1/models/digits/policy",
            "POST /v1/models/digits/retention",
        )
    ]
    assert tidegate("retention", "digits", "--now", "--dry-run")[0] == 2


def test_stages_and_approvals(plane: Any, tidegate: Any, tmp_path: Any) -> None:
    stage = {"name": "production", "approvals": 2, "scope": "operate", "verified": True, "checks": ""}
    policy = {"stages": [stage], "serve_from": "production"}
    plane.answers |= {
        f"GET {PATH}/3": NUMBERED,
        f"GET {PATH}/3/stage": VIEW,
        f"PUT {PATH}/3/stage": VIEW,
        f"POST {PATH}/3/approvals": VIEW,
        f"DELETE {PATH}/3/approvals/production": None,
        "GET /v1/models/digits/policy": policy,
        "PATCH /v1/models/digits/policy": policy,
    }
    code, out, _ = tidegate("stage", "digits@3")
    assert (code, "digits@3 is in the stage staging." in out) == (0, True)
    assert "For production: it has 1 of 2 approvals." in out
    tidegate("stage", "digits@3", "--to", "production")
    assert sent(plane) == {"stage": "production"}
    tidegate("approve", "digits@3", "--stage", "production", "--comment", "fine")
    assert sent(plane) == {"stage": "production", "comment": "fine"}
    assert tidegate("approve", "digits@3", "--stage", "production", "--withdraw")[0] == 0
    (tmp_path / "stages.yaml").write_text("stages: [{name: production, approvals: 2}]\n")
    code, out, _ = tidegate("stages", "digits", "--set", "stages.yaml")
    assert (code, out.splitlines()[1].split()) == (
        0,
        ["production", "2", "operate", "yes", "-", "from", "here", "on"],
    )
    assert sent(plane) == {"serve_from": None, "stages": [{"name": "production", "approvals": 2}]}
    (tmp_path / "wrong.yaml").write_text("stage: production\n")
    code, _, error = tidegate("stages", "digits", "--set", "wrong.yaml")
    assert (code, "needs `stages`" in error) == (2, True)
    tidegate("stages", "digits", "--off")
    assert sent(plane) == {"stages": None, "serve_from": None}


def test_compare_and_lineage(plane: Any, tidegate: Any) -> None:
    comparison = {
        "metrics": [{"name": "accuracy", "a": 0.8, "b": 0.9, "delta": 0.1, "percent": 12.5}],
        "capacity": [],
        "parameters": [],
        "tags": [],
        "fields": [],
        "requirements_added": [],
        "requirements_removed": [],
        "signature": {"known": True, "same": True, "compatible": True, "breaking": []},
    }
    ancestor = {"version": "digits@1", "known": True, "run": "r-1", "dataset": None, "commit": None}
    plane.answers |= {
        "GET /v1/compare": {"a": VERSION, "b": NUMBERED, "comparison": comparison},
        f"GET {PATH}/3": NUMBERED,
        f"GET {PATH}/3/lineage": {"ancestors": [ancestor], "children": []},
    }
    code, out, _ = tidegate("compare", "digits@1", "digits@3")
    assert (code, out.splitlines()[0].split()) == (0, ["WHAT", "DIGITS@1", "DIGITS@3", "DELTA"])
    assert out.splitlines()[-1] == "The signatures are the same."
    lines = tidegate("lineage", "digits@3")[1].splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["ancestor", "digits@1", "r-1"],
        ["itself", "digits@3", "-"],
    ]


def test_a_file_is_registered_without_serving_it(
    deployable: Any,  # noqa: F811
    tidegate: Any,
    tmp_path: Any,
) -> None:
    (tmp_path / "digits.onnx").write_bytes(b"model")
    (tmp_path / "card.md").write_text("# Digits\n")
    deployable.answers[f"PUT {PATH}/1/card"] = {"text": "# Digits\n"}
    arguments = ("--register-only", "--owner", "ann", "--framework", "xgboost==2.1.0", "--card", "card.md")
    code, out, error = tidegate("deploy", "digits.onnx", "--name", "digits", *arguments)
    assert code == 0, error
    assert out == "digits@1 is registered, and does not serve. To serve it: tidegate deploy digits@1\n"
    assert "registry POST /v1/deploy" not in deployable.seen
    assert "registry PUT /v1/models/digits/versions/1/card" in deployable.seen
    stated = [orjson.loads(body) for body in deployable.bodies if b'"artifact"' in body][-1]["metadata"]
    assert stated == {"framework": "xgboost", "framework_version": "2.1.0", "owner": "ann"}
