"""The HTTP API of webhooks: the secret that signs them, and the attempts to deliver a job's result."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from services.gateway.adapters.router_client import RouterClient
from services.gateway.api.job_http import id_in_path, request_principal
from services.gateway.application.jobs.tracking import JobTracker
from tidegate.kernel.store.webhooks import WebhookStore


class WebhookHandlers:
    """The handlers of ``/v1/webhooks/secret`` and ``/v1/jobs/{id}/deliveries``."""

    def __init__(self, tracker: JobTracker, webhooks: WebhookStore, router: RouterClient) -> None:
        self._tracker = tracker
        self._webhooks = webhooks
        self._router = router
        self.router = APIRouter(prefix="/v1", tags=["Webhooks"])
        self.router.add_api_route("/webhooks/secret", self.secret, methods=["GET"])
        self.router.add_api_route("/jobs/{id}/deliveries", self.deliveries, methods=["GET"])

    async def secret(self) -> dict[str, Any]:
        """Return the secret that signs the caller's webhooks, in the Standard Webhooks format."""
        request_principal()
        return await self._router.webhook_secret()

    async def deliveries(self, id: str) -> dict[str, Any]:
        """List the attempts to deliver the job's webhook, oldest first."""
        job = await self._tracker.find(id_in_path(id, "job"), request_principal())
        return {"webhook": job.webhook, "items": await self._webhooks.deliveries(job.id)}
