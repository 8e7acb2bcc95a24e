"""Build the APIs for language models. They share one core."""

from __future__ import annotations

from fastapi import APIRouter

from services.gateway.api.body_limits import BodyLimits
from services.gateway.api.llm import openai_errors
from services.gateway.api.llm.door import LlmDoor
from services.gateway.api.llm.engine_extras import ExtraRoutes
from services.gateway.api.llm.jobs import LlmJobs
from services.gateway.api.llm.ollama import OllamaRoutes
from services.gateway.api.llm.openai import OpenAiRoutes
from services.gateway.api.llm.tgi import TgiRoutes
from services.gateway.api.metrics import GatewayMetrics
from services.gateway.application.access_log import AccessLog
from services.gateway.application.inference.core import InferenceCore
from services.gateway.application.llm.accounting import LlmAccounting
from services.gateway.application.llm.core import LlmCore
from services.gateway.settings import GatewaySettings

# URL paths of the APIs for language models. They are a part of ``STREAMED`` in app.py. On these paths,
# request bodies may be larger than on other paths. The values are limits in bytes. None: the route limits the
# size itself.
LLM_BODIES: dict[str, int | None] = {
    r"/v1/(chat/completions|completions|embeddings|responses)": None,
    r"/|/generate|/generate_stream|/tgi/.*": None,
    r"/tokenize|/detokenize|/pooling|(/v1)?/score|(/v[12])?/rerank": None,
}


class LlmWiring:
    """The core for language models and the routers of its APIs.

    ``answer_error`` answers requests that are refused before they reach a route.
    """

    answer_error = staticmethod(openai_errors.answer_at)

    def __init__(
        self,
        settings: GatewaySettings,
        core: InferenceCore,
        accounting: LlmAccounting,
        limits: BodyLimits,
        metrics: GatewayMetrics,
        log: AccessLog,
        jobs: LlmJobs,
    ) -> None:
        metrics.on_forget.append(accounting.meters.forget)
        self.core = LlmCore(core, accounting)
        self.door = LlmDoor(self.core, limits, metrics, log, queue_comments=settings.llm_queue_comments)
        self.openai = openai = OpenAiRoutes(self.door, jobs)
        self.routers: list[APIRouter] = [
            openai.router,
            TgiRoutes(self.door, openai).router,
            OllamaRoutes(self.door).router,
            ExtraRoutes(self.door).router,
        ]
