"""The exit codes that docs/cli.md promises."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from tidegate.cli import app, exit_codes
from tidegate.client.errors import BadAnswer, Unreachable, from_answer
from tidegate.kernel import errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.BadRequest("x"), 1),
        (errors.Unauthorized("x"), 1),
        (errors.PayloadTooLarge("x"), 1),
        (BadAnswer("x"), 1),
        (exit_codes.UsageError("x"), 2),
        (errors.NotFound("x"), 3),
        (errors.ModelFailed("x"), 4),
        (errors.DeadlinePassed("x"), 5),
        (Unreachable("x"), 6),
        (errors.Unavailable("x"), 6),
        (errors.NoRoutes("x"), 6),
        (errors.Overloaded("x"), 7),
        (errors.NoCapacity("x"), 7),
        (errors.Conflict("x"), 7),
    ],
)
def test_codes(error: errors.TidegateError, code: int) -> None:
    assert exit_codes.code_of(error) == code


def run(monkeypatch: pytest.MonkeyPatch, error: BaseException, *arguments: str) -> int:
    """What ``tidegate version`` exit_codes with when it ends in ``error``."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("tidegate.cli.output.show", fail)
    with pytest.raises(SystemExit) as ended:
        app.main(["version", *arguments])
    code = ended.value.code
    assert isinstance(code, int)
    return code


RID = "Request id: r9 (tidegate logs --request r9)"


def test_an_error_is_a_message_and_a_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = from_answer(
        503,
        {"retry-after": "7"},
        orjson.dumps({"error": "Full.", "reason": "overloaded", "request_id": "r9"}),
    )
    assert run(monkeypatch, refused) == 7
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["Error: Full.", "Try again in 7 s.", RID]


def test_with_json_an_error_is_one_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, errors.NotFound("No such thing."), "--json") == 3
    out, err = capsys.readouterr()
    assert orjson.loads(out) == {"error": "No such thing.", "reason": "not_found", "request_id": None}
    assert err == "Error: No such thing.\n"


def test_ctrl_c_has_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, KeyboardInterrupt()) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["scale"], ["scale", "x"], ["scale", "x", "1", "--auto"]]
)
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app.main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().out == ""
