"""Read the releases that saved a pickled estimator from its bytes, which are never executed. Pure.

``pickletools`` stops at a joblib file's arrays, which lie raw between the opcodes, so the bytes are searched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

SKLEARN, NUMPY = "scikit-learn", "numpy"
# Two reads overlap by so much: more than the longest match.
_OVERLAP = 128
_LONGEST_VERSION = 64
# The key in an estimator's state, perhaps an opcode that remembers it, and the opcode and length of a text.
_SAVED_WITH = re.compile(rb"_sklearn_version(?:\x94|q.|r.{4})?(?:\x8c(.)|X(.{4}))", re.DOTALL)
_VERSION = re.compile(r"[0-9]+(\.[0-9A-Za-z+]+)+")
# Names of modules that only numpy 2 writes.
_NUMPY_2 = re.compile(rb"numpy\._core|numpy\.random\._(?:mt19937|pcg64|philox|sfc64)\W")


@dataclass(frozen=True, slots=True)
class PickleReleases:
    """The releases that wrote a pickle. ``sklearn`` None: it does not say."""

    sklearn: str | None = None
    numpy_2: bool = False


def saved_with(pieces: Iterable[bytes]) -> PickleReleases:
    """Return what the bytes of a pickle, unpacked and in pieces, say of the releases that wrote it."""
    sklearn, numpy_2, before = None, False, b""
    for piece in pieces:
        read = before + piece
        sklearn = sklearn or _sklearn_in(read)
        numpy_2 = numpy_2 or _NUMPY_2.search(read) is not None
        if sklearn and numpy_2:
            break
        before = read[-_OVERLAP:]
    return PickleReleases(sklearn, numpy_2)


def warnings(saved: PickleReleases, here: Mapping[str, str], requirements: Sequence[str]) -> list[str]:
    """Return what the publisher should know, given the packages ``here`` (name -> version) for models.

    A package that the version's own requirements name is not judged.
    """
    found = []
    ours = here.get(SKLEARN)
    if saved.sklearn and ours and saved.sklearn != ours and not _names(requirements, SKLEARN):
        found.append(
            f"The estimator was saved with scikit-learn {saved.sklearn}, and this stack's models run {ours}: "
            f"its answers may differ, or it may not load. Save it with scikit-learn=={ours}, or deploy it "
            f"with --requirements FILE that has the line scikit-learn=={saved.sklearn}."
        )
    numpy = here.get(NUMPY, "1")
    if saved.numpy_2 and numpy.startswith("1"):
        found.append(
            f"The estimator was saved with numpy 2, and this stack's models run numpy "
            f"{numpy if NUMPY in here else '1.x'}. It is read through a compatibility layer: check its "
            "answers. To do without, save it with numpy<2, or export it to ONNX."
        )
    return found


def _sklearn_in(read: bytes) -> str | None:
    for found in _SAVED_WITH.finditer(read):
        length = int.from_bytes(found[1] or found[2], "little")
        text = read[found.end() : found.end() + min(length, _LONGEST_VERSION)].decode("latin-1")
        if len(text) == length and _VERSION.fullmatch(text):
            return text
    return None


def _names(requirements: Sequence[str], package: str) -> bool:
    names = {re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0] for line in requirements}
    return package in {re.sub(r"[-_.]+", "-", name).lower() for name in names}
