"""The core behind every door: read, decide purely, write in one transaction, then tell others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TypeVar

from services.registry.adapters import artifact_inspection, metrics
from services.registry.adapters.artifact_inspection import Inspection
from services.registry.adapters.artifacts import ArtifactStore, StagedArtifact
from services.registry.adapters.change_notifier import ChangeNotifier
from services.registry.adapters.sql.database import RegistryDatabase
from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.adapters.sql.writing import DesiredStateWriter
from services.registry.domain import (
    compatibility,
    formats,
    names,
    pickles,
    registration,
    removal,
    requirements,
    rollover,
    signature,
)
from services.registry.domain.archive_limits import ArchiveLimits
from services.registry.domain.desired_state import Change, ChangeNotification, RegistrySnapshot
from services.registry.domain.rollover import DeployRequest
from tidegate.kernel import telemetry
from tidegate.kernel.errors import BadRequest, Conflict, NotFound, PayloadTooLarge, TidegateError, Unavailable
from tidegate.kernel.protocol.models import Format, Signature, Version, VersionMetadata

log = telemetry.logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Registration:
    """A version as its publisher hands it in. ``format`` None: by the file's name.

    ``requirements`` None: those in the artifact, if it has any; else they stand in place of these.
    """

    model: str
    artifact: str
    filename: str
    format: Format | None = None
    signature: Signature | None = None
    requirements: list[str] | None = None
    metadata: VersionMetadata | None = None
    allow_pickle: bool = False
    breaking: bool = False


@dataclass(frozen=True, slots=True)
class RegisterResult:
    """What became of a registration: its version, whether that is new, and what its publisher should know."""

    version: Version
    new: bool
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What can be said of a registration beforehand. ``version``: the one that it is already, if it is."""

    format: Format
    stored: bool
    version: Version | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RegistryPolicy:
    """What is a matter of setting, and the ``packages`` in the models' environment, as far as known here."""

    limits: ArchiveLimits = field(default_factory=ArchiveLimits)
    default_max_batch: int = 64
    pending_for: timedelta = timedelta(hours=1)
    packages: Mapping[str, str] = field(default_factory=dict)


