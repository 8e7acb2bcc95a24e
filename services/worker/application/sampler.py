"""Sample the inputs and outputs of calls into profiles, without delaying requests.

The scheduler only adds references to a bounded buffer, while the limit of rows per second allows it. A thread
counts the rows in batches, and a task publishes the counts. Rows that do not fit into the buffer are dropped,
and their number is counted.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from services.worker.adapters.metrics import SAMPLED, SAMPLES_DROPPED
from services.worker.adapters.model_call import ModelAnswer
from services.worker.application.model_calls import Queued
from services.worker.domain.samples import CALL_ROWS, SampledCall, SampledStream
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.envelope import Buffer
from tidegate.kernel.store import StoreUnavailable
from tidegate.kernel.store.profiles import ProfileStore

log = telemetry.logger(__name__)
T = TypeVar("T")

# The thread counts the waiting rows when there are this many, or after this many seconds.
BATCH_ROWS, BATCH_S = 256, 5.0
# The counts are published after this many seconds, or after this many rows.
PUBLISH_S, PUBLISH_ROWS = 10.0, 1000
# Until the router has computed the bins, the counts are published after this many seconds.
LEARN_S = 2.0
MAX_ROWS, MAX_BYTES = 2048, 16 * 2**20
# If the inputs of a call have up to this many bytes, the sampler copies them. A reference to the inputs would
# keep the whole envelope in memory.
COPIED_BYTES = 64 * 1024
# The limit ``rows_per_s`` is applied in steps. A step allows as many rows as ``rows_per_s`` allows in this
# many seconds, but at least one.
REFILL_S = 0.1
UNSENT_KEPT = 20
# Raw rows are deleted after this many seconds. If there are more rows than the Deployment's `keep_rows`, the
# oldest are deleted earlier.
ROWS_KEPT_S = 7 * 86_400.0
# The sampler keeps this many answers from the end of a stream. They contain the token counts and the finish
# reason.
LAST_ANSWERS = 3


class Counter(Protocol):
    """Counts samples. Only the sampler's thread calls it."""

    def count(self, samples: Sequence[SampledCall | SampledStream]) -> None:
        """Count samples. Those that cannot be read are dropped."""

    def use(self, bins: bytes) -> None:
        """Use these bins from now on. Do nothing if they are in use already."""

    def take_rows(self) -> list[bytes]:
        """Remove and return the raw rows that wait for the blob store, as lines of JSON."""

    def take(self, rows_key: str = "", rows: int = 0) -> bytes | None:
        """Return the counts since the last call of :meth:`take`, as a message; None if it would be empty.

        ``rows_key`` is the key of the blob with the raw rows that were stored last. ``rows`` is the number of
        these rows.
        """

    @property
    def learning(self) -> bool:
        """Return True until the bins are known."""


class StreamSample:
    """A sample of one stream. It keeps only the stream's last answers."""

    def __init__(self, sampler: Sampler, trace: bytes) -> None:
        self._sampler = sampler
        self._trace = trace
        self._answers: deque[ModelAnswer] = deque(maxlen=LAST_ANSWERS)

    def see(self, answer: ModelAnswer) -> None:
        """Add the stream's next answer, and drop the oldest answer if there are too many."""
        self._answers.append(answer)

    def end(self) -> None:
        """Give this sample to the sampler.

        The calling code must call this only if the stream has succeeded.
        """
        outputs = [answer.outputs for answer in self._answers]
        self._sampler.add_stream(SampledStream(self._trace, outputs, time.time()))


