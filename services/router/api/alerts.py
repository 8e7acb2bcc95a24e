"""Routes of alerts: their states and history, silences, receivers, and the rules for Prometheus."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from services.router.adapters.alert_file import AlertFile, AlertMessage
from services.router.api.monitoring import leading
from services.router.application.alert_runner import AlertRunner, message_of
from services.router.application.alert_sender import AlertSender, described
from services.router.application.change_feed import CHANGE_PREFIX, change_message
from services.router.domain.alerts import formats
from services.router.domain.alerts.alert_rules import RULES
from services.router.domain.alerts.notifications import Notification, Receiver
from services.router.domain.alerts.prometheus import rule_file
from services.router.domain.alerts.registry_changes import TEST
from services.router.domain.alerts.silences import Silence
from services.router.domain.alerts.states import Alert
from tidegate.kernel.errors import BadRequest, NotFound, Unavailable
from tidegate.kernel.protocol.access import ADMIN, OPERATE, Principal
from tidegate.kernel.protocol.change_kinds import CHANGE_KINDS, ChangeKind
from tidegate.kernel.protocol.models import Name
from tidegate.kernel.protocol.webhooks import read_url
from tidegate.kernel.service.api import JsonRoute
from tidegate.kernel.service.caller import needs, require

router = APIRouter(prefix="/v1/alerts", tags=["alerts"], route_class=JsonRoute)
Operator = Annotated[Principal, Depends(needs(OPERATE))]
Pattern = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._*?-]+$")]


class NewSilence(BaseModel):
    """A silence for ``for_s`` seconds. In ``endpoint`` and ``rule``, ``*`` and ``?`` are wildcards."""

    model_config = ConfigDict(extra="forbid")

    endpoint: Pattern = "*"
    rule: Pattern = "*"
    severity: Literal["*", "warning", "critical"] = "*"
    for_s: float = Field(gt=0, le=366 * 86_400, allow_inf_nan=False)
    why: str = Field(min_length=1, max_length=500)


class ReceiverBody(BaseModel):
    """A receiver of the alerts whose severity is ``severity`` or worse, or of changes in the registry.

    ``to``: a URL or an e-mail address. ``changes``: the kinds of objects whose changes the receiver gets. If
    it is not empty, the receiver gets no alerts.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["webhook", "slack", "email"]
    to: str = Field(min_length=3, max_length=2048)
    endpoint: Pattern = "*"
    severity: Literal["warning", "critical"] = "warning"
    changes: list[ChangeKind] = Field(default_factory=list, max_length=len(CHANGE_KINDS))


def _runner(request: Request) -> AlertRunner:
    leading(request)
    runner: AlertRunner = request.app.state.alerts
    return runner


def _file(request: Request) -> AlertFile:
    """Return the file of alerts. Raise Unavailable if this router does not lead.

    Unlike :func:`_runner`, this also works before the first reading of the traffic.
    """
    if not request.app.state.watch.leads:
        raise Unavailable("this router does not lead: retry in a few seconds", retry_after_s=5.0)
    runner: AlertRunner = request.app.state.alerts
    return runner.file


@router.get("")
async def list_all(
    request: Request, state: Literal["pending", "firing", "resolved"] | None = None
) -> dict[str, Any]:
    """List the alerts, worst first, each with the silence that matches it (or null)."""
    runner = _runner(request)
    silenced = runner.silenced(time.time())
    alerts = [each for each in runner.alerts.values() if state in (None, each.state)]
    alerts.sort(key=lambda each: (each.state != "firing", each.severity, each.endpoint, each.rule))
    items = [
        formats.public(each) | {"silence": silenced[each.key].to_json() if each.key in silenced else None}
        for each in alerts
    ]
    return {"items": items}


@router.get("/history")
async def history(
    request: Request, endpoint: str | None = None, limit: int = Query(100, ge=1, le=10_000)
) -> dict[str, Any]:
    """List the last alerts that fired or were resolved, newest first."""
    events = await asyncio.to_thread(_file(request).events, endpoint, limit)
    return {"items": [formats.public(each) for each in events]}


@router.get("/rules")
async def rules() -> dict[str, Any]:
    """List the alert rules."""
    return {
        "items": [
            {
                "rule": each.name,
                "severity": each.severity,
                "for_s": each.for_s,
                "description": each.description,
                "expression": each.expression,
                "remedy": each.remedy,
            }
            for each in RULES
        ]
    }


@router.get("/prometheus", response_class=PlainTextResponse)
async def prometheus() -> str:
    """Return the alert rules as a rule file for Prometheus."""
    return rule_file()


@router.get("/messages")
async def messages(
    request: Request, operator: Operator, limit: int = Query(100, ge=1, le=1000)
) -> dict[str, Any]:
    """List the last messages to receivers, with the result of each, newest first.

    Messages about changes are listed only for callers that may read the audit log.
    """
    found = await asyncio.to_thread(_file(request).messages, limit)
    shown = found if operator.may(ADMIN) else [m for m in found if not m.id.startswith(CHANGE_PREFIX)]
    return {"items": [each.public() for each in shown]}


