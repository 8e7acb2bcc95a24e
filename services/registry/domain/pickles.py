"""Find the releases of scikit-learn and numpy that wrote a pickle, without executing it. Pure.

The bytes are searched for known texts. ``pickletools`` cannot read joblib files, because they have raw arrays
between the opcodes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from services.registry.domain import needs

SKLEARN, NUMPY = "scikit-learn", "numpy"
# The number of bytes at the end of a piece that are searched again together with the next piece. No match is
# longer, so a match that spans two pieces is found.
_OVERLAP = 128
_MAX_VERSION_LENGTH = 64
# Matches the text "_sklearn_version", an optional memoize opcode, and the opcode and length of the next text.
_SAVED_WITH = re.compile(rb"_sklearn_version(?:\x94|q.|r.{4})?(?:\x8c(.)|X(.{4}))", re.DOTALL)
_VERSION = re.compile(r"[0-9]+(\.[0-9A-Za-z+]+)+")
# Only numpy 2 writes these module names.
_NUMPY_2 = re.compile(rb"numpy\._core|numpy\.random\._(?:mt19937|pcg64|philox|sfc64)\W")


@dataclass(frozen=True, slots=True)
class PickleReleases:
    """The library releases that wrote a pickle.

    ``sklearn`` None: the release is unknown. ``numpy_2``: True if numpy 2 or later wrote the pickle.
    """

    sklearn: str | None = None
    numpy_2: bool = False


def releases_in(pieces: Iterable[bytes]) -> PickleReleases:
    """Return the library releases that wrote a pickle. ``pieces``: the pickle's unpacked bytes, in order."""
    sklearn, numpy_2, before = None, False, b""
    for piece in pieces:
        text = before + piece
        sklearn = sklearn or _sklearn_in(text)
        numpy_2 = numpy_2 or _NUMPY_2.search(text) is not None
        if sklearn and numpy_2:
            break
        before = text[-_OVERLAP:]
    return PickleReleases(sklearn, numpy_2)


def warnings(saved_by: PickleReleases, here: Mapping[str, str], requirements: Sequence[str]) -> list[str]:
    """Return warnings for the publisher about releases that the models' environment does not have.

    ``here``: the release of each package in the models' environment. If the version's own requirements name
    scikit-learn, its release is not compared, because the requirements decide which release is installed.
    """
    messages = []
    ours = here.get(SKLEARN)
    if saved_by.sklearn and ours and saved_by.sklearn != ours and SKLEARN not in needs.named(requirements):
        messages.append(
            f"The estimator was saved with scikit-learn {saved_by.sklearn}, and models here run with "
            f"{ours}. The estimator may not load, or its results may differ. Save it with "
            f"scikit-learn=={ours}, or deploy it with --requirements FILE, where FILE has the line "
            f"scikit-learn=={saved_by.sklearn}."
        )
    numpy = here.get(NUMPY, "1")
    if saved_by.numpy_2 and numpy.startswith("1"):
        messages.append(
            "The estimator was saved with numpy 2, and models here run with numpy "
            f"{numpy if NUMPY in here else '1.x'}. A compatibility layer loads it, so check a few results. "
            "To avoid the layer, save the estimator with numpy<2, or export it to ONNX."
        )
    return messages


def _sklearn_in(data: bytes) -> str | None:
    for match in _SAVED_WITH.finditer(data):
        length = int.from_bytes(match[1] or match[2], "little")
        text = data[match.end() : match.end() + min(length, _MAX_VERSION_LENGTH)].decode("latin-1")
        if len(text) == length and _VERSION.fullmatch(text):
            return text
    return None
