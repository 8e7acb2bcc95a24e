"""Read the inputs and outputs of a TensorFlow SavedModel in an archive, without TensorFlow."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from services.registry.adapters import archive_reader
from services.registry.domain.signature import GraphValue, OnnxGraph
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.archives import ArchiveLimits
from tidegate.kernel.protocol.models import Datatype
from tidegate.kernel.protocol.protobuf_wire import Budget, Malformed, Message

FILE = "saved_model.pb"
SERVING = "serving_default"
# The maximum size of the graph in bytes. This is protobuf's limit for one message. The variables do not
# count, because they are in other files.
MAX_GRAPH = 2 * 1024**3
# Field numbers from saved_model.proto, meta_graph.proto and tensor_shape.proto.
META_GRAPHS, SIGNATURES, SIGNATURE_INPUTS, SIGNATURE_OUTPUTS = 2, 5, 1, 2
ENTRY_KEY, ENTRY_VALUE, INFO_TYPE, INFO_SHAPE = 1, 2, 2, 3
SHAPE_DIM, DIM_SIZE, SHAPE_UNKNOWN = 2, 1, 3
_DATATYPES: dict[int, Datatype] = {
    1: "FP32", 2: "FP64", 3: "INT32", 4: "UINT8", 5: "INT16", 6: "INT8", 7: "BYTES", 9: "INT64", 10: "BOOL",
    14: "BF16", 17: "UINT16", 19: "FP16", 22: "UINT32", 23: "UINT64",
}  # fmt: skip


def read(path: Path, limits: ArchiveLimits) -> OnnxGraph:
    """Return the inputs and outputs of the signature ``serving_default``. Blocking.

    Raise BadRequest if the SavedModel is incomplete, cannot be read, or has no such signature.
    """
    contents = archive_reader.read_archive(path, names=(), max_text=0, limits=limits)
    found = sorted(
        (inner for inner in contents.files if inner.name == FILE), key=lambda inner: len(inner.parts)
    )
    if not found or contents.sizes[found[0]] > MAX_GRAPH:
        raise BadRequest(
            f"The archive has no {FILE}, or the file has more than 2 GiB. Pack the whole folder that "
            "tf.saved_model.save wrote."
        )
    if not any(inner.parent == found[0].parent / "variables" for inner in contents.files):
        raise BadRequest(f"The archive has no folder `variables` beside {FILE}. Pack the whole folder.")
    with tempfile.TemporaryDirectory(prefix="tidegate-registry-") as folder:
        file = Path(folder, FILE)
        archive_reader.extract(path, PurePosixPath(found[0]), file)
        return _graph(file)


def _graph(path: Path) -> OnnxGraph:
    if not path.stat().st_size:
        raise BadRequest(f"The {FILE} is empty. Save the model again.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            signatures = dict(_signatures(Message(data, 0, len(data), Budget())))
            signature = signatures.get(SERVING)
            if signature is None:
                raise BadRequest(
                    f"The SavedModel has no signature {SERVING!r}. Its signatures: "
                    f"{', '.join(sorted(signatures))[:200] or 'none'}. Save it with "
                    "tf.saved_model.save(model, folder, signatures={...}) or "
                    "with Keras' model.export(folder)."
                )
            inputs = tuple(_values(signature, SIGNATURE_INPUTS))
            return OnnxGraph(inputs, tuple(_values(signature, SIGNATURE_OUTPUTS)), "the SavedModel")
        except Malformed as error:
            raise BadRequest(f"The {FILE} cannot be read ({error}). Save the model again.") from None


def _signatures(model: Message) -> Iterator[tuple[str, Message]]:
    for graph in model.messages(META_GRAPHS):
        for entry in graph.messages(SIGNATURES):
            yield _entry(entry)


def _values(signature: Message, field: int) -> Iterator[GraphValue]:
    for entry in signature.messages(field):
        name, info = _entry(entry)
        datatype, dims = None, []
        unknown = True
        for number, value in info.fields():
            if number == INFO_TYPE and isinstance(value, int):
                datatype = _DATATYPES.get(value)
            elif number == INFO_SHAPE and isinstance(value, Message):
                unknown = any(kind == SHAPE_UNKNOWN and each for kind, each in value.fields())
                dims = [_dim(dim) for dim in value.messages(SHAPE_DIM)]
        yield GraphValue(name, "tensor", datatype, None if unknown else tuple(dims))


def _entry(entry: Message) -> tuple[str, Message]:
    key, value = "", None
    for number, part in entry.fields():
        if number == ENTRY_KEY and isinstance(part, Message):
            key = part.text()
        elif number == ENTRY_VALUE and isinstance(part, Message):
            value = part
    if value is None:
        raise Malformed(f"the signature {key!r} is empty")
    return key, value


def _dim(dim: Message) -> int | None:
    size = 0
    for number, value in dim.fields():
        if number == DIM_SIZE and isinstance(value, int):
            size = value
    # A dynamic axis is -1. As a varint, it is read as a number above 2**63.
    return size if 0 < size < 1 << 63 else None
