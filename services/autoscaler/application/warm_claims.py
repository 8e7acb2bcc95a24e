"""Remember which warm pool worker became which replica, and find out the results of offers.

An offer asks a waiting worker to become a replica. A worker accepts it by claiming the replica in the store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from services.autoscaler.adapters.history.decision_store import DecisionStore
from services.autoscaler.domain.warm_pool import WarmClaim
from tidegate.kernel.store import Store, StoreUnavailable

SETTLE_S = 10.0  # seconds after which an unclaimed offer is withdrawn
NOBODY = "autoscaler"


class WarmClaims:
    """Records of offered replicas and of the workers that claimed them, by replica name.

    They are also in the decision store, so that the next leader can read them.
    """

    def __init__(
        self, store: Store, decision_store: DecisionStore, clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._decision_store = decision_store
        self._clock = clock
        self._claims: dict[str, WarmClaim] = {}

    def __iter__(self) -> Iterator[WarmClaim]:
        return iter(tuple(self._claims.values()))

    @property
    def open(self) -> bool:
        """Return True while the result of at least one offer is not known."""
        return any(not claim.worker for claim in self)

    @property
    def workers(self) -> dict[str, WarmClaim]:
        """Return a claim for each worker that took an offer. The keys are the workers' names."""
        return {claim.worker: claim for claim in self if claim.worker}

    def take_over(self) -> None:
        """Read the claims of the former leader."""
        self._claims = {claim.replica: claim for claim in self._decision_store.claims()}

    def worker_of(self, replica: str) -> str:
        """Return the name that the launcher uses for a replica.

        For a replica from a pool, this is the name of the pool's worker.
        """
        claim = self._claims.get(replica)
        return claim.worker if claim is not None and claim.worker else replica

    def save(self, claim: WarmClaim) -> None:
        """Store a claim, which replaces an earlier one of the same replica."""
        self._claims[claim.replica] = claim
        self._decision_store.save_claim(claim)

    def drop(self, replica: str) -> None:
        """Delete the claim of a replica, if there is one."""
        if self._claims.pop(replica, None) is not None:
            self._decision_store.drop_claim(replica)

    def drop_ended(self, existing: set[str]) -> None:
        """Delete the claims of workers that no longer exist."""
        for claim in self:
            if claim.worker and claim.worker not in existing:
                self.drop(claim.replica)

    async def settle(self) -> None:
        """Find out which workers took the pending offers. Withdraw offers that no worker took in time.

        If the leader changes or the store fails before the result of an offer is known, the offer stays
        pending.
        """
        for claim in self:
            if claim.worker:
                continue
            try:
                worker = await self._store.claimant(claim.replica)
                if worker is None and self._clock() - claim.launched_at > SETTLE_S:
                    worker = await self._store.claim_replica(claim.replica, NOBODY)
            except StoreUnavailable:
                return
            if worker is not None and worker != NOBODY:
                self.save(replace(claim, worker=worker))
            elif worker == NOBODY:
                self.drop(claim.replica)
