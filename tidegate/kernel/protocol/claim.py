"""Claims: references that frames carry in place of tensors too large for a message. Pure.

    u8 len key | key | one u64 byte size for each tensor

The key names a blob in the blob store (:mod:`tidegate.kernel.blobs.store`). The blob has the tensors in
order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from tidegate.kernel.protocol.envelope import Buffer, Undecodable


class Claim(NamedTuple):
    """A reference to a blob with tensors: its key, and the tensors' sizes in bytes."""

    key: str
    sizes: tuple[int, ...]


def write_claim(key: str, data: Iterable[Buffer]) -> bytes:
    """Return the claim of a blob that holds ``data``."""
    raw = key.encode()
    sizes = [len(buffer) for buffer in data]
    return b"".join((bytes((len(raw),)), raw, struct.pack(f"<{len(sizes)}Q", *sizes)))


def read_claim(data: list[Buffer]) -> Claim:
    """Read the claim in a frame's data. Raises :class:`Undecodable`."""
    if len(data) != 1 or not len(data[0]):
        sizes = [len(buffer) for buffer in data]
        raise Undecodable(
            f"a claim must be one buffer that is not empty; the frame has buffers of {sizes} bytes"
        )
    raw = bytes(data[0])
    at = 1 + raw[0]
    count, rest = divmod(len(raw) - at, 8)
    if count < 0 or rest:
        raise Undecodable("a claim is cut off")
    try:
        return Claim(raw[1:at].decode(), struct.unpack_from(f"<{count}Q", raw, at))
    except UnicodeDecodeError:
        raise Undecodable("a claim's key is not text") from None
