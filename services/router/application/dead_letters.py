"""Keeps the dead letters: a line each in a journal, their payloads in the blob store, both with limits."""

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
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.errors import NotFound, Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Request

log = telemetry.logger(__name__)

DEAD = Counter("tidegate_router_dead_letters_total", "Requests given up.", ["cause"])
HELD = Gauge("tidegate_router_dead_letter_bytes", "Bytes of payloads that are kept with dead letters.")

SWEEP_S = 60.0
# Lines of the journal beyond the letters in it, before it is written anew.
SPARE_LINES = 1000


class DeadLetters:
    """The letters in the order in which they came, and the journal that survives the router."""

    def __init__(self, journal: Path, blobs: Blobs, claims: Claims, limits: DeadLetterLimits) -> None:
        self._journal = journal
        self._blobs = blobs
        self._claims = claims
        self._limits = limits
        self._letters: dict[str, DeadLetter] = {}
        self._loaded = False
        self._lines = 0
        # A payload is in memory while it is written, so only one at a time is.
        self._keeping = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        HELD.set_function(lambda: sum(each.payload_bytes for each in self._letters.values() if each.payload))

    @property
    def all(self) -> list[DeadLetter]:
        """Return the letters, oldest first; raises Unavailable where another router keeps them."""
        self._check()
        return list(self._letters.values())

    def start(self) -> None:
        """Begin to sweep what is loaded."""
        self._task = asyncio.create_task(self._run(), name="dead letters")

    def load(self) -> None:
        """Read what this router, or the leader before it, has kept. From here on this router keeps them."""
        self._letters.clear()
        self._loaded = True
        if self._journal.exists():
            for line in self._journal.read_bytes().splitlines():
                with contextlib.suppress(ValueError, TypeError):  # half a line: the end of a crash
                    told = orjson.loads(line)
                    if told.get("deleted"):
                        self._letters.pop(told["letter"], None)
                    else:
                        letter = read_letter(told)
                        self._letters[letter.letter] = letter
            self._rewrite()

    def unload(self) -> None:
        """Leave the letters to the router that leads."""
        self._letters.clear()
        self._loaded = False
        self._lines = 0

    async def stop(self) -> None:
        """End."""
        await tasks.end(self._task)
        self._blobs.close()

    def get(self, letter_id: str) -> DeadLetter:
        """Return a letter; raises NotFound, or Unavailable where another router keeps them."""
        self._check()
        letter = self._letters.get(letter_id)
        if letter is None:
            raise NotFound(f"there is no dead letter {letter_id!r}")
        return letter

    async def payload(self, letter: DeadLetter) -> bytes:
        """Return what was kept of a letter: a request's frame, or an envelope that could not be read.

        Raises NotFound when nothing was kept, Unavailable when the blob store does not give it.
        """
        if not letter.payload:
            raise NotFound(f"dead letter {letter.letter} has no payload: {letter.missing}")
        return await self._blobs.get(letter.payload)

    async def bury(self, letter: DeadLetter, request: Request | None, raw: Buffer = b"") -> None:
        """Keep a letter, with its request, or ``raw`` bytes that are none."""
        async with self._keeping:
            try:
                pieces = [raw] if request is None else await self._whole(request)
                letter = await self._kept(letter, pieces)
            except Unavailable as error:
                letter = replace(letter, missing=error.message)
        letter = replace(letter, letter=new_letter_id())
        DEAD.labels(letter.cause if letter.cause in CAUSES else "other").inc()
        log.warning("dead letter", extra=letter.shown() | letter.named())
        if self._loaded:  # else the lead was lost meanwhile: the journal has it, for the next one that leads
            self._letters[letter.letter] = letter
        self._write([letter.to_json()])
        await self._sweep()

    def replayed(self, letter: DeadLetter, replay: Replay) -> DeadLetter:
        """Note a replay of a letter."""
        letter = self.get(letter.letter)
        letter = replace(letter, replays=(*letter.replays, replay))
        self._letters[letter.letter] = letter
        self._write([letter.to_json()])
        return letter

    async def delete(self, letter: DeadLetter) -> None:
        """Forget a letter and its payload."""
        self._forget([letter])
        if letter.payload:
            await self._blobs.delete(letter.payload)

    def _check(self) -> None:
        if not self._loaded:
            raise Unavailable("another router leads and keeps the dead letters: try again", retry_after_s=1.0)

    async def _whole(self, request: Request) -> list[Buffer]:
        if not request.flags & envelope.CLAIM:
            return [request.raw]
        return without_claim(request, await self._claims.redeem(request.data))

    async def _kept(self, letter: DeadLetter, pieces: list[Buffer]) -> DeadLetter:
        size = sum(map(len, pieces))
        if size > self._limits.payload_bytes:
            return replace(
                letter,
                missing=f"its {size} bytes are more than TIDEGATE_DEAD_LETTER_BYTES "
                f"({self._limits.payload_bytes})",
            )
        key = await self._blobs.put(pieces, self._limits.keep_s, durable=True)
        return replace(letter, payload=key, payload_bytes=size)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self._sweep()
            except Exception:
                log.exception("dead letters were not swept; the next round tries again")

    async def _sweep(self) -> None:
        """Let go of what is beyond the limits. The blob store sweeps payloads that are too old by itself."""
        due = overdue(list(self._letters.values()), time.time(), self._limits)
        self._forget(due.letters)
        told = "it was deleted to make room: payloads of dead letters exceeded TIDEGATE_DEAD_LETTER_BYTES"
        for letter in due.payloads:
            self._letters[letter.letter] = replace(letter, payload="", missing=told)
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
        # Only by the router that keeps the letters: another one does not know them, and would lose them.
        if self._loaded and self._lines > len(self._letters) + SPARE_LINES:
            self._rewrite()

    def _rewrite(self) -> None:
        fresh = self._journal.with_suffix(".new")
        fresh.write_bytes(b"".join(orjson.dumps(each.to_json()) + b"\n" for each in self._letters.values()))
        fresh.replace(self._journal)
        self._lines = len(self._letters)
