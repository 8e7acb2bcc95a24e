"""The content of the page at ``/``: a description, the models, and a command to try next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WHAT = (
    "Tidegate serves trained models behind a queue. It speaks the Open Inference Protocol v2, as Triton and "
    "KServe do, over REST and gRPC."
)
LINKS = {
    "API": "/docs",
    "OpenAPI document": "/openapi.json",
    "models": "/v2/models",
    "server metadata": "/v2",
    "ready": "/v2/health/ready",
}


def document(
    version: str, url: str, models: Sequence[dict[str, Any]] | None, problem: str = ""
) -> dict[str, Any]:
    """Return the page as data.

    ``url``: the address that the caller used. ``models``: the models to which the caller may send requests,
    as entries of the model index. None means that the caller has no valid credential. In this case,
    ``problem`` says what is wrong with the credential.
    """
    page: dict[str, Any] = {"name": "tidegate", "version": version, "description": WHAT}
    if models is None:
        page["problem"] = problem
        command = f"curl -H 'Authorization: Bearer tg_...' {url}/"
        return page | {"next": {"do": "Retry with a key", "command": command}, "links": LINKS}
    return page | {"models": list(models), "next": _next(url, models), "links": LINKS}


def _next(url: str, models: Sequence[dict[str, Any]]) -> dict[str, str]:
    if not models:
        return {"do": "Deploy a model", "command": "tidegate deploy model.onnx"}
    ready = next((model for model in models if model["state"] == "READY"), None)
    if ready is None:
        return {"do": "See why no model is ready", "command": "tidegate status"}
    return {
        "do": f"See what {ready['name']} takes and returns",
        "command": f"curl {url}/v2/models/{ready['name']}",
    }
