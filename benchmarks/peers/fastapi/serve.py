"""Serving without a queue: FastAPI and onnxruntime in one process."""

from __future__ import annotations

import models
import numpy as np
import orjson
import uvicorn
from fastapi import FastAPI, Request, Response

app = FastAPI()
session = models.digits_session()


def answer(document: object) -> Response:
    """Return a JSON answer; orjson serializes numpy arrays directly."""
    return Response(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


@app.get("/ready")
async def ready() -> Response:
    """Return 200: the server is ready when it answers."""
    return answer({"ready": True})


@app.post("/identity")
async def identity(request: Request) -> Response:
    """Echo ``x`` as ``y``."""
    x = np.asarray(orjson.loads(await request.body())["x"], np.float32)
    return answer({"y": x})


@app.post("/digits")
async def digits(request: Request) -> Response:
    """Classify ``image``: ``label`` and ``probabilities``."""
    image = np.asarray(orjson.loads(await request.body())["image"], np.float32)
    label, probabilities = models.run_digits(session, image)
    return answer({"label": label, "probabilities": probabilities})


@app.post("/image")
async def image(request: Request) -> Response:
    """Return the ``mean`` of a raw image."""
    return answer({"mean": models.mean_of(models.image_of(await request.body()))})


if __name__ == "__main__":
    uvicorn.run(
        app, host="127.0.0.1", port=models.port(), loop="uvloop", http="httptools", access_log=False,
        log_level="warning",
    )  # fmt: skip
