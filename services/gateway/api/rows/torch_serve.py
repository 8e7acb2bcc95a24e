"""Serve TorchServe's inference API, and a part of its management API: list, describe and scale."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Query, Request, Response

from services.gateway.api.rows.door import Received, RowsDoor, principal
from services.gateway.api.rows.errors import torch_serve
from services.gateway.application.model_control import ModelControl
from services.gateway.domain.contract import Contract, Decoded
from services.gateway.domain.rows import content, encoding, whole_body
from tidegate.kernel.errors import BadRequest, TidegateError

PROTOCOL = "torchserve"
_INSTEAD = {
    "POST": "to register a model: `tidegate deploy FILE --name NAME`",
    "DELETE": "to remove a model: `tidegate delete NAME`",
}


class TorchServeRoutes:
    """The routes of TorchServe."""

    def __init__(self, door: RowsDoor, control: ModelControl) -> None:
        self._door = door
        self._control = control
        self.router = APIRouter(tags=["TorchServe"])
        add = self.router.add_api_route
        for path in ("/predictions/{model}", "/predictions/{model}/{version}"):
            add(path, self.predict, methods=["POST"], response_model=None)
        add("/models", self.models, methods=["GET"], response_model=None)
        for path in ("/models/{model}", "/models/{model}/{version}"):
            add(path, self.describe, methods=["GET"], response_model=None)
        add("/models", self.refuse, methods=["POST"], response_model=None)
        add("/models/{model}", self.refuse, methods=["DELETE"], response_model=None, name="refuse_delete")
        for path in ("/models/{model}", "/models/{model}/{version}"):
            add(path, self.scale, methods=["PUT"], response_model=None)

    async def predict(self, request: Request, model: str, version: str = "") -> Response:
        """Run a model, and return its outputs as JSON.

        If the request is one row that is not in a list, the JSON is the result of this row. Otherwise, the
        JSON of one output is a list of results. The JSON of several outputs is an object with one list for
        each output.

        If the model decodes request bodies itself, return the body and the content type that the model
        returns.
        """

        async def make(received: Received) -> Response:
            number = version.partition(".")[0]
            kind, whole = received.header("content-type"), False

            def decode(contract: Contract) -> Decoded:
                nonlocal whole
                if whole := whole_body.takes_whole_body(contract):
                    return whole_body.decode(received.body, kind, "", contract)
                return content.decode(kind, received.body, contract)

            answer = await self._door.run(received, PROTOCOL, model, number, decode)
            if whole:
                media, body = whole_body.answer(answer.result.outputs, answer.result.reply.data)
                return Response(body, 200, answer.headers, media)
            result: Any = encoding.columns(answer.outputs)
            if answer.result.rows == 1 and bytes(received.body[:1]) != b"[":
                (result,) = encoding.as_rows(answer.outputs)
            return Response(orjson.dumps(result), 200, answer.headers, "application/json")

        return await self._door.respond(request, make, torch_serve)

    async def models(self) -> Response:
        """Return the models that the caller may use."""
        try:
            found = [{"modelName": each.name, "modelUrl": each.name} for each in self._door.endpoints()]
        except TidegateError as error:
            return torch_serve(error)
        return Response(orjson.dumps({"models": found}), media_type="application/json")

    async def describe(self, model: str, version: str = "") -> Response:
        """Return the versions of a model and their ready workers."""
        try:
            endpoint = self._door.endpoint(model)
            number = version.partition(".")[0]
            wanted = sorted(endpoint.versions, key=int) if number in ("", "all") else [number]
            routes = [(each, self._door.core.find(model, each)[1]) for each in wanted]
        except TidegateError as error:
            return torch_serve(error)
        found = [
            {
                "modelName": model,
                "modelVersion": f"{number}.0",
                "runtime": route.format,
                "batchSize": max(route.contract.max_batch, 1),
                "workers": [
                    {"id": str(at), "status": "READY"}
                    for at in range(self._door.core.fleet(route.name).ready)
                ],
            }
            for number, route in routes
        ]
        return Response(orjson.dumps(found), media_type="application/json")

    async def scale(
        self,
        model: str,
        version: str = "",
        min_worker: int = Query(1, ge=0, le=100_000),
        synchronous: bool = False,
    ) -> Response:
        """Keep a model at ``min_worker`` replicas. The setting ``model_control`` says who may do this.

        With ``synchronous``, answer when that many replicas are ready.
        """
        number = version.partition(".")[0]
        try:
            await self._control.scale(model, number, min_worker, principal(), wait=synchronous)
        except TidegateError as error:
            return torch_serve(error)
        done = f"Workers scaled to {min_worker} for model: {model}"
        status = done if synchronous else "Processing worker updates..."
        body = orjson.dumps({"status": status})
        return Response(body, 200 if synchronous else 202, media_type="application/json")

    async def refuse(self, request: Request) -> Response:
        """Refuse to manage models, and name the command to run instead."""
        return torch_serve(
            BadRequest(f"models cannot be managed through this API; {_INSTEAD[request.method]}")
        )
