"""Measure int8 variants of an ONNX model, for ``tidegate quantize`` and ``deploy --precision``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidegate.cli import api, output
from tidegate.cli.api import Control, Doc
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.progress import Steps
from tidegate.kernel.errors import TidegateError

if TYPE_CHECKING:
    from tidegate.cli.deploy_request import DeployRequest
    from tidegate.kernel.precision.embedded import Precision
    from tidegate.quantize.choice import Choice, Measured, Wanted
    from tidegate.quantize.study import Study

PRECISIONS = ("auto", "int8")
MEASURES = ("agreement", "cosine", "error")
DEFAULT_LOSS = "0.5%"


@dataclass(frozen=True, slots=True)
class Wish:
    """The wanted precision, the largest loss of accuracy to accept, and how to measure the loss."""

    precision: str
    samples: Path | None
    max_loss: float
    measure: str | None = None
    labels: str | None = None
    portable: bool = False
    threads: int = 1
    seconds: float = 2.0

    def check(self, path: Path) -> Path:
        """Check the options and the files. Return the path of the file with samples.

        Raise UsageError if an option or a file is wrong.
        """
        if self.precision not in PRECISIONS:
            raise UsageError(f"--precision {self.precision}: choose one of {', '.join(PRECISIONS)}.")
        if self.measure is not None and self.measure not in MEASURES:
            raise UsageError(f"--measure {self.measure}: choose one of {', '.join(MEASURES)}.")
        if self.samples is None:
            raise UsageError(
                "The loss of accuracy must be measured. Add --samples data.npz, a file with the model's "
                "inputs by name. Save it with np.savez('data.npz', NAME=array)."
            )
        for file in (path, self.samples):
            if not file.is_file():
                raise UsageError(f"{file} does not exist.")
        if path.suffix.lower() != ".onnx":
            raise UsageError(f"{path} is not an .onnx file, and only ONNX models can be quantised.")
        return self.samples


@dataclass(frozen=True, slots=True)
class Quantised:
    """The measurements of a model and of its int8 recipes, and the recipe that was chosen.

    A recipe is a method to convert the model to int8. ``file``: the int8 model; None if the model stays fp32.
    """

    study: Study
    choice: Choice
    max_loss: float
    precision: Precision | None
    file: Path | None

    @property
    def chosen(self) -> Measured:
        """Return the measurements of the chosen model."""
        return next(each for each in self.study.results if each.name == self.choice.name)

    @property
    def original(self) -> Measured:
        """Return the measurements of the original model."""
        return self.study.results[0]

    def document(self) -> dict[str, Any]:
        """Return the document for ``--json``."""
        from dataclasses import asdict

        study = self.study
        return {
            "precision": "int8" if self.choice.quantised else "fp32",
            "recipe": self.choice.name,
            "max_loss": self.max_loss,
            "measure": study.measure,
            "output": study.output,
            "labels": study.labels,
            "rows": study.rows,
            "batch": study.batch,
            "cpu": asdict(self.precision)["cpu"] if self.precision else None,
            "flags": list(self.precision.flags) if self.precision else None,
            "recipes": [
                {**asdict(each), "reason": self.choice.reasons.get(each.name, "")} for each in study.results
            ],
        }

    def show(self) -> None:
        """Print the table of recipes."""
        study = self.study
        rows = [
            [each.name, "-" if each.problem else f"{each.loss:.2%}", _number(each.likeness, each, ".4f"),
             _number(each.sqnr_db, each, ".1f"), output.size_of(each.size) if each.size else "-",
             _number(each.ms, each, ".3g"), self.choice.reasons.get(each.name, "")]
            for each in study.results
        ]  # fmt: skip
        output.table(rows, ["recipe", "loss", study.measure, "SQNR dB", "size", "ms", "why"])
        kind = "accuracy" if study.labels else study.measure
        shared = ". These rows also calibrated the recipes" if study.shared else ""
        output.line(
            f"Loss: {kind} of {study.output!r} on {study.rows} rows{shared}. A call has {study.batch} rows."
        )
        if not self.choice.quantised:
            output.line(
                "Every recipe was refused (see WHY), so the model stays fp32. --max-loss allows more loss.",
                style="bold",
            )


def _number(value: float | None, each: Measured, form: str) -> str:
    return "-" if value is None or each.problem else format(value, form)


def loss_of(text: str) -> float:
    """Parse a loss, ``0.5%`` or ``0.005``, as a share. Raise UsageError for other texts."""
    number = text.strip().removesuffix("%").strip()
    try:
        value = float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise UsageError(f"--max-loss {text!r}: write a share such as 0.5% or 0.005.")
    return value


@contextmanager
def quantised(path: Path, wish: Wish, steps: Steps) -> Iterator[Quantised]:
    """Try the int8 recipes on a model, and yield the result.

    ``Quantised.file`` is deleted after the ``with`` block. Raise UsageError for a wrong option or file, and
    StudyFailed if the recipes cannot be measured.
    """
    from tidegate.cli.interrupts import interrupted_by_signals
    from tidegate.quantize.choice import choose
    from tidegate.quantize.study import Options, python_of, studied

    samples = wish.check(path)

    def on_step(text: str) -> None:
        steps.change("quantise", "running", text)

    options = Options(wish.labels, wish.measure, wish.threads, wish.seconds)
    python = python_of(_runtime())
    with interrupted_by_signals(), studied(python, path, samples, options, on_step) as study:
        wanted: Wanted = "int8" if wish.precision == "int8" else "auto"
        choice = choose(study.results, wish.max_loss, wanted, portable=wish.portable)
        precision = _precision(study, choice, wish.max_loss) if choice.quantised else None
        file = _marked(study, choice, precision) if precision is not None else None
        found = Quantised(study, choice, wish.max_loss, precision, file)
        what = f"{choice.name}, loss {found.chosen.loss:.2%}" if file else "fp32 stays"
        steps.change("quantise", "done", what)
        yield found


def _runtime() -> Path:
    """Return the folder that contains the models' Python environment.

    If the stack in use cannot be found, take the folder from the settings in the environment.
    """
    try:
        return api.settings().runtime_path
    except TidegateError:
        return api.settings_with({}).runtime_path


def _marked(study: Study, choice: Choice, precision: Precision) -> Path:
    """Write the precision and the samples into the file of the chosen model. Return the file's path."""
    from tidegate.kernel.precision import embedded

    file = study.file(choice.name)
    embedded.append(file, precision, study.samples())
    return file


