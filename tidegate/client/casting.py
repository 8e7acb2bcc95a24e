"""Cast the caller's values to the datatype that a model expects. Only floats may be rounded. Pure: no I/O."""

from __future__ import annotations

from typing import Any

import numpy as np

from tidegate.client.codec import Array, datatype_of, dtype_of


def fit(name: str, value: Any, datatype: str | None) -> tuple[Array, str]:
    """Return ``value`` as an array of ``datatype``, and the datatype to send.

    ``datatype``: the datatype that the model expects. If it is None, the value is not cast. Then the datatype
    to send is FP32 for Python floats, and the value's own datatype for all other values.

    An array of integers or bools is cast if the datatype is numeric and can hold all its values. A float
    array is cast if numpy calls the cast safe. There is one exception: Python floats and float64 arrays
    (numpy's default) are rounded to the model's float datatype. Raise TypeError, with the expected datatype,
    for all other arrays, and for a float that would become infinite.
    """
    bare = not isinstance(value, np.ndarray | np.generic)
    array = _as_array(name, value)
    own = datatype_of(array)
    if datatype is None:
        return array, "FP32" if bare and own == "FP64" else own
    if own == "BYTES" or datatype == "BYTES":
        if own != datatype:
            raise _refusal(name, array, datatype)
        return array, datatype
    target = dtype_of(datatype)
    if array.dtype != target:
        array = _cast(name, array, datatype, target, bare or array.dtype == np.float64)
    return array, datatype


def _as_array(name: str, value: Any) -> Array:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise TypeError(f"input {name!r}: not a rectangular array: {error}") from None
    if array.dtype.kind == "O" and not all(isinstance(item, bytes | str) for item in array.flat):
        raise TypeError(f"input {name!r}: an object array may hold only bytes and str")
    # numpy would turn a list of bytes into fixed-width strings, which lose trailing zero bytes.
    return np.asarray(value, dtype=object) if array.dtype.kind in "SU" else array


def _cast(name: str, array: Array, datatype: str, target: np.dtype[Any], rounds: bool) -> Array:
    source = array.dtype
    if source.kind in "biu":
        # Integers and bools have no NaN. So if the cast values equal the original ones, nothing is lost.
        with np.errstate(all="ignore"):
            cast = array.astype(target)
            if target.kind != "b" and _same_values(array, cast):
                return cast
    elif np.can_cast(source, target, "safe"):
        return array.astype(target)
    elif rounds and target.kind == "f":
        with np.errstate(over="ignore"):
            cast = array.astype(target)
        if np.array_equal(np.isfinite(cast), np.isfinite(array)):
            return cast
    raise _refusal(name, array, datatype)


def _same_values(whole: Array, cast: Array) -> bool:
    if cast.dtype.kind == "f":
        # ``cast`` has floats, and ``whole`` has the original integers. If a float is beyond the range of the
        # integer type, converting it back gives an undefined result. So count such a float as a changed
        # value.
        info_max = np.iinfo(np.uint64).max if whole.dtype.kind == "u" else np.iinfo(np.int64).max
        if not np.all(np.isfinite(cast)) or np.any(np.abs(cast.astype(np.float64)) >= float(info_max)):
            return False
        return bool(np.array_equal(cast.astype(np.uint64 if whole.dtype.kind == "u" else np.int64), whole))
    return bool(np.array_equal(cast, whole)) and bool(np.array_equal(cast < 0, whole < 0))


def _refusal(name: str, array: Array, datatype: str) -> TypeError:
    target, own = dtype_of(datatype), datatype_of(array)
    wanted = "bytes or str" if datatype == "BYTES" else f"numpy {target}"
    given = "bytes or str" if own == "BYTES" else str(array.dtype)
    told = f"input {name!r}: the model expects {datatype} ({wanted}), got {given}"
    if "BYTES" in (datatype, own):
        return TypeError(told)
    return TypeError(
        f"{told}, which does not convert without loss. To convert it anyway: .astype(np.{target.name})"
    )
