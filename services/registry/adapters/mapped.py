"""Map a file into memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.registry.domain.json_outline import Malformed
from tidegate.kernel.errors import BadRequest


@contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """Yield a memory map of a file.

    Raise BadRequest if the file is empty, or if the ``with`` block of the calling code raises Malformed.
    """
    if not path.stat().st_size:
        raise BadRequest("The file is empty. Save the model again.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            yield data
        except Malformed as error:
            raise BadRequest(f"The file cannot be read ({error}). Save the model again.") from None
