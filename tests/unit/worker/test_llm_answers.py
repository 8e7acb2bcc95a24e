"""The one answer of a language model: which event it is, when it is final, what a refusal means."""

from __future__ import annotations

import orjson
import pytest

from services.worker.domain.llm_answers import (
    LONGEST_PAUSE_S,
    NotOneEvent,
    TokenUsage,
    collected,
    error_message,
    refusal,
    retry_pause_s,
)
from services.worker.domain.split import Output
from tidegate.kernel.errors import BadRequest, ModelFailed, NotFound, PayloadTooLarge
from tidegate.kernel.protocol.llm import Meta
from tidegate.kernel.protocol.tensors import pack_strings, unpack_strings
from tidegate.kernel.protocol.usage import MOST_TOKENS


def part(events: list[bytes], **meta: object) -> tuple[bytes, bytes]:
    return pack_strings(events), pack_strings([orjson.dumps(meta)])


def test_facts_may_come_before_and_after_the_event():
    found = collected(
        [part([], prompt_ids=[1, 2]), part([b'{"a":1}'], status=200), part([], usage=[2, 3, 0], ids=[7])]
    )
    assert (found.event, found.meta.usage) == (b'{"a":1}', (2, 3, 0))
    assert found.parameters() == {"prompt_tokens": 2, "completion_tokens": 3}
    events, meta = found.outputs()
    assert unpack_strings(events.raw) == [b'{"a":1}']
    assert orjson.loads(unpack_strings(meta.raw)[0]) == {"status": 200, "usage": [2, 3, 0]}


@pytest.mark.parametrize("events", [[], [b"{}", b"{}"]])
def test_other_than_one_event_is_no_answer(events):
    with pytest.raises(NotOneEvent):
        collected([part(events)])


def test_only_a_busy_engine_is_called_again():
    assert [retry_pause_s(Meta(status), 0) for status in (200, 400, 404, 500)] == [None] * 4
    assert [retry_pause_s(Meta(503), tries) for tries in (0, 1, 2, 10)] == [1.0, 2.0, 4.0, 30.0]
    assert retry_pause_s(Meta(429, retry_after_s=7.5), 3) == 7.5
    assert retry_pause_s(Meta(429, retry_after_s=1e9), 0) == LONGEST_PAUSE_S


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, BadRequest), (404, NotFound), (413, PayloadTooLarge), (422, BadRequest), (500, ModelFailed)],
)
def test_a_refusal_is_an_error_with_the_engines_message(status, error):
    found = refusal(collected([part([b'{"error":{"message":"too long"}}'], status=status)]))
    assert type(found) is error
    assert found is not None
    assert found.message == "too long"


def test_an_answer_is_no_refusal():
    assert refusal(collected([part([b"{}"])])) is None


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (b'{"error":"plain"}', "plain"),
        (b'{"message":"at the top"}', "at the top"),
        (b'{"detail":"of FastAPI"}', "of FastAPI"),
        (b"no JSON", "no JSON"),
        (b"[1]", ""),
    ],
)
def test_messages_of_other_servers(event, message):
    assert error_message(event) == message


def heard(*metas: bytes) -> tuple[int, int, int]:
    usage = TokenUsage()
    for meta in metas:
        usage.hear(
            [Output("events", "BYTES", (1,), b""), Output("meta", "BYTES", (1,), pack_strings([meta]))]
        )
    return usage.tokens()


def test_the_last_counts_of_a_stream_are_its_usage():
    assert heard(b'{"usage": [7, 1, 0]}', b'{"usage":[7,9,4]}', b'{"ids":[1],"usage": null}') == (7, 9, 4)


@pytest.mark.parametrize("meta", [b"{}", b'{"usage": [1]}', b'{"usage": [', b'{"usage": null}'])
def test_without_counts_a_stream_has_no_usage(meta):
    assert heard(meta) == (0, 0, 0)


def test_an_upstream_may_state_any_number_of_tokens():
    """Sums of them are in databases with 64 bits."""
    assert Meta.from_bytes(b'{"usage": [9000000000000000000, 3, 0]}').usage == (MOST_TOKENS, 3, 0)
