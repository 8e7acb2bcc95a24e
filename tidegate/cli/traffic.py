"""Show and set how an endpoint's traffic is divided: ``tidegate traffic``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import Control, Doc, control, part
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json, parse_sticky

_HEADS = ("deployment", "version", "share", "gets now", "ready", "arriving/s", "note")
# At most this many of a rollout's last events are printed.
_EVENTS = 5
UNREADY = ("wake", "others", "fail")


def traffic(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The endpoint's name.")],
    rule: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            metavar="RULE",
            help="A rule: header:NAME[=VALUE]:VERSION or tenant:KEY_ID:VERSION. Repeatable. The given rules "
            "replace all earlier ones.",
        ),
    ] = None,
    no_rules: Annotated[bool, typer.Option("--no-rules", help="Remove all rules.")] = False,
    sticky: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="The sticky key: header:NAME, parameter:NAME, key (the caller's), or none."
        ),
    ] = None,
    when_unready: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY",
            help="What happens to the share of a target without a ready replica. wake: the target's requests "
            "wait, unless no replica can start; others: the other targets get the share; fail: the target "
            "always keeps it.",
        ),
    ] = None,
    feedback: Annotated[
        bool | None,
        typer.Option(
            "--feedback/--no-feedback",
            help="Add to each answer an id with which callers report feedback (POST /v1/feedback).",
        ),
    ] = None,
    failover: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VERSION",
            help="A version or Deployment that gets requests if the targets cannot answer them. "
            "Give it once for each. Together, they replace the earlier list; none: empties the list.",
        ),
    ] = None,
    reserve: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Reserve N replicas for this endpoint, from the target with the largest share; 0: none.",
        ),
    ] = None,
    weight: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Weight at a busy Deployment, relative to other endpoints: 1 to 100. Default: 1.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show how an endpoint's traffic is divided now, or set its rules and sticky keys.

    A version in the request decides first, then rules, then sticky keys, then the shares of
    `tidegate split`. Example: tidegate traffic digits --rule header:X-Beta=1:v2 --sticky header:X-User
    """
    plane = control()
    path = f"/v1/endpoints/{part(name)}"

    def changes(endpoint: Doc) -> Doc:
        given = {"feedback": feedback, "weight": weight, "reserved": reserve}
        changed = _changes(plane, endpoint, rule, no_rules, sticky, when_unready)
        changed |= {key: value for key, value in given.items() if value is not None}
        return changed | ({"failover": _failover(plane, endpoint, failover)} if failover else {})

    document = _document(plane, plane.registry.revise(path, changes))
    output.show(document, json, lambda: _print(document))


def _changes(
    plane: Control,
    endpoint: Doc,
    rules: Sequence[str] | None,
    no_rules: bool,
    sticky: str | None,
    when_unready: str | None,
) -> Doc:
    from tidegate.cli.rollout import chosen

    changes: Doc = {}
    if rules and no_rules:
        raise UsageError("Use --rule or --no-rules, not both.")
    if rules:
        parsed = [parse_rule(text) for text in rules]
        held = plane.registry.pages("/v1/deployments")
        for each in parsed:
            each["deployment"] = chosen(endpoint, held, {each["deployment"]: 1})[0]["deployment"]
        changes["rules"] = parsed
    elif no_rules:
        changes["rules"] = []
    if sticky is not None:
        changes["sticky"] = parse_sticky(sticky)
    if when_unready is not None:
        if when_unready not in UNREADY:
            raise UsageError(f"--when-unready must be one of {', '.join(UNREADY)}, got {when_unready!r}.")
        changes["when_unready"] = when_unready
    return changes


def _failover(plane: Control, endpoint: Doc, named: Sequence[str]) -> list[str]:
    """Return the names of the Deployments in ``--failover`` options, each given by version or by name.

    Raise BadRequest for a version without a Deployment.
    """
    from tidegate.cli.rollout import chosen

    if list(named) == ["none"]:
        return []
    held = plane.registry.pages("/v1/deployments")
    known = {each["name"] for each in held}
    return [
        each if each in known else str(chosen(endpoint, held, {each: 1})[0]["deployment"]) for each in named
    ]


def parse_rule(text: str) -> dict[str, Any]:
    """Parse a ``--rule`` option. The result's ``deployment`` is the version or name in the option.

    A header's value can contain colons, so the version is the part after the last colon. Raise UsageError for
    other texts.
    """
    condition, colon, target = text.rpartition(":")
    kind, _, subject = condition.partition(":")
    if not colon or not target or not subject or kind not in ("header", "tenant"):
        raise UsageError(
            f"{text!r} is not a rule: write header:NAME:VERSION, header:NAME=VALUE:VERSION or "
            "tenant:KEY_ID:VERSION, as in header:X-Beta=1:v2."
        )
    if kind == "tenant":
        return {"tenant": subject, "deployment": target}
    header, equals, value = subject.partition("=")
    return {"header": header, "value": value if equals else None, "deployment": target}


