from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest

from services.registry.adapters.artifacts import ArtifactStore
from services.registry.domain import uploads
from services.registry.domain.uploads import Upload, UploadLimits
from tidegate.kernel.errors import BadRequest, Conflict, NotFound, PayloadTooLarge, TooMany

LIMITS = UploadLimits(number=2, total_bytes=100, artifact_bytes=80, idle=timedelta(days=1))
HALF = Upload("u1", "me", "a" * 64, 60, datetime(2026, 1, 1, tzinfo=UTC), received=30, parts=("p",))
WHOLE = replace(HALF, received=60)


def test_states() -> None:
    assert [HALF.state, WHOLE.state] == ["open", "verifying"]
    assert uploads.checked(WHOLE, "a" * 64).state == "stored"
    wrong = uploads.checked(WHOLE, "b" * 64)
    assert (wrong.state, wrong.parts, wrong.is_unfinished) == ("failed", (), False)
    assert "Send the file again" in wrong.problem
    assert uploads.lost(WHOLE).state == "failed"


def test_the_same_bytes_are_continued() -> None:
    ended = uploads.lost(replace(WHOLE, id="u0"))
    assert uploads.resumed([ended, HALF], HALF.sha256, HALF.size) is HALF
    assert uploads.resumed([ended], HALF.sha256, HALF.size) is None
    assert uploads.resumed([HALF], HALF.sha256, 61) is None, "the size was announced wrongly"


@pytest.mark.parametrize(
    ("held", "size", "error", "words"),
    [
        ([], 81, PayloadTooLarge, "TIDEGATE_MAX_ARTIFACT_BYTES"),
        ([HALF], 41, TooMany, "would have 101 bytes"),
        (
            [replace(HALF, size=1), replace(HALF, size=1)],
            1,
            TooMany,
            "2 unfinished uploads, which is the limit",
        ),
    ],
)
def test_limits_of_a_caller(held: list[Upload], size: int, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        uploads.check_new(held, size, LIMITS)


def test_what_has_ended_does_not_count() -> None:
    uploads.check_new([HALF], 40, LIMITS)
    uploads.check_new([uploads.lost(WHOLE), uploads.checked(WHOLE, WHOLE.sha256), HALF], 40, LIMITS)


def test_where_bytes_may_be_appended() -> None:
    uploads.check_append(HALF, 30, 30)
    uploads.check_append(HALF, 30, None)
    with pytest.raises(Conflict, match="Continue at 30, not at 29") as moved:
        uploads.check_append(HALF, 29, 1)
    assert moved.value.reason == "wrong_offset"
    with pytest.raises(BadRequest, match="opened for 60 bytes"):
        uploads.check_append(HALF, 30, 31)
    with pytest.raises(Conflict, match="has ended"):
        uploads.check_append(uploads.lost(WHOLE), 60, 0)


def test_an_upload_is_only_its_owners() -> None:
    assert uploads.own(HALF, "u1", "me") is HALF
    for found, owner in ((HALF, "other"), (None, "me")):
        with pytest.raises(NotFound, match="Open a new upload"):
            uploads.own(found, "u1", owner)


async def test_bytes_that_come_late_change_nothing(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path), max_bytes=100)
    parts, digest = store.parts, sha256(b"good").hexdigest()
    parts.write("u1", 0, b"good")
    with parts.unchanging("u1"):
        parts.write("u1", 0, b"evil")
    assert Path(parts.file("u1")).read_bytes() == b"good"
    assert await store.assemble("u1", [], digest, 4) == digest
    assert await store.assemble("u1", [], digest, 4) == digest  # another registry has assembled it
    with pytest.raises(FileNotFoundError):
        await store.assemble("u2", [], sha256(b"other").hexdigest(), 5)


def test_an_offset_that_another_request_uses():
    assert "Continue at 5, not at 3" in uploads.moved(5, 3).message
    assert "Another request already sends" in uploads.moved(5, 5).message
