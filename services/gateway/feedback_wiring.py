"""Build and connect the parts for feedback: ids of answers, the intake, and its HTTP route."""

from __future__ import annotations

from services.gateway.adapters.route_table import RouteTableCache
from services.gateway.api.feedback import FeedbackRoutes
from services.gateway.application.feedback import FeedbackIntake, FeedbackTags
from services.gateway.domain.feedback_ids import FeedbackIds
from services.gateway.settings import GatewaySettings
from tidegate.kernel.store import JobStore
from tidegate.kernel.store.feedback import FeedbackStore


class FeedbackWiring:
    """The parts for feedback. ``tags`` makes the ids of answers, for every API of the gateway."""

    def __init__(self, settings: GatewaySettings, routes: RouteTableCache) -> None:
        ids = FeedbackIds(settings.service_token)
        self.tags = FeedbackTags(ids)
        routes.on_table.append(self.tags.take)
        self._store = FeedbackStore.connect(settings.jobs_url)
        self._jobs = JobStore.connect(settings.jobs_url)
        intake = FeedbackIntake(ids, self._store, self._jobs, settings.feedback_window_s)
        self.router = FeedbackRoutes(intake).router

    async def stop(self) -> None:
        """Close the connections."""
        await self._store.close()
        await self._jobs.close()
