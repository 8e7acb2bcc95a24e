"""Write the desired state in one transaction. If it changes anything, the revision increases by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncConnection

from services.registry.adapters.sql import (
    aliases,
    audit,
    baselines,
    cards,
    facts,
    policies,
    stages,
    verifications,
)
from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.adapters.sql.tables import (
    artifacts,
    deployments,
    endpoint_targets,
    endpoints,
    models,
    revision,
    versions,
)
from services.registry.domain.audit import NewAuditEntry, audited
from services.registry.domain.desired_state import (
    Change,
    ChangeNotification,
    DropAlias,
    DropDeployment,
    DropEndpoint,
    DropVersion,
    MarkVersion,
    PutAlias,
    PutDeployment,
    PutEndpoint,
    PutPolicy,
    RestoreVersion,
    StoredDeployment,
    notification_of,
)
from services.registry.domain.model_policy import ModelPolicy
from tidegate.kernel import telemetry
from tidegate.kernel.protocol.models import EndpointSpec, Signature, Version, VersionMetadata
from tidegate.kernel.protocol.verification import Verification
from tidegate.kernel.service import caller


class DesiredStateWriter(DesiredStateReader):
    """A write transaction. Only one is open at a time.

    ``notifications`` are published after the commit. ``entries`` are the new entries of the audit log.
    """

    def __init__(self, connection: AsyncConnection, now: datetime) -> None:
        super().__init__(connection, now)
        self.notifications: list[ChangeNotification] = []
        self.entries: list[NewAuditEntry] = []
        self.next_revision = 0

    async def begin(self) -> None:
        """Lock the row with the revision until the transaction ends."""
        query = sa.select(revision.c.value).with_for_update()
        self.next_revision = int((await self._connection.execute(query)).scalar_one()) + 1

    async def revision(self) -> int:
        """Return the revision after this transaction."""
        return self.next_revision if self.notifications else self.next_revision - 1

    async def finish(self) -> None:
        """Increment the revision if anything changed."""
        if self.notifications:
            await self._connection.execute(sa.update(revision).values(value=self.next_revision))

    async def probe(self) -> None:
        """Check that the database can be written: write the revision, but do not change its value.

        Raise the driver's error if the write fails.
        """
        await self._connection.execute(sa.update(revision).values(value=revision.c.value))

    async def apply(self, changes: Iterable[Change]) -> None:
        """Apply changes in order, and add each of them to the audit log."""
        for change in changes:
            notification = notification_of(change)
            before = await self._current(notification)
            match change:
                case PutDeployment(stored, created):
                    await self._put_deployment(stored, created=created)
                case PutEndpoint(spec, created):
                    await self._put_endpoint(spec, created=created)
                case DropDeployment(name):
                    await self._connection.execute(sa.delete(deployments).where(deployments.c.name == name))
                case DropEndpoint(name):
                    await self._drop_targets(name)
                    await self._connection.execute(sa.delete(endpoints).where(endpoints.c.name == name))
                case MarkVersion(model, number):
                    await self._mark(model, number, self.now)
                case RestoreVersion(model, number):
                    await self._mark(model, number, None)
                case DropVersion(model, number):
                    for part in (baselines, cards, facts, stages, verifications):
                        await part.drop(self._connection, model, number)
                    await self._connection.execute(sa.delete(versions).where(_is(model, number)))
                case _:
                    await self._apply_to_model(change)
            await self.note(notification, before, await self._current(notification))

    async def _apply_to_model(self, change: Change) -> None:
        match change:
            case PutAlias(model, alias, number):
                await aliases.put(self._connection, model, alias, number, self.now)
            case PutPolicy(model, policy):
                await policies.put(self._connection, model, policy)
            case DropAlias(model, alias):
                await aliases.drop(self._connection, model, alias)

    async def note(
        self,
        notification: ChangeNotification,
        before: Mapping[str, Any] | None,
        after: Mapping[str, Any] | None,
    ) -> None:
        """Add a change to the audit log, and add its notification to ``notifications``."""
        self.notifications.append(notification)
        by = caller.current.get()
        old, new = audited(before, after)
        entry = NewAuditEntry(
            at=self.now,
            principal=by.principal.id,
            principal_name=by.principal.name,
            origin=by.origin,
            request_id=telemetry.request_id.get(),
            action=notification.action,
            kind=notification.kind,
            name=notification.name,
            before=old,
            after=new,
            revision=self.next_revision,
        )
        self.entries.append(entry)
        await audit.add(self._connection, entry)

    async def _current(self, notification: ChangeNotification) -> Mapping[str, Any] | None:
        """Return the current fields of the object in ``notification``; None if it does not exist."""
        objects: Sequence[BaseModel] = ()
        if notification.kind == "alias":
            model, _, alias = notification.name.rpartition("/")
            known = (await aliases.of_models(self._connection, [model])).get(model, {})
            return {"version": known[alias]} if alias in known else None
        if notification.kind == "deployment":
            objects = await self.deployments(notification.name)
        elif notification.kind == "endpoint":
            objects = await self.endpoints(notification.name)
        elif notification.kind == "policy":
            policy = (await policies.read(self._connection)).get(notification.name, ModelPolicy())
            return policy.model_dump(mode="json")
        elif notification.kind == "version":
            model, _, number = notification.name.rpartition("/")
            objects = await self.versions(model, int(number))
        return objects[0].model_dump(mode="json") if objects else None

    async def _mark(self, model: str, number: int, deleted_at: datetime | None) -> None:
        marked = sa.update(versions).where(_is(model, number)).values(deleted_at=deleted_at)
        await self._connection.execute(marked)

    async def next_number(self, model: str) -> int:
        """Return the next version number of a model. A number is never returned twice."""
        taken = sa.update(models).where(models.c.name == model).values(last_number=models.c.last_number + 1)
        if (await self._connection.execute(taken)).rowcount:
            query = sa.select(models.c.last_number).where(models.c.name == model)
            return int((await self._connection.execute(query)).scalar_one())
        await self._insert(models, name=model, last_number=1, created_at=self.now)
        return 1

    async def add_version(self, version: Version) -> None:
        """Add a version. Its artifact is no longer pending, because a version uses it now."""
        await self._insert(
            versions,
            model=version.model,
            number=version.number,
            format=version.format,
            artifact_sha256=version.artifact_sha256,
            filename=version.filename,
            signature=version.signature.model_dump() if version.signature else None,
            requirements=version.requirements,
            trusted=version.trusted,
            metadata=version.metadata.model_dump(mode="json"),
            created_at=version.created_at,
            **_verification_values(version.verification),
            created_by=caller.current.get().principal.id,
        )
        await facts.write(self._connection, version.model, version.number, version.metadata)
        named = sa.update(artifacts).where(artifacts.c.sha256 == version.artifact_sha256)
        await self._connection.execute(named.values(pending_until=None))
        notification = ChangeNotification("version", f"{version.model}/{version.number}", "created")
        await self.note(notification, None, version.model_dump(mode="json"))

    async def describe_version(
        self, model: str, number: int, metadata: VersionMetadata, signature: Signature | None
    ) -> None:
        """Replace a version's metadata and signature."""
        values: dict[str, Any] = {
            "metadata": metadata.model_dump(mode="json"),
            "signature": signature.model_dump() if signature else None,
        }
        notification = ChangeNotification("version", f"{model}/{number}", "updated")
        before = await self._current(notification)
        await self._connection.execute(sa.update(versions).where(_is(model, number)).values(values))
        await facts.write(self._connection, model, number, metadata)
        await self.note(notification, before, await self._current(notification))

    async def verify_version(self, model: str, number: int, verification: Verification) -> None:
        """Replace the verification of a version."""
        notification = ChangeNotification("version", f"{model}/{number}", "updated")
        before = await self._current(notification)
        values = _verification_values(verification)
        await self._connection.execute(sa.update(versions).where(_is(model, number)).values(values))
        await self.note(notification, before, await self._current(notification))

    async def note_artifact(self, sha256: str, size: int, pending_until: datetime) -> None:
        """Add an uploaded artifact. It is kept until ``pending_until`` even if no version uses it."""
        seen = sa.update(artifacts).where(artifacts.c.sha256 == sha256).values(pending_until=pending_until)
        if not (await self._connection.execute(seen)).rowcount:
            await self._insert(
                artifacts, sha256=sha256, size=size, created_at=self.now, pending_until=pending_until
            )

    async def drop_unused_artifacts(self) -> list[str]:
        """Delete the rows of artifacts that no version uses and that are not pending. Return their sha256."""
        used = sa.select(versions.c.artifact_sha256).where(versions.c.artifact_sha256 == artifacts.c.sha256)
        pending = artifacts.c.pending_until.is_not(None) & (artifacts.c.pending_until > self.now)
        query = sa.select(artifacts.c.sha256).where(~used.exists(), ~pending)
        unused = list((await self._connection.execute(query)).scalars())
        for sha256 in unused:
            await self._connection.execute(sa.delete(artifacts).where(artifacts.c.sha256 == sha256))
        return unused

    async def _put_deployment(self, stored: StoredDeployment, *, created: bool) -> None:
        spec, override = stored.spec, stored.override
        values = {
            "model": spec.model,
            "version": spec.version,
            "options": spec.model_dump(mode="json", exclude={"name", "model", "version"}),
            "declared": stored.declared,
            "override_replicas": override.replicas if override else None,
            "override_expires_at": override.expires_at if override else None,
            "override_force": override is not None and override.force,
            "revision": self.next_revision,
        }
        if created:
            await self._insert(deployments, name=spec.name, created_at=self.now, **values)
        else:
            changed = sa.update(deployments).where(deployments.c.name == spec.name)
            await self._connection.execute(changed.values(values))

    async def _put_endpoint(self, spec: EndpointSpec, *, created: bool) -> None:
        values = {
            "options": spec.model_dump(mode="json", exclude={"name", "targets", "previous"}),
            "revision": self.next_revision,
        }
        if created:
            await self._insert(endpoints, name=spec.name, created_at=self.now, **values)
        else:
            changed = sa.update(endpoints).where(endpoints.c.name == spec.name)
            await self._connection.execute(changed.values(values))
            await self._drop_targets(spec.name)
        for role, targets in (("target", spec.targets), ("previous", spec.previous)):
            for position, target in enumerate(targets):
                await self._insert(
                    endpoint_targets,
                    endpoint=spec.name,
                    role=role,
                    position=position,
                    deployment=target.deployment,
                    weight=target.weight,
                )

    async def _drop_targets(self, endpoint: str) -> None:
        query = sa.delete(endpoint_targets).where(endpoint_targets.c.endpoint == endpoint)
        await self._connection.execute(query)

    async def _insert(self, table: sa.Table, **values: Any) -> None:
        await self._connection.execute(sa.insert(table).values(values))


def _verification_values(verification: Verification) -> dict[str, Any]:
    rest = verification.model_dump(mode="json", exclude={"state"})
    return {"verification_state": verification.state, "verification": rest}


def _is(model: str, number: int) -> sa.ColumnElement[bool]:
    return (versions.c.model == model) & (versions.c.number == number)
