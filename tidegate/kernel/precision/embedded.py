"""Read and write the recipe of a lower-precision model in its file, with samples and expected answers.

The recipe and the samples are ``metadata_props`` entries of the ONNX file. Every copy of the file contains
them, and runtimes ignore them. In Protobuf, bytes appended to a file can add such entries, so no ONNX library
is needed.
"""

from __future__ import annotations

import base64
import io
import json
import mmap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tidegate.kernel.protocol.protobuf_wire import Budget, Malformed, Message

if TYPE_CHECKING:
    import numpy as np

    from tidegate.kernel.precision.loss import Measure

RECIPE_KEY, SAMPLES_KEY = "tidegate.precision", "tidegate.samples"
_METADATA_PROPS, _KEY, _VALUE = 14, 1, 2
# The most fields of a ModelProto that are read to find the entries. Large models do not need more, because
# all weights are in one field.
_MAX_FIELDS = 100_000
MAX_SAMPLES_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Precision:
    """The recipe that gave a model its lower precision, and the loss that was measured with it.

    ``loss``: a number from 0 to 1. If the samples have labels and ``measure`` is agreement, the loss is the
    accuracy of the original minus the accuracy of this model (at least 0). Otherwise, the loss is 1 minus the
    likeness of this model's answers to the original's answers.

    ``max_loss``: the highest accepted loss. ``rows``: the number of samples with which the loss was measured.
    ``cpu``, ``flags``: the CPU of the machine that measured the loss. ``full_range``: True if the model is
    exact only on a CPU that adds products of 8-bit values without saturation.
    """

    recipe: str
    measure: Measure
    output: str
    loss: float
    max_loss: float
    rows: int
    cpu: str
    flags: tuple[str, ...] = ()
    full_range: bool = False


@dataclass(frozen=True, slots=True)
class Embedded:
    """A model's precision, samples of its inputs, and the original model's answers to these samples.

    ``inputs`` and ``outputs`` are empty if the file contains no samples.
    """

    precision: Precision
    inputs: dict[str, np.ndarray[Any, Any]]
    outputs: dict[str, np.ndarray[Any, Any]]


def append(model: Path, precision: Precision, samples: bytes | None) -> None:
    """Append a :class:`Precision` and samples to an ONNX file.

    ``samples``: the bytes of an npz file; None: append no samples. Equal arguments append equal bytes.
    """
    entries = [(RECIPE_KEY, json.dumps(asdict(precision), sort_keys=True).encode())]
    if samples is not None:
        entries.append((SAMPLES_KEY, base64.b64encode(samples)))
    with model.open("ab") as file:
        for key, value in entries:
            entry = _field(_KEY, key.encode()) + _field(_VALUE, value)
            file.write(_field(_METADATA_PROPS, entry))


def read(model: Path) -> Embedded | None:
    """Return the :class:`Precision` and the samples in an ONNX file.

    Return None if the file has no ``Precision``, or if the ``Precision`` or the samples are unreadable. A
    file may have a ``Precision`` and no samples.
    """
    try:
        found = _entries(model)
        if RECIPE_KEY not in found:
            return None
        precision = _precision(json.loads(found[RECIPE_KEY]))
        inputs, outputs = _samples(found.get(SAMPLES_KEY, b""))
    except (OSError, ValueError, KeyError, TypeError, Malformed, EOFError):
        return None
    return Embedded(precision, inputs, outputs)


def _entries(model: Path) -> dict[str, bytes]:
    if not model.stat().st_size:
        return {}
    found = {}
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for entry in Message(data, 0, len(data), Budget(_MAX_FIELDS)).messages(_METADATA_PROPS):
            key = next((part.text() for part in entry.messages(_KEY)), "")
            if key in (RECIPE_KEY, SAMPLES_KEY):
                value = next(iter(entry.messages(_VALUE)), None)
                if value is not None and value.end - value.start <= 2 * MAX_SAMPLES_BYTES:
                    found[key] = bytes(data[value.start : value.end])
    return found


def _precision(raw: dict[str, Any]) -> Precision:
    from tidegate.kernel.precision.loss import Measure  # imports numpy, which few workers need

    if raw["measure"] not in get_args(Measure):
        raise ValueError(raw["measure"])
    known = {name: raw[name] for name in Precision.__dataclass_fields__ if name in raw}
    return Precision(**{**known, "flags": tuple(map(str, raw.get("flags", ())))})


def _samples(encoded: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    if not encoded:
        return {}, {}
    import numpy as np

    with np.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    split = {
        prefix: {n.removeprefix(prefix): a for n, a in found.items() if n.startswith(prefix)}
        for prefix in ("in:", "out:")
    }
    return split["in:"], split["out:"]


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
