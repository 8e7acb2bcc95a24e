"""Hostile files of models: ONNX, pickles, GGUF, TensorFlow, skops, and files that are no models at all."""

from __future__ import annotations

import os
import pickle
import struct
import zlib
from typing import Any

from benchmarks.hostile_corpus.archives import zipped
from benchmarks.hostile_corpus.case import Case, raw

MIB = 2**20
PICKLED = {"allow_pickle": True}


class Runs:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = (function, arguments)

    def __reduce__(self) -> Any:
        return self.made


def varint(number: int) -> bytes:
    """Return a number in protobuf's form."""
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def field(number: int, content: bytes) -> bytes:
    """Return a field of protobuf with a length."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensor(name: bytes, shape: bytes = b"") -> bytes:
    """Return an input or output of ONNX: FP32 with one axis."""
    return field(1, name) + field(2, field(1, b"\x08\x01" + field(2, shape or field(1, b"\x08\x04"))))


def onnx(*more: bytes, graph: bytes = b"") -> bytes:
    """Return an ONNX file with an input and an output, and more fields."""
    graph = graph or field(11, tensor(b"x")) + field(12, tensor(b"y"))
    return b"\x08\x08" + field(7, graph) + b"".join(more)


def external(location: bytes) -> bytes:
    """Return an ONNX file whose weights are in another file."""
    key = field(13, field(1, b"location") + field(2, location))
    weights = field(5, field(8, b"w") + b"\x70\x01" + key)
    return onnx(graph=field(11, tensor(b"x")) + field(12, tensor(b"y")) + weights)


def nested(depth: int) -> bytes:
    """Return an ONNX file with graphs inside of attributes of nodes, so deep."""
    inner = b""
    for _ in range(depth):
        inner = field(1, field(5, field(6, inner)))
    return onnx(graph=field(11, tensor(b"x")) + field(12, tensor(b"y")) + inner)


def gguf(tensors: int, pairs: int, rest: bytes = b"") -> bytes:
    """Return the beginning of a GGUF file with these counts."""
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest


def joblib_array(size: int) -> bytes:
    """Return a pickle with an array of joblib that states this many rows."""
    state = pickle.dumps({"shape": (size,), "order": "C"}, 2)[2:-1]
    return b"\x80\x02cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81" + state + b"b."


SHELL = pickle.dumps(Runs(os.system, "touch /tmp/tidegate-hostile"))
TRUST = r"--trust"
FLATBUFFER = b"\x1c\0\0\0TFL3"
CASES: tuple[Case, ...] = (
    Case(
        "ONNX that is cut off",
        "m.onnx",
        lambda: onnx()[:-4],
        "not an ONNX model|reaches past the end|is cut off",
    ),
    Case(
        "ONNX with a length of 2^63",
        "m.onnx",
        raw(b"\x08\x08\x3a" + b"\xff" * 8 + b"\x7f"),
        "not an ONNX model",
    ),
    Case(
        "ONNX with a number without an end",
        "m.onnx",
        raw(b"\x08\x08\x3a" + b"\xff" * 1000),
        "not an ONNX model",
    ),
    Case("ONNX with two graphs", "m.onnx", lambda: onnx(onnx()[2:]), "two graphs"),
    Case(
        "ONNX with 6,000,000 fields",
        "m.onnx",
        lambda: onnx(b"\x28\x01" * 6_000_000),
        "too many fields|two|not an ONNX",
        slow=True,
    ),
    Case(
        "ONNX with a name that is no text",
        "m.onnx",
        lambda: onnx(graph=field(11, tensor(b"\xff\xfe"))),
        "UTF-8",
    ),
    Case(
        "ONNX with a name of 1 MB",
        "m.onnx",
        lambda: onnx(graph=field(11, tensor(b"x" * MIB))),
        "name of more",
    ),
    Case("ONNX without inputs", "m.onnx", lambda: onnx(graph=field(12, tensor(b"y"))), "declares no input"),
    Case("ONNX whose weights are /etc/shadow", "m.onnx", lambda: external(b"/etc/shadow"), "external data"),
    Case(
        "ONNX whose weights are above its folder",
        "m.onnx",
        lambda: external(b"../../../etc/shadow"),
        "external data",
    ),
    Case(
        "archive of ONNX whose weights are above its folder",
        "m.zip",
        lambda: zipped(("m.onnx", external(b"../../etc/shadow"))),
        "etc/shadow|below|no such file",
        {"format": "onnx"},
    ),
    Case("ONNX with 3,000 graphs in each other", "m.onnx", lambda: nested(3000), "deep|not an ONNX|nested"),
    Case("pickle of os.system without a flag", "m.pkl", raw(SHELL), "allow_pickle"),
    Case("pickle of os.system", "m.pkl", raw(SHELL), "posix.system", PICKLED),
    Case("pickle of os.system, named as ONNX", "m.onnx", raw(SHELL), "allow_pickle"),
    Case(
        "pickle of os.system in the form of Python 1",
        "m.pkl",
        raw(b"\x80\x02cos\nsystem\n(S'x'\ntR."),
        "os.system",
        PICKLED,
    ),
    Case("pickle of eval", "m.joblib", lambda: pickle.dumps(Runs(eval, "1")), "builtins.eval", PICKLED),
    Case(
        "pickle of __import__",
        "m.joblib",
        lambda: pickle.dumps(Runs(__import__, "os")),
        "__import__",
        PICKLED,
    ),
    Case(
        "pickle with an escaped module name",
        "m.pkl",
        raw(b"\x80\x04V\\u006fs\n\x8c\x06system\x93."),
        "unknown",
        PICKLED,
    ),
    Case("pickle of os.system, packed", "m.joblib", lambda: zlib.compress(SHELL), "posix.system", PICKLED),
    Case(
        "pickle in a zip",
        "m.pkl",
        lambda: zipped(("data.pkl", SHELL)),
        "archive|torch.save|no Triton model",
        PICKLED,
    ),
    Case(
        "pickle of 3,000,000 marks",
        "m.pkl",
        raw(b"\x80\x02" + b"(" * 3_000_000 + b"."),
        "cannot be checked",
        PICKLED,
    ),
    Case(
        "pickle of 64 MB of opcodes, packed",
        "m.joblib",
        lambda: flood(),
        "cannot be checked",
        PICKLED,
        slow=True,
    ),
    Case(
        "pickle with a length of 2^62",
        "m.pkl",
        raw(b"\x80\x04\x8e" + b"\xff" * 7 + b"\x3f."),
        "cannot be checked",
        PICKLED,
    ),
    Case(
        "joblib array with a lying shape",
        "m.joblib",
        lambda: joblib_array(2**60),
        "cannot be checked",
        PICKLED,
    ),
    Case("joblib by lz4", "m.joblib", raw(b"\x04\x22\x4d\x18" + bytes(50)), "lz4", PICKLED),
    Case("GGUF with 2^60 tensors", "m.gguf", lambda: gguf(2**60, 0), "GGUF file cannot be used|not complete"),
    Case("GGUF with 2^60 pairs", "m.gguf", lambda: gguf(0, 2**60), "GGUF file cannot be used"),
    Case(
        "GGUF with a text of 2^60 bytes",
        "m.gguf",
        lambda: gguf(0, 1, struct.pack("<Q", 2**60)),
        "GGUF file cannot",
    ),
    Case("GGUF that is cut off", "m.gguf", raw(b"GGUF\3\0"), "GGUF file cannot be used"),
    Case(
        "safetensors with a header of 2^60 bytes",
        "m.safetensors",
        raw(struct.pack("<Q", 2**31) + b'{"a":{}}'),
        "safetensors",
    ),
    Case(
        "TensorFlow Lite with an offset outside",
        "m.tflite",
        raw(b"\xff\xff\xff\x7fTFL3" + bytes(64)),
        "outside",
    ),
    Case(
        "TensorFlow Lite with an offset backwards",
        "m.tflite",
        raw(FLATBUFFER + b"\xff" * 64),
        "outside|cannot be read",
    ),
    Case("TensorFlow Lite that is cut off", "m.tflite", raw(b"\x08\0\0\0TFL3"), "outside|too early|no graph"),
    Case("SavedModel without variables", "m.zip", lambda: zipped(("saved_model.pb", b"")), "variables"),
    Case(
        "SavedModel of rubbish",
        "m.zip",
        lambda: zipped(("saved_model.pb", b"\xff" * 100), ("variables/variables.index", b"")),
        "cannot be read",
    ),
    Case(
        "skops with os.system",
        "m.skops",
        lambda: skops('{"__class__": "system", "__module__": "os", "__loader__": "FunctionNode"}'),
        "os.system.*--trust",
    ),
    Case(
        "skops with a method",
        "m.skops",
        lambda: skops('{"__class__": "SVC", "__module__": "sklearn.svm", "__loader__": "MethodNode"}'),
        TRUST,
    ),
    Case("skops with 100,000 lists in each other", "m.skops", lambda: skops("[" * 100_000), "levels"),
    Case(
        "skops with 20,000 types",
        "m.skops",
        lambda: skops(
            str([{"__class__": f"A{n}", "__module__": "b"} for n in range(20_000)]).replace("'", '"')
        ),
        "more than 10000 different types",
    ),
    Case("skops without a schema that ends", "m.skops", lambda: skops('{"__class__": "a'), "cannot be read"),
    Case("MLmodel of a billion laughs", "MLmodel", lambda: laughs(), "MLmodel file|YAML|MLflow"),
    Case("archive with an MLmodel of a billion laughs", "m.zip", lambda: zipped(("MLmodel", laughs())), "."),
    Case(
        "a PNG image", "model.onnx", raw(b"\x89PNG\r\n\x1a\n" + bytes(99)), "a PNG image, not an ONNX model"
    ),
    Case("a program", "model.tflite", raw(b"\x7fELF\x02\x01\x01" + bytes(99)), "a program for Linux"),
    Case("a web page", "model.cbm", raw(b"<!DOCTYPE html><html>"), "a web page"),
    Case(
        "a pointer of Git LFS",
        "model.gguf",
        raw(b"version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    Case(
        "a state_dict",
        "net.pt",
        lambda: zipped(("net/data.pkl", SHELL), ("net/data/0", b"")),
        "torch.jit.script",
    ),
    Case("a Keras file", "net.h5", raw(b"\x89HDF\r\n\x1a\n" + bytes(99)), "model.export"),
    Case("an empty file", "model.onnx", raw(b""), "is empty"),
)


def flood() -> bytes:
    """Return 64 MiB of pickle opcodes, packed to 0.3 MB."""
    packer = zlib.compressobj(1)
    parts = [packer.compress(b"\x80\x04(")]
    piece = b"N0" * (MIB // 2)
    parts += [packer.compress(piece) for _ in range(64)]
    return b"".join([*parts, packer.flush()])


def skops(schema: str) -> bytes:
    """Return a skops file with this schema."""
    return zipped(("schema.json", schema.encode()))


def laughs() -> bytes:
    """Return YAML whose aliases unfold to a billion texts."""
    lines = ["flavors: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return "\n".join(lines).encode()
