"""``tidegate replay``: compare scaling policies on the same arrivals."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import control
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json, Name, seconds
from tidegate.cli.scaling import changes_of

_ARRIVALS, _POLICIES, _REPLICAS = "Arrivals", "Policies", "Speed of a replica"
TIME_LIMIT_S = 300.0

_HEADS = (
    "policy", "late", "wait p50", "p95", "p99 ms", "expired", "replica h", "cost", "most", "changes", "turns"
)  # fmt: skip


class Shape(str, Enum):
    """A shape of generated arrivals."""

    CONSTANT = "constant"
    STEP = "step"
    RAMP = "ramp"
    SPIKE = "spike"
    DIURNAL = "diurnal"
    WORKDAY = "workday"
    BURSTY = "bursty"


def replay(
    name: Name,
    recorded: Annotated[
        bool,
        typer.Option(
            "--recorded",
            help="Replay recorded arrivals. --for sets how far back they go.",
            rich_help_panel=_ARRIVALS,
        ),
    ] = False,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            metavar="FILE.csv",
            help="File of arrivals, with lines `time` or `time,count`.",
            rich_help_panel=_ARRIVALS,
        ),
    ] = None,
    shape: Annotated[
        Shape, typer.Option(help="Shape of generated arrivals.", rich_help_panel=_ARRIVALS)
    ] = Shape.SPIKE,
    rps: Annotated[float, typer.Option(help="Requests per second.", rich_help_panel=_ARRIVALS)] = 10.0,
    factor: Annotated[
        float, typer.Option(help="Peak rate, as a multiple of --rps.", rich_help_panel=_ARRIVALS)
    ] = 10.0,
    duration: Annotated[
        str, typer.Option("--for", metavar="TIME", help="Length of the arrivals.", rich_help_panel=_ARRIVALS)
    ] = "10m",
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="FIELD=VALUE[;...]",
            help="Another policy to compare, written as for `policy --set`; repeatable.",
            rich_help_panel=_POLICIES,
        ),
    ] = None,
    keda: Annotated[bool, typer.Option("--keda", help="KEDA's formula.", rich_help_panel=_POLICIES)] = False,
    knative: Annotated[
        bool, typer.Option("--knative", help="Knative's formula.", rich_help_panel=_POLICIES)
    ] = False,
    call_ms: Annotated[
        float | None,
        typer.Option(help="Milliseconds of a model call; default: as measured.", rich_help_panel=_REPLICAS),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Requests in one call.", rich_help_panel=_REPLICAS)
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(help="Calls that a replica runs at the same time.", rich_help_panel=_REPLICAS),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Tokens in each prompt (language models).", rich_help_panel=_REPLICAS)
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Time that a replica needs to start.", rich_help_panel=_REPLICAS),
    ] = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Write a picture.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Repeat the recorded decisions, and compare the results.")
    ] = False,
    json: Json = False,
) -> None:
    """Replay arrivals with the deployment's scaling policy and with others, and compare the results.

    The results are waits, late requests and cost. Arrivals are generated (--shape), read from a file, or
    recorded. The autoscaler's own code makes the decisions.
    """
    plane = control()
    deployment = plane.deployment_of(name)
    if verify:
        _verify(plane, deployment, seconds(duration), json)
        return
    if recorded and file:
        raise UsageError("--recorded and --file exclude each other.")
    out = picture or Path(f"{deployment}-replay.png")
    order = {
        "deployment": deployment,
        "arrivals": _arrivals(recorded, file, shape.value, rps, factor, seconds(duration)),
        "policies": [variation(text) for text in with_ or ()],
        "others": [other for other, wanted in (("keda", keda), ("knative", knative)) if wanted],
        "service": {
            "call_ms": call_ms,
            "batch": batch,
            "slots": slots,
            "prompt_tokens": prompt_tokens,
            "start_s": None if start is None else seconds(start),
        },
        "picture": True,
    }
    found = plane.autoscaler.post("/v1/replay", order, timeout=TIME_LIMIT_S)
    _keep(out, found.pop("picture"))
    found["file"] = str(out)
    output.show(found, json, lambda: _tell(found))


def variation(text: str) -> dict[str, Any]:
    """Parse ``FIELD=VALUE;FIELD=VALUE`` as a policy that has this text as its name.

    Raise UsageError for other texts.
    """
    return {
        "name": text[:80],
        "changes": changes_of([part.strip() for part in text.split(";") if part.strip()]),
    }


def rows_of(results: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Return the figures of each policy as rows."""
    keys = ("wait_p50_ms", "wait_p95_ms", "wait_p99_ms", "expired")
    return [
        (
            result["name"],
            f"{result['late']} ({result['late_share']:.1%})",
            *(result[key] for key in keys),
            f"{result['replica_hours']:.3f}",
            None if result["cost"] is None else f"{result['cost']:.3f}",
            *(result[key] for key in ("most_replicas", "changes", "reversals")),
        )
        for result in results
    ]


def _arrivals(
    recorded: bool, file: Path | None, shape: str, rps: float, factor: float, length_s: float
) -> dict[str, Any]:
    if recorded:
        return {"kind": "recorded", "seconds": length_s}
    if file is None:
        return {"kind": "synthetic", "shape": shape, "rps": rps, "factor": factor, "seconds": length_s}
    try:
        return {"kind": "csv", "text": file.read_text()}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: {getattr(error, 'strerror', None) or 'it is not text'}.") from None


def _keep(path: Path, picture: str) -> None:
    try:
        path.write_bytes(base64.b64decode(picture))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.") from None


def _tell(found: Mapping[str, Any]) -> None:
    service = found["service"]
    slots = f" in {service['slots']} slots" if service.get("slots", 1) > 1 else ""
    output.line(
        f"{found['deployment']}: {found['requests']:,} requests in {found['seconds']:,.0f} s. A call of up "
        f"to {service['batch']} requests{slots} takes {service['call_ms']:.3g} ms, a start takes "
        f"{service['start_s']:.3g} s. A request is late after a wait of {found['target_wait_ms']:g} ms."
    )
    output.table(rows_of(found["results"]), _HEADS)
    output.line(f"picture: {found['file']}")


def _verify(plane: Any, deployment: str, length_s: float, json: bool) -> None:
    order = {"deployment": deployment, "since": time.time() - length_s}
    found = plane.autoscaler.post("/v1/replay/verify", order, timeout=TIME_LIMIT_S)

    def human() -> None:
        output.line(
            f"{deployment}: {found['reproduced']} of {found['decisions']} decisions reproduced, "
            f"in {found['rounds']} rounds of the autoscaler since {output.moment(found['since'])}"
        )
        for each in found["different"]:
            output.line(f"{output.moment(each['at'])}: recorded {each['then']}, repeated {each['now']}")

    output.show(found, json, human)
    if found["differences"]:
        raise typer.Exit(1)
