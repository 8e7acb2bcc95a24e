"""Commands about scaling: ``deployments``, ``why``, ``policy``, ``pause``, ``drain`` and others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import control, part
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json, Name, seconds

For = Annotated[str | None, typer.Option("--for", metavar="TIME", help="Duration, such as 2h.")]

_HEADS = (
    "deployment", "desired", "ready", "starting", "draining", "limits", "queue", "arriving/s", "served/s",
    "busy", "wait ms", "per hour", "rule",
)  # fmt: skip
_PLACES = ("min_replicas", "max_replicas", "scale_to_zero_after_s", "target_wait_ms")


def deployments(json: Json = False) -> None:
    """List the deployments: replicas, queue, rates, predicted wait, cost."""
    items = control().autoscaler.items("/v1/deployments")
    rows = [deployment_row(item) for item in items]
    output.show({"items": items}, json, lambda: output.table(rows, _HEADS, "Nothing is deployed."))


def deployment_row(status: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a deployment's status as a row."""
    limits, busy = status.get("limits"), status.get("utilization")
    return (
        status["deployment"],
        *(status[phase] for phase in ("desired", "ready", "starting", "draining")),
        None if limits is None else f"{limits[0]}-{limits[1]}",
        *(status.get(key) for key in ("queue", "arrival_rate", "service_rate")),
        None if busy is None else f"{busy:.0%}",
        *(status.get(key) for key in ("predicted_wait_ms", "cost_per_hour", "rule")),
    )


def why(name: Name, json: Json = False) -> None:
    """Explain a deployment's number of replicas: rule, bounds, signals, ended replicas and decisions."""
    plane = control()
    found = plane.autoscaler.get(f"/v1/deployments/{part(plane.deployment_of(name))}/why")
    output.show(found, json, lambda: _tell(found))


def _tell(found: Mapping[str, Any]) -> None:
    there = ", ".join(f"{count} {phase}" for phase, count in found["replicas"].items() if count)
    output.line(f"{found['deployment']}: {found['desired']} wanted ({there or 'none running'})", style="bold")
    output.line(f"  {found['rule']}: {found['reason']}")
    bounds = found["policy"]["bounds"]
    output.line(
        f"  between {bounds['low']} ({bounds['low_rule']}) and {bounds['high']} ({bounds['high_rule']})"
    )
    for hold in found["holds"]:
        output.line(f"  {hold}")
    if found["needs"]:
        output.line()
        rows = [(need["rule"], need["replicas"], need["why"]) for need in found["needs"]]
        output.table(rows, ("rule", "needs", "because"))
    signals = {key: value for key, value in (found["signals"] or {}).items() if value not in (None, "", 0)}
    output.line()
    output.line(f"signals: {output.text_of(signals)}", style="dim")
    for end in found["ended"]:
        output.line(f"ended {output.moment(end['at'])}  {end['replica']}: {end['cause']}: {end['message']}")
    output.line()
    decisions = [
        (output.moment(d["at"]), f"{d['before']} -> {d['after']}", d["rule"], d["reason"])
        for d in found["decisions"]
    ]
    output.table(decisions, ("time", "replicas", "rule", "reason"), "No decision yet.")


