"""The route that lists the versions with a pending verification."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from services.autoscaler.application.verifier import Verifier
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1", tags=["autoscaler"], route_class=JsonRoute)


def _verifier(request: Request) -> Verifier:
    value: Verifier = request.app.state.verifier
    return value


@router.get("/verifications")
async def verifications(verifier: Annotated[Verifier, Depends(_verifier)]) -> dict[str, Any]:
    """Return the versions with a pending verification, each with the current step of its scratch replica."""
    return {"items": verifier.view(), "problem": verifier.problem}
