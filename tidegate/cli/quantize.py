"""``tidegate quantize``: make an int8 model from an ONNX model, and measure its loss of accuracy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli import exit_codes, output
from tidegate.cli.options import Json
from tidegate.cli.precision import DEFAULT_LOSS
from tidegate.cli.progress import Steps

SamplesFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.npz",
        help="The model's inputs by name, and `labels` if you have them; or the model's only input as .npy.",
    ),
]


def quantize(
    path: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The ONNX model.")],
    samples: SamplesFile = None,
    precision: Annotated[
        str,
        typer.Option(help="int8, or auto: int8 only if it is also faster than the original."),
    ] = "int8",
    max_loss: Annotated[
        str, typer.Option(metavar="LOSS", help="Largest loss of accuracy to accept, such as 0.5% or 0.005.")
    ] = DEFAULT_LOSS,
    measure: Annotated[
        str | None,
        typer.Option(
            help="How to measure the loss: agreement (of classes), cosine or error (relative); default: "
            "the measure that suits the outputs."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Name of the array with the labels; default: `labels`, else `truth`."
        ),
    ] = None,
    portable: Annotated[
        bool,
        typer.Option("--portable", help="Only try recipes that are equally exact on a CPU without VNNI."),
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each call.")] = 1,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write the new model to. [MODEL.int8.onnx]")
    ] = None,
    json: Json = False,
) -> None:
    """Make an ONNX model smaller and faster, and measure on your samples how much accuracy it loses.

    Each recipe is compared with the original: loss, noise, size, latency. Exit code 1: every recipe was
    refused, for example because its loss is above --max-loss. Then no file is written. Example: tidegate
    quantize model.onnx --samples data.npz --max-loss 0.5%
    """
    from tidegate.cli.precision import Wish, loss_of, quantised

    wish = Wish(precision, samples, loss_of(max_loss), measure, labels, portable, threads)
    target = out or path.with_suffix(".int8.onnx")
    with Steps().shown() as steps, quantised(path, wish, steps) as found:
        if found.file is not None:
            shutil.copyfile(found.file, target)
        document = found.document() | {"file": str(target) if found.file else None}

    def human() -> None:
        found.show()
        if found.file is not None:
            output.line(f"Wrote {target}. Serve it: tidegate deploy {target}")

    output.show(document, json, human)
    if found.file is None:
        raise typer.Exit(exit_codes.ERROR)
