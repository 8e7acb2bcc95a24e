"""``tidegate deploy``."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli.exits import UsageError
from tidegate.cli.options import Json, numbers, pairs, seconds

if TYPE_CHECKING:
    from tidegate.cli.publish import Order

_SCALE, _RUN, _ABOUT = "Scaling", "How it runs", "About the version"


def deploy(
    path: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="A model file, or a folder.")],
    name: Annotated[
        str | None, typer.Option(help="Of model and endpoint; default: from the file's name.")
    ] = None,
    model_format: Annotated[
        str | None, typer.Option(help="onnx, sklearn, torchscript, python or triton; default: by file name.")
    ] = None,
    min_replicas: Annotated[
        int | None, typer.Option("--min", min=0, help="At least so many replicas.", rich_help_panel=_SCALE)
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option("--max", min=1, help="At most so many replicas.", rich_help_panel=_SCALE)
    ] = None,
    scale_to_zero_after: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Sleep after so long idle (with --min 0).", rich_help_panel=_SCALE),
    ] = None,
    target_wait_ms: Annotated[
        float | None, typer.Option(help="Scale up when requests would wait longer.", rich_help_panel=_SCALE)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of a replica.", rich_help_panel=_RUN)
    ] = None,
    instances: Annotated[
        int | None, typer.Option(min=1, help="Model instances in a replica.", rich_help_panel=_RUN)
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Rows in one model call, at most.", rich_help_panel=_RUN)
    ] = None,
    batch_window_ms: Annotated[
        float | None, typer.Option(min=0, help="Wait so long to fill a batch.", rich_help_panel=_RUN)
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="K=V", help="Environment of the model; repeatable.", rich_help_panel=_RUN),
    ] = None,
    resource: Annotated[
        list[str] | None,
        typer.Option(
            metavar="K=V",
            help="memory_mb, cpus, shm_mb, gpus, gpu_memory_mb, allow_cpu or response_cache_mb of a replica; "
            "repeatable.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Image of its workers, if containers.", rich_help_panel=_RUN)
    ] = None,
    signature: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Inputs and outputs, if unknown.", rich_help_panel=_ABOUT),
    ] = None,
    requirements: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.txt", help="What its Python needs, as pip reads it.", rich_help_panel=_RUN
        ),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Take a pickle: it can run any code.", rich_help_panel=_ABOUT),
    ] = False,
    metadata: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Metadata; the options below win.", rich_help_panel=_ABOUT),
    ] = None,
    trained_at: Annotated[
        str | None, typer.Option(metavar="DATE", help="When it was trained.", rich_help_panel=_ABOUT)
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="K=V", help="accuracy=0.98; repeatable.", rich_help_panel=_ABOUT),
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option(metavar="K=V", help="team=vision; repeatable.", rich_help_panel=_ABOUT)
    ] = None,
    note: Annotated[str | None, typer.Option(help="Free text.", rich_help_panel=_ABOUT)] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return only when it serves.")] = True,
    timeout: Annotated[str, typer.Option(metavar="TIME", help="How long to wait.")] = "5m",
    json: Json = False,
) -> None:
    """Serve a model file: the next version of an existing name rolls over without a gap."""
    from tidegate.cli.publish import Order, read_json, read_lines

    options = {
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "scale_to_zero_after_s": None if scale_to_zero_after is None else seconds(scale_to_zero_after),
        "target_wait_ms": target_wait_ms,
        "threads": threads,
        "instances": instances,
        "batching": _given({"max_batch": max_batch, "window_ms": batch_window_ms}) or None,
        "env": pairs("--env", env) or None,
        "resources": numbers("--resource", resource) or None,
        "image": image,
    }
    about = {
        "trained_at": None if trained_at is None else iso_time(trained_at),
        "metrics": numbers("--metric", metric) or None,
        "tags": pairs("--tag", tag) or None,
        "notes": note,
    }
    order = Order(
        path=path,
        name=name or name_of(path),
        format=model_format,
        options=_given(options),
        signature=read_json(signature) if signature else None,
        requirements=read_lines(requirements) if requirements else None,
        metadata={**(read_json(metadata) if metadata else {}), **_given(about)},
        allow_pickle=allow_pickle,
    )
    _run(order, seconds(timeout) if wait else None, json)


def _run(order: Order, timeout_s: float | None, json: bool) -> None:
    from tidegate.cli import output
    from tidegate.cli.api import control
    from tidegate.cli.progress import Steps
    from tidegate.cli.publish import publish, wait_serving

    plane, began = control(), time.monotonic()
    with Steps().shown() as steps:
        placed = publish(plane, order, steps)
        status = None if timeout_s is None else wait_serving(plane, placed, timeout_s, steps)

    def human() -> None:
        number, deployment = placed["version"]["number"], placed["deployment"]["name"]
        if status is None:
            output.line(f"{order.name} version {number} is on its way as {deployment}: `tidegate status`")
            return
        took = time.monotonic() - began
        output.line(f"{order.name} serves version {number} ({deployment}), {took:.1f} s after the command.")
        output.line(f"  tidegate infer {order.name} --data '{example_data(placed['version'])}'")
        output.line(f"  curl {plane.settings.gateway_url}/v2/models/{order.name}")

    output.show({**placed, "status": status, "seconds": time.monotonic() - began}, json, human)


def name_of(path: Path) -> str:
    """A name from a path: ``My_Model.v2.onnx`` is ``my-model-v2``. Raises UsageError when nothing is left."""
    resolved = path.resolve()
    stem = resolved.name if resolved.is_dir() else re.sub(r"(\.tar)?\.[A-Za-z0-9]+$", "", resolved.name)
    found = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:63].strip("-")
    if not found:
        raise UsageError(f"{path} gives no name: use --name.")
    return found


def iso_time(text: str) -> str:
    """``2024-05-31`` or a full ISO time, as the registry takes it. Raises UsageError."""
    from tidegate.cli.options import parsed

    try:
        return parsed(text).astimezone().isoformat()
    except ValueError:
        raise UsageError(f"--trained-at {text!r} is not an ISO date or time, such as 2024-05-31.") from None


def example_data(version: dict[str, Any]) -> str:
    """What ``--data`` looks like for this version's inputs, without writing out large tensors."""
    inputs = (version.get("signature") or {}).get("inputs") or []
    return "{" + ", ".join(f'"{spec["name"]}": ...' for spec in inputs) + "}" if inputs else "{...}"


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
