"""Quantise an ONNX file with several recipes, and measure each recipe on samples.

    <runtime>/model-env/bin/python3 tidegate/quantize/recipes.py MODEL.onnx SAMPLES.npz FOLDER [options]

This script runs in the models' environment, which has onnx, onnxruntime and numpy, but not Tidegate. The
script prints one JSON document per line: ``{"step": TEXT}`` for progress, and at the end ``{"result": ...}``
or ``{"problem": TEXT}``. It writes the file of each recipe to ``FOLDER``. It also writes ``samples.npz``: a
few rows and the original model's answers to them.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernel" / "precision"))

import loss as comparing  # type: ignore[import-not-found]

LABELS = ("truth", "labels", "label", "target", "y")
MAX_ROWS, CALIBRATION_ROWS, BATCH = 4096, 256, 64
# If the samples have fewer rows than this, or fewer than two batches, the same rows are used to calibrate and
# to measure the loss.
FEW_ROWS = 32
KEPT_ROWS, KEPT_BYTES = 16, 256 * 1024
# Treat tensors of unknown type as FP32, which has the number 1 in ONNX.
FLOAT = {"DefaultTensorType": 1}
QUANTISABLE = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "Attention", "LSTM", "Gather"})


class Problem(Exception):
    """The study cannot be made. The message says why, and what to do."""


@dataclass(frozen=True)
class Recipe:
    """A method to convert a model to int8.

    ``full_range``: True if the recipe makes signed weights that use all 8 bits, at least for some models. On
    CPUs without VNNI, sums of products can then overflow. So the model's answers are not exact on these CPUs.
    """

    name: str
    description: str
    full_range: bool
    make: Callable[[Path, Path, Samples], None]


def static(
    *, per_channel: bool, reduce_range: bool, unsigned: bool = False, only: tuple[str, ...] | None = None
) -> Callable[[Path, Path, Samples], None]:
    """Return a function that quantises a model with the help of samples.

    The returned function computes the ranges of activations from the samples. ``only``: the operators to
    quantise; None for all that onnxruntime can quantise.
    """

    def make(source: Path, target: Path, samples: Samples) -> None:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        quantize_static(
            str(source),
            str(target),
            Reader(samples.calibration()),
            quant_format=QuantFormat.QDQ,
            per_channel=per_channel,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QUInt8 if unsigned else QuantType.QInt8,
            op_types_to_quantize=only,
            extra_options=FLOAT,
        )

    return make


def dynamic(*, per_channel: bool) -> Callable[[Path, Path, Samples], None]:
    """Return a function that quantises a model without samples.

    The quantised model computes the ranges of activations at each call.
    """

    def make(source: Path, target: Path, samples: Samples) -> None:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        # If the model has convolutions, use unsigned weights, because onnxruntime has no dynamic convolution
        # with signed weights.
        operators = {node.op_type for node in onnx.load(str(source), load_external_data=False).graph.node}
        kind = QuantType.QUInt8 if "Conv" in operators else QuantType.QInt8
        quantize_dynamic(
            str(source), str(target), per_channel=per_channel, weight_type=kind, extra_options=FLOAT
        )

    return make


RECIPES = (
    Recipe(
        "qdq-reduced", "static ranges, per channel, weights of 7 bits", False,
        static(per_channel=True, reduce_range=True),
    ),
    Recipe(
        "qdq-products", "as qdq-reduced, but only for convolutions and matrix products", False,
        static(per_channel=True, reduce_range=True, only=("Conv", "MatMul", "Gemm")),
    ),
    Recipe(
        "qdq-full", "static ranges, per channel, weights of 8 bits", True,
        static(per_channel=True, reduce_range=False),
    ),
    Recipe(
        "qdq-u8u8", "static ranges, unsigned weights", False,
        static(per_channel=False, reduce_range=False, unsigned=True),
    ),
    Recipe("dynamic", "ranges computed at each call, per tensor", True, dynamic(per_channel=False)),
    Recipe(
        "dynamic-per-channel", "ranges computed at each call, per channel", True,
        dynamic(per_channel=True),
    ),
)  # fmt: skip


class Reader:
    """An adapter between the samples and onnxruntime's calibration.

    The calibration gets the inputs of one model call at a time.
    """

    def __init__(self, feeds: Iterator[Mapping[str, Any]]) -> None:
        self._feeds = feeds

    def get_next(self) -> Mapping[str, Any] | None:
        """Return the next call's inputs; None at the end."""
        return next(self._feeds, None)