class Sampler:
    """Samples up to ``rows_per_s`` rows a second. ``wants`` is False while no more rows may be added.

    ``counter_of`` creates the counter in the sampler's thread, because the import of numpy takes long.
    """

    def __init__(
        self,
        store: ProfileStore,
        blobs: Blobs,
        deployment: str,
        counter_of: Callable[[], Counter],
        rows_per_s: int,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._deployment = deployment
        self._counter_of = counter_of
        self._counter: Counter | None = None
        self._rows_per_s = rows_per_s
        self._left = self._refill = max(1.0, rows_per_s * REFILL_S)
        self._refilled_at = 0.0
        self._samples: list[SampledCall | SampledStream] = []
        self._rows = self._bytes = self._unpublished = 0
        self._full = asyncio.Event()
        self._unsent: deque[bytes] = deque(maxlen=UNSENT_KEPT)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampler")
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.wants = False

    def start(self) -> None:
        """Start to sample."""
        self._refilled_at = time.monotonic()
        self.wants = True
        self._task = asyncio.create_task(self._run(), name="sampler")

    async def stop(self) -> None:
        """Publish what was sampled, and stop."""
        self.wants = False
        if self._timer is not None:
            self._timer.cancel()
        await tasks.end(self._task)
        if self._task is not None:
            await self._count()
            await self._publish()
        self._thread.shutdown(wait=False)
        await self._store.close()

    # --- called for each request ------------------------------------------------------------------------

    def add(self, group: Sequence[Queued], answer: ModelAnswer) -> None:
        """Add a call to the sample. Call this only if :attr:`wants` is True."""
        first = group[0].request
        rows = size = 0
        requests, datas = [], []
        for item in group:
            request = item.request
            rows += request.rows or 1
            size += sum(map(len, request.data))
            requests.append((request.trace, request.rows))
            datas.append(request.data)
        inputs: list[list[Buffer]] = [list(pieces) for pieces in zip(*datas, strict=True)]
        if size <= COPIED_BYTES:
            inputs = [[b"".join(pieces)] for pieces in inputs]
        size += sum(len(output.raw) for output in answer.outputs)
        self._add(
            SampledCall(first.key, requests, inputs, answer.outputs, time.time()), min(rows, CALL_ROWS), size
        )

    def stream(self, trace: bytes) -> StreamSample | None:
        """Return an object that samples the answers of one stream; None if no row may be added now."""
        return StreamSample(self, trace) if self.wants else None

    def add_stream(self, sample: SampledStream) -> None:
        """Add a stream that has ended."""
        self._add(sample, 1, sum(len(o.raw) for outputs in sample.answers for o in outputs))

    def _add(self, sample: SampledCall | SampledStream, rows: int, size: int) -> None:
        if self._rows + rows > MAX_ROWS or self._bytes + size > MAX_BYTES:
            SAMPLES_DROPPED.inc(rows)
        else:
            self._samples.append(sample)
            self._rows += rows
            self._bytes += size
            if self._rows >= BATCH_ROWS:
                self._full.set()
        self._left -= rows
        if self._left <= 0:
            self._pause()

    def _pause(self) -> None:
        """Set ``wants`` to False until the limit allows more rows."""
        due = self._refilled_at + (self._refill - self._left) / self._rows_per_s
        wait_s = due - time.monotonic()
        if wait_s <= 0:
            self._fill()
            return
        self.wants = False
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._fill)

    def _fill(self) -> None:
        self._left = self._refill
        self._refilled_at = time.monotonic()
        self.wants = self._task is not None and not self._task.done()

    # --- count and publish ------------------------------------------------------------------------------

    async def _run(self) -> None:
        published_at = float("-inf")
        while True:
            self._full.clear()
            try:
                await asyncio.wait_for(self._full.wait(), self._wait_s)
            except TimeoutError:
                pass
            await self._count()
            pause_s = LEARN_S if self._learning else PUBLISH_S
            if self._unpublished >= PUBLISH_ROWS or time.monotonic() - published_at >= pause_s:
                published_at, self._unpublished = time.monotonic(), 0
                await self._publish()

    @property
    def _learning(self) -> bool:
        return self._counter is not None and self._counter.learning

    @property
    def _wait_s(self) -> float:
        return LEARN_S if self._learning else BATCH_S

    async def _count(self) -> None:
        """Count the waiting samples in the sampler's thread."""
        samples, rows = self._samples, self._rows
        if not samples:
            return
        self._samples, self._rows, self._bytes = [], 0, 0
        self._unpublished += rows
        SAMPLED.inc(rows)
        await self._in_thread(self._count_now, samples)

    def _count_now(self, samples: Sequence[SampledCall | SampledStream]) -> None:
        if self._counter is None:
            self._counter = self._counter_of()
        self._counter.count(samples)

    async def _publish(self) -> None:
        """Read the bins and publish the counts.

        If the store fails, keep the newest counts for the next try.
        """
        if self._counter is None:
            return
        try:
            if (bins := await self._store.bins(self._deployment)) is not None:
                await self._in_thread(self._counter.use, bins)
            key, count = await self._store_rows(self._counter)
            if (piece := await self._in_thread(self._counter.take, key, count)) is not None:
                self._unsent.append(piece)
            while self._unsent:
                await self._store.push(self._deployment, self._unsent[0])
                self._unsent.popleft()
        except StoreUnavailable:
            return

    async def _store_rows(self, counter: Counter) -> tuple[str, int]:
        """Store the raw rows in a blob. Return its key and the number of rows.

        Return ("", 0) if there are no rows, or if the blob store failed.
        """
        lines = await self._in_thread(counter.take_rows)
        if not lines:
            return "", 0
        try:
            return await self._blobs.put(b"".join(lines), ROWS_KEPT_S), len(lines)
        except Unavailable as error:
            log.warning("raw rows could not be stored", extra={"problem": error.message})
            return "", 0

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T | None:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)
        except Exception:  # an error in a sample must not end the sampler
            log.exception("sampled calls could not be handled")
            return None
