"""``tidegate alerts``: alerts, their history, silences, receivers and rules."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import Doc, Service, control, part
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json, Limit, seconds
from tidegate.kernel.protocol.change_kinds import CHANGE_KINDS

alerts = typer.Typer(
    name="alerts",
    help="List, silence and test the alerts of endpoints, and set the receivers.",
    invoke_without_command=True,
)


class Export(str, Enum):
    """A format of exported alert rules."""

    PROMETHEUS = "prometheus"


class Severity(str, Enum):
    """The lowest severity of the alerts that a receiver gets."""

    WARNING = "warning"
    CRITICAL = "critical"


@alerts.callback()
def listed(
    context: typer.Context,
    firing: Annotated[bool, typer.Option("--firing", help="List only alerts that fire.")] = False,
    history: Annotated[bool, typer.Option("--history", help="List past alerts, newest first.")] = False,
    export: Annotated[
        Export | None, typer.Option("--export", help="Print the rules for Prometheus and Alertmanager.")
    ] = None,
    limit: Limit = 50,
    json: Json = False,
) -> None:
    """List the alerts that fire or are pending. Example: tidegate alerts --firing"""
    if context.invoked_subcommand is not None:
        return

    if export is not None:
        _export(json)
    elif history:
        items = _router().items("/v1/alerts/history", limit=limit)
        output.show({"items": items}, json, lambda: _print(items, "No alert has fired yet."))
    else:
        items = _router().items("/v1/alerts", state="firing" if firing else None)
        items = [each for each in items if firing or each["state"] != "resolved"]
        output.show({"items": items}, json, lambda: _print(items, "No alert fires or is pending."))


@alerts.command()
def silence(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The endpoint; * matches any text, ? one character.")
    ],
    length: Annotated[str, typer.Option("--for", metavar="TIME", help="Duration, such as 2h.")],
    why: Annotated[str, typer.Option("--why", metavar="TEXT", help="The reason, shown to other operators.")],
    rule: Annotated[str, typer.Option("--rule", metavar="RULE", help="Only this rule.")] = "*",
    json: Json = False,
) -> None:
    """Silence an endpoint's alerts for a time. They still fire, but are not sent.

    Example: tidegate alerts silence digits --for 2h --why "load test" --rule QueueAge
    """
    body = {"endpoint": name, "rule": rule, "for_s": seconds(length), "why": why}
    made = _router().post("/v1/alerts/silences", body)
    until = output.moment(made["until"])
    text = f"Silence {made['id']}: alerts {made['rule']} of {made['endpoint']} are not sent until {until}."
    output.show(made, json, lambda: output.line(text))


@alerts.command()
def silences(json: Json = False) -> None:
    """List the silences that have not ended. Example: tidegate alerts silences --json"""
    items = _router().items("/v1/alerts/silences")
    rows = [(s["id"], s["endpoint"], s["rule"], output.moment(s["until"]), s["by"], s["why"]) for s in items]
    heads = ("id", "endpoint", "rule", "until", "by", "why")
    output.show({"items": items}, json, lambda: output.table(rows, heads, "No silence."))


@alerts.command()
def unsilence(
    id: Annotated[str, typer.Argument(metavar="ID", help="The id, as `tidegate alerts silences` lists it.")],
    json: Json = False,
) -> None:
    """End a silence. Its alerts that still fire are sent now. Example: tidegate alerts unsilence 9f2c41d0"""
    _router().delete(f"/v1/alerts/silences/{part(id)}")
    output.show({"ended": id}, json, lambda: output.line(f"Silence {id} ended."))


@alerts.command("test")
def try_receivers(
    receiver: Annotated[
        str | None, typer.Argument(metavar="[RECEIVER]", help="One receiver; default: all.")
    ] = None,
    json: Json = False,
) -> None:
    """Send a test message, and print each receiver's answer.

    Exit code 1: a receiver did not accept the message, or no receiver exists. Example: tidegate alerts test
    chat
    """
    from urllib.parse import urlencode

    query = "" if receiver is None else f"?{urlencode({'receiver': receiver})}"
    items = _router().post(f"/v1/alerts/test{query}", {}, timeout=90.0)["items"]
    rows = [
        (i["name"], i["kind"], i["to"], "delivered" if i["delivered"] else "failed", i["answer"])
        for i in items
    ]
    heads = ("receiver", "kind", "to", "result", "answer")
    hint = "No receiver exists. Add one: tidegate alerts add-receiver NAME --webhook URL"
    output.show({"items": items}, json, lambda: output.table(rows, heads, hint))
    if not items or not all(each["delivered"] for each in items):
        raise typer.Exit(1)


@alerts.command()
def messages(limit: Limit = 20, json: Json = False) -> None:
    """List the latest messages to receivers, with their results. Example: tidegate alerts messages -n 5"""
    items = _router().items("/v1/alerts/messages", limit=limit)
    rows = [
        (output.moment(i["made_at"]), i["receiver"], i["title"], i["state"], i["attempt"], i["detail"])
        for i in items
    ]
    heads = ("at", "receiver", "message", "state", "attempts", "answer")
    output.show({"items": items}, json, lambda: output.table(rows, heads, "No message yet."))


@alerts.command()
def receivers(json: Json = False) -> None:
    """List the receivers of alerts and changes. Addresses are shortened, because some contain a secret.

    Example: tidegate alerts receivers
    """
    items = _router().items("/v1/alerts/receivers")
    rows = [(i["name"], i["kind"], i["to"], i["endpoint"], _gets(i)) for i in items]
    heads = ("receiver", "kind", "to", "names", "gets")
    hint = "No receiver exists. Add one: tidegate alerts add-receiver NAME --webhook URL"
    output.show({"items": items}, json, lambda: output.table(rows, heads, hint))


def _gets(receiver: Doc) -> str:
    if changes := receiver.get("changes"):  # an older router sends none
        return f"changes: {', '.join(changes)}"
    return f"alerts: {receiver['severity']}{' and worse' if receiver['severity'] == 'warning' else ''}"


@alerts.command()
def add_receiver(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The receiver's name.")],
    webhook: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A webhook, signed as in the Standard Webhooks specification."),
    ] = None,
    slack: Annotated[
        str | None,
        typer.Option(metavar="URL", help="An incoming webhook of Slack, or of a chat with the same format."),
    ] = None,
    email: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Needs TIDEGATE_SMTP_URL.")] = None,
    endpoint: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Only alerts of these endpoints, or changes of these models, deployments and endpoints; "
            "* matches any text, ? one character.",
        ),
    ] = "*",
    severity: Annotated[
        Severity, typer.Option(help=("Send only alerts of at least this severity."))
    ] = Severity.WARNING,
    changes: Annotated[
        str | None,
        typer.Option(
            metavar="KINDS",
            help="Send changes in the registry instead of alerts: `all`, or some of "
            + ",".join(CHANGE_KINDS)
            + ".",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Add or replace a receiver: a signed webhook, a chat with Slack's format, or an e-mail address.

    Examples: tidegate alerts add-receiver chat --slack https://hooks.slack.com/services/...
    tidegate alerts add-receiver ci --webhook https://ci.example.com/hook --changes version,alias
    """
    given = [(kind, to) for kind, to in (("webhook", webhook), ("slack", slack), ("email", email)) if to]
    if len(given) != 1:
        raise UsageError("Give exactly one of --webhook URL, --slack URL and --email ADDRESS.")
    ((kind, to),) = given
    body: dict[str, Any] = {"kind": kind, "to": to, "endpoint": endpoint, "severity": severity.value}
    if changes is not None:
        body["changes"] = _kinds(changes)
    made: Doc = _router().put(f"/v1/alerts/receivers/{part(name)}", body)
    what = "alerts" if changes is None else "changes in the registry"
    text = f"{name} receives {what}. Try it: tidegate alerts test {name}"
    output.show(made, json, lambda: output.line(text))


