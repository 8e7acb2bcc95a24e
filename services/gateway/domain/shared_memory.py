"""Check the names, keys and parts of shared memory regions that callers register. Pure.

The error messages begin with Triton's words, because Triton's clients compare them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.bounded_json import shown
from tidegate.kernel.protocol.envelope import Buffer

MAX_NAME, MAX_KEY = 255, 255
MAX_SIZE = 2**64  # the numbers in Triton's API are unsigned 64-bit integers
# The prefixes of segment names that Tidegate's workers and Triton's Python backend use.
RESERVED = ("tidegate", "triton_python_backend_shm_region")

REGION, OFFSET, SIZE = "shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"
CUDA_REFUSED = (
    "failed to register CUDA shared memory region: {name!r}, GPUs not supported: the model may run on "
    "another host. Use system shared memory, or send the tensors as binary data"
)


class UsesRegions(BadRequest):
    """The error for a tensor in shared memory that the decoder of the request cannot read."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"{where}: a shared memory region needs /infer or ModelInfer, a caller on the gateway's host, "
            "and TIDEGATE_SHARED_MEMORY=local. Without them, send the tensor as binary data"
        )


@dataclass(frozen=True, slots=True)
class RegionPart:
    """The part of a region that a tensor's parameters name. Offset and size are in bytes."""

    region: str
    offset: int
    size: int

    def parameters(self, written: int) -> dict[str, Any]:
        """Return the parameters of an output that has ``written`` bytes in this part."""
        found: dict[str, Any] = {REGION: self.region, SIZE: written}
        return found | {OFFSET: self.offset} if self.offset else found


class Sink(Protocol):
    """The destination of one output in shared memory."""

    @property
    def part(self) -> RegionPart:
        """Return the part of a region that gets the output."""

    def write(self, output: str, data: Buffer) -> None:
        """Write an output; raise BadRequest if it does not fit."""


class Regions(Protocol):
    """The regions of one caller."""

    def read(self, part: RegionPart) -> Buffer:
        """Return a copy of the bytes in a part.

        Raise NotFound if the region does not exist, and BadRequest if the part is wrong or too large. Raise
        Overloaded if the gateway's memory for requests is full.
        """

    def sink(self, part: RegionPart) -> Sink:
        """Return a part as the destination of an output.

        Raise NotFound if the region does not exist, and BadRequest if the part is not inside it.
        """


def file_of(name: str, key: str) -> str:
    """Return the file name in a key such as ``/input``.

    Raise BadRequest if the key is not one file name, or begins with a prefix of :data:`RESERVED`.
    """
    found = key.removeprefix("/")
    if not found or found in (".", "..") or "/" in found or not found.isprintable() or len(key) > MAX_KEY:
        raise BadRequest(
            f"Unable to open shared memory region: {shown(key)}: a key is the name of one segment, such as "
            "'/input'"
        )
    prefix = next((each for each in RESERVED if found.startswith(each)), None)
    if prefix is not None:
        raise BadRequest(
            f"cannot register shared memory region {shown(name)} with key {shown(key)} as the key contains "
            f"the reserved prefix {prefix!r}: use another name"
        )
    return found


def check_name(name: str) -> None:
    """Raise BadRequest for a name that is empty or too long."""
    if not name or len(name) > MAX_NAME:
        raise BadRequest(f"'region name' must have 1 to {MAX_NAME} characters, got {len(name)}")


def check_extent(name: str, offset: int, size: int, file_size: int) -> None:
    """Raise BadRequest if a region is not inside its file. Offset and sizes are in bytes."""
    if size < 1 or offset < 0 or offset + size > file_size:
        raise BadRequest(
            f"failed to register shared memory region {name!r}: invalid args: bytes {offset} to "
            f"{offset + size} are not within the segment's {file_size} bytes"
        )


def check_part(part: RegionPart, region_size: int) -> None:
    """Raise BadRequest if a part is not inside its region of ``region_size`` bytes."""
    if part.offset >= region_size:
        raise BadRequest(
            f"Invalid offset for shared memory region: {part.region!r}: the offset is {part.offset}, but "
            f"the region has {region_size} bytes"
        )
    if part.offset + part.size > region_size:
        raise BadRequest(
            f"Invalid offset + byte size for shared memory region: {part.region!r}: {part.offset} + "
            f"{part.size} is past the end of the region, which has {region_size} bytes"
        )


def part_of(where: str, parameters: Mapping[str, Any]) -> RegionPart | None:
    """Return the part of a region that a tensor's parameters name, or None if they name none.

    Raise BadRequest if the parameters are wrong. ``where``: the tensor's name for messages.
    """
    region, offset, size = parameters.get(REGION), parameters.get(OFFSET), parameters.get(SIZE)
    if region is None:
        for name, value in ((OFFSET, offset), (SIZE, size)):
            if value is not None:
                raise BadRequest(
                    f"{name!r} can not be specified without {REGION!r} parameter for tensor {where}"
                )
        return None
    if size is None:
        raise BadRequest(f"{SIZE!r} must be specified along with {REGION!r} parameter for tensor {where}")
    if not isinstance(region, str):
        raise BadRequest(f"{where}: {REGION!r} must be a string, got {shown(region)}")
    offset = 0 if offset is None else offset
    for name, value in ((OFFSET, offset), (SIZE, size)):
        if type(value) is not int or not 0 <= value < MAX_SIZE:
            raise BadRequest(f"{where}: {name!r} must be a number of bytes, got {shown(value)}")
    return RegionPart(region, offset, size)


def too_small(part: RegionPart, output: str, needed: int) -> BadRequest:
    """Return the error for an output that does not fit into its part."""
    return BadRequest(
        f"shared memory size specified with the request for output {output!r} ({part.size} bytes) should be "
        f"at least {needed} bytes to hold the results"
    )
