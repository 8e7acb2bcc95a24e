"""Composition root of the registry."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from datetime import timedelta

from fastapi import APIRouter, Depends, FastAPI

from services.registry.adapters import metrics, pickle_file
from services.registry.adapters.artifacts import ArtifactStore
from services.registry.adapters.change_notifier import ChangeNotifier
from services.registry.adapters.sql.database import Clock, RegistryDatabase, utc_now
from services.registry.adapters.usage_intake import UsageIntake
from services.registry.api import (
    aliases,
    artifacts,
    baselines,
    cards,
    comparisons,
    deployments,
    desired_state,
    endpoints,
    experiments,
    history,
    keys,
    models,
    policies,
    replicas,
    rollouts,
    searches,
    shadows,
    signatures,
    stages,
    traffic,
    uploads,
    verifications,
)
from services.registry.application.artifacts import Artifacts
from services.registry.application.baselines import Baselines
from services.registry.application.cards import Cards
from services.registry.application.deletion import Deletion
from services.registry.application.keyring import Keyring
from services.registry.application.maintenance import Maintenance
from services.registry.application.retention import Retention
from services.registry.application.running_replicas import RunningReplicas
from services.registry.application.signatures import Signatures
from services.registry.application.stages import Stages
from services.registry.application.transactions import Transactions
from services.registry.application.uploads import Uploads
from services.registry.application.verifications import Verifications
from services.registry.application.versions import InspectionSettings, Versions
from services.registry.domain.uploads import UploadLimits
from services.registry.settings import RegistrySettings
from tidegate.kernel.protocol.archives import ArchiveLimits
from tidegate.kernel.protocol.model_signature import MAX_BUNDLE_BYTES
from tidegate.kernel.service.api import create_app


def build(settings: RegistrySettings, clock: Clock = utc_now) -> FastAPI:
    """Return the registry's app. The database must be migrated before the app starts."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        database = RegistryDatabase(settings.database_url, clock)
        store = ArtifactStore(settings.artifact_url, max_bytes=settings.max_artifact_bytes)
        notifier = ChangeNotifier(settings.amqp_url)
        transactions = Transactions(database, notifier)
        stored = Artifacts(
            transactions,
            store,
            timedelta(seconds=settings.pending_artifact_s),
            signs_urls=settings.presigned_downloads,
        )
        resumable = Uploads(transactions, stored, _upload_limits(settings))
        intake = UsageIntake(settings.amqp_url, database)
        deletion = Deletion(transactions, stored, timedelta(seconds=settings.deleted_version_s))
        retention = Retention(transactions)
        maintenance = Maintenance(database, stored, resumable, (retention, deletion), settings.probe_every_s)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(database.close)
            await store.start()
            await notifier.start()
            stack.push_async_callback(notifier.stop)
            intake.start()
            stack.push_async_callback(intake.stop)
            app.state.transactions, app.state.artifacts = transactions, stored
            app.state.uploads = resumable
            stack.push_async_callback(resumable.close)
            app.state.verifications = Verifications(transactions, enabled=settings.verification == "on")
            app.state.versions = Versions(
                transactions, stored, _inspection_settings(settings), app.state.verifications
            )
            app.state.baselines = Baselines(transactions)
            app.state.signatures = Signatures(transactions, stored, settings.trusted_keys)
            app.state.deletion, app.state.retention = deletion, retention
            app.state.stages = Stages(transactions)
            app.state.cards = Cards(transactions)
            app.state.keyring = Keyring(transactions)
            app.state.replicas = RunningReplicas(transactions)
            app.state.health.add("database", lambda: database.problem)
            app.state.health.add("artifacts", lambda: store.problem)
            app.state.maintenance = maintenance
            await maintenance.start()
            stack.push_async_callback(maintenance.stop)
            yield

    closed_to_replicas = APIRouter(dependencies=[Depends(replicas.refuse_replicas)])
    for each in (
        artifacts,
        models,
        searches,
        comparisons,
        aliases,
        policies,
        stages,
        baselines,
        cards,
        verifications,
        deployments,
        endpoints,
        desired_state,
        keys,
        history,
        replicas,
        experiments,
        rollouts,
        shadows,
        signatures,
        traffic,
        uploads,
    ):
        closed_to_replicas.include_router(each.router)
    app = create_app(
        name="registry",
        settings=settings,
        lifespan=lifespan,
        routers=[artifacts.reading, signatures.reading, closed_to_replicas],
        identify=replicas.identify(settings.service_token),
        larger_bodies={
            # None: no limit here. These bodies are streamed into the store, which has its own limit.
            r"/v1/artifacts": None,
            r"/v1/uploads/[^/]+": None,
            r"/v1/artifacts/[0-9a-f]{64}/signatures": MAX_BUNDLE_BYTES,
        },
    )
    app.add_middleware(metrics.RequestMetrics)
    return app


def _inspection_settings(settings: RegistrySettings) -> InspectionSettings:
    return InspectionSettings(
        limits=ArchiveLimits(
            members=settings.max_archive_members,
            unpacked_bytes=settings.max_unpacked_bytes,
            ratio=settings.max_archive_ratio,
        ),
        default_max_batch=settings.default_max_batch,
        packages=pickle_file.packages(settings.runtime_path),
    )


def _upload_limits(settings: RegistrySettings) -> UploadLimits:
    return UploadLimits(
        number=settings.max_uploads_per_caller,
        total_bytes=settings.max_upload_bytes_per_caller,
        artifact_bytes=settings.max_artifact_bytes,
        idle=timedelta(seconds=settings.upload_idle_s),
    )
