"""Begin the verification of versions, and write its results."""

from __future__ import annotations

import asyncio
import time

from services.registry.adapters.sql import verifications
from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.adapters.sql.writing import DesiredStateWriter
from services.registry.application.transactions import Transactions
from services.registry.domain import names
from services.registry.domain import verification as rules
from tidegate.kernel.errors import Conflict, NotFound
from tidegate.kernel.protocol.models import DeploymentSpec, Format, Version
from tidegate.kernel.protocol.verification import (
    ScratchTask,
    Verification,
    VerificationOptions,
    VerificationResult,
)

WAIT_POLL_S = 0.1


class Verifications:
    """Begin and read the verifications of versions, and store their results.

    ``enabled`` False: new versions are not verified.
    """

    def __init__(self, transactions: Transactions, *, enabled: bool) -> None:
        self._transactions = transactions
        self._enabled = enabled

    def first(self, format_: Format) -> Verification:
        """Return the initial verification of a new version."""
        return rules.at_registration(format_, self._transactions.now(), enabled=self._enabled)

    async def plan(
        self, writer: DesiredStateWriter, version: Version, options: VerificationOptions | None
    ) -> None:
        """Store the Deployment and the samples for the scratch replica that will verify the version.

        If the verification is not pending, do nothing. Raise BadRequest for invalid options.
        """
        if version.verification.state != "pending":
            return
        options = options or VerificationOptions()
        spec = rules.scratch_spec(await writer.snapshot(), version.model, version.number, options)
        document = {"deployment": spec.model_dump(mode="json"), "samples": options.samples}
        await verifications.put(writer.connection, version.model, version.number, document)

    async def plan_again(
        self, writer: DesiredStateWriter, version: Version, options: VerificationOptions | None
    ) -> Version:
        """Begin a new verification when a version's artifact is registered again, if one is needed.

        A new verification is needed if the version was rejected, or if ``options`` has new samples. If none
        is needed, return the version unchanged. Do the same if the verification of versions is off.
        """
        if not self._enabled:
            return version
        stored = await verifications.find(writer.connection, version.model, version.number) or {}
        new = options is not None and bool(options.samples) and options.samples != stored.get("samples")
        if version.verification.state != "rejected" and not new:
            return version
        return await self._begin(writer, version, options)

    async def begin(self, model: str, number: int, options: VerificationOptions) -> Verification:
        """Begin to verify a version. Without samples in ``options``, use those of its last verification.

        If a verification is pending already, return it and do not begin another. Raise NotFound for an
        unknown version. Raise Conflict if the verification of versions is off.
        """
        if not self._enabled:
            raise Conflict(
                "The verification of versions is switched off. Set TIDEGATE_VERIFICATION=on and restart the "
                "registry."
            )
        async with self._transactions.change() as writer:
            version = await _version(writer, model, number)
            if version.verification.state == "pending":
                return version.verification
            stored = await verifications.find(writer.connection, model, number) or {}
            if not options.samples and stored.get("samples"):
                options = options.model_copy(update={"samples": stored["samples"]})
            return (await self._begin(writer, version, options)).verification

    async def read(self, model: str, number: int, wait_s: float = 0.0) -> Verification:
        """Return the verification of a version. While it is pending, wait up to ``wait_s`` seconds."""
        until = time.monotonic() + wait_s
        while True:
            async with self._transactions.read() as reader:
                found = (await _version(reader, model, number)).verification
            if found.state != "pending" or time.monotonic() >= until:
                return found
            await asyncio.sleep(WAIT_POLL_S)

    async def task(self, model: str, number: int) -> tuple[DeploymentSpec, ScratchTask]:
        """Return the Deployment and the verification task of a version's scratch replica.

        The task has the samples and the number of the verification round. Raise NotFound if there is no such
        version or task.
        """
        async with self._transactions.read() as reader:
            version = await _version(reader, model, number)
            stored = await verifications.find(reader.connection, model, number)
        if stored is None:
            raise NotFound(f"Version {number} of model {model!r} has nothing to verify.")
        round_ = version.verification.round
        spec = DeploymentSpec.model_validate(stored["deployment"])
        return spec, ScratchTask(round=round_, samples=stored["samples"])

    async def settle(self, model: str, number: int, result: VerificationResult) -> Verification:
        """Write the result of the current verification round. Ignore a result of an earlier round."""
        async with self._transactions.change() as writer:
            version = await _version(writer, model, number)
            fresh = rules.settled(version.verification, result, writer.now)
            if fresh is None:
                return version.verification
            await writer.verify_version(model, number, fresh)
        return fresh

    async def _begin(
        self, writer: DesiredStateWriter, version: Version, options: VerificationOptions | None
    ) -> Version:
        round_, card = version.verification.round + 1, version.verification.card
        fresh = rules.at_registration(version.format, writer.now, enabled=True, round_=round_)
        fresh = fresh.model_copy(update={"card": card})
        changed = version.model_copy(update={"verification": fresh})
        await self.plan(writer, changed, options)
        await writer.verify_version(version.model, version.number, fresh)
        return changed


async def _version(reader: DesiredStateReader, model: str, number: int) -> Version:
    found = await reader.versions(model, number)
    if not found:
        raise names.unknown_version(model, number)
    return found[0]
