"""Store dead letters within limits. Each has one line in a journal, and a payload in the blob store."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import orjson
from prometheus_client import Counter, Gauge

from services.router.domain.dead_letters import (
    DeadLetter,
    DeadLetterLimits,
    Replay,
    new_letter_id,
    overdue,
    read_letter,
    without_claim,
)
from services.router.domain.exceptions import CAUSES
from tidegate.kernel import telemetry
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.errors import NotFound, Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Request
from tidegate.kernel.repeating_task import RepeatingTask

log = telemetry.logger(__name__)

DEAD = Counter("tidegate_router_dead_letters_total", "Requests given up.", ["cause"])
HELD = Gauge("tidegate_router_dead_letter_bytes", "Bytes of payloads that are kept with dead letters.")

SWEEP_S = 60.0
# The journal is rewritten when it has more outdated lines than this.
SPARE_LINES = 1000


class DeadLetters:
    """The dead letters in order of arrival, and the journal in which they are stored."""

    def __init__(self, journal: Path, blobs: Blobs, claims: Claims, limits: DeadLetterLimits) -> None:
        self._journal = journal
        self._blobs = blobs
        self._claims = claims
        self._limits = limits
        self._letters: dict[str, DeadLetter] = {}
        self._loaded = False
        self._lines = 0
        # Write one payload at a time. Each is in memory while it is written, and many could fill the memory.
        self._writing = asyncio.Lock()
        self._loop = RepeatingTask("dead letters", self._step, retry_s=SWEEP_S)
        HELD.set_function(lambda: sum(each.payload_bytes for each in self._letters.values() if each.payload))

    @property
    def all(self) -> list[DeadLetter]:
        """Return the letters, oldest first. Raise Unavailable if another router leads."""
        self._check()
        return list(self._letters.values())

    def start(self) -> None:
        """Start the loop. Every minute, it deletes the letters and payloads that exceed the limits."""
        self._loop.start(after_s=SWEEP_S)

    def load(self) -> None:
        """Read the journal, because this router now manages the dead letters."""
        self._letters.clear()
        self._loaded = True
        if self._journal.exists():
            for line in self._journal.read_bytes().splitlines():
                with contextlib.suppress(ValueError, TypeError):  # a crash may leave an incomplete line
                    entry = orjson.loads(line)
                    if entry.get("deleted"):
                        self._letters.pop(entry["letter"], None)
                    else:
                        letter = read_letter(entry)
                        self._letters[letter.letter] = letter
            self._rewrite()

    def unload(self) -> None:
        """Forget the letters in memory, because the new leader manages them now."""
        self._letters.clear()
        self._loaded = False
        self._lines = 0

    async def stop(self) -> None:
        """Stop the loop and close the blob store."""
        await self._loop.stop()
        self._blobs.close()

    def get(self, letter_id: str) -> DeadLetter:
        """Return a letter. Raise NotFound if it does not exist, Unavailable if another router leads."""
        self._check()
        letter = self._letters.get(letter_id)
        if letter is None:
            raise NotFound(f"there is no dead letter {letter_id!r}: `tidegate dead` lists them")
        return letter

    async def payload(self, letter: DeadLetter) -> bytes:
        """Return a letter's payload: a request's frame, or an envelope that could not be decoded.

        Raise NotFound if no payload was kept, Unavailable if the blob store fails.
        """
        if not letter.payload:
            raise NotFound(f"dead letter {letter.letter} has no payload: {letter.missing}")
        return await self._blobs.get(letter.payload)

    async def add(self, letter: DeadLetter, request: Request | None, raw: Buffer = b"") -> None:
        """Store a letter with its request, or with ``raw`` bytes that could not be decoded."""
        async with self._writing:
            try:
                pieces = [raw] if request is None else await self._with_tensors(request)
                letter = await self._with_payload(letter, pieces)
            except Unavailable as error:
                letter = replace(letter, missing=error.message)
        letter = replace(letter, letter=new_letter_id())
        DEAD.labels(letter.cause if letter.cause in CAUSES else "other").inc()
        log.warning("dead letter", extra=letter.public() | letter.log_ids())
        # A router that no longer leads writes only the journal, where the next leader finds the letter.
        if self._loaded:
            self._letters[letter.letter] = letter
        self._write([letter.to_json()])
        await self._sweep()

    def add_replay(self, letter: DeadLetter, replay: Replay) -> DeadLetter:
        """Add a replay to a letter. Return the changed letter."""
        letter = self.get(letter.letter)
        letter = replace(letter, replays=(*letter.replays, replay))
        self._letters[letter.letter] = letter
        self._write([letter.to_json()])
        return letter

    async def delete(self, letter: DeadLetter) -> None:
        """Delete a letter and its payload."""
        self._forget([letter])
        if letter.payload:
            await self._blobs.delete(letter.payload)

    def _check(self) -> None:
        if not self._loaded:
            raise Unavailable(
                "another router leads and manages the dead letters: retry in a second", retry_after_s=1.0
            )

    async def _with_tensors(self, request: Request) -> list[Buffer]:
        if not request.flags & envelope.CLAIM:
            return [request.raw]
        return without_claim(request, await self._claims.redeem(request.data))

    async def _with_payload(self, letter: DeadLetter, pieces: list[Buffer]) -> DeadLetter:
        size = sum(map(len, pieces))
        if size > self._limits.payload_bytes:
            return replace(
                letter,
                missing=f"it was not kept, because its {size} bytes are more than TIDEGATE_DEAD_LETTER_BYTES "
                f"({self._limits.payload_bytes})",
            )
        key = await self._blobs.put(pieces, self._limits.keep_s, durable=True)
        return replace(letter, payload=key, payload_bytes=size)

    async def _step(self) -> float:
        await self._sweep()
        return SWEEP_S

    async def _sweep(self) -> None:
        """Delete letters and payloads that exceed the limits. Old payloads expire in the blob store."""
        due = overdue(list(self._letters.values()), time.time(), self._limits)
        self._forget(due.letters)
        missing = "it was deleted, because all payloads together exceeded TIDEGATE_DEAD_LETTER_BYTES"
        for letter in due.payloads:
            self._letters[letter.letter] = replace(letter, payload="", missing=missing)
        self._write([self._letters[letter.letter].to_json() for letter in due.payloads])
        for letter in (*due.letters, *due.payloads):
            if letter.payload:
                await self._blobs.delete(letter.payload)

    def _forget(self, letters: Sequence[DeadLetter]) -> None:
        for letter in letters:
            self._letters.pop(letter.letter, None)
        self._write([{"letter": letter.letter, "deleted": True} for letter in letters])

    def _write(self, lines: Sequence[dict[str, object]]) -> None:
        if not lines:
            return
        self._journal.parent.mkdir(parents=True, exist_ok=True)
        with self._journal.open("ab") as journal:
            journal.write(b"".join(orjson.dumps(line) + b"\n" for line in lines))
        self._lines += len(lines)
        # Only the leader rewrites the journal: other routers have not loaded the letters and would lose them.
        if self._loaded and self._lines > len(self._letters) + SPARE_LINES:
            self._rewrite()

    def _rewrite(self) -> None:
        new_file = self._journal.with_suffix(".new")
        new_file.write_bytes(
            b"".join(orjson.dumps(each.to_json()) + b"\n" for each in self._letters.values())
        )
        new_file.replace(self._journal)
        self._lines = len(self._letters)
