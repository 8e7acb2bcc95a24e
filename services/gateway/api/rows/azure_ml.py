"""Serve the path of Azure ML's online endpoints."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from services.gateway.api.rows.door import Received, RowsDoor
from services.gateway.api.rows.errors import azure_ml
from services.gateway.domain.contract import Contract, Decoded
from services.gateway.domain.rows import content, encoding
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol import bounded_json

PROTOCOL = "azureml"
DEPLOYMENT = "azureml-model-deployment"


class AzureMlRoutes:
    """The routes of Azure ML. What Azure calls a deployment is a version of the model here."""

    def __init__(self, door: RowsDoor) -> None:
        self._door = door
        self.router = APIRouter(tags=["Azure ML"])
        self.router.add_api_route(
            "/endpoints/{model}/score", self.score, methods=["POST"], response_model=None
        )

    async def score(self, request: Request, model: str) -> Response:
        """Run a model on ``input_data`` (rows or a data frame) or ``data``; answer with a list of results."""

        async def make(received: Received) -> Response:
            version = received.header(DEPLOYMENT).removeprefix("v")
            document = bounded_json.loads(received.body)
            answer = await self._door.run(
                received, PROTOCOL, model, version, lambda contract: _decode(document, contract)
            )
            body = orjson.dumps(encoding.as_rows(answer.outputs))
            headers = answer.headers | {DEPLOYMENT: f"v{answer.result.route.version}"}
            return Response(body, 200, headers, "application/json")

        return await self._door.respond(request, make, azure_ml)


def _decode(document: Any, contract: Contract) -> Decoded:
    if isinstance(document, dict) and "input_data" in document and "input_data" not in contract.inputs:
        document = document["input_data"]
        if isinstance(document, dict) and {"columns", "data"} <= document.keys():
            return content.from_json(_table(document, contract), contract)
    return content.from_json(document, contract)


def _table(frame: dict[str, Any], contract: Contract) -> Any:
    """Return the rows of a data frame. A row is an object if all columns name inputs, else a list."""
    columns, rows = frame["columns"], frame["data"]
    if not isinstance(columns, list) or not isinstance(rows, list):
        raise BadRequest("'columns' and 'data' must be lists")
    if not all(isinstance(each, str) and each in contract.inputs for each in columns):
        return rows
    if any(not isinstance(row, list) or len(row) != len(columns) for row in rows):
        raise BadRequest(f"every row of 'data' must have {len(columns)} values")
    return [dict(zip(columns, row, strict=True)) for row in rows]
