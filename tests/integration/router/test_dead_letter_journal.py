"""The journal of dead letters when the leader changes: only the leader rewrites it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from services.router.application.dead_letters import SPARE_LINES, DeadLetters
from services.router.domain.dead_letters import DeadLetter, DeadLetterLimits
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.blobs.store import Blobs

pytestmark = pytest.mark.integration


def letters_of(folder: Path) -> DeadLetters:
    blobs = Blobs(f"file://{folder}/blobs")
    return DeadLetters(
        folder / "letters.jsonl", blobs, Claims(blobs, 1000), DeadLetterLimits(2 * SPARE_LINES, 1e6, 2**30)
    )


def letter(n: int) -> DeadLetter:
    return DeadLetter(time.time(), "undecodable", "requests.v1.a", f"{n:04x}", 0, 3, "")


async def test_a_former_leader_appends_to_the_journal_and_never_rewrites_it(tmp_path):
    former = letters_of(tmp_path)
    former.load()
    for n in range(SPARE_LINES + 1):
        former._letters[f"{n:016x}"] = found = letter(n)
        former._write([found.to_json() | {"letter": f"{n:016x}"}])
    former.unload()
    await former.add(letter(SPARE_LINES + 1), None, b"raw")
    following = letters_of(tmp_path)
    following.load()
    assert len(following.all) == SPARE_LINES + 2
    former.load()
    assert len(former.all) == SPARE_LINES + 2
