"""The route that shows an endpoint's experiment and its report."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from tidegate.kernel.errors import NotFound

router = APIRouter(prefix="/v1/experiments", tags=["experiments"])


@router.get("/{name}")
async def experiment(request: Request, name: str) -> dict[str, Any]:
    """Return an endpoint's experiment with its report.

    The report has each variant's numbers, the comparisons, and how much data is still needed.
    """
    desired = request.app.state.controller.desired
    found = next((each for each in desired.endpoints if each.name == name), None) if desired else None
    if found is None:
        raise NotFound(f"There is no endpoint {name!r}. `tidegate routes` lists the endpoints.")
    report: dict[str, Any] = request.app.state.experiments.report(found)
    return report
