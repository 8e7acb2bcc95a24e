"""Register, check and describe versions of models."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from services.registry.adapters import artifact_inspection, glimpses, hugging_face_artifact
from services.registry.adapters.artifact_inspection import Inspection
from services.registry.adapters.sql.writing import DesiredStateWriter
from services.registry.application.artifacts import Artifacts
from services.registry.application.lineage import with_parent
from services.registry.application.quotas import check_quota
from services.registry.application.transactions import Transactions
from services.registry.application.verifications import Verifications
from services.registry.domain import (
    compatibility,
    formats,
    names,
    needs,
    pickles,
    recognition,
    registration,
    requirements,
    rollover,
    signature,
    version_metadata,
)
from services.registry.domain.rollover import DeployRequest
from tidegate.kernel.errors import BadRequest, Conflict, PayloadTooLarge
from tidegate.kernel.protocol.archives import ArchiveLimits
from tidegate.kernel.protocol.models import Format, Signature, Version, VersionMetadata
from tidegate.kernel.protocol.verification import VerificationOptions


@dataclass(frozen=True, slots=True)
class Registration:
    """A version as its publisher describes it.

    ``format`` None: the format is found by the file's contents or the file name. ``trust``: dangerous or
    unknown names that a pickle or a skops file is allowed to import.

    ``requirements`` None: use the requirements in the artifact, if it has any.
    """

    model: str
    artifact: str
    filename: str
    format: Format | None = None
    signature: Signature | None = None
    requirements: list[str] | None = None
    metadata: VersionMetadata | None = None
    allow_pickle: bool = False
    trust: Sequence[str] = ()
    breaking: bool = False
    verification: VerificationOptions | None = None


@dataclass(frozen=True, slots=True)
class RegisterResult:
    """The result of a registration.

    ``new`` False: the version existed already. ``warnings``: texts for the publisher.
    """

    version: Version
    new: bool
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of a check before the upload. ``version``: an existing identical version.

    ``format`` None: only the file's contents can show the format.
    """

    format: Format | None
    stored: bool
    version: Version | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class InspectionSettings:
    """The settings for the inspection of artifacts.

    ``packages``: the version of each package in the models' environment; empty if this host does not have
    that environment.
    """

    limits: ArchiveLimits = field(default_factory=ArchiveLimits)
    default_max_batch: int = 64
    packages: Mapping[str, str] = field(default_factory=dict)


