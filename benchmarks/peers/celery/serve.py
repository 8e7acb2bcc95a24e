"""The HTTP server: it sends each request to Celery and waits for the result in FastAPI's thread pool."""

from __future__ import annotations

from typing import Annotated, Any

import models
import tasks
import uvicorn
from fastapi import Body, FastAPI
from fastapi.responses import ORJSONResponse

app = FastAPI(default_response_class=ORJSONResponse)
LIMIT_S = 30


@app.get("/ready")
def ready() -> dict[str, Any]:
    """Return 200 when Celery's pool answers."""
    return {"ready": tasks.ping.delay().get(timeout=5)}


@app.post("/identity")
def identity(x: Annotated[list[list[float]], Body(embed=True)]) -> dict[str, Any]:
    """Echo ``x`` as ``y``."""
    return {"y": tasks.identity.delay(x).get(timeout=LIMIT_S)}


@app.post("/jobs/identity", status_code=202)
def identity_job(x: Annotated[list[list[float]], Body(embed=True)]) -> dict[str, str]:
    """Submit a task that echoes. Return 202 as soon as Celery has published it."""
    return {"id": tasks.identity.delay(x).id}


@app.get("/jobs/done")
def done() -> dict[str, int]:
    """Return the number of results of all tasks."""
    return {"done": tasks.app.backend.client.dbsize()}


@app.post("/digits")
def digits(image: Annotated[list[list[float]], Body(embed=True)]) -> dict[str, Any]:
    """Classify ``image``: ``label`` and ``probabilities``."""
    answer: dict[str, Any] = tasks.digits.delay(image).get(timeout=LIMIT_S)
    return answer


@app.post("/image")
def image(body: Annotated[bytes, Body(media_type="application/octet-stream")]) -> dict[str, Any]:
    """Return the ``mean`` of a raw image."""
    return {"mean": tasks.mean.delay(body).get(timeout=LIMIT_S)}


if __name__ == "__main__":
    uvicorn.run(
        app, host="127.0.0.1", port=models.port(), loop="uvloop", http="httptools", access_log=False,
        log_level="warning",
    )  # fmt: skip