def _document(plane: Control, endpoint: Doc) -> Doc:
    from tidegate.cli import canary_state, experiment, shadow

    table = plane.router.get("/v1/routes")
    entry = table["endpoints"].get(endpoint["name"], {})
    loads = {each["deployment"]: each for each in plane.autoscaler.items("/v1/deployments")}
    return {
        "endpoint": endpoint["name"],
        "targets": rows(endpoint, entry, table["deployments"], loads),
        "rules": endpoint["rules"],
        "sticky": endpoint["sticky"],
        "when_unready": endpoint["when_unready"],
        "feedback": endpoint["feedback"],
        "shadow": shadow.read(plane, endpoint["name"]) if endpoint.get("shadow") is not None else None,
        "weight": endpoint["weight"],
        "experiment": experiment.read(plane, endpoint["name"])
        if endpoint["experiment"] is not None
        else None,
        "rollout": canary_state.read(plane, endpoint["name"]) if endpoint["rollout"] is not None else None,
        "failover": endpoint["failover"],
        "reserved": endpoint["reserved"],
    }


def rows(
    endpoint: Mapping[str, Any],
    entry: Mapping[str, Any],
    deployments: Mapping[str, Mapping[str, Any]],
    loads: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Return a row for each Deployment of an endpoint: wanted share, present share, and a note.

    The note says why the two shares differ, or what happens to the requests if no replica is ready.

    ``entry``: the endpoint in the route table; empty if the route table does not have the endpoint yet.
    """
    wanted = {target["deployment"]: target["weight"] for target in endpoint["targets"]}
    now = {target["deployment"]: target["weight"] for target in entry.get("targets", ())}
    whole, part_now = sum(wanted.values()) or 1, sum(now.values()) or 1
    withheld = entry.get("withheld", {})
    rules = [rule["deployment"] for rule in endpoint["rules"]]
    spare = endpoint.get("failover", [])
    names = dict.fromkeys([*wanted, *now, *rules, *spare])
    return [
        {
            "deployment": name,
            "version": deployments.get(name, {}).get("version"),
            "share": 100 * wanted.get(name, 0) / whole,
            "now": 100 * now.get(name, 0) / part_now,
            "ready": deployments.get(name, {}).get("ready"),
            "arrival_rate": loads.get(name, {}).get("arrival_rate"),
            "note": _note(name, wanted, now, withheld, spare)
            or (_unready(deployments.get(name, {}), loads.get(name, {})) if now.get(name) else ""),
        }
        for name in names
    ]


def _note(
    name: str,
    wanted: Mapping[str, int],
    now: Mapping[str, int],
    withheld: Mapping[str, str],
    spare: Sequence[str],
) -> str:
    if name in withheld:
        return f"its share goes to the others: {withheld[name]}"
    if name in spare and name not in wanted:
        return (
            "failover: serves now"
            if name in now
            else "failover: gets requests that the targets cannot answer"
        )
    if name not in wanted:
        return "serves until the new targets are ready" if name in now else "by rules only"
    return "waits until every new target is ready" if wanted[name] and name not in now else ""


def _unready(deployment: Mapping[str, Any], status: Mapping[str, Any]) -> str:
    """Return what happens to a target's requests if the target has no ready replica.

    Return an empty string if it has a ready replica.
    """
    if deployment.get("ready", 1):
        return ""
    if not deployment.get("wakeable", True):
        return "its requests fail: the deployment is held at 0 replicas"
    loaded = next((c for c in status.get("conditions", ()) if c["type"] == "Loaded" and not c["ok"]), None)
    if loaded is not None:
        return f"its requests fail: {loaded['message']}"
    return "its requests wait for a replica"


def _print(document: Mapping[str, Any]) -> None:
    from tidegate.cli import canary_state, experiment, output, shadow

    output.table(
        [
            (
                each["deployment"],
                each["version"],
                f"{each['share']:.4g}%",
                f"{each['now']:.4g}%",
                each["ready"],
                each["arrival_rate"],
                each["note"],
            )
            for each in document["targets"]
        ],
        _HEADS,
    )
    for rule in document["rules"]:
        output.line(f"rule: {_condition(rule)} -> {rule['deployment']}")
    sticky = document["sticky"]
    if sticky:
        output.line(f"sticky: by {sticky['by']}{' ' + sticky['name'] if sticky['name'] else ''}")
    if document["feedback"]:
        output.line("answers get an id for feedback: X-Feedback-Id")
    if document["shadow"] is not None:
        output.line(f"shadow: {shadow.line_of(document['shadow'])}")
    if document["reserved"]:
        output.line(f"replicas that serve only this endpoint: {document['reserved']}")
    if document["weight"] != 1:
        output.line(f"weight beside other endpoints on the same Deployment: {document['weight']}")
    if document["experiment"] is not None:
        output.line(f"experiment: {experiment.line_of(document['experiment'])}")
    if document["rollout"] is not None:
        output.line(f"rollout: {canary_state.line_of(document['rollout'])}")
        for event in document["rollout"]["rollout"]["history"][-_EVENTS:]:
            output.line(f"  {canary_state.event_line(event)}")
    output.line(f"a target without a ready replica: {document['when_unready']}", style="dim")


def _condition(rule: Mapping[str, Any]) -> str:
    parts = []
    if rule["header"] is not None:
        parts.append(rule["header"] + (f" = {rule['value']}" if rule["value"] is not None else ""))
    if rule["tenant"] is not None:
        parts.append(f"tenant {rule['tenant']}")
    return " and ".join(parts)
