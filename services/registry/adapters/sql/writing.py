"""Writes of the intention, inside one transaction that bumps the revision once if anything changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncConnection

from services.registry.adapters.sql import audit
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
from services.registry.domain.audit import NewAuditEntry, pair
from services.registry.domain.desired_state import (
    Change,
    ChangeNotification,
    DropDeployment,
    DropEndpoint,
    DropVersion,
    PutDeployment,
    PutEndpoint,
    StoredDeployment,
)
from tidegate.kernel import telemetry
from tidegate.kernel.protocol.models import EndpointSpec, Signature, Version, VersionMetadata
from tidegate.kernel.service import caller


class DesiredStateWriter(DesiredStateReader):
    """The one write transaction of the moment; ``notifications`` are to be told once it is committed."""

    def __init__(self, connection: AsyncConnection, now: datetime) -> None:
        super().__init__(connection, now)
        self.notifications: list[ChangeNotification] = []
        self.next_revision = 0

    async def begin(self) -> None:
        """Wait for the turn: the row's lock is held until the transaction ends."""
        query = sa.select(revision.c.value).with_for_update()
        self.next_revision = int((await self._connection.execute(query)).scalar_one()) + 1

    async def revision(self) -> int:
        """The revision that this transaction will have made, or leave."""
        return self.next_revision if self.notifications else self.next_revision - 1

    async def finish(self) -> None:
        """Bump the revision if the intention changed."""
        if self.notifications:
            await self._connection.execute(sa.update(revision).values(value=self.next_revision))

    async def probe(self) -> None:
        """Write without changing anything; raises when the database cannot be written."""
        await self._connection.execute(sa.update(revision).values(value=revision.c.value))

    async def apply(self, changes: Iterable[Change]) -> None:
        """Carry out a plan, in its order."""
        for change in changes:
            before = await self._seen(change.notification)
            match change:
                case PutDeployment(held):
                    await self._put_deployment(held, created=change.created)
                case PutEndpoint(spec):
                    await self._put_endpoint(spec, created=change.created)
                case DropDeployment(name):
                    await self._connection.execute(sa.delete(deployments).where(deployments.c.name == name))
                case DropEndpoint(name):
                    await self._drop_targets(name)
                    await self._connection.execute(sa.delete(endpoints).where(endpoints.c.name == name))
                case DropVersion():
                    await self._connection.execute(
                        sa.delete(versions).where(_is(change.model, change.number))
                    )
            await self.note(change.notification, before, await self._seen(change.notification))

    async def note(
        self,
        notification: ChangeNotification,
        before: Mapping[str, Any] | None,
        after: Mapping[str, Any] | None,
    ) -> None:
        """Something has changed: others are told once it is committed, and the audit log keeps it."""
        self.notifications.append(notification)
        by = caller.current.get()
        was, is_ = pair(before, after)
        entry = NewAuditEntry(
            at=self.now,
            principal=by.principal.id,
            principal_name=by.principal.name,
            origin=by.origin,
            request_id=telemetry.request_id.get(),
            action=notification.action,
            kind=notification.kind,
            name=notification.name,
            before=was,
            after=is_,
            revision=self.next_revision,
        )
        await audit.add(self._connection, entry)

    async def _seen(self, notification: ChangeNotification) -> Mapping[str, Any] | None:
        """The object of a notice as it is now."""
        found: Sequence[BaseModel] = ()
        if notification.kind == "deployment":
            found = await self.deployments(notification.name)
        elif notification.kind == "endpoint":
            found = await self.endpoints(notification.name)
        elif notification.kind == "version":
            model, _, number = notification.name.rpartition("/")
            found = await self.versions(model, int(number))
        return found[0].model_dump(mode="json") if found else None

    async def next_number(self, model: str) -> int:
        """Take the next version number of a model, which nobody gets again."""
        taken = sa.update(models).where(models.c.name == model).values(last_number=models.c.last_number + 1)
        if (await self._connection.execute(taken)).rowcount:
            query = sa.select(models.c.last_number).where(models.c.name == model)
            return int((await self._connection.execute(query)).scalar_one())
        await self._insert(models, name=model, last_number=1, created_at=self.now)
        return 1

    async def add_version(self, version: Version) -> None:
        """Store a version; its artifact is no longer pending."""
        await self._insert(
            versions,
            model=version.model,
            number=version.number,
            format=version.format,
            artifact_sha256=version.artifact_sha256,
            filename=version.filename,
            signature=version.signature.model_dump() if version.signature else None,
            requirements=version.requirements,
            metadata=version.metadata.model_dump(mode="json"),
            created_at=version.created_at,
        )
        named = sa.update(artifacts).where(artifacts.c.sha256 == version.artifact_sha256)
        await self._connection.execute(named.values(pending_until=None))
        notification = ChangeNotification("version", f"{version.model}/{version.number}", "created")
        await self.note(notification, None, version.model_dump(mode="json"))

    async def describe_version(
        self, model: str, number: int, metadata: VersionMetadata, signature: Signature | None
    ) -> None:
        """Replace what is said of a version; its bytes never change."""
        values: dict[str, Any] = {
            "metadata": metadata.model_dump(mode="json"),
            "signature": signature.model_dump() if signature else None,
        }
        notification = ChangeNotification("version", f"{model}/{number}", "updated")
        before = await self._seen(notification)
        await self._connection.execute(sa.update(versions).where(_is(model, number)).values(values))
        await self.note(notification, before, await self._seen(notification))

    async def note_artifact(self, sha256: str, size: int, pending_until: datetime) -> None:
        """Know of an uploaded artifact, and keep it until then even if no version names it."""
        seen = sa.update(artifacts).where(artifacts.c.sha256 == sha256).values(pending_until=pending_until)
        if not (await self._connection.execute(seen)).rowcount:
            await self._insert(
                artifacts, sha256=sha256, size=size, created_at=self.now, pending_until=pending_until
            )

    async def drop_unused_artifacts(self) -> list[str]:
        """Forget artifacts that no version names and nobody is about to name; their digests."""
        used = sa.select(versions.c.artifact_sha256).where(versions.c.artifact_sha256 == artifacts.c.sha256)
        pending = artifacts.c.pending_until.is_not(None) & (artifacts.c.pending_until > self.now)
        query = sa.select(artifacts.c.sha256).where(~used.exists(), ~pending)
        unused = list((await self._connection.execute(query)).scalars())
        for sha256 in unused:
            await self._connection.execute(sa.delete(artifacts).where(artifacts.c.sha256 == sha256))
        return unused

    async def _put_deployment(self, held: StoredDeployment, *, created: bool) -> None:
        spec, override = held.spec, held.override
        values = {
            "model": spec.model,
            "version": spec.version,
            "options": spec.model_dump(mode="json", exclude={"name", "model", "version"}),
            "declared": held.declared,
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


def _is(model: str, number: int) -> sa.ColumnElement[bool]:
    return (versions.c.model == model) & (versions.c.number == number)
