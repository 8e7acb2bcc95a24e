"""The sampler: what it counts, what it keeps, and that it stays within its limits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest

from services.worker.adapters.metrics import SAMPLES_DROPPED
from services.worker.adapters.model_call import ModelAnswer
from services.worker.application import sampler as sampling
from services.worker.application.profile_counter import HELD_ROWS, ProfileCounter
from services.worker.application.sampler import Sampler
from services.worker.domain.raw_rows import MAX_STRING_BYTES
from services.worker.domain.samples import CALL_ROWS, SampledCall, SampledStream
from services.worker.domain.split import Output
from services.worker.domain.text_answers import text_answer
from tests.conftest import PATIENCE_S
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.profiles.bins import Bins
from tidegate.kernel.profiles.piece import ProfilePiece, PublishedBins
from tidegate.kernel.protocol import envelope, trace_context
from tidegate.kernel.protocol.envelope import tensor
from tidegate.kernel.protocol.llm import EVENTS, META
from tidegate.kernel.protocol.tensors import pack_strings
from tidegate.kernel.store.profiles import ProfileStore

KEY = envelope.call_key((tensor("x", "FP32", (2,)), tensor("city", "BYTES", (1,))), (), {})
BINS = {"x[0]": Bins((0.0, 1.0), 0.0, 5.0), "x[1]": Bins((0.0,), 0.0, 5.0)}
BLOCKED_PORT = "redis://127.0.0.1:9/"


def call(*rows: int, first: float = 1.0, labels: Sequence[int] = ()) -> SampledCall:
    """Return a call of requests with these numbers of rows."""
    total = sum(rows)
    table = np.full((total, 2), first, np.float32)
    cities = pack_strings(["Bern"] * total)
    output = np.asarray(labels or [1] * total, np.int64)
    return SampledCall(
        KEY,
        [(f"id-{at}".encode(), count) for at, count in enumerate(rows)],
        [[table.tobytes()], [cities]],
        [Output("label", "INT64", (total,), output.tobytes())],
        10.0,
    )


def counter(predictions: bool = False, **options: Any) -> ProfileCounter:
    made = ProfileCounter("r-1", **options)
    made.use(PublishedBins("b1", BINS, predictions).to_bytes())
    return made


def taken(made: ProfileCounter) -> ProfilePiece:
    raw = made.take()
    assert raw is not None
    return ProfilePiece.from_bytes(raw)


def test_calls_are_counted_together() -> None:
    made = counter()
    made.count([call(1), call(3, first=0.5), call(2, 2, first=9.0)])
    profile = taken(made).profile
    assert profile.rows == 8
    assert profile.numbers["x[0]"].counts.tolist() == [0, 4, 4]
    assert profile.numbers["x[0]"].above == 4
    assert profile.values["city"].counts == {"Bern": 8}
    assert profile.values["prediction"].counts == {"1": 8}
    assert made.take() is None


def test_only_the_first_rows_of_a_large_call_are_counted() -> None:
    made = counter()
    made.count([call(CALL_ROWS + 50), call(1)])
    assert taken(made).profile.rows == CALL_ROWS + 1


def test_rows_wait_for_the_bins_and_are_counted_then() -> None:
    made = ProfileCounter("r-1")
    made.count([call(3)])
    first = taken(made)
    assert (first.bins_id, first.learned_rows, first.profile.rows) == ("", 3, 0)
    assert first.summaries["x[0]"].rows == 3
    made.count([call(2)])
    assert taken(made).learned_rows == 2
    made.use(PublishedBins("b1", BINS).to_bytes())
    counted = taken(made)
    assert (counted.bins_id, counted.profile.rows, counted.learned_rows) == ("b1", 5, 0)


def test_rows_that_wait_for_the_bins_are_bounded() -> None:
    made = ProfileCounter("r-1")
    for _ in range(HELD_ROWS // CALL_ROWS + 1):
        made.count([call(CALL_ROWS)])
    found = taken(made)
    assert (found.learned_rows, found.dropped) == (HELD_ROWS, CALL_ROWS)


def test_a_router_that_lost_the_summaries_gets_those_of_new_rows() -> None:
    made = ProfileCounter("r-1")
    for _ in range(HELD_ROWS // CALL_ROWS):
        made.count([call(CALL_ROWS)])
    assert taken(made).learned_rows == HELD_ROWS
    made.count([call(CALL_ROWS, first=9.0)])
    found = taken(made)
    assert (found.learned_rows, found.summaries["x[0]"].points[0]) == (CALL_ROWS, 9.0)
    made.use(PublishedBins("b1", BINS).to_bytes())
    assert taken(made).profile.rows == HELD_ROWS


def test_predictions_of_single_rows_are_kept_if_labels_may_arrive() -> None:
    made = counter(predictions=True)
    made.count([call(1, 2, labels=(4, 5, 6))])
    assert [(each.request_id, each.label) for each in taken(made).predictions] == [("id-0", "4")]
    other = counter(predictions=False)
    other.count([call(1)])
    assert taken(other).predictions == []


def test_a_call_that_cannot_be_read_is_left_out() -> None:
    made = counter()
    broken = call(2)._replace(inputs=[[b"\0" * 12], [pack_strings(["a", "b"])]])
    made.count([broken, call(1)._replace(key=KEY + b" ")])
    assert made.take() is None
    made.count([call(1)])
    assert taken(made).profile.rows == 1


def test_raw_rows_are_kept_up_to_the_limit_and_without_redacted_fields() -> None:
    made = counter(redact=("city",), keep_rows=2)
    made.count([call(1, first=2.0), call(3)])
    lines = [orjson.loads(line) for line in made.take_rows()]
    assert lines[0] == {
        "at": 10.0,
        "request_id": "id-0",
        "inputs": {"x": [2.0, 2.0], "city": None},
        "outputs": {"label": [1.0]},
    }
    assert len(lines) == 2
    made.count([call(1)])
    assert made.take_rows() == []
    assert "city" not in taken(made).profile.values


def test_raw_rows_have_neither_long_strings_nor_the_context_of_a_trace() -> None:
    made = counter(keep_rows=2)
    long = call(1)
    trace = trace_context.attached(b"id-7", trace_context.TraceContext(1, 2, True))
    made.count([
        long._replace(
            requests=[(trace, 1)], inputs=[long.inputs[0], [pack_strings(["x" * (MAX_STRING_BYTES + 1)])]]
        )
    ])  # fmt: skip
    (line,) = map(orjson.loads, made.take_rows())
    assert line["request_id"] == "id-7"
    assert line["inputs"]["city"] == {"shape": [1], "values": "omitted"}


def test_no_raw_rows_are_kept_by_default() -> None:
    made = counter()
    made.count([call(1)])
    assert made.take_rows() == []


def _answer(events: Sequence[str], meta: dict[str, Any]) -> list[Output]:
    return [
        Output(EVENTS, "BYTES", (len(events),), pack_strings(list(events))),
        Output(META, "BYTES", (1,), pack_strings([orjson.dumps(meta)])),
    ]


def test_the_last_answers_of_a_language_model_have_its_tokens_and_its_end() -> None:
    last = ['{"choices": [{"finish_reason": "length"}]}', '{"choices": [], "usage": {}}']
    stream = SampledStream(
        b"t", [_answer(["{}"], {"usage": [7, 1, 0]}), _answer(last, {"usage": [7, 9, 0]})], 1.0
    )
    assert text_answer(stream) == (7, 9, "length")
    made = counter()
    made.count([stream])
    assert taken(made).profile.values["finish_reason"].counts == {"length": 1}


class Rows:
    """A counter that only counts rows."""

    learning = False

    def __init__(self) -> None:
        self.rows = 0

    def count(self, samples: Sequence[SampledCall | SampledStream]) -> None:
        self.rows += sum(each.rows for each in samples if isinstance(each, SampledCall))

    def use(self, bins: bytes) -> None: ...

    def take(self, rows_key: str = "", rows: int = 0) -> bytes | None:
        return None

    def take_rows(self) -> list[bytes]:
        return []


def group(rows: int, size: int = 8) -> list[Any]:
    request = SimpleNamespace(key=b"k", rows=rows, trace=b"t", data=[memoryview(b"\0" * size)])
    return [SimpleNamespace(request=request)]


ANSWER = ModelAnswer([], {})


@pytest.fixture
async def made(tmp_path: Any) -> Any:
    rows = Rows()
    blobs = Blobs(str(tmp_path))
    found = Sampler(ProfileStore.connect(BLOCKED_PORT), blobs, "d", lambda: rows, 200)
    found.start()
    yield found, rows
    await found.stop()
    blobs.close()


async def test_the_limit_stops_the_sampling_and_time_resumes_it(made: tuple[Sampler, Rows]) -> None:
    sampler, _ = made
    taken_rows = 0
    while sampler.wants:
        sampler.add(group(1), ANSWER)
        taken_rows += 1
        assert taken_rows <= 100
    async with asyncio.timeout(PATIENCE_S):
        while not sampler.wants:
            await asyncio.sleep(0.01)


async def test_every_added_row_is_counted_although_the_store_is_away(made: tuple[Sampler, Rows]) -> None:
    sampler, rows = made
    sampler.add(group(sampling.BATCH_ROWS), ANSWER)
    async with asyncio.timeout(PATIENCE_S):
        while rows.rows < sampling.BATCH_ROWS:
            await asyncio.sleep(0.01)


async def test_a_full_buffer_drops_rows(made: tuple[Sampler, Rows]) -> None:
    sampler, _ = made
    before = SAMPLES_DROPPED._value.get()
    for _ in range(3):  # in one turn of the event loop, so that nothing is counted meanwhile
        sampler.add(group(1, size=sampling.MAX_BYTES // 2 - 1024), ANSWER)
    assert SAMPLES_DROPPED._value.get() - before == 1


async def test_a_small_request_is_copied_and_keeps_no_envelope_in_memory(made: tuple[Sampler, Rows]) -> None:
    sampler, _ = made
    sampler.add(group(1), ANSWER)
    (sample,) = sampler._samples
    assert isinstance(sample, SampledCall)
    assert isinstance(sample.inputs[0][0], bytes)
