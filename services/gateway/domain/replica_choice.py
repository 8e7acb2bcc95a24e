"""Choose the preferred replica for a request to a language model. Pure.

The replica that has read the longest part of the prompt is preferred. If it has too much load, no replica is
preferred, and the request goes to the queue that all replicas share.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal, NamedTuple

# If no replica has read a prompt, the hash of its first FIRST_BLOCKS blocks determines the replica. So all
# gateways choose the same replica for this prompt, and for other prompts with the same beginning.
FIRST_BLOCKS = 4
# The gateway counts its own requests in flight at each replica. M is the mean of these counts over all ready
# replicas. A replica has too much load if its count is above LOAD_CAP * M + 1.
LOAD_CAP = 1.25
# The largest number of prompt blocks that a gateway remembers for each Deployment.
MAX_BLOCKS = 100_000

Outcome = Literal["hit", "first", "stolen", "loaded", "none"]


class ReplicaSlots(NamedTuple):
    """A ready replica of a language model.

    ``inflight``: the number of its requests in flight, as its last report states. ``slots``: how many
    requests the replica can run at the same time.
    """

    name: str
    inflight: int
    slots: int


@dataclass(slots=True)
class PrefixMemory:
    """Remember which replica was the last to read each block of a prompt, as far as this gateway knows."""

    limit: int = MAX_BLOCKS
    _replicas: OrderedDict[bytes, str] = field(default_factory=OrderedDict)

    def read_by(self, blocks: Sequence[bytes], replica: str) -> None:
        """Remember that a replica has read ``blocks``."""
        for block in blocks:
            self._replicas[block] = replica
            self._replicas.move_to_end(block)
        while len(self._replicas) > self.limit:
            self._replicas.popitem(last=False)

    def depths(self, blocks: Sequence[bytes]) -> dict[str, int]:
        """Return for each replica how many blocks it has read from the beginning of a prompt."""
        found: dict[str, int] = {}
        for depth, block in enumerate(blocks, 1):
            replica = self._replicas.get(block)
            if replica is None:
                break
            found[replica] = depth
        return found


class Choice(NamedTuple):
    """The preferred replica for a request; None if no replica is preferred.

    ``outcome``: the label for the metrics. If another replica runs the request, the label becomes ``stolen``.
    """

    replica: str | None
    outcome: Outcome


def choose(
    blocks: Sequence[bytes],
    memory: PrefixMemory,
    ready: Sequence[ReplicaSlots],
    inflight: Mapping[str, int],
) -> Choice:
    """Return the preferred replica for a prompt. ``blocks``: the hashes of the prompt's blocks.

    ``inflight``: the number of this gateway's requests in flight at each replica, by the replica's name.
    """
    if len(ready) < 2 or not blocks:
        return Choice(None, "none")
    depths = memory.depths(blocks)
    known = [replica for replica in ready if replica.name in depths]
    outcome: Outcome = "hit" if known else "first"
    if known:
        best = max(known, key=lambda replica: depths[replica.name])
    else:
        best = _rendezvous(blocks[:FIRST_BLOCKS][-1], ready)
    if is_loaded(best, ready, inflight):
        return Choice(None, "loaded")
    return Choice(best.name, outcome)


def is_loaded(replica: ReplicaSlots, ready: Sequence[ReplicaSlots], inflight: Mapping[str, int]) -> bool:
    """Return True if a replica has no free engine slot, or too many of this gateway's requests."""
    own = inflight.get(replica.name, 0)
    mean = sum(inflight.get(each.name, 0) for each in ready) / len(ready)
    return max(own, replica.inflight) >= replica.slots or own > LOAD_CAP * mean + 1


def _rendezvous(block: bytes, ready: Sequence[ReplicaSlots]) -> ReplicaSlots:
    """Return the replica with the highest hash. Each hash covers ``block`` and one replica's name.

    If a replica is lost, only the prompts of this replica move to other replicas.
    """
    return max(ready, key=lambda each: blake2b(block + each.name.encode(), digest_size=8).digest())