@router.get("/silences")
async def silences(request: Request, _: Operator) -> dict[str, Any]:
    """List the silences that have not ended."""
    return {"items": [each.to_json() for each in _file(request).silences(time.time())]}


@router.post("/silences")
async def silence(request: Request, operator: Operator, body: NewSilence) -> dict[str, Any]:
    """Create a silence for the alerts that match its endpoint, its rule and its severity."""
    now = time.time()
    made = Silence(
        os.urandom(4).hex(), body.endpoint, body.rule, body.severity, now, now + body.for_s, body.why,
        operator.name or operator.id,
    )  # fmt: skip
    _file(request).save_silence(made, now)
    return made.to_json()


@router.delete("/silences/{id}", status_code=204)
async def unsilence(request: Request, _: Operator, id: str) -> Response:
    """End a silence."""
    file = _file(request)
    if id not in {each.id for each in file.silences(time.time())}:
        raise NotFound(f"There is no silence {id!r}. `tidegate alerts silences` lists them.")
    file.drop_silence(id)
    return Response(status_code=204)


@router.get("/receivers")
async def receivers(request: Request, _: Operator) -> dict[str, Any]:
    """List the receivers. Their addresses are shortened, because some contain a secret."""
    return {"items": [each.public() for each in _file(request).receivers()]}


@router.put("/receivers/{name}")
async def put_receiver(request: Request, _: Operator, name: Name, body: ReceiverBody) -> dict[str, Any]:
    """Create or replace a receiver. From now on it gets every alert or change that matches it.

    For a receiver of changes, or to replace one, the caller needs the scope ``admin``, as for reading the
    audit log.
    """
    file = _file(request)
    if body.changes or _gets_changes(file, name):
        require(ADMIN)
    _check_address(request, body)
    receiver = Receiver(name, body.kind, body.to, body.endpoint, body.severity, tuple(body.changes))
    file.save_receiver(receiver)
    return receiver.public()


@router.delete("/receivers/{name}", status_code=204)
async def delete_receiver(request: Request, _: Operator, name: str) -> Response:
    """Delete a receiver and the messages that wait for it.

    For a receiver of changes, the caller needs the scope ``admin``.
    """
    file = _file(request)
    _named(file.receivers(), name)
    if _gets_changes(file, name):
        require(ADMIN)
    file.drop_receiver(name)
    return Response(status_code=204)


@router.post("/test")
async def send_test(request: Request, _: Operator, receiver: str | None = None) -> dict[str, Any]:
    """Send a test message to all receivers or to one. Return each receiver's response."""
    found = _file(request).receivers()
    if receiver is not None:
        found = [_named(found, receiver)]
    sender: AlertSender = request.app.state.alert_sender
    results = await asyncio.gather(*(_try(request, sender, each) for each in found))
    return {"items": list(results)}


async def _try(request: Request, sender: AlertSender, receiver: Receiver) -> dict[str, Any]:
    now = time.time()
    mail_from = request.app.state.smtp_from
    if receiver.changes:
        return await _tried(sender, change_message(TEST, receiver, mail_from, now), receiver)
    alert = Alert(
        "test", "Test", "", "warning", "firing", now, now, 1.0, 1.0,
        "This is a test of Tidegate's alerts. Nothing is wrong.", "tidegate alerts", id="test", fired_at=now,
    )  # fmt: skip
    notification = Notification("test", (alert,))
    return await _tried(sender, message_of(notification, receiver, mail_from, now), receiver)


async def _tried(sender: AlertSender, message: AlertMessage, receiver: Receiver) -> dict[str, Any]:
    result = await sender.send(message, receiver)
    delivered = result.status is not None and 200 <= result.status < 300
    return receiver.public() | {
        "delivered": delivered, "status": result.status, "took_ms": result.took_ms,
        "answer": described(result),
    }  # fmt: skip


def _check_address(request: Request, body: ReceiverBody) -> None:
    if body.kind == "email":
        if not formats.is_address(body.to):
            raise BadRequest("`to` is not an e-mail address: write NAME@DOMAIN")
        if not request.app.state.mail.configured:
            raise BadRequest(
                "no SMTP server is configured: run `tidegate settings set TIDEGATE_SMTP_URL=smtp://...`"
            )
    elif read_url(body.to) is None:
        raise BadRequest("`to` must be a URL that begins with http:// or https:// and has no user name")


def _gets_changes(file: AlertFile, name: str) -> bool:
    return any(each.name == name and each.changes for each in file.receivers())


def _named(found: list[Receiver], name: str) -> Receiver:
    for each in found:
        if each.name == name:
            return each
    raise NotFound(f"There is no receiver {name!r}. `tidegate alerts receivers` lists them.")
