"""Read the desired state in one transaction, so that all data has the same revision."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime
from math import isfinite
from typing import Any, NamedTuple

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncConnection

from services.registry.adapters.sql import aliases, policies, stages
from services.registry.adapters.sql.byte_order import exact
from services.registry.adapters.sql.tables import (
    artifacts,
    audit,
    deployments,
    endpoint_targets,
    endpoints,
    models,
    revision,
    versions,
)
from services.registry.domain.desired_state import RegistrySnapshot, StoredDeployment, StoredEndpoint
from services.registry.domain.pages import EVERYTHING, NamedPage
from tidegate.kernel.protocol.models import (
    Deployment,
    DeploymentSpec,
    DesiredState,
    Endpoint,
    EndpointSpec,
    Override,
    Target,
    Version,
)
from tidegate.kernel.protocol.verification import REFUSED_STATES, Verification

_VERSION_FIELDS = tuple(name for name in Version.model_fields if name != "verification")
# The condition for versions that are not deleted.
LIVE = versions.c.deleted_at.is_(None)


class Totals(NamedTuple):
    """The counts of stored objects, for the metrics."""

    versions: int
    deployments: int
    endpoints: int
    artifacts: int
    artifact_bytes: int


class DesiredStateReader:
    """Read transaction on the desired state. Its results have no overrides that expired before ``now``."""

    def __init__(self, connection: AsyncConnection, now: datetime) -> None:
        self._connection = connection
        self.now = now

    @property
    def connection(self) -> AsyncConnection:
        """Return the database connection, for other queries in the same transaction."""
        return self._connection

    async def revision(self) -> int:
        """Return the revision: the number of the last change to the desired state."""
        return int((await self._connection.execute(sa.select(revision.c.value))).scalar_one())

    async def artifact_size(self, sha256: str) -> int | None:
        """Return the size of an artifact in bytes, or None if it does not exist."""
        query = sa.select(artifacts.c.size).where(artifacts.c.sha256 == sha256)
        return (await self._connection.execute(query)).scalar_one_or_none()

    async def versions(self, model: str | None = None, number: int | None = None) -> list[Version]:
        """Return versions, sorted by model and number. Deleted versions are left out.

        ``model``: return only the versions of this model. ``number``: return only the versions with this
        number.
        """
        query = _all_versions().where(LIVE)
        if model is not None:
            query = query.where(versions.c.model == model)
        if number is not None:
            query = query.where(versions.c.number == number)
        rows = await self._connection.execute(query)
        result = [version_of(row) for row in rows.mappings()]
        # Sort here and not in SQL, because databases differ: PostgreSQL sorts texts by language, SQLite by
        # bytes.
        return sorted(result, key=lambda version: (version.model, version.number))

    async def deployed_versions(self) -> list[Version]:
        """Return the versions that a Deployment runs or that wait for verification.

        They are sorted by model and number.
        """
        used = sa.exists().where(
            deployments.c.model == versions.c.model, deployments.c.version == versions.c.number
        )
        pending = (versions.c.verification_state == "pending") & LIVE
        rows = await self._connection.execute(_all_versions().where(used | pending))
        result = [version_of(row) for row in rows.mappings()]
        return sorted(result, key=lambda version: (version.model, version.number))

    async def versions_to_compare(self, model: str, artifact: str) -> list[Version]:
        """Return the versions with which a new registration is compared, sorted by number.

        These are the model's versions with this artifact, its latest version, and its latest version with a
        signature.
        """
        latest = sa.select(sa.func.max(versions.c.number)).where(versions.c.model == model, LIVE)
        signed = latest.where(versions.c.signature.is_not(None))
        wanted = (
            (versions.c.artifact_sha256 == artifact)
            | (versions.c.number == latest.scalar_subquery())
            | (versions.c.number == signed.scalar_subquery())
        )
        query = _all_versions().where(versions.c.model == model, LIVE, wanted)
        rows = await self._connection.execute(query)
        return sorted((version_of(row) for row in rows.mappings()), key=lambda version: version.number)

    async def version(self, model: str, number: int) -> Version | None:
        """Return one version, or None if it does not exist."""
        return next(iter(await self.versions(model, number)), None)

    async def numbers(self, models_: list[str]) -> dict[str, list[int]]:
        """Return the version numbers of each of these models, ascending."""
        query = sa.select(versions.c.model, versions.c.number).where(versions.c.model.in_(models_), LIVE)
        found: dict[str, list[int]] = {}
        for model, number in await self._connection.execute(query.order_by(versions.c.number)):
            found.setdefault(model, []).append(number)
        return found

    async def latest_versions(self, models_: list[str]) -> dict[str, Version]:
        """Return the latest version of each of these models. Models without a version are left out."""
        latest = (
            sa.select(versions.c.model, sa.func.max(versions.c.number).label("number"))
            .where(versions.c.model.in_(models_), LIVE)
            .group_by(versions.c.model)
            .subquery()
        )
        query = _all_versions().join(
            latest, (latest.c.model == versions.c.model) & (latest.c.number == versions.c.number)
        )
        rows = await self._connection.execute(query)
        return {row["model"]: version_of(row) for row in rows.mappings()}

    async def model_created(self, models_: list[str]) -> dict[str, datetime]:
        """Return when each of these models was first registered. Deleted models are included."""
        query = sa.select(models.c.name, models.c.created_at).where(models.c.name.in_(models_))
        return {row.name: row.created_at for row in await self._connection.execute(query)}

    async def models(self) -> list[str]:
        """Return the names of all models that have a version."""
        rows = await self._connection.execute(sa.select(versions.c.model).where(LIVE).distinct())
        return sorted(rows.scalars())

    async def deployments(
        self, name: str | None = None, model: str | None = None, page: NamedPage = EVERYTHING
    ) -> list[Deployment]:
        """Return a page of Deployments, sorted by name. By default, return all Deployments.

        ``name``: return only the Deployment with this name. ``model``: return only the Deployments of this
        model.
        """
        query = _paged(sa.select(deployments), deployments.c.name, page)
        if name is not None:
            query = query.where(deployments.c.name == name)
        if model is not None:
            query = query.where(deployments.c.model == model)
        rows = await self._connection.execute(query)
        result = [
            Deployment.model_validate(
                {
                    **_spec_fields(row),
                    "revision": row["revision"],
                    "created_at": row["created_at"],
                    "override": _override(row, self.now),
                }
            )
            for row in rows.mappings()
        ]
        return sorted(result, key=lambda deployment: deployment.name)

    async def endpoints(self, name: str | None = None, page: NamedPage = EVERYTHING) -> list[Endpoint]:
        """Return a page of Endpoints, sorted by name. By default, return all Endpoints.

        ``name``: return only the Endpoint with this name.
        """
        query = _paged(sa.select(endpoints), endpoints.c.name, page)
        if name is not None:
            query = query.where(endpoints.c.name == name)
        rows = (await self._connection.execute(query)).mappings().all()
        targets = await self._targets(name)
        result = [
            Endpoint.model_validate(
                {**_endpoint_fields(row, targets), "revision": row["revision"]},
            )
            for row in rows
        ]
        return sorted(result, key=lambda endpoint: endpoint.name)

    async def desired_state(self) -> DesiredState:
        """Return the desired state: all Deployments and Endpoints, with their versions and aliases."""
        return DesiredState(
            revision=await self.revision(),
            versions=await self.deployed_versions(),
            deployments=await self.deployments(),
            endpoints=await self.endpoints(),
            aliases=await self._aliases_in_use(),
        )

    async def desired_state_mark(self) -> str:
        """Return a short text that changes whenever :meth:`desired_state` changes."""
        # Within one revision, the desired state changes only if an override expires. But a standby of the
        # database may take over without its last revisions. Then other changes get their numbers.
        ended = sa.select(sa.func.count()).where(deployments.c.override_expires_at <= self.now)
        newest = sa.select(audit.c.at).order_by(audit.c.id.desc()).limit(1)
        query = sa.select(revision.c.value, ended.scalar_subquery(), newest.scalar_subquery())
        value, expired, at = (await self._connection.execute(query)).one()
        return f"{value}.{expired}.{0 if at is None else at.timestamp()}"

    async def _aliases_in_use(self) -> dict[str, dict[str, int]]:
        """Return the aliases of the models that Deployments run."""
        rows = await self._connection.execute(sa.select(deployments.c.model).distinct())
        return await aliases.of_models(self._connection, list(rows.scalars()))

    async def snapshot(self) -> RegistrySnapshot:
        """Return the data for decisions about changes: versions, Deployments, Endpoints and policies."""
        columns = versions.c.model, versions.c.number, versions.c.deleted_at.is_(None)
        keys = (await self._connection.execute(sa.select(*columns))).all()
        deployment_rows = (await self._connection.execute(sa.select(deployments))).mappings().all()
        endpoint_rows = (await self._connection.execute(sa.select(endpoints))).mappings().all()
        targets = await self._targets(None)
        return RegistrySnapshot(
            refused=await self._refused(),
            policies=await policies.read(self._connection),
            staged=await stages.staged(self._connection),
            versions=frozenset((model, number) for model, number, live in keys if live),
            deleted=frozenset((model, number) for model, number, live in keys if not live),
            deployments={row["name"]: _stored_deployment(row, self.now) for row in deployment_rows},
            aliases={
                (model, alias): number
                for model, known in (await aliases.of_models(self._connection)).items()
                for alias, number in known.items()
            },
            endpoints={
                row["name"]: StoredEndpoint(
                    EndpointSpec.model_validate(_endpoint_fields(row, targets)), row["revision"]
                )
                for row in endpoint_rows
            },
        )

    async def _refused(self) -> dict[tuple[str, int], Verification]:
        """Return the verifications of the versions that must not serve."""
        query = sa.select(
            versions.c.model, versions.c.number, versions.c.verification_state, versions.c.verification
        ).where(versions.c.verification_state.in_(REFUSED_STATES))
        rows = (await self._connection.execute(query)).mappings()
        return {(row["model"], row["number"]): _verification(row) for row in rows}

    async def totals(self) -> Totals:
        """Return how many objects are stored. Deleted versions are not included."""
        queries = [
            sa.select(sa.func.count()).select_from(table)
            for table in (versions, deployments, endpoints, artifacts)
        ]
        queries[0] = queries[0].where(LIVE)
        counts = [query.scalar_subquery() for query in queries]
        size = sa.select(sa.func.coalesce(sa.func.sum(artifacts.c.size), 0)).scalar_subquery()
        row = (await self._connection.execute(sa.select(*counts, size))).one()
        return Totals(*(int(value) for value in row))

    async def _targets(self, endpoint: str | None) -> dict[tuple[str, str], list[Target]]:
        query = sa.select(endpoint_targets).order_by(
            endpoint_targets.c.endpoint, endpoint_targets.c.role, endpoint_targets.c.position
        )
        if endpoint is not None:
            query = query.where(endpoint_targets.c.endpoint == endpoint)
        targets: dict[tuple[str, str], list[Target]] = defaultdict(list)
        for row in (await self._connection.execute(query)).mappings():
            target = Target(deployment=row["deployment"], weight=row["weight"])
            targets[row["endpoint"], row["role"]].append(target)
        return targets


def _paged(query: sa.Select[Any], name: sa.Column[str], page: NamedPage) -> sa.Select[Any]:
    """Return the query for one page of a list that is sorted by name."""
    if page.after is not None:
        query = query.where(exact(name) > page.after)
    return query if page.most is None else query.order_by(exact(name)).limit(page.most)


def _all_versions() -> sa.Select[Any]:
    """Return the query for all versions with the sizes of their artifacts, including deleted versions."""
    return sa.select(versions, artifacts.c.size.label("artifact_size")).join(
        artifacts, artifacts.c.sha256 == versions.c.artifact_sha256
    )


def version_of(row: sa.RowMapping) -> Version:
    """Return the version that a row describes.

    The row has the columns of ``versions``, and ``artifact_size``.
    """
    fields = {name: row[name] for name in _VERSION_FIELDS} | {"verification": _verification(row)}
    try:
        return Version.model_validate(fields)
    except ValidationError:  # a row of an older release may have nan or inf
        return Version.model_validate(finite(fields))


def _verification(row: sa.RowMapping) -> Verification:
    return Verification.model_validate({**(row["verification"] or {}), "state": row["verification_state"]})


def _spec_fields(row: sa.RowMapping) -> dict[str, Any]:
    return {**finite(row["options"]), "name": row["name"], "model": row["model"], "version": row["version"]}


def _endpoint_fields(row: sa.RowMapping, targets: dict[tuple[str, str], list[Target]]) -> dict[str, Any]:
    name = row["name"]
    return {
        **row["options"],
        "name": name,
        "targets": targets.get((name, "target"), []),
        "previous": targets.get((name, "previous"), []),
    }


def finite(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a row's fields without values that are nan or infinite.

    JSON has no such numbers, but older releases stored them.
    """
    return {
        name: finite(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if not isinstance(value, float) or isfinite(value)
    }


def _override(row: sa.RowMapping, now: datetime) -> Override | None:
    replicas, expires_at = row["override_replicas"], row["override_expires_at"]
    if replicas is None or (expires_at is not None and expires_at <= now):
        return None
    return Override(replicas=replicas, expires_at=expires_at, force=row["override_force"])


def _stored_deployment(row: sa.RowMapping, now: datetime) -> StoredDeployment:
    spec = DeploymentSpec.model_validate(_spec_fields(row))
    return StoredDeployment(spec, row["declared"], _override(row, now), row["revision"])