class Samples:
    """The rows of a samples file: some for calibration, the others for measuring the loss.

    A call has at most ``batch`` rows. ``fixed``: True if the model accepts only calls of ``batch`` rows.
    ``shared``: True if there are too few rows to split. Then the same rows are used for both purposes.
    """

    def __init__(self, inputs: dict[str, Any], labels: Any | None, batch: int, fixed: bool) -> None:
        self.batch, self.fixed = batch, fixed
        rows = len(next(iter(inputs.values())))
        self.shared = rows < max(FEW_ROWS, 2 * batch)
        usable = rows - rows % batch
        every = np.arange(usable)
        blocks = every // batch
        judged = every if self.shared else every[blocks % 2 == 0]
        self._calibrating = every if self.shared else every[blocks % 2 == 1]
        self._inputs = inputs
        self.inputs = {name: values[judged] for name, values in inputs.items()}
        self.labels = None if labels is None else labels[judged]
        self.rows = len(judged)

    def calibration(self) -> Iterator[Mapping[str, Any]]:
        """Yield the inputs of the calibration calls."""
        at = self._calibrating[:CALIBRATION_ROWS]
        yield from chunks({name: values[at] for name, values in self._inputs.items()}, self.batch)


def chunks(inputs: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """Yield the inputs in blocks of up to ``size`` rows."""
    rows = len(next(iter(inputs.values())))
    for start in range(0, rows, size):
        yield {name: values[start : start + size] for name, values in inputs.items()}


def read_samples(path: Path, session: Any, label_name: str | None) -> Samples:
    """Return the samples of an npz or npy file. Raise Problem if they do not fit the model."""
    expected = {each.name: each for each in session.get_inputs()}
    try:
        found = np.load(path, allow_pickle=False)
        arrays = {name: found[name] for name in found.files} if hasattr(found, "files") else None
    except (OSError, ValueError) as error:
        raise Problem(f"{path} cannot be read as .npz or .npy: {error}") from None
    if arrays is None:
        if len(expected) != 1:
            raise Problem(
                f"The model has {len(expected)} inputs. Save the samples as an .npz file that has one "
                "array for each input, with the input's name."
            )
        arrays = {next(iter(expected)): found}
    missing = sorted(set(expected) - set(arrays))
    if missing:
        raise Problem(
            f"The samples have the arrays {', '.join(sorted(arrays))}, but the model has the inputs "
            f"{', '.join(sorted(expected))}. Save them with np.savez(FILE, {missing[0]}=...)."
        )
    inputs = {name: fitted(arrays[name][:MAX_ROWS], each) for name, each in expected.items()}
    if len({len(values) for values in inputs.values()}) != 1:
        raise Problem(
            "The arrays of the samples have different numbers of rows. Give all arrays the same number."
        )
    rows = len(next(iter(inputs.values())))
    fixed = [each.shape[0] for each in expected.values() if each.shape and isinstance(each.shape[0], int)]
    batch = fixed[0] if fixed else max(1, min(BATCH, rows // 2))
    if rows < batch or rows == 0:
        raise Problem(f"The samples have {rows} rows, but a call of the model needs {batch}. Add rows.")
    outputs = {each.name for each in session.get_outputs()}
    names = [label_name] if label_name else [n for n in LABELS if n not in expected and n not in outputs]
    name = next((each for each in names if each in arrays), None)
    if label_name and name is None:
        raise Problem(
            f"The samples have no array {label_name!r}. Use --labels with one of {', '.join(sorted(arrays))}."
        )
    labels = None if name is None else arrays[name][:MAX_ROWS]
    if labels is not None and len(labels) != rows:
        raise Problem(
            f"The array {name!r} has {len(labels)} labels for {rows} rows. Write one label for each row."
        )
    return Samples(inputs, labels, batch, bool(fixed))


NUMPY = {
    "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8, "tensor(int8)": np.int8,
}  # fmt: skip


def fitted(values: Any, tensor: Any) -> Any:
    """Convert the values to the input's datatype. Raise Problem if their shape does not fit."""
    shape = [size if isinstance(size, int) else -1 for size in tensor.shape]
    fits = values.ndim == len(shape) and all(
        want in (-1, have) for want, have in zip(shape[1:], values.shape[1:], strict=True)
    )
    if not fits:
        raise Problem(
            f"The samples of {tensor.name!r} have the shape {list(values.shape)}; expected {shape} "
            "(-1: any size)."
        )
    return values.astype(NUMPY.get(tensor.type, values.dtype), copy=False)


def session_of(path: Path, threads: int) -> Any:
    """Open a model with the options that a worker uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def answers(session: Any, samples: Samples) -> dict[str, Any]:
    """Return the model's outputs for all rows that are used to measure the loss."""
    names = [each.name for each in session.get_outputs()]
    parts = [session.run(names, feed) for feed in chunks(samples.inputs, samples.batch)]
    return {name: np.concatenate([part[at] for part in parts]) for at, name in enumerate(names)}


def latencies(sessions: Mapping[str, Any], samples: Samples, seconds: float) -> dict[str, float]:
    """Return the median time of a call for each session, in milliseconds.

    The sessions take turns, so that other load on the machine affects all of them equally.
    """
    feed = next(chunks(samples.inputs, samples.batch))
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        session.run(None, feed)
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(next(iter(times.values()))) < 5:
        for name, session in sessions.items():
            began = time.perf_counter()
            session.run(None, feed)
            times[name].append((time.perf_counter() - began) * 1e3)
    return {name: float(np.median(each)) for name, each in times.items()}


def prepared(model: Path, folder: Path) -> Path:
    """Write a copy of the model with the inferred shapes of its tensors, and return the copy's path.

    Recipes use these shapes. If they cannot be inferred, return ``model``, and the recipes continue without
    shapes.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    target = folder / "prepared.onnx"
    try:
        quant_pre_process(str(model), str(target), skip_symbolic_shape=True)
        add_types(target)
    except Exception as error:
        say(
            step=(
                f"the shapes cannot be inferred ({type(error).__name__}); quantisation continues without them"
            )
        )
        return model
    return target


# The number of each type in ONNX, by the type's name in onnxruntime.
TYPES = {"tensor(float)": 1, "tensor(int32)": 6, "tensor(int64)": 7, "tensor(double)": 11}


def add_types(path: Path) -> None:
    """Add types to the model file, for the tensors whose types ONNX cannot infer.

    An example is a tensor that an operator of scikit-learn computes. onnxruntime can infer these types. So
    load a temporary copy of the model that has these tensors as outputs, and read the outputs' types.
    """
    import onnx

    model = onnx.load(str(path))
    graph = model.graph
    known = {each.name for each in (*graph.value_info, *graph.output, *graph.input)}
    missing = [name for node in graph.node for name in node.output if name and name not in known]
    if not missing:
        return
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in missing)
    probed = path.with_name("probe.onnx")
    onnx.save(probe, str(probed))
    for each in session_of(probed, 1).get_outputs():
        if each.name in missing and each.type in TYPES:
            # An empty shape can mean a scalar or an unknown shape. So treat it as unknown.
            described = onnx.helper.make_tensor_value_info(each.name, TYPES[each.type], each.shape or None)
            graph.value_info.append(described)
    onnx.save(model, str(path))


def check_operators(model: Path) -> None:
    """Raise Problem if the model has no operator that int8 makes faster."""
    import onnx

    operators = {node.op_type for node in onnx.load(str(model), load_external_data=False).graph.node}
    if not operators & QUANTISABLE:
        raise Problem(
            "The model has no operator that int8 makes faster, such as a convolution or a matrix product. "
            f"It has {', '.join(sorted(operators)[:6])}. Deploy the model without --precision."
        )


def study(arguments: argparse.Namespace) -> dict[str, Any]:
    """Apply and measure every recipe. Return the measurements.

    Raise Problem if the model or the samples cannot be used.
    """
    model, folder = arguments.model, arguments.folder
    check_operators(model)
    original = session_of(model, arguments.threads)
    samples = read_samples(arguments.samples, original, arguments.labels)
    expected = answers(original, samples)
    measure, output = comparing.measure_of(expected, samples.labels is not None)
    if arguments.measure:
        measure = arguments.measure
    keep_samples(folder / "samples.npz", samples, expected)
    source = prepared(model, folder)
    sessions, rows = {"fp32": original}, []
    for recipe in RECIPES:
        say(step=f"{recipe.name}: {recipe.description}")
        row: dict[str, Any] = {"name": recipe.name, "full_range": recipe.full_range, "problem": None}
        rows.append(row)
        target = folder / f"{recipe.name}.onnx"
        try:
            recipe.make(source, target, samples)
            session = session_of(target, arguments.threads)
            found = answers(session, samples)
        except Exception as error:
            row["problem"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            continue
        sessions[recipe.name] = session
        row |= judged(found, expected, samples, measure, output) | {"bytes": target.stat().st_size}
    say(step="measuring latencies")
    times = latencies(sessions, samples, arguments.seconds)
    for row in rows:
        row["ms"] = times.get(row["name"])
    first = {
        "name": "fp32", "full_range": False, "problem": None, "ms": times["fp32"], "bytes": total_size(model),
        **judged(expected, expected, samples, measure, output),
    }  # fmt: skip
    return {
        "rows": samples.rows, "batch": samples.batch, "shared": samples.shared, "measure": measure,
        "output": output, "labels": samples.labels is not None, "recipes": [first, *rows],
    }  # fmt: skip


def total_size(model: Path) -> int:
    """Return the size in bytes of the model, including separate files with its weights."""
    import onnx
    from onnx.external_data_helper import uses_external_data

    loaded = onnx.load(str(model), load_external_data=False)
    files = {
        entry.value
        for tensor in loaded.graph.initializer
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    size: int = model.stat().st_size + sum((model.parent / name).stat().st_size for name in files)
    return size


def judged(found: Any, expected: Any, samples: Samples, measure: Any, output: str) -> dict[str, Any]:
    """Compare a recipe's answers with the original's. Return likeness, loss, SQNR and accuracy.

    The likeness says how similar the answers are: 1.0 means equal. SQNR is the ratio of the signal to the
    noise of quantisation, in decibels. The accuracy is None without labels.
    """
    likeness = comparing.likeness(measure, expected[output], found[output])
    accuracy, loss = None, 1.0 - likeness
    if samples.labels is not None and measure == "agreement":
        accuracy = accuracy_of(found[output], samples.labels)
        loss = max(0.0, accuracy_of(expected[output], samples.labels) - accuracy)
    return {
        "likeness": likeness, "loss": max(0.0, loss), "sqnr_db": comparing.sqnr_db(expected, found),
        "accuracy": accuracy,
    }  # fmt: skip


def accuracy_of(values: Any, labels: Any) -> float:
    """Return the fraction of rows with the right class, from 0 to 1."""
    return float((comparing.classes(values).reshape(-1) == np.asarray(labels).reshape(-1)).mean())


def keep_samples(path: Path, samples: Samples, expected: Mapping[str, Any]) -> None:
    """Write a few rows and the original model's answers, so that a worker can measure the loss on its CPU.

    Write nothing if the smallest possible call (one row, or a batch of fixed size) is too large. Also write
    nothing if the rows contain texts.
    """
    rows = samples.batch if samples.fixed else min(samples.rows, KEPT_ROWS)
    arrays = {f"in:{name}": values for name, values in samples.inputs.items()}
    arrays |= {f"out:{name}": values for name, values in expected.items()}

    def size() -> int:
        return sum(values[:rows].nbytes for values in arrays.values())

    while rows > 1 and not samples.fixed and size() > KEPT_BYTES:
        rows //= 2
    if size() > KEPT_BYTES or any(values.dtype.kind in "OSU" for values in arrays.values()):
        return
    packed = io.BytesIO()
    np.savez_compressed(packed, **{name: values[:rows] for name, values in arrays.items()})
    path.write_bytes(packed.getvalue())


def say(**document: Any) -> None:
    """Print one JSON line for the parent process."""
    print(json.dumps(document), flush=True)


def main() -> int:
    """Run the study. Return 0, or 1 if the study cannot be made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--labels")
    parser.add_argument("--measure", choices=("agreement", "cosine", "error"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0)
    warnings.simplefilter("ignore")
    try:
        say(result=study(parser.parse_args()))
    except Problem as problem:
        say(problem=str(problem))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
