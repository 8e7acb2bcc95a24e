"""Read and write tensors as files and JSON, for the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tidegate.cli.exit_codes import UsageError
from tidegate.client.casting import fit
from tidegate.client.codec import Array


def from_json(text: str | bytes) -> Any:
    """Parse inputs from JSON: an object with the inputs by name, an OIP request, or an array.

    Raise UsageError if the text is not JSON, or if a tensor of an OIP request is wrong.
    """
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise UsageError(f"The inputs are not JSON: {error}.") from None
    if isinstance(found, dict) and isinstance(found.get("inputs"), list):
        return dict(_tensor(given) for given in found["inputs"])
    return found


def _tensor(given: Any) -> tuple[str, Array]:
    try:
        array, _ = fit(given["name"], given["data"], given["datatype"])
        return given["name"], array.reshape(given["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"An input is not an OIP tensor (name, datatype, shape, data): {error}.") from None


def from_file(path: Path) -> Any:
    """Read inputs from a .json, .npy (one array) or .npz (arrays by name) file.

    Raise UsageError if the file cannot be read or has another extension.
    """
    try:
        if path.suffix == ".json":
            return from_json(path.read_bytes())
        if path.suffix not in {".npy", ".npz"}:
            raise UsageError(f"{path}: inputs are read from .json, .npy and .npz files.")
        loaded = np.load(path, allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}.") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}.") from None


def save(outputs: Mapping[str, Array], path: Path) -> None:
    """Write outputs to a .npz or .json file, or a single output to a .npy file.

    Raise UsageError if the file cannot be written or has another extension.
    """
    plain = {name: _plain(array) for name, array in outputs.items()}
    try:
        match path.suffix:
            case ".npz":
                with path.open("wb") as file:
                    np.savez(file, **plain)  # type: ignore[arg-type]  # numpy types **kwds with its own flag
            case ".npy" if len(plain) == 1:
                np.save(path, next(iter(plain.values())))
            case ".npy":
                raise UsageError(
                    f"A .npy file holds one array, but there are {len(plain)}. Use .npz or --select."
                )
            case ".json":
                nested = {name: array.tolist() for name, array in outputs.items()}
                path.write_bytes(orjson.dumps(nested, default=_text))
            case _:
                raise UsageError(f"{path}: outputs are written to .npz, .npy and .json files.")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.") from None


def _plain(array: Array) -> Array:
    # Write bytes instead of objects: numpy would write objects as a pickle, which cannot be read safely.
    return array.astype(np.bytes_) if array.dtype == object else array


def values_of(array: Array) -> list[Any]:
    """Return the elements in row-major order as JSON values. Bytes become text."""
    flat: list[Any] = array.ravel().tolist()
    return [_text(value) if isinstance(value, bytes) else value for value in flat]


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    raise TypeError(type(value).__name__)