class Registrar:
    """Uploads, versions and every change to the intention."""

    def __init__(
        self,
        database: RegistryDatabase,
        artifacts: ArtifactStore,
        notifier: ChangeNotifier,
        policy: RegistryPolicy,
    ) -> None:
        self.database = database
        self.artifacts = artifacts
        self.notifier = notifier
        self._policy = policy

    def now(self) -> datetime:
        """The registry's clock."""
        return self.database.clock()

    async def upload(
        self, chunks: AsyncIterator[bytes], *, announced: int | None, expected: str | None
    ) -> StagedArtifact:
        """Store an artifact; the same bytes twice are stored once. ``expected``: the sender's digest."""
        staged = await self.artifacts.stage(chunks, announced)
        try:
            if expected is not None and expected != staged.sha256:
                raise BadRequest(
                    f"The bytes that arrived have sha256 {staged.sha256}, not {expected}: send them again."
                )
            # Row first, then file: collecting takes the same row before it deletes the file.
            async with self.change() as writer:
                until = writer.now + self._policy.pending_for
                await writer.note_artifact(staged.sha256, staged.size, until)
                await self.artifacts.keep(staged)
        except BaseException:
            await asyncio.shield(self.artifacts.discard(staged))
            raise
        metrics.UPLOADED.inc(staged.size)
        return staged

    async def register(self, wanted: Registration) -> RegisterResult:
        """Make the next version of a model of an uploaded artifact, unless it is one that the model has.

        The same artifact, format, signature and requirements as a version is that version; metadata that is
        given then replaces what it has, field by field. Raises Conflict for a signature that breaks callers.
        """
        format_ = _screened(wanted)
        found = await self._inspect(wanted, format_)
        async with self.change() as writer:
            size = await writer.artifact_size(wanted.artifact)
            if size is None:
                raise _no_artifact(wanted.artifact)
            held = await writer.versions(wanted.model)
            same = registration.already(held, wanted.artifact, format_, found.requirements, found.signature)
            if same is not None:
                return RegisterResult(
                    await _redescribed(writer, same, wanted.metadata), False, self._warnings(found)
                )
            names.check_new("model", wanted.model, await writer.models())
            compatibility.check(held, found.signature, breaking=wanted.breaking)
            version = Version(
                model=wanted.model,
                number=await writer.next_number(wanted.model),
                format=format_,
                artifact_sha256=wanted.artifact,
                artifact_size=size,
                filename=wanted.filename,
                signature=found.signature,
                requirements=found.requirements,
                metadata=wanted.metadata or VersionMetadata(),
                created_at=writer.now,
            )
            await writer.add_version(version)
        return RegisterResult(version, True, self._warnings(found))

    async def check(self, wanted: Registration, size: int | None, order: DeployRequest) -> CheckResult:
        """Refuse what :meth:`register` and a deploy of its version would refuse, and change nothing.

        ``wanted.artifact`` may be empty, or not be uploaded yet: what its bytes say is then left open.
        """
        format_ = _screened(wanted)
        registration.check_described(format_, wanted.signature, by_itself=format_ == "python")
        if (too_large := registration.check_size(size, self.artifacts.max_bytes)) is not None:
            raise PayloadTooLarge(too_large)
        async with self.database.read() as reader:
            stored = bool(wanted.artifact) and await reader.artifact_size(wanted.artifact) is not None
        found = await self._inspect(wanted, format_) if stored else Inspection(wanted.signature)
        async with self.database.read() as reader:
            held = await reader.versions(wanted.model)
            same = registration.already(held, wanted.artifact, format_, found.requirements, found.signature)
            if same is None:
                names.check_new("model", wanted.model, await reader.models())
                compatibility.check(held, found.signature, breaking=wanted.breaking)
            number = same.number if same else max((v.number for v in held), default=0) + 1
            rollover.deploy(
                (await reader.snapshot()).with_version(wanted.model, number), replace(order, version=number)
            )
        return CheckResult(format_, stored, same, self._warnings(found))

    def _warnings(self, found: Inspection) -> list[str]:
        return pickles.warnings(found.saved, self._policy.packages, found.requirements)

    async def describe(
        self, model: str, number: int, metadata: VersionMetadata | None, given: Signature | None
    ) -> Version:
        """Change what is said of a version. A signature can be added where there is none, never changed."""
        async with self.change() as writer:
            held = next(iter(await writer.versions(model, number)), None)
            if held is None:
                raise NotFound(f"Model {model!r} has no version {number}.")
            if given is not None and held.signature not in (None, given):
                raise Conflict(
                    f"Version {number} of model {model!r} has a signature already, and a version does not "
                    "change: register the artifact again with the other signature."
                )
            if given is not None:
                signature.check(given)
            update = {"metadata": metadata or held.metadata, "signature": given or held.signature}
            changed = held.model_copy(update=update)
            if changed != held:
                await writer.describe_version(model, number, changed.metadata, changed.signature)
        return changed

    async def decide(
        self,
        decision: Callable[[RegistrySnapshot], Sequence[Change]],
        answer: Callable[[DesiredStateReader], Awaitable[T]],
    ) -> T:
        """Carry out what ``decision`` makes of the intention; ``answer`` reads the outcome with it."""
        async with self.change() as writer:
            await writer.apply(decision(await writer.snapshot()))
            return await answer(writer)

    async def delete_version(self, model: str, number: int) -> None:
        """Forget a version that nobody uses, and its artifact if no other version has it."""
        await self.decide(lambda now: removal.delete_version(now, model, number), _nothing)
        await self.collect()

    async def delete_model(self, model: str, *, cascade: bool) -> list[ChangeNotification]:
        """Forget a model's versions (``cascade``: and all that serves them); what was deleted or changed."""
        async with self.change() as writer:
            await writer.apply(removal.delete_model(await writer.snapshot(), model, cascade=cascade))
        await self.collect()
        return writer.notifications

    async def collect(self) -> None:
        """Delete artifacts that no version names, and uploads that broke off; what fails waits for later."""
        try:
            await self.artifacts.sweep()
            async with self.change() as writer:
                for sha256 in await writer.drop_unused_artifacts():
                    await self.artifacts.remove(sha256)
        except Unavailable as error:
            log.warning("artifacts not collected", extra={"problem": error.message})

    async def observe(self) -> None:
        """Probe database and store, and show what there is in the metrics."""
        await self.database.probe()
        await self.artifacts.probe()
        try:
            async with self.database.read() as reader:
                metrics.show(await reader.revision(), await reader.totals())
        except TidegateError as error:
            log.warning("totals not read", extra={"problem": error.message})

    @asynccontextmanager
    async def change(self) -> AsyncIterator[DesiredStateWriter]:
        """A write transaction whose changes are told once, and only if, it is committed."""
        async with self.database.write() as writer:
            yield writer
        self.notifier.notify(writer.next_revision, writer.notifications)

    async def _inspect(self, wanted: Registration, format_: Format) -> Inspection:
        async with self.database.read() as reader:
            if await reader.artifact_size(wanted.artifact) is None:
                raise _no_artifact(wanted.artifact)
        async with self.artifacts.local(wanted.artifact) as path:
            found = await asyncio.to_thread(
                artifact_inspection.inspect,
                path,
                format_,
                model=wanted.model,
                given=wanted.signature,
                max_batch=self._policy.default_max_batch,
                limits=self._policy.limits,
            )
        if wanted.requirements is None:
            return found
        given = requirements.lines_of("\n".join(wanted.requirements), "requirements")
        return replace(found, requirements=given)


def _screened(wanted: Registration) -> Format:
    """Return the format of a registration, refusing what can be refused without its bytes."""
    names.check("model", wanted.model)
    formats.check_filename(wanted.filename)
    format_ = formats.chosen(wanted.filename, wanted.format)
    formats.check_consent(format_, allow_pickle=wanted.allow_pickle)
    if wanted.signature is not None:
        signature.check(wanted.signature)
    if wanted.requirements is not None:
        requirements.lines_of("\n".join(wanted.requirements), "requirements")
    return format_


async def _redescribed(writer: DesiredStateWriter, held: Version, given: VersionMetadata | None) -> Version:
    fields = {name: getattr(given, name) for name in given.model_fields_set} if given else {}
    metadata = held.metadata.model_copy(update=fields)
    if metadata == held.metadata:
        return held
    await writer.describe_version(held.model, held.number, metadata, held.signature)
    return held.model_copy(update={"metadata": metadata})


def _no_artifact(sha256: str) -> BadRequest:
    return BadRequest(f"No artifact {sha256} is stored here: upload it with PUT /v1/artifacts first.")


async def _nothing(_: DesiredStateReader) -> None:
    return None
