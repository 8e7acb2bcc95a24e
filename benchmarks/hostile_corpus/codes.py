"""Hostile Python, configurations, requirements, signatures and names."""

from __future__ import annotations

from typing import Any

from benchmarks.hostile_corpus.archives import zipped
from benchmarks.hostile_corpus.case import Case, raw

CODE = b"def predict(x: float) -> float:\n    return x\n"
SIGNATURE: dict[str, Any] = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [4]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [4]}],
}
TREES = b"tree\nversion=v4\nnum_class=1\nmax_feature_idx=3\n\nTree=0\n\nend of trees\n"
REFUSED = (400, 422)


def config(text: str) -> bytes:
    """Return an archive of a Triton model with this configuration."""
    return zipped(("config.pbtxt", text.encode("utf-8", "surrogatepass")), ("1/model.py", b""))


def needs(line: str) -> Case:
    """Return a case of a Python file with a bad requirement."""
    return Case(
        f"requirement {line[:30]!r}", "m.py", raw(CODE), "requirement", {"requirements": [line]}, REFUSED
    )


def named(name: str) -> Case:
    """Return a case of a good file with a bad name."""
    return Case(f"file name {name[:12]!r}", name, raw(TREES), "plain file name", statuses=REFUSED)


def signed(name: str, words: str, signature: Any) -> Case:
    """Return a case of a good file with a bad signature."""
    return Case(f"signature {name}", "m.txt", raw(TREES), words, {"signature": signature}, REFUSED)


def tensor(**fields: Any) -> dict[str, Any]:
    """Return a signature with a changed input."""
    return SIGNATURE | {"inputs": [SIGNATURE["inputs"][0] | fields]}


def deep(levels: int) -> Any:
    """Return lists in each other."""
    found: Any = []
    for _ in range(levels):
        found = [found]
    return found


CASES: tuple[Case, ...] = (
    Case("Python with a null byte", "m.py", raw(b"x = 1\0"), "Python|null"),
    Case(
        "Python nested 100,000 levels deep",
        "m.py",
        lambda: b"x = " + b"(" * 100_000,
        "Python|nested|parenthes",
    ),
    Case(
        "Python with an expression of 50,000 terms",
        "m.py",
        lambda: b"x = " + b"-" * 50_000 + b"1",
        "Python|nest|deep",
    ),
    Case(
        "Python with an integer of 10,000 digits",
        "m.py",
        lambda: b"x: " + b"9" * 10_000 + b" = 1",
        "digits|Python",
    ),
    Case("Python of 5 MB", "m.py", lambda: b"#" * (5 * 2**20), "larger than"),
    Case("Python in Latin-1", "m.py", raw(b"x = '\xe9'"), "."),
    Case("Python without a predict", "m.py", raw(b"x = 1\n"), "predict|TritonPythonModel"),
    Case("config.pbtxt of rubbish", "m.zip", lambda: config("\0\1\2"), "config.pbtxt"),
    Case(
        "config.pbtxt nested 100,000 levels deep",
        "m.zip",
        lambda: config("parameters {" * 100_000),
        "config.pbtxt",
    ),
    Case("config.pbtxt of 2 MB", "m.zip", lambda: config("#" * 2 * 2**20), "larger than"),
    Case(
        "config.pbtxt with a negative size",
        "m.zip",
        lambda: config("max_batch_size: -5"),
        "max_batch_size|config",
    ),
    Case(
        "config.pbtxt with a dimension of 10^30",
        "m.zip",
        lambda: config(f"input [{{dims: [{10**30}]}}]"),
        "config",
    ),
    Case("archive of Triton without a model", "m.zip", lambda: zipped(("readme.txt", b"")), "model"),
    needs("-r /etc/passwd"),
    needs("-e ."),
    needs("--install-option=--prefix=/"),
    needs("../../evil"),
    needs("./evil.whl"),
    needs("numpy\x1b[2J"),
    needs("a" * 3000),
    signed("with a name twice", "more than once", SIGNATURE | {"inputs": SIGNATURE["inputs"] * 2}),
    signed("with a negative axis", "shape", tensor(shape=[-5])),
    signed("with an axis of 10^30", "shape", tensor(shape=[10**30])),
    signed("with 17 axes", "shape", tensor(shape=[1] * 17)),
    signed("with an unknown datatype", "datatype", tensor(datatype="PICKLE")),
    signed("without inputs", "inputs", SIGNATURE | {"inputs": []}),
    signed("of a text", "signature", "x"),
    signed("of 60 lists in each other", "signature", deep(60)),
    signed("of another model", "features|outputs", SIGNATURE),
    signed("with a name of 1,000 characters", "name", tensor(name="x" * 1000)),
    named("../../etc/passwd"),
    named("a/b.onnx"),
    named("a\\b.onnx"),
    named("a\nb.onnx"),
    named("a\x1b[2Jb.onnx"),
    named("evil\u202exnno.exe"),
    named("x" * 300),
    named(""),
    named(".."),
)
