"""Recognise the format of a file by its contents. The file's name is only a hint. Pure.

The table of kinds is in ``kinds.py`` and ``foreign_kinds.py``. To add a format, add a row there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Format

HEAD_BYTES = 64 * 1024
"""The bytes that are read from the start of a file, and from the start of its unpacked contents."""

LABELS: dict[Format, str] = {
    "onnx": "an ONNX model",
    "sklearn": "a scikit-learn estimator",
    "torchscript": "TorchScript",
    "python": "a Python model",
    "triton": "a Triton model directory",
    "llm": "a language model",
    "oip": "the description of an upstream",
    "xgboost": "an XGBoost model",
    "lightgbm": "a LightGBM model",
    "catboost": "a CatBoost model",
    "tflite": "a TensorFlow Lite model",
    "tensorflow": "a TensorFlow SavedModel",
    "mlflow": "an MLflow model",
    "huggingface": "a Hugging Face folder",
    "pt2": "a program of torch.export",
}


@dataclass(frozen=True, slots=True)
class Glimpse:
    """The parts of a file that are read to recognise its format. Their size is limited.

    ``head``: the first bytes. ``unpacked``: the first bytes of a compressed file's contents; empty for other
    files. ``members``: the size in bytes of each file in an archive, by path; None if the file is not an
    archive or cannot be read.
    """

    filename: str
    size: int
    head: bytes
    unpacked: bytes = b""
    members: Mapping[str, int] | None = None

    def ends(self, *suffixes: str) -> bool:
        """Return True if the file's name has one of these endings."""
        return self.filename.lower().endswith(suffixes)

    @property
    def root(self) -> frozenset[str]:
        """Return the names of the files at the root of an archive."""
        return frozenset(name for name in self.members or () if "/" not in name)

    @property
    def below(self) -> frozenset[str]:
        """Return the paths in an archive, each without its first folder."""
        return frozenset(name.partition("/")[2] for name in self.members or ())

    @property
    def text(self) -> str | None:
        """Return the first characters of a text file; None if the file does not begin with text."""
        try:
            # If only the start was read, it can end in the middle of a character. Ignore that character.
            decoded = self.head.decode("utf-8-sig", "strict" if self.size <= len(self.head) else "ignore")
        except UnicodeDecodeError:
            return None
        odd = sum(not (each.isprintable() or each in "\t\r\n\f") for each in decoded[:4096])
        return decoded if decoded and not odd else None


Test = Callable[[Glimpse], bool]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file.

    - ``what``: the kind's name in messages ("a PNG image")
    - ``test``: the test that files of this kind pass
    - ``format``: the format in which Tidegate serves the file; None if the kind alone decides no format
    - ``fits``: other formats that files of this kind can have
    - ``remedy``: what the user must do if the file is refused
    - ``general``: True if the kind alone does not prove ``format``

    A publisher may state a format of ``fits``. If ``format`` is None, the file's name may also suggest one of
    them. Without either, the file is refused.

    If ``general`` is True and the publisher states no format, a file name that suggests a format outside
    ``fits`` is an error.
    """

    what: str
    test: Test
    format: Format | None = None
    remedy: str = ""
    fits: frozenset[Format] = field(default_factory=frozenset)
    general: bool = False


def recognise(glimpse: Glimpse, table: Sequence[Kind]) -> Kind | None:
    """Return the first kind in ``table`` whose test the file passes; None if it passes no test."""
    return next((kind for kind in table if kind.test(glimpse)), None)


def decide(filename: str, kind: Kind | None, stated: Format | None, by_name: Format | None) -> Format:
    """Return the format of a file.

    ``kind``: the kind that was recognised from the contents; None if no kind was recognised. ``stated``: the
    format that the publisher states. ``by_name``: the format that the file's name suggests.

    Raise BadRequest if the contents contradict ``stated``, if they contradict ``by_name`` and do not prove a
    format, if Tidegate cannot serve them, or if nothing shows the format.
    """
    if kind is None:
        if (known := stated or by_name) is not None:
            return known
        raise BadRequest(
            f"Neither the contents nor the name of {filename[:80]!r} shows what kind of model it is. State "
            f"the format with --model-format (in the API: format): {', '.join(LABELS)}."
        )
    wanted = stated or by_name
    if stated is not None and (stated == kind.format or stated in kind.fits):
        return stated
    agrees = wanted is None or wanted in kind.fits
    if stated is None and kind.format is not None and (agrees or not kind.general):
        return kind.format
    if stated is None and by_name is not None and agrees:
        return by_name
    raise BadRequest(_wrong(filename, kind, stated, wanted))


def _wrong(filename: str, kind: Kind, stated: Format | None, wanted: Format | None) -> str:
    expected = "a model that Tidegate can serve" if wanted is None else LABELS[wanted]
    remedy = kind.remedy or "Deploy the model's own file."
    if not kind.remedy and kind.format is not None and stated is not None:
        remedy = f"To deploy it as {LABELS[kind.format]}, leave out --model-format (in the API: format)."
    return f"{filename[:80]!r} is {kind.what}, not {expected}. {remedy}"


def starts(*magic: bytes) -> Test:
    """Return a test that a file passes if it begins with one of ``magic``."""
    return lambda glimpse: glimpse.head.startswith(magic)


def has_at(at: int, magic: bytes) -> Test:
    """Return a test that a file passes if it has the bytes ``magic`` at the offset ``at``."""
    return lambda glimpse: glimpse.head[at : at + len(magic)] == magic


def matches(pattern: bytes) -> Test:
    """Return a test that matches a regular expression against the beginning of a file."""
    found = re.compile(pattern, re.DOTALL)
    return lambda glimpse: found.match(glimpse.head) is not None


def holds(*paths: str) -> Test:
    """Return a test for an archive that has all these files at its root."""
    return lambda glimpse: set(paths) <= glimpse.root


def both(first: Test, second: Test) -> Test:
    """Return a test that a file passes only if it passes both tests."""
    return lambda glimpse: first(glimpse) and second(glimpse)
