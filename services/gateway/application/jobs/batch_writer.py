"""Write the results of a batch to the blob store, in chunks.

OpenAI's batches have a file of answers and a file of errors.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from services.gateway.adapters.batch_files import LineWriter
from services.gateway.application.jobs.line_forms import ResultLine
from services.gateway.domain.batches import Batch, FileChunk
from services.gateway.domain.openai.batches import (
    ERROR_BYTES,
    ERROR_LINES,
    OUTPUT_BYTES,
    OUTPUT_LINES,
    batch_name,
)
from services.gateway.domain.openai.files import StoredFile
from tidegate.kernel.blobs.store import Blobs


class Written(NamedTuple):
    """The chunks that were written since the last save.

    ``chunk``: the chunk of a batch with tensors; None for a batch of OpenAI's API. ``files``: the chunks of
    OpenAI's result files, by file id.
    """

    chunk: FileChunk | None
    files: Mapping[bytes, FileChunk]

    @property
    def size(self) -> int:
        """Return the size of all chunks, in bytes."""
        chunks = [*self.files.values(), *([self.chunk] if self.chunk is not None else [])]
        return sum(chunk.size for chunk in chunks)


class BatchWriter:
    """Write the results of one batch.

    ``counts``: the number of finished lines by outcome, since the batch began. For a batch of OpenAI's API,
    it also has the lines and bytes of the result files.
    """

    def __init__(self, batch: Batch, blobs: Blobs, keep_s: float) -> None:
        self._batch = batch
        self._keep_s = keep_s
        self._lines = LineWriter(blobs, keep_s)
        self._errors = LineWriter(blobs, keep_s)
        self._unsaved: dict[bytes, FileChunk] = {}
        self.counts = Counter(batch.counts)

    @property
    def held(self) -> int:
        """Return how many bytes of results are in memory."""
        return self._lines.held + self._errors.held

    def add(self, result: ResultLine) -> bool:
        """Add a result. Return True if :meth:`write` must be called now."""
        self.counts[result.outcome] += 1
        if self._batch.openai is None:
            return self._lines.add(result.line)
        good = result.outcome == "succeeded"
        self.counts[OUTPUT_LINES if good else ERROR_LINES] += 1
        self.counts[OUTPUT_BYTES if good else ERROR_BYTES] += len(result.line) + 1
        return (self._lines if good else self._errors).add(result.line)

    async def write(self) -> Written | None:
        """Write the results that are in memory to the blob store, and return the new chunks.

        Return None if there are no new chunks. If this method raises Unavailable, the calling code must call
        it again.
        """
        facts = self._batch.openai
        if facts is None:
            chunk = await self._lines.write()
            return None if chunk is None else Written(chunk, {})
        for id_, writer in ((facts.output_file, self._lines), (facts.error_file, self._errors)):
            if (chunk := await writer.write()) is not None:
                self._unsaved[id_] = chunk
        written, self._unsaved = self._unsaved, {}
        return Written(None, written) if written else None

    def files(self, counts: Mapping[str, int]) -> list[StoredFile]:
        """Return the records of an OpenAI batch's result files; other batches have no such files.

        ``counts``: the saved counts of result lines and bytes.
        """
        facts = self._batch.openai
        if facts is None:
            return []
        now_ms = int(time.time() * 1e3)
        name = batch_name(self._batch.id)
        kinds = (
            (facts.output_file, "output", OUTPUT_LINES, OUTPUT_BYTES),
            (facts.error_file, "error", ERROR_LINES, ERROR_BYTES),
        )
        return [
            StoredFile(
                id_,
                self._batch.principal,
                f"{name}_{kind}.jsonl",
                "batch_output",
                counts[size],
                counts[lines],
                now_ms,
                now_ms + int(self._keep_s * 1e3),
            )
            for id_, kind, lines, size in kinds
            if counts.get(lines)
        ]
