"""Serve the REST API of TensorFlow Serving, which is also KServe's protocol v1."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from services.gateway.api.rows.door import Answer, Received, RowsDoor, takes_tensors
from services.gateway.api.rows.errors import tf_serving
from services.gateway.application.catalogue import Catalogue
from services.gateway.domain.contract import Contract, Decoded
from services.gateway.domain.rows import decoding, encoding
from tidegate.kernel.errors import BadRequest, TidegateError
from tidegate.kernel.protocol import bounded_json
from tidegate.kernel.protocol.bounded_json import shown

SIGNATURE = "serving_default"
PROTOCOL = "tf_serving"
_STATES = {True: "AVAILABLE", False: "LOADING"}
_TYPES = {
    "FP16": "DT_HALF", "FP32": "DT_FLOAT", "FP64": "DT_DOUBLE", "BF16": "DT_BFLOAT16", "BOOL": "DT_BOOL",
    "BYTES": "DT_STRING",
}  # fmt: skip


class TfServingRoutes:
    """The routes of TensorFlow Serving. ``openai`` answers ``GET /v1/models/NAME`` for language models."""

    def __init__(
        self, door: RowsDoor, catalogue: Catalogue, openai: Callable[[str], Awaitable[Response]]
    ) -> None:
        self._door = door
        self._catalogue = catalogue
        self._openai = openai
        self.router = APIRouter(tags=["TensorFlow Serving"])
        for path in ("", "/versions/{version}", "/labels/{label}"):
            base = f"/v1/models/{{model}}{path}"
            for action in (self.predict, self.classify, self.regress):
                self.router.add_api_route(
                    f"{base}:{action.__name__}", action, methods=["POST"], response_model=None
                )
            self.router.add_api_route(f"{base}/metadata", self.metadata, methods=["GET"], response_model=None)
            self.router.add_api_route(base, self.status, methods=["GET"], response_model=None)

    async def predict(self, request: Request, model: str, version: str = "", label: str = "") -> Response:
        """Answer rows (``instances``) with ``predictions``, or columns (``inputs``) with ``outputs``."""

        async def make(received: Received) -> Response:
            document = _document(received)
            by_row = "instances" in document

            def decode(contract: Contract) -> Decoded:
                if by_row == ("inputs" in document):
                    raise BadRequest("the request must have either 'instances' (rows) or 'inputs' (columns)")
                if by_row:
                    return decoding.from_rows(document["instances"], contract)
                return decoding.from_columns(document["inputs"], contract)

            answer = await self._run(received, model, version, label, decode)
            if by_row:
                return _json(answer, {"predictions": encoding.as_rows(answer.outputs)})
            return _json(answer, {"outputs": encoding.columns(answer.outputs)})

        return await self._door.respond(request, make, tf_serving)

    async def classify(self, request: Request, model: str, version: str = "", label: str = "") -> Response:
        """Return a list of ``[label, score]`` for each example."""

        async def make(received: Received) -> Response:
            answer = await self._examples(received, model, version, label)
            classes = encoding.scores(answer.outputs).tolist()
            return _json(answer, {"results": [[[str(at), s] for at, s in enumerate(row)] for row in classes]})

        return await self._door.respond(request, make, tf_serving)

    async def regress(self, request: Request, model: str, version: str = "", label: str = "") -> Response:
        """Return one number for each example."""

        async def make(received: Received) -> Response:
            answer = await self._examples(received, model, version, label)
            return _json(answer, {"results": encoding.numbers(answer.outputs)})

        return await self._door.respond(request, make, tf_serving)

    async def status(self, model: str, version: str = "", label: str = "") -> Response:
        """Return the state of each version of a model, and whether the model is ready (KServe v1)."""
        try:
            table = self._door.core.table()
            known = table.endpoints.get(model)
            if not version and not label and (known is None or not takes_tensors(known)):
                return await self._openai(model)
            endpoint, wanted = self._door.endpoint(model), self._version(model, version, label)
            found = [wanted] if wanted else sorted(endpoint.versions, key=int)
            ready = {each: not self._catalogue.not_ready(model, each) for each in found}
        except TidegateError as error:
            return tf_serving(error)
        states = [
            {
                "version": each,
                "state": _STATES[ready[each]],
                "status": {"error_code": "OK", "error_message": ""},
            }
            for each in found
        ]
        document = {"name": model, "ready": any(ready.values()), "model_version_status": states}
        return Response(orjson.dumps(document), media_type="application/json")

    async def metadata(self, model: str, version: str = "", label: str = "") -> Response:
        """Return the signature of a model, as TensorFlow Serving describes it."""
        try:
            self._door.endpoint(model)
            wanted = self._version(model, version, label)
            found = self._catalogue.metadata(model, wanted)
        except TidegateError as error:
            return tf_serving(error)
        document = {
            "model_spec": {
                "name": model, "signature_name": "", "version": wanted or found["versions"][-1],
            },
            "metadata": {"signature_def": {"signature_def": {SIGNATURE: {
                "inputs": {each["name"]: _tensor(each) for each in found["inputs"]},
                "outputs": {each["name"]: _tensor(each) for each in found["outputs"]},
                "method_name": "tensorflow/serving/predict",
            }}}},
        }  # fmt: skip
        return Response(orjson.dumps(document), media_type="application/json")

    async def _examples(self, received: Received, model: str, version: str, label: str) -> Answer:
        document = _document(received)
        return await self._run(
            received, model, version, label, lambda contract: decoding.examples(document, contract)
        )

    async def _run(
        self,
        received: Received,
        model: str,
        version: str,
        label: str,
        decode: Callable[[Contract], Decoded],
    ) -> Answer:
        wanted = self._version(model, version, label)
        return await self._door.run(received, PROTOCOL, model, wanted, decode)

    def _version(self, model: str, version: str, label: str) -> str:
        """Return the version that a path names. A label is an alias of a version.

        If no alias has the name ``stable``, the label ``stable`` lets the endpoint choose the version.
        """
        return self._door.endpoint(model).labelled(label) if label else version


def _document(received: Received) -> dict[str, Any]:
    document = bounded_json.loads(received.body)
    if not isinstance(document, dict):
        raise BadRequest("the request must be a JSON object")
    name = document.get("signature_name") or SIGNATURE
    if name != SIGNATURE:
        raise BadRequest(f"the signature {shown(name)} does not exist: every model has only {SIGNATURE!r}")
    return document


def _json(answer: Answer, document: dict[str, Any]) -> Response:
    return Response(orjson.dumps(document), 200, answer.headers, "application/json")


def _tensor(spec: dict[str, Any]) -> dict[str, Any]:
    kind = _TYPES.get(spec["datatype"]) or f"DT_{spec['datatype']}"
    dims = [{"size": str(size), "name": ""} for size in spec["shape"]]
    shape = {"dim": dims, "unknown_rank": False}
    return {"dtype": kind, "tensor_shape": shape, "name": f"{spec['name']}:0"}
