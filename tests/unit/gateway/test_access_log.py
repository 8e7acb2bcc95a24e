"""The access log writes whole lines, with ids and without keys, and a bounded number of errors."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from services.gateway.application.access_log import AccessLog
from services.gateway.application.inference.core import Timing
from tidegate.kernel.errors import NotFound
from tidegate.kernel.protocol.access import ANONYMOUS, Principal

WHO = Principal("3f2a", "team", frozenset())
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
HEADERS = {
    b"authorization": b"Bearer tg_3f2a_secret",
    b"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01".encode(),
}
ANSWER: Any = SimpleNamespace(
    timing=Timing(0.001, 0.002, 0.003, 0.0005),
    route=SimpleNamespace(name="digits-v2", version="2"),
    request=SimpleNamespace(id="mine"),
)


async def written(log: AccessLog, written: list[bytes]) -> list[dict[str, Any]]:
    """Return the written lines."""
    await log.stop()
    return [json.loads(line) for line in b"".join(written).splitlines()]


def access_log(**how: Any) -> tuple[AccessLog, list[bytes]]:
    found: list[bytes] = []
    return AccessLog(found.append, **{"first": 1, "fraction": 0.0, "errors_per_s": 5} | how), found


async def test_the_line_of_a_success_has_caller_model_and_times() -> None:
    log, lines = access_log()
    assert log.take()
    log.answered(
        "rest", "digits", ANSWER, WHO, "r" * 500, status=200, received=9, sent=3, total=0.01, headers=HEADERS
    )
    (line,) = await written(log, lines)
    assert line["request_id"] == "r" * 128
    assert (line["client_id"], line["trace_id"]) == ("mine", TRACE)
    assert (line["caller"], line["tenant"]) == ("3f2a", "team")
    assert (line["model"], line["version"], line["deployment"]) == ("digits", "2", "digits-v2")
    parts = sum(line[f"{part}_ms"] for part in ("decode", "transit", "wait", "compute", "encode"))
    assert parts == line["total_ms"] == 10.0
    assert b"secret" not in b"".join(lines)
    assert line["time"].endswith("+00:00")


async def test_a_caller_without_a_credential_has_no_name() -> None:
    log, lines = access_log()
    log.refused("grpc", "digits", NotFound("there is none"), ANONYMOUS, "r", status="NOT_FOUND")
    (line,) = await written(log, lines)
    assert "caller" not in line
    assert (line["reason"], line["problem"]) == ("not_found", "there is none")


async def test_a_flood_of_errors_is_bounded_and_counted() -> None:
    log, lines = access_log(errors_per_s=5)
    for number in range(1000):
        log.refused("rest", "digits", NotFound("no"), None, str(number), status=404)
    found = await written(log, lines)
    told = [line for line in found if "dropped" in line]
    assert len(found) - len(told) < 100
    assert sum(line["dropped"] for line in told) + len(found) - len(told) == 1000


async def test_a_log_that_is_off_takes_no_line() -> None:
    log = AccessLog.off()
    assert not any(log.take() for _ in range(10_000))
    log.refused("rest", "digits", NotFound("no"), None, "r", status=404)
    assert log._lines == []
