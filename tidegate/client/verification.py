"""Read and start the verification of versions through a gateway, for both clients.

The calls use the registry's API. `docs/access.md` lists the scopes that the caller's key needs for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

import orjson

from tidegate.client.calls import Call
from tidegate.client.core import Core
from tidegate.client.flow import Flow, Sleep
from tidegate.client.jobs import Document, document_of
from tidegate.kernel.errors import DeadlinePassed

POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class VerificationFlows:
    """Calls about verification. Each returns the verification of a version, with its capacity card."""

    core: Core

    def read(self, model: str, version: int) -> Flow[Document]:
        """Return the verification of a version."""
        return document_of((yield from self.core.call("GET", _path(model, version), None)))

    def start(self, model: str, version: int, samples: Sequence[Document]) -> Flow[Document]:
        """Verify a version again."""
        answer = yield from self.core.caller.call(
            "POST",
            _path(model, version),
            timeout_s=self.core.timeout_s,
            headers={"Content-Type": "application/json"},
            content=orjson.dumps({"samples": list(samples)}),
            repeatable=True,
        )
        return document_of(answer)

    def wait(self, model: str, version: int, timeout_s: float) -> Flow[Document]:
        """Return the verification as soon as it is not pending.

        Raise DeadlinePassed after ``timeout_s`` seconds.
        """
        clock = self.core.caller.clock
        deadline = clock() + timeout_s
        while True:
            found = yield from self.read(model, version)
            if found["state"] != "pending":
                return found
            if clock() >= deadline:
                raise DeadlinePassed(
                    f"Version {version} of {model} is not verified after {timeout_s:g} s. "
                    f"See: tidegate verify {model} --version {version}",
                    reason="not_verified",
                )
            yield Sleep(POLL_S)


class VerificationCalls:
    """The calls about verification, for both clients. See `docs/verification.md`."""

    _verification: VerificationFlows

    @Call
    def verification(self, model: str, version: int) -> Flow[Document]:
        """Return the ``state`` of a version's verification, its ``message`` and its capacity ``card``."""
        return self._verification.read(model, version)

    @Call
    def verify(self, model: str, version: int, samples: Sequence[Document] = ()) -> Flow[Document]:
        """Verify a version again. If ``samples`` is empty, use the samples of its last verification."""
        return self._verification.start(model, version, samples)

    @Call
    def wait_verified(self, model: str, version: int, timeout_s: float = 120.0) -> Flow[Document]:
        """Wait until a version is verified, rejected or skipped.

        Raise DeadlinePassed after ``timeout_s`` seconds.
        """
        return self._verification.wait(model, version, timeout_s)


def _path(model: str, version: int) -> str:
    return f"/api/registry/v1/models/{quote(model, safe='')}/versions/{version}/verification"