class Versions:
    """Register, check and describe versions."""

    def __init__(
        self,
        transactions: Transactions,
        artifacts: Artifacts,
        settings: InspectionSettings,
        verifications: Verifications,
    ) -> None:
        self._transactions = transactions
        self._verifications = verifications
        self._artifacts = artifacts
        self._settings = settings

    async def register(self, request: Registration) -> RegisterResult:
        """Register an uploaded artifact as the next version of a model.

        If an equal version exists, register nothing. Add the fields of ``request.metadata`` to that version's
        metadata, and return it. Versions are equal if they have the same artifact, format, requirements,
        trusted imports and signature. If the signature of the new version is unknown, signatures are not
        compared.

        Raise BadRequest if the artifact is not stored or not acceptable. Raise Conflict if the signature
        breaks callers of the latest version.
        """
        request = await self._recognised(request)
        format_ = _check_request(request)
        if format_ is None:
            raise _no_artifact(request.artifact)
        inspection = await self._inspect(request, format_)
        async with self._transactions.change() as writer:
            size = await writer.artifact_size(request.artifact)
            if size is None:
                raise _no_artifact(request.artifact)
            stored = await writer.versions_to_compare(request.model, request.artifact)
            same = registration.same_version(
                stored,
                request.artifact,
                format_,
                inspection.requirements,
                inspection.signature,
                inspection.trusted,
            )
            if same is not None:
                version = await _with_metadata(writer, same, request.metadata)
                version = await self._verifications.plan_again(writer, version, request.verification)
                return RegisterResult(version, False, self._warnings(inspection))
            names.check_new("model", request.model, await writer.models())
            compatibility.check(stored, inspection.signature, breaking=request.breaking)
            await check_quota(writer, request.artifact, size)
            described = await with_parent(writer, request.metadata or VersionMetadata(), own="")
            version = Version(
                model=request.model,
                number=await writer.next_number(request.model),
                format=format_,
                artifact_sha256=request.artifact,
                artifact_size=size,
                filename=request.filename,
                signature=inspection.signature,
                requirements=inspection.requirements,
                trusted=inspection.trusted,
                metadata=described,
                created_at=writer.now,
                verification=self._verifications.first(format_),
            )
            await writer.add_version(version)
            await self._verifications.plan(writer, version, request.verification)
        return RegisterResult(version, True, self._warnings(inspection))

    async def check(self, request: Registration, size: int | None, deploy: DeployRequest) -> CheckResult:
        """Check if a version can be registered and deployed, without changing anything.

        Raise the errors that :meth:`register` and a deploy would raise. If ``request.artifact`` is empty or
        not uploaded yet, the artifact's contents are not checked. ``size``: the artifact's size in bytes.
        """
        request = await self._recognised(request)
        format_ = _check_request(request)
        if format_ is not None:
            registration.check_has_signature(format_, request.signature, describes_itself=format_ == "python")
        if (problem := registration.size_problem(size, self._artifacts.store.max_bytes)) is not None:
            raise PayloadTooLarge(problem)
        async with self._transactions.read() as reader:
            is_stored = bool(request.artifact) and await reader.artifact_size(request.artifact) is not None
        inspection = Inspection(request.signature)
        if is_stored and format_ is not None:
            inspection = await self._inspect(request, format_)
        async with self._transactions.read() as reader:
            stored = await reader.versions_to_compare(request.model, request.artifact)
            same = format_ and registration.same_version(
                stored,
                request.artifact,
                format_,
                inspection.requirements,
                inspection.signature,
                inspection.trusted,
            )
            if same is None:
                names.check_new("model", request.model, await reader.models())
                compatibility.check(stored, inspection.signature, breaking=request.breaking)
                await check_quota(reader, request.artifact, size or 0)
            number = same.number if same else max((v.number for v in stored), default=0) + 1
            snapshot = (await reader.snapshot()).with_version(request.model, number)
            rollover.deploy(snapshot, replace(deploy, version=number))
        return CheckResult(format_, is_stored, same, self._warnings(inspection))

    async def describe(
        self,
        model: str,
        number: int,
        metadata: VersionMetadata | None,
        added: Signature | None,
        patch: Mapping[str, Any] | None = None,
    ) -> Version:
        """Replace or patch a version's metadata, or add a signature to a version without one.

        ``metadata``: the new metadata; None: use the stored metadata. ``patch``: a JSON merge patch of this
        metadata. ``added``: the new signature.

        Raise NotFound for an unknown version, or BadRequest for wrong metadata or a wrong signature. Raise
        Conflict if the version already has another signature. A signature never changes.
        """
        async with self._transactions.change() as writer:
            version = next(iter(await writer.versions(model, number)), None)
            if version is None:
                raise names.unknown_version(model, number)
            if added is not None and version.signature not in (None, added):
                raise Conflict(
                    f"Version {number} of model {model!r} already has a signature, and a version never "
                    "changes. Register the artifact as a new version with the other signature."
                )
            if added is not None:
                signature.check(added)
            described = version_metadata.patched(metadata or version.metadata, patch or {})
            described = await with_parent(writer, described, f"{model}@{number}")
            update = {"metadata": described, "signature": added or version.signature}
            changed = version.model_copy(update=update)
            if changed != version:
                await writer.describe_version(model, number, changed.metadata, changed.signature)
        return changed

    def _warnings(self, inspection: Inspection) -> list[str]:
        saved_by, here = inspection.saved_by, self._settings.packages
        return [*inspection.notes, *pickles.warnings(saved_by, here, inspection.requirements)]

    async def _recognised(self, request: Registration) -> Registration:
        """Return the request with the format that the artifact's contents show.

        Return the request unchanged if the artifact is not stored. Raise BadRequest if the file is not of the
        stated format or cannot be served; the message says what the file is.
        """
        formats.check_filename(request.filename)
        async with self._transactions.read() as reader:
            if not request.artifact or await reader.artifact_size(request.artifact) is None:
                return request
        async with self._artifacts.store.local(request.artifact) as path:
            kind = await asyncio.to_thread(glimpses.kind_of, path, request.filename, self._settings.limits)
            by_name = formats.format_by_name(request.filename)
            found = recognition.decide(request.filename, kind, request.format, by_name)
            if found == "llm" and request.format is None:
                found = await asyncio.to_thread(
                    hugging_face_artifact.llm_or_other, path, self._settings.limits
                )
        return replace(request, format=found)

    async def _inspect(self, request: Registration, format_: Format) -> Inspection:
        async with self._transactions.read() as reader:
            if await reader.artifact_size(request.artifact) is None:
                raise _no_artifact(request.artifact)
        async with self._artifacts.store.local(request.artifact) as path:
            inspection = await asyncio.to_thread(
                artifact_inspection.inspect,
                path,
                format_,
                model=request.model,
                user_signature=request.signature,
                max_batch=self._settings.default_max_batch,
                limits=self._settings.limits,
                allow_pickle=request.allow_pickle,
                trust=request.trust,
            )
        lines = inspection.requirements
        if request.requirements is not None:
            lines = _requirement_lines(request.requirements)
        added = needs.unmet(lines, inspection.needs, self._settings.packages)
        return replace(
            inspection,
            requirements=[*lines, *(need.line for need in added)],
            notes=[*inspection.notes, *(need.note for need in added if need.note)],
        )


def _check_request(request: Registration) -> Format | None:
    """Check a request. Return the stated format, or the format that the file name suggests, or None.

    Raise BadRequest if any field is wrong. The artifact is not read.
    """
    names.check("model", request.model)
    formats.check_filename(request.filename)
    format_ = request.format or formats.format_by_name(request.filename)
    if not request.filename.lower().endswith(".skops"):
        formats.check_pickle_allowed(format_, allow_pickle=request.allow_pickle)
    if request.metadata is not None:
        version_metadata.check(request.metadata)
    if request.signature is not None:
        signature.check(request.signature)
    if request.requirements is not None:
        _requirement_lines(request.requirements)
    return format_


def _requirement_lines(lines: list[str]) -> list[str]:
    return requirements.parse("\n".join(lines), "requirements")


async def _with_metadata(
    writer: DesiredStateWriter, version: Version, changes: VersionMetadata | None
) -> Version:
    fields = {name: getattr(changes, name) for name in changes.model_fields_set} if changes else {}
    metadata = version_metadata.check(version.metadata.model_copy(update=fields))
    metadata = await with_parent(writer, metadata, f"{version.model}@{version.number}")
    if metadata == version.metadata:
        return version
    await writer.describe_version(version.model, version.number, metadata, version.signature)
    return version.model_copy(update={"metadata": metadata})


def _no_artifact(sha256: str) -> BadRequest:
    return BadRequest(f"No artifact {sha256} is stored here. Upload it first with PUT /v1/artifacts.")