def policy(
    name: Name,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Change a field, such as aggressiveness=latency. An empty value means the default. "
            "Repeatable.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show a deployment's scaling policy, or change fields of it."""
    plane = control()
    path = f"/v1/deployments/{part(plane.deployment_of(name))}/policy"
    autoscaler = plane.autoscaler
    found = autoscaler.patch(path, changes_of(change)) if change else autoscaler.get(path)
    output.show(found, json, lambda: _show_policy(found))


def changes_of(given: list[str]) -> dict[str, Any]:
    """Parse ``FIELD=VALUE`` options as a change of a policy. Raise UsageError for other options."""
    import yaml

    plain: dict[str, Any] = {}
    scaling: dict[str, Any] = {}
    for text in given:
        field, equals, value = text.partition("=")
        if not equals or not field:
            raise UsageError(f"{text!r}: write FIELD=VALUE, such as max_replicas=4.")
        try:
            parsed = yaml.safe_load(value) if value else None
        except yaml.YAMLError:
            raise UsageError(f"{text!r}: {value!r} is not YAML.") from None
        (plain if field in _PLACES else scaling)[field.removeprefix("scaling.")] = parsed
    return {**plain, **({"scaling": scaling} if scaling else {})}


def _show_policy(found: Mapping[str, Any]) -> None:
    given = {**found["given"], **found["given"]["scaling"]}
    del given["scaling"]
    output.table(list(given.items()), ("given", "value"))
    output.line()
    bounds = found["bounds"]
    told = [("bounds", f"{bounds['low']} to {bounds['high']}")]
    told += [(f"{side} by", bounds[f"{side}_rule"]) for side in ("low", "high")]
    output.table([*found["effective"].items(), *told], ("in force", "value"))


def pause(
    name: Name,
    hold: Annotated[
        bool, typer.Option("--hold", help="Keep the current replicas, whatever the load.")
    ] = False,
    duration: For = None,
    json: Json = False,
) -> None:
    """Stop a deployment's replicas, whatever the load. With --hold, keep them and only stop scaling."""
    body = {"hold": hold, "ttl_s": None if duration is None else seconds(duration)}
    until = f" for {duration}" if duration else " until `tidegate resume`"
    _ask(name, "pause", body, lambda a: f"is held at {a['replicas']} replicas{until}", json)


def resume(name: Name, json: Json = False) -> None:
    """Let a deployment scale by its policy again."""
    _ask(name, "resume", {}, lambda _: "scales by its policy again", json)


def drain(
    replica: Annotated[
        str, typer.Argument(metavar="REPLICA", help="Name of the replica, as `tidegate replicas` lists it.")
    ],
    json: Json = False,
) -> None:
    """Drain one replica: it finishes its requests and exits. Another replica replaces it."""
    found = control().autoscaler.post(f"/v1/replicas/{part(replica)}/drain", {})
    output.show(found, json, lambda: output.line(f"{replica} drains"))


def cordon(
    host: Annotated[
        str | None, typer.Argument(metavar="HOST", help="The host; default: list the hosts.")
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Allow new replicas on the host again.")] = False,
    drain_: Annotated[bool, typer.Option("--drain", help="Also drain the host's replicas.")] = False,
    json: Json = False,
) -> None:
    """Start no more replicas on a host. Without HOST, list the hosts and their free capacity."""
    autoscaler = control().autoscaler
    if host is None:
        if off or drain_:
            raise UsageError("Name the host. List the hosts: tidegate cordon")
        items = autoscaler.items("/v1/hosts")
        room = ("cores", "memory_mb", "available_mb")
        rows = [
            (h["host"], h["replicas"], output.moment(h["cordoned_at"]), *(h.get(key) for key in room))
            for h in items
        ]
        heads = ("host", "replicas", "cordoned", "cores", "MiB", "MiB available")
        output.show({"items": items}, json, lambda: output.table(rows, heads))
        return
    path = f"/v1/hosts/{part(host)}/cordon"
    found = autoscaler.delete(path) if off else autoscaler.put(path, {"drain": drain_})
    told = "takes replicas again" if off else "takes no more replicas"
    gone = f"; {len(found['drained'])} drain" if found.get("drained") else ""
    output.show(found, json, lambda: output.line(f"{host} {told}{gone}"))


def warm(json: Json = False) -> None:
    """List the warm pools: workers that run a model server and wait for a model."""
    items = control().autoscaler.items("/v1/warm")
    rows = [
        (each["pool"], each["workers"], len(each["ready"]), each["there"], each["image"], each["problem"])
        for each in items
    ]
    columns = ("pool", "wanted", "ready", "there", "image", "problem")
    none = "No warm pool exists. To have one, set TIDEGATE_AUTOSCALER_WARM."
    output.show({"items": items}, json, lambda: output.table(rows, columns, none))


def _ask(name: str, verb: str, body: dict[str, Any], told: Any, json: bool) -> None:
    plane = control()
    deployment = plane.deployment_of(name)
    answer = plane.autoscaler.post(f"/v1/deployments/{part(deployment)}/{verb}", body)
    output.show(answer, json, lambda: output.line(f"{deployment} {told(answer)}"))
