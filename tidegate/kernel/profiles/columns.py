"""Turn tensors into named columns: numbers to count by bin, and short strings to count by value. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import numpy.typing as npt

from tidegate.kernel.protocol.tensors import DATATYPES, unpack_strings

Numbers = npt.NDArray[np.float64]

# If a row of a tensor has more elements than this, each row is described by its mean, standard deviation,
# minimum and maximum.
MAX_WIDTH = 256
# The most columns of numbers. Further ones are left out.
MAX_COLUMNS = 512
# If a string of a column has more bytes than this, the column is text. Then only the lengths of its strings
# and their numbers of words are counted.
VALUE_BYTES = 64
MAX_STRINGS = 16
CHANNELS = (1, 3, 4)


@dataclass(slots=True)
class Columns:
    """The columns of some rows. ``numbers``: NaN is a missing value. ``values``: None is a missing value."""

    rows: int
    numbers: dict[str, Numbers] = field(default_factory=dict)
    values: dict[str, list[str | None]] = field(default_factory=dict)

    def put(self, name: str, numbers: Numbers) -> None:
        """Add a column of numbers if there are fewer than ``MAX_COLUMNS`` of them."""
        if len(self.numbers) < MAX_COLUMNS:
            self.numbers[name] = numbers


@dataclass(frozen=True, slots=True)
class SampledTensor:
    """A tensor with the values of several rows.

    ``shape``: the shape of one row. ``raw``: the bytes of all rows.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: bytes


def add_tensor(columns: Columns, tensor: SampledTensor, redact: Collection[str] = ()) -> None:
    """Add the columns of a tensor. Raise ValueError if the tensor's bytes do not fit its shape.

    ``redact``: the names of tensors whose strings are private. Of these strings, only the lengths are stored.
    """
    if tensor.datatype == "BYTES":
        _add_strings(columns, tensor, redact)
        return
    table = as_table(tensor, columns.rows)
    if table.shape[1] > MAX_WIDTH:
        _add_statistics(columns, tensor, table)
        return
    for name, at in zip(element_names(tensor.name, tensor.shape), range(table.shape[1]), strict=True):
        columns.put(name, table[:, at])


def as_table(tensor: SampledTensor, rows: int) -> Numbers:
    """Return a numeric tensor as a table of ``rows`` rows. Raise ValueError if its size does not fit."""
    datatype = DATATYPES[tensor.datatype]
    if tensor.datatype == "BF16":
        found = np.frombuffer(tensor.raw, "<u2").astype("<u4").__lshift__(16).view("<f4")
    else:
        found = np.frombuffer(tensor.raw, datatype.numpy)
    return found.reshape(rows, -1).astype(np.float64)


def element_names(name: str, shape: Sequence[int]) -> list[str]:
    """Return the names of a row's elements: the tensor's name for a single element, else ``name[0]``, ..."""
    width = prod(shape)
    return [name] if width == 1 else [f"{name}[{at}]" for at in range(width)]


def _add_statistics(columns: Columns, tensor: SampledTensor, table: Numbers) -> None:
    """Add the mean, standard deviation, minimum and maximum of each row of a tensor.

    If the tensor is an image, add them for each channel.
    """
    with np.errstate(invalid="ignore"):
        for suffix, part in _channels(tensor, table):
            columns.put(f"{tensor.name}.mean{suffix}", part.mean(axis=1))
            columns.put(f"{tensor.name}.sd{suffix}", part.std(axis=1))
            columns.put(f"{tensor.name}.min{suffix}", part.min(axis=1))
            columns.put(f"{tensor.name}.max{suffix}", part.max(axis=1))


def _channels(tensor: SampledTensor, table: Numbers) -> list[tuple[str, Numbers]]:
    shape = tensor.shape
    if len(shape) != 3:
        return [("", table)]
    image = table.reshape(len(table), *shape)
    if shape[0] in CHANNELS:
        return [(f"[{at}]", image[:, at].reshape(len(table), -1)) for at in range(shape[0])]
    if shape[2] in CHANNELS:
        return [(f"[{at}]", image[..., at].reshape(len(table), -1)) for at in range(shape[2])]
    return [("", table)]


def _add_strings(columns: Columns, tensor: SampledTensor, redact: Collection[str]) -> None:
    strings = unpack_strings(tensor.raw)
    width = max(1, len(strings) // max(1, columns.rows))
    if len(strings) != width * columns.rows:
        raise ValueError(f"{tensor.name} has {len(strings)} strings; they do not fit {columns.rows} rows")
    for at, name in zip(range(min(width, MAX_STRINGS)), _string_names(tensor.name, width), strict=False):
        those = strings[at::width]
        columns.put(f"{name}.length", np.array([len(each) for each in those], float))
        if tensor.name in redact:
            continue
        if any(len(each) > VALUE_BYTES for each in those):
            columns.put(f"{name}.words", np.array([each.count(b" ") + 1 for each in those], float))
        else:
            columns.values[name] = [each.decode(errors="replace") for each in those]


def _string_names(name: str, width: int) -> list[str]:
    return element_names(name, (width,))
