"""``tidegate infer``: send one request through the gateway, with the SDK."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import settings, token_of, unreachable
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json
from tidegate.client.errors import Unreachable

if TYPE_CHECKING:
    from tidegate.client import InferResult
    from tidegate.client.codec import Array


def infer(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The endpoint's name.")],
    data: Annotated[
        str | None,
        typer.Option(
            "--data", "-d", metavar="JSON", help="The inputs as JSON; @FILE reads a file, - reads stdin."
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="File of inputs: .json, .npy or .npz.")
    ] = None,
    version: Annotated[
        int | None, typer.Option(help="Call this version, not the one that the endpoint serves.")
    ] = None,
    timeout_ms: Annotated[
        int, typer.Option(min=1, help="Deadline of the request, in milliseconds from now.")
    ] = 30_000,
    select: Annotated[
        list[str] | None, typer.Option(metavar="OUTPUT", help="Return only this output; repeatable.")
    ] = None,
    output_file: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Save the outputs to this file: .npz, .npy or .json."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Send one request. Inputs: {"name": [...]}, an OIP request, or an array if the model has one input."""
    from tidegate.cli.tensors import save
    from tidegate.client import Client

    inputs = given_inputs(data, file)
    found = settings()
    url = found.gateway_url
    try:
        with Client(url, timeout_s=timeout_ms / 1000, api_key=token_of(found) or None) as client:
            result = client.infer(name, inputs, version=version, outputs=select)
    except TypeError as error:
        raise UsageError(f"{error}.") from None
    except Unreachable:
        raise unreachable("gateway", url) from None
    if output_file is not None:
        save(result, output_file)
    output.show(document(result), json, lambda: _print(result))


def given_inputs(data: str | None, file: Path | None) -> Any:
    """Return the inputs of ``--data`` or ``--file``. Raise UsageError unless exactly one is given."""
    from tidegate.cli.tensors import from_file, from_json

    if (data is None) == (file is None):
        raise UsageError("Give the inputs with either --data or --file.")
    return from_file(file) if file is not None else from_json(text_of_option(data or ""))


def text_of_option(data: str) -> str:
    """Return the text in ``--data``. Read a file for ``@FILE``, and stdin for ``-``.

    Raise UsageError for a file that cannot be read.
    """
    if data == "-":
        return sys.stdin.read()
    if data.startswith("@"):
        try:
            return Path(data[1:]).read_text()
        except OSError as error:
            raise UsageError(f"{data[1:]}: {error.strerror}.") from None
    return data


def document(result: InferResult) -> dict[str, Any]:
    """Return a result as an OIP response, with the call's timing in milliseconds."""
    from tidegate.cli.tensors import values_of
    from tidegate.client.codec import datatype_of

    return {
        "model_name": result.model_name,
        "model_version": result.model_version,
        "request_id": result.request_id,
        "parameters": result.parameters,
        "outputs": [
            {
                "name": name,
                "datatype": datatype_of(array),
                "shape": list(array.shape),
                "data": values_of(array),
            }
            for name, array in result.items()
        ],
        "timing_ms": result.timing,
    }


def readable(array: Array) -> Array:
    """Return an array for printing. Bytes that are UTF-8 become text; other values do not change."""
    import numpy as np

    if array.dtype != object:
        return array
    shown = np.empty(array.shape, dtype=object)
    for place, value in np.ndenumerate(array):
        with suppress(UnicodeDecodeError):
            value = value.decode() if isinstance(value, bytes) else value
        shown[place] = value
    return shown


def _print(result: InferResult) -> None:
    import numpy as np

    from tidegate.client.codec import datatype_of

    for name, array in result.items():
        output.line(f"{name}  {datatype_of(array)}{list(array.shape)}", style="bold")
        with np.printoptions(precision=6, suppress=True, threshold=200, linewidth=100):
            output.line(str(readable(array)))
    parts = ", ".join(f"{part} {ms:.2f} ms" for part, ms in result.timing.items())
    output.say(f"{result.model_name} version {result.model_version}; {parts}", style="dim")
