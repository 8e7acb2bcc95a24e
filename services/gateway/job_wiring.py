"""Build and connect the parts for jobs: records, queue, batches, webhooks, and their HTTP handlers."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter

from services.gateway.adapters.acknowledged_jobs import AcknowledgedJobs
from services.gateway.adapters.async_store import AsyncStore
from services.gateway.adapters.job_queue import JobQueue
from services.gateway.adapters.router_client import RouterClient
from services.gateway.adapters.store.async_outputs import AsyncOutputStore
from services.gateway.adapters.store.batches import BatchStore
from services.gateway.adapters.store.files import FileStore
from services.gateway.api.batches import BatchHandlers
from services.gateway.api.body_limits import BodyLimits
from services.gateway.api.job_responses import JobResponses
from services.gateway.api.job_submission import JobSubmissionHandler
from services.gateway.api.jobs import JobHandlers
from services.gateway.api.llm.jobs import LlmJobs
from services.gateway.api.openai.batches import OpenAiBatchHandlers
from services.gateway.api.openai.files import OpenAiFileRoutes
from services.gateway.api.webhooks import WebhookHandlers
from services.gateway.application.access import Access
from services.gateway.application.access_log import AccessLog
from services.gateway.application.async_outputs import AsyncOutputs
from services.gateway.application.inference.core import InferenceCore
from services.gateway.application.jobs.batches import BatchService
from services.gateway.application.jobs.results import JobResults
from services.gateway.application.jobs.submission import JobSubmitter
from services.gateway.application.jobs.tracking import JobTracker
from services.gateway.application.llm.accounting import LlmAccounting
from services.gateway.application.llm.core import LlmCore
from services.gateway.application.openai.batches import OpenAiBatches
from services.gateway.application.openai.files import FileLimits, FileService
from services.gateway.domain.classification import Labels
from services.gateway.settings import GatewaySettings
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.protocol.envelope import LARGE
from tidegate.kernel.store import JobStore
from tidegate.kernel.store.webhooks import WebhookStore


class JobWiring:
    """The parts for jobs.

    The calling code must start them after the dispatcher of requests, and stop them before the dispatcher.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        incarnation: str,
        core: InferenceCore,
        access: Access,
        accounting: LlmAccounting,
        blobs: Blobs,
        labels: Callable[[str], Labels],
        limits: BodyLimits,
        log: AccessLog,
    ) -> None:
        """Build the parts. ``labels`` returns the class names of a Deployment's outputs."""
        self._store, self._queue = JobStore.connect(settings.jobs_url), JobQueue(settings.amqp_url)
        # The store of jobs keeps its data in memory, so large tensors go to the blob store.
        claims = Claims(blobs, min(settings.claim_above_bytes, LARGE))
        tracker = JobTracker(self._store, self._queue)
        self.submitter = JobSubmitter(
            core,
            LlmCore(core, accounting),
            tracker,
            self._queue,
            claims,
            ttl_s=settings.job_ttl_s,
            retention_s=settings.job_retention_s,
            max_queued=settings.max_waiting_jobs,
        )
        results = JobResults(self._store, claims, labels)
        responses = JobResponses(results, core.fleet)
        self._batch_store = BatchStore.connect(settings.jobs_url)
        self._batches = BatchService(
            self._batch_store,
            self.submitter,
            tracker,
            results,
            blobs,
            access,
            incarnation,
            keep_s=settings.job_retention_s,
        )
        line_bytes = min(settings.max_batch_line_bytes, settings.max_json_bytes)
        file_limits = FileLimits(
            line_bytes,
            settings.max_batch_bytes,
            settings.max_batch_lines,
            settings.max_files,
            settings.max_files_bytes,
            settings.file_retention_s,
        )
        file_store = FileStore.connect(settings.jobs_url)
        self._files = FileService(file_store, self._batch_store, blobs, file_limits)
        openai = OpenAiBatches(self._batch_store, self._batches, self._files)
        batch_handlers = BatchHandlers(
            self._batches,
            OpenAiBatchHandlers(openai),
            limits,
            file_bytes=settings.max_batch_bytes,
            line_bytes=line_bytes,
            lines=settings.max_batch_lines,
        )
        self._webhooks = WebhookStore.connect(settings.jobs_url)
        self._router = RouterClient(settings.router_url, settings.service_token)
        self._acknowledged = AcknowledgedJobs(self._store, incarnation, lambda: self.submitter.acknowledged)
        self.async_store = AsyncStore(settings.async_url) if settings.async_url else None
        self.async_outputs = (
            None
            if self.async_store is None
            else AsyncOutputs(
                AsyncOutputStore.connect(settings.jobs_url), self._store, results, self.async_store
            )
        )
        self.submission = JobSubmissionHandler(self.submitter, tracker, responses, access, log)
        self.llm = LlmJobs(self.submitter, tracker, responses, access, log)
        self.routers: list[APIRouter] = [
            JobHandlers(self.submitter, tracker, responses, access).router,
            batch_handlers.router,
            OpenAiFileRoutes(self._files, limits).router,
            WebhookHandlers(tracker, self._webhooks, self._router).router,
        ]

    def start(self) -> None:
        """Connect, and begin to run batches in the background."""
        self._queue.start()
        self._acknowledged.start()
        self._batches.start()
        self._files.start()
        if self.async_outputs is not None:
            self.async_outputs.start()

    async def stop(self) -> None:
        """End the leases of batches, write the records of submitted jobs, and disconnect."""
        if self.async_outputs is not None:
            await self.async_outputs.stop()
        await self._batches.stop()
        await self._files.stop()
        await self._acknowledged.stop()
        await self.submitter.stop()
        await self._queue.stop()
        await self._batch_store.close()
        await self._store.close()
        await self._webhooks.close()
        await self._router.close()