def _precision(study: Study, choice: Choice, max_loss: float) -> Precision:
    from tidegate.kernel.precision import cpu
    from tidegate.kernel.precision.embedded import Precision

    chosen = next(each for each in study.results if each.name == choice.name)
    machine = cpu.read()
    measure: Any = study.measure
    return Precision(
        recipe=choice.name,
        measure=measure,
        output=study.output,
        loss=round(chosen.loss, 6),
        max_loss=max_loss,
        rows=study.rows,
        cpu=machine.name,
        flags=machine.flags,
        full_range=chosen.full_range,
    )


def sibling_metadata(found: Quantised, parent: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the int8 version's metadata: the original's metadata, the lineage and the measurements."""
    chosen, original, precision = found.chosen, found.original, found.precision
    assert precision is not None
    tags = {
        "precision": "int8",
        "recipe": precision.recipe,
        "measured_on": precision.cpu,
        "cpu_flags": " ".join(precision.flags) or "none",
    }
    numbers = {
        "loss": chosen.loss,
        found.study.measure: chosen.likeness,
        "sqnr_db": chosen.sqnr_db,
        "accuracy": chosen.accuracy,
        "latency_ms": chosen.ms,
        "latency_ms_fp32": original.ms,
        "size_bytes": float(chosen.size),
        "size_bytes_fp32": float(original.size),
    }
    kept = {key: value for key, value in (metadata.get("metrics") or {}).items() if key != "accuracy"}
    return {
        **metadata,
        "parent": parent,
        "tags": {**(metadata.get("tags") or {}), **tags},
        "metrics": {**kept, **{k: round(v, 6) for k, v in numbers.items() if v is not None}},
    }


def registered_smaller(
    control: Control, request: DeployRequest, wish: Wish, steps: Steps
) -> tuple[Doc, Quantised]:
    """Register a model, and also its int8 version if a measured recipe is good enough.

    Return the version to serve, and the measurements. The recipes are measured first. If that fails, register
    nothing. Raise UsageError, StudyFailed, and the errors of registration.
    """
    from tidegate.cli.publish import registered

    with quantised(request.path, wish, steps) as found:
        original = registered(control, request, steps)
        if found.file is None:
            return original, found
        metadata = sibling_metadata(found, f"{request.name}@{original['number']}", request.metadata)
        # Leave out the cryptographic signature, because it is valid only for the original's bytes.
        sibling = replace(request, path=found.file, metadata=metadata, signed=None)
        return registered(control, sibling, steps), found
