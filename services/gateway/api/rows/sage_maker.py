"""Serve the paths of SageMaker's runtime, which boto3 calls, and the paths of SageMaker's containers."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from services.gateway.api.rows.door import Received, RowsDoor
from services.gateway.api.rows.errors import sage_maker
from services.gateway.domain.rows import content, whole_body
from services.gateway.domain.rows.typed_body import TypedBody

PROTOCOL = "sagemaker"
TARGET_MODEL, TARGET_VARIANT = "x-amzn-sagemaker-target-model", "x-amzn-sagemaker-target-variant"
ATTRIBUTES = "x-amzn-sagemaker-custom-attributes"


class SageMakerRoutes:
    """The routes of SageMaker. SageMaker's endpoint is a model here, and its variant is a version."""

    def __init__(self, door: RowsDoor) -> None:
        self._door = door
        self.router = APIRouter(tags=["SageMaker"])
        add = self.router.add_api_route
        for path in ("/invocations", "/endpoints/{model}/invocations", "/models/{model}/invoke"):
            add(path, self.invoke, methods=["POST"], response_model=None)
        add("/ping", self.ping, methods=["GET"], response_model=None)

    async def ping(self, request: Request) -> Response:
        """Answer 200 if requests can be routed and queued, else 503."""
        healthy = not request.app.state.health.problems()
        body = b'{"status": "Healthy"}' if healthy else b'{"status": "Unhealthy"}'
        return Response(body, 200 if healthy else 503, media_type="application/json")

    async def invoke(self, request: Request, model: str = "") -> Response:
        """Run a model on JSON, JSON Lines, CSV, NumPy's format or raw bytes.

        The header ``Accept`` chooses the content type of the answer.
        """

        async def make(received: Received) -> Response:
            name = model or received.header(TARGET_MODEL).removesuffix(".tar.gz").strip("/")
            name = name or self._door.only(f"name a model in the header {TARGET_MODEL}")
            given = TypedBody(received.header("content-type"), received.header("accept"), received.body)
            version = received.header(TARGET_VARIANT).removeprefix("v")
            answer = await self._door.run(received, PROTOCOL, name, version, given.decode)
            if given.whole:
                media, body = whole_body.answer(answer.result.outputs, answer.result.reply.data)
            else:
                media, body = content.encode(given.wanted, answer.outputs, rows=given.rows)
            variant = f"v{answer.result.route.version}"
            headers = answer.headers | {"x-amzn-invoked-production-variant": variant}
            if attributes := received.header(ATTRIBUTES):
                headers[ATTRIBUTES] = attributes[:1024]
            return Response(body, 200, headers, media)

        return await self._door.respond(request, make, sage_maker)