def _kinds(text: str) -> list[str]:
    """Return the kinds in the value of ``--changes``. Raise UsageError for an unknown kind."""
    if text == "all":
        return list(CHANGE_KINDS)
    kinds = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    unknown = [kind for kind in kinds if kind not in CHANGE_KINDS]
    if unknown or not kinds:
        wrong = f"has unknown kinds: {', '.join(unknown)}" if unknown else "names no kind"
        raise UsageError(f"--changes {wrong}. Write `all`, or some of {','.join(CHANGE_KINDS)}")
    return kinds


@alerts.command()
def remove_receiver(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The receiver's name.")], json: Json = False
) -> None:
    """Remove a receiver, and the messages that wait for it. Example: tidegate alerts remove-receiver chat"""
    _router().delete(f"/v1/alerts/receivers/{part(name)}")
    output.show({"removed": name}, json, lambda: output.line(f"{name} gets no more messages."))


def _print(items: list[Any], empty: str) -> None:
    rows = [
        (
            item["endpoint"],
            item["rule"],
            item["subject"],
            "silenced" if item.get("silence") else item["state"],
            item["severity"],
            output.moment(item["resolved_at"] if item["state"] == "resolved" else item["since"]),
            item["summary"],
            item["remedy"],
        )
        for item in items
    ]
    heads = ("endpoint", "rule", "of", "state", "severity", "since", "why", "next")
    output.table(rows, heads, empty)


def _export(json: bool) -> None:
    if json:
        output.dump({"items": _router().items("/v1/alerts/rules")})
    else:
        _router().download("/v1/alerts/prometheus", lambda piece: print(piece.decode(), end=""))


def _router() -> Service:
    return control().router
