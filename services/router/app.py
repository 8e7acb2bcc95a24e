"""Composition root of the router."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI

from services.router.adapters import process_identity, webhook_secret
from services.router.adapters.registry_cache import RegistryCache
from services.router.adapters.table_revision import TableRevision
from services.router.adapters.webhook_sender import WebhookSender
from services.router.api import (
    alerts,
    dead_letters,
    drift,
    experiments,
    jobs,
    monitoring,
    rollouts,
    routes,
    shadows,
)
from services.router.api.given_up_requests import ExceptionConsumer
from services.router.application.blob_sweeper import BlobSweeper
from services.router.application.controller import RouteController
from services.router.application.dead_letters import DeadLetters
from services.router.application.experiment_runner import ExperimentRunner
from services.router.application.job_sweeper import JobSweeper
from services.router.application.leadership import Leadership
from services.router.application.ledger import Ledger
from services.router.application.replays import Replays
from services.router.application.rollout_runner import RolloutRunner
from services.router.application.shadow_reader import ShadowReader
from services.router.application.webhook_dispatcher import WebhookDispatcher
from services.router.drift_wiring import judges_of
from services.router.settings import RouterSettings
from services.router.watch_wiring import watch_of
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.service.api import create_app
from tidegate.kernel.store import JobStore, Store
from tidegate.kernel.store.feedback import FeedbackStore
from tidegate.kernel.store.leader import LeaderStore
from tidegate.kernel.store.webhooks import WebhookStore


def build(settings: RouterSettings) -> FastAPI:
    """Return the router's FastAPI app. The router's loops start and stop with the app."""
    data = settings.state_path / "data"
    store, job_store = Store.connect(settings.redis_url), JobStore.connect(settings.jobs_url)
    schedule, leases = WebhookStore.connect(settings.jobs_url), LeaderStore.connect(settings.jobs_url)
    feedback = FeedbackStore.connect(settings.jobs_url)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        incarnation = os.urandom(4).hex()
        revision = TableRevision(data / "router-revision.json")
        leadership = _leadership(settings, leases, incarnation, seen=revision.epoch)

        def leads() -> bool:
            return leadership.leads

        registry = RegistryCache(
            settings.registry_url, settings.service_token, data / "router-intention.json"
        )
        condemned: set[str] = set()
        controller = _controller(settings, store, registry, revision, leadership, incarnation)
        controller.condemned = condemned
        runner = RolloutRunner(
            store, registry, leadership, data / "rollouts.json", controller.relist, condemned, feedback
        )
        reader = ShadowReader(
            store, registry, leadership, data / "shadows.json", lambda: controller.table, controller.relist
        )
        counter = app.state.experiments = ExperimentRunner(
            store, feedback, registry, leadership, data / "experiments.json", controller.relist
        )
        blobs = Blobs(settings.blob_url)
        claims = Claims(blobs, settings.claim_above_bytes)
        letters = DeadLetters(data / "dead-letters.jsonl", blobs, claims, settings.dead_letter_limits())
        exceptions = ExceptionConsumer(settings.amqp_url, job_store, letters, leads)
        leadership.on_change(exceptions.on_change)
        sweeper = BlobSweeper(Blobs(settings.blob_url), settings.blob_sweep_interval_s, leads=leads)
        ledger = Ledger(job_store, store, settings.amqp_url, settings.ledger_interval_s, leads=leads)
        job_sweeper = _job_sweeper(settings, job_store, ledger, letters, leads)
        master = webhook_secret.load(settings.state_path / "webhook-secret")
        watching = watch_of(settings, store, registry, leads, letters, master)
        dispatcher = _webhook_dispatcher(settings, schedule, job_store, master, leads)
        app.state.controller, app.state.dead_letters, app.state.rollouts = controller, letters, runner
        app.state.shadows = reader
        app.state.replays = _replays(settings, letters, job_store, claims, exceptions, controller)
        app.state.ledger, app.state.webhook_master = ledger, master
        judge, quality = judges_of(settings, registry, leads)
        app.state.drift, app.state.quality = judge, quality
        watching.attach(app, judge.snapshot, quality.snapshot)
        app.state.health.add("table", controller.problem)
        app.state.health.add("broker", lambda: controller.connection.problem)
        app.state.health.add("exceptions", lambda: exceptions.connection.problem or exceptions.out.problem)
        app.state.health.add("jobs", lambda: job_sweeper.problem or dispatcher.problem)
        consumers = (letters, exceptions, sweeper, job_sweeper, dispatcher, ledger, judge, quality)
        messages = (watching.sender, watching.changes, watching.watch)
        loops = (leadership, controller, runner, reader, counter, *consumers, *messages)
        for loop in loops:
            loop.start()
        yield
        for loop in reversed(loops):
            await loop.stop()
        await schedule.close()
        await feedback.close()
        await job_store.close()
        await store.close()

    return create_app(
        name="router",
        settings=settings,
        lifespan=lifespan,
        routers=[
            routes.router,
            rollouts.router,
            shadows.router,
            monitoring.router,
            alerts.router,
            jobs.router,
            dead_letters.router,
            drift.router,
            drift.quality_router,
            experiments.router,
        ],
    )


def _leadership(settings: RouterSettings, leases: LeaderStore, incarnation: str, seen: int) -> Leadership:
    return Leadership(
        leases,
        process_identity.own(incarnation),
        lease_s=settings.router_lease_s,
        seen=seen,
        is_dead=process_identity.is_dead,
    )


def _controller(
    settings: RouterSettings,
    store: Store,
    registry: RegistryCache,
    revision: TableRevision,
    leadership: Leadership,
    incarnation: str,
) -> RouteController:
    return RouteController(
        store,
        registry,
        revision,
        leadership,
        settings.amqp_url,
        incarnation,
        interval_s=settings.route_interval_s,
        relist_s=settings.relist_interval_s,
    )


def _replays(
    settings: RouterSettings,
    letters: DeadLetters,
    jobs: JobStore,
    claims: Claims,
    exceptions: ExceptionConsumer,
    controller: RouteController,
) -> Replays:
    return Replays(
        letters,
        jobs,
        claims,
        exceptions.out,
        lambda: controller.table,
        ttl_s=settings.job_ttl_s,
        retention_s=settings.job_retention_s,
    )


def _job_sweeper(
    settings: RouterSettings,
    jobs: JobStore,
    ledger: Ledger,
    letters: DeadLetters,
    leads: Callable[[], bool],
) -> JobSweeper:
    return JobSweeper(
        jobs,
        settings.amqp_url,
        ledger.take_lost,
        interval_s=settings.job_sweep_interval_s,
        retention=settings.job_retention(),
        leads=leads,
        letters=letters,
    )


def _webhook_dispatcher(
    settings: RouterSettings,
    schedule: WebhookStore,
    jobs: JobStore,
    master: bytes,
    leads: Callable[[], bool],
) -> WebhookDispatcher:
    limits = settings.webhook_limits()
    sender = WebhookSender(
        allow_private=settings.webhook_allow_private,
        timeout_s=limits.timeout_s,
        max_in_flight=limits.max_in_flight,
    )
    return WebhookDispatcher(
        schedule,
        jobs,
        sender,
        master,
        limits=limits,
        retry_policy=settings.webhook_retry_policy(),
        leads=leads,
    )
