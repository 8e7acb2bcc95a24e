"""Rules for uploads that can be continued: how an upload begins, receives bytes and ends. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal

from tidegate.kernel.errors import BadRequest, Conflict, NotFound, PayloadTooLarge, TooMany

State = Literal["open", "verifying", "stored", "failed"]
# PART_BYTES: the size in bytes of a full part. LEAST_PART_BYTES: the smallest size in bytes of a part, except
# the last part of an upload. Many small parts would make an upload slow.
PART_BYTES = 8 * 2**20
LEAST_PART_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """The limits of one caller's unfinished uploads.

    ``number``: how many uploads. ``total_bytes``: their total size. ``artifact_bytes``: the size of each.
    ``idle``: the time after which an upload that receives nothing is deleted.
    """

    number: int
    total_bytes: int
    artifact_bytes: int
    idle: timedelta


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload. ``received``: the number of stored bytes. ``parts``: the names of the stored objects.

    ``problem``: why the upload failed; empty if it did not fail.
    """

    id: str
    owner: str
    sha256: str
    size: int
    touched_at: datetime
    received: int = 0
    parts: tuple[str, ...] = ()
    stored: bool = False
    problem: str = ""

    @property
    def state(self) -> State:
        """Return the state that callers see."""
        if self.problem:
            return "failed"
        if self.stored:
            return "stored"
        return "verifying" if self.received == self.size else "open"

    @property
    def is_unfinished(self) -> bool:
        """Return True if the upload is neither stored nor failed."""
        return not self.stored and not self.problem


def resumed(uploads: Sequence[Upload], sha256: str, size: int) -> Upload | None:
    """Return the unfinished upload with this ``sha256`` and ``size``, or None."""
    same = (each for each in uploads if each.is_unfinished and (each.sha256, each.size) == (sha256, size))
    return next(same, None)


def check_new(uploads: Sequence[Upload], size: int, limits: UploadLimits) -> None:
    """Raise PayloadTooLarge or TooMany if a new upload of ``size`` bytes would exceed its owner's limits."""
    if size > limits.artifact_bytes:
        raise PayloadTooLarge(
            f"The artifact has {size} bytes. The limit is {limits.artifact_bytes} "
            "(TIDEGATE_MAX_ARTIFACT_BYTES)."
        )
    unfinished = [each for each in uploads if each.is_unfinished]
    remedy = "Finish one, or delete one: `tidegate uploads` lists them (API: GET /v1/uploads)."
    if len(unfinished) >= limits.number:
        raise TooMany(
            f"You have {len(unfinished)} unfinished uploads, which is the limit "
            f"(TIDEGATE_MAX_UPLOADS_PER_CALLER). {remedy}"
        )
    total = sum(each.size for each in unfinished) + size
    if total > limits.total_bytes:
        raise TooMany(
            f"With this upload, your unfinished uploads would have {total} bytes. The limit is "
            f"{limits.total_bytes} (TIDEGATE_MAX_UPLOAD_BYTES_PER_CALLER). {remedy}"
        )


def check_append(upload: Upload, offset: int, announced: int | None) -> None:
    """Check that bytes may be appended to an upload at ``offset``.

    Raise Conflict if the upload has ended, or if ``offset`` is not the number of bytes received so far. Raise
    BadRequest if the new bytes would exceed the upload's size.

    ``announced``: the size of this request's body in bytes, as stated by the sender; None if unknown.
    """
    if not upload.is_unfinished:
        raise Conflict(
            f"The upload has ended ({upload.state}), so it accepts no more bytes. Open another upload."
        )
    if offset != upload.received:
        raise moved(upload.received, offset)
    if announced is not None and offset + announced > upload.size:
        raise too_many_bytes(upload)


def moved(received: int, offset: int) -> Conflict:
    """Return the error for an offset that is wrong, or at which another request already sends bytes."""
    how = (
        "Another request already sends the next bytes. Use one connection for an upload."
        if received == offset
        else f"Continue at {received}, not at {offset}."
    )
    return Conflict(f"The registry has {received} bytes of this upload. {how}", reason="wrong_offset")


def too_many_bytes(upload: Upload) -> BadRequest:
    """Return the error for an upload that receives more bytes than it was opened for."""
    return BadRequest(
        f"The upload was opened for {upload.size} bytes, but more arrived. Open another upload."
    )


def own(upload: Upload | None, id_: str, owner: str) -> Upload:
    """Return the upload. Raise NotFound if it does not exist or belongs to another caller."""
    if upload is None or upload.owner != owner:
        raise NotFound(
            f"You have no upload {id_[:40]!r}. It may have expired. Open a new upload with POST /v1/uploads."
        )
    return upload


def checked(upload: Upload, found: str) -> Upload:
    """Return the upload in the state ``stored``, or ``failed`` if its bytes have the wrong sha256.

    ``found``: the sha256 of the bytes that arrived.
    """
    if found == upload.sha256:
        return replace(upload, stored=True, parts=())
    problem = f"The bytes that arrived have sha256 {found}, not {upload.sha256}. Send the file again."
    return replace(upload, problem=problem, parts=())


def lost(upload: Upload) -> Upload:
    """Return the upload in the state ``failed``, because the store has lost its bytes."""
    return replace(
        upload,
        problem=("The bytes of this upload are no longer in the artifact store. Send the file again."),
        parts=(),
    )
