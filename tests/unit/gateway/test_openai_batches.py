"""OpenAI's view of batches and files: statuses, times, limits, the bytes of an upload."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from services.gateway.adapters import batch_files
from services.gateway.adapters.batch_files import RawLines
from services.gateway.domain.batches import Batch
from services.gateway.domain.openai.batches import (
    batch_name,
    check_cancel,
    is_batch_request,
    public,
    read_batch_id,
    read_batch_request,
)
from services.gateway.domain.openai.facts import OpenAiFacts
from services.gateway.domain.openai.files import (
    StoredFile,
    check_filename,
    check_purpose,
    file_name,
    kept_s,
    read_file_id,
)
from tidegate.kernel.errors import BadRequest, NotFound, PayloadTooLarge

ID, FILE, OUT, BAD = (bytes([n]) * 16 for n in range(4))
FACTS = OpenAiFacts(FILE, OUT, BAD, "/v1/completions", "24h", 90_000_000, {"a": "b"})
BATCH = Batch(ID, "running", "me", 10, 1_000, openai=FACTS)


def shown(**given: Any) -> dict[str, Any]:
    return public(replace(BATCH, **given), FACTS)


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({}, "validating"),
        ({"validated_ms": 2_000}, "in_progress"),
        ({"validated_ms": 2_000, "done": 9}, "in_progress"),
        ({"validated_ms": 2_000, "done": 10}, "finalizing"),
        ({"validated_ms": 2_000, "state": "cancelling"}, "cancelling"),
        *[({"state": state}, state) for state in ("completed", "failed", "expired", "cancelled")],
    ],
)
def test_statuses(given, status):
    assert shown(**given)["status"] == status


def test_a_completed_batch():
    counts = {"succeeded": 7, "failed": 2, "expired": 1, "output_lines": 7, "error_lines": 3}
    found = shown(state="completed", validated_ms=2_000, finished_ms=5_000, done=10, counts=counts)
    assert found["request_counts"] == {"total": 10, "completed": 7, "failed": 3}
    assert (found["output_file_id"], found["error_file_id"]) == (file_name(OUT), file_name(BAD))
    assert (found["created_at"], found["in_progress_at"], found["completed_at"]) == (1, 2, 5)
    assert (found["expires_at"], found["cancelled_at"], found["errors"]) == (90_000, None, None)
    assert found["metadata"] == {"a": "b"}


def test_files_are_shown_at_the_end():
    counts = {"output_lines": 7, "error_lines": 0}
    assert shown(counts=counts, validated_ms=1)["output_file_id"] is None
    found = shown(counts=counts, state="cancelled")
    assert (found["output_file_id"], found["error_file_id"]) == (file_name(OUT), None)


def test_errors_of_lines_and_of_the_whole():
    assert shown(state="failed", error='[{"line": 3}]')["errors"] == {"object": "list", "data": [{"line": 3}]}
    (error,) = shown(state="failed", error="the file is gone")["errors"]["data"]
    assert (error["code"], error["message"]) == ("batch_failed", "the file is gone")


def test_facts_survive_their_record():
    assert OpenAiFacts.from_json(FACTS.to_json()) == FACTS


@pytest.mark.parametrize(
    ("window", "seconds"), [("24h", 86_400), ("30d", 2_592_000), ("90s", 90), ("5m", 300)]
)
def test_windows(window, seconds):
    wish = {"input_file_id": file_name(FILE), "endpoint": "/v1/embeddings", "completion_window": window}
    assert read_batch_request(wish) == (FILE, "/v1/embeddings", window, seconds, {})


@pytest.mark.parametrize("window", [None, 24, "", "0h", "31d", "1w", "1.5h", "99999999s", "24 h"])
def test_other_windows(window):
    wish = {"input_file_id": file_name(FILE), "endpoint": "/v1/embeddings", "completion_window": window}
    with pytest.raises(BadRequest, match="completion_window"):
        read_batch_request(wish)


def test_which_body_is_a_batch_of_openais_api():
    assert is_batch_request({"input_file_id": None})
    assert not any(
        map(is_batch_request, [{}, {"inputs": []}, {"inputs": [], "input_file_id": "x"}, [], None, "x"])
    )


def test_which_batches_can_be_cancelled():
    assert all(
        check_cancel(replace(BATCH, state=state)) is None for state in ("running", "cancelling", "cancelled")
    )
    assert all(check_cancel(replace(BATCH, state=state)) for state in ("completed", "failed", "expired"))


def test_names_of_ids():
    assert read_batch_id(batch_name(ID)) == ID
    assert read_file_id(file_name(FILE)) == FILE
    for read in (read_batch_id, read_file_id):
        for text in ("", "x", "0" * 32, "batch_", "file-xyz", file_name(ID)[:-1]):
            with pytest.raises(NotFound):
                read(text)


def test_the_fields_of_an_upload():
    assert check_purpose("batch") == "batch"
    for other in (None, "", "fine-tune"):
        with pytest.raises(BadRequest):
            check_purpose(other)
    assert [
        check_filename(name) for name in ("a.jsonl", "/x/y\\z.jsonl", "a\x00\nb", None, "/", "x" * 999)
    ] == [
        "a.jsonl",
        "z.jsonl",
        "ab",
        "file.jsonl",
        "file.jsonl",
        "x" * 255,
    ]


def test_how_long_a_file_is_kept():
    assert kept_s(None, None, 50.0) == 50.0
    assert kept_s("created_at", "3600", 50.0) == 3600.0
    for anchor, seconds in (
        ("birth", "3600"),
        ("created_at", None),
        (None, "5"),
        (None, "9" * 40),
        (None, "0000000036009999999"),
        (None, "x"),
    ):
        with pytest.raises(BadRequest):
            kept_s(anchor, seconds, 50.0)


def test_a_file_as_openais_api_shows_it():
    file = StoredFile(FILE, "me", "a.jsonl", "batch", 5, 1, 1_500, 9_000)
    assert file.public() == {
        "id": file_name(FILE),
        "object": "file",
        "bytes": 5,
        "created_at": 1,
        "expires_at": 9,
        "filename": "a.jsonl",
        "purpose": "batch",
        "status": "processed",
        "status_details": None,
    }


def pieces(content: bytes, step: int, **given: int) -> list[tuple[bytes, int]]:
    limits = {"line_bytes": 100, "total_bytes": 10_000, "lines": 100} | given
    cut = RawLines(**limits)
    found = [cut.feed(content[at : at + step]) for at in range(0, len(content), step)]
    return [piece for piece in (*found, cut.end()) if piece is not None]


@pytest.mark.parametrize("step", [1, 3, 64, 10_000])
def test_a_file_is_cut_at_line_ends_and_stays_as_it_is(step, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batch_files, "CHUNK_BYTES", 20)
    content = b"\r\n".join([b"one", b"", b"  two  ", b"three" * 9, b"4"] * 3)
    found = pieces(content, step)
    assert b"".join(piece for piece, _ in found) == content
    assert sum(lines for _, lines in found) == 12
    assert all(piece.endswith(b"\n") for piece, _ in found[:-1])
    assert len(found) > 1 or step == 10_000


def test_limits_of_a_file():
    for content, given, error in (
        (b"x" * 101, {}, PayloadTooLarge),
        (b"x" * 101 + b"\n", {}, PayloadTooLarge),
        (b"y\n" * 20, {"total_bytes": 30}, PayloadTooLarge),
        (b"y\n" * 20, {"lines": 19}, BadRequest),
    ):
        for step in (1, 7, 1000):
            with pytest.raises(error):
                pieces(content, step, **given)
