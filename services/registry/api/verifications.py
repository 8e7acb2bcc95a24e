"""Routes of the verification of versions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel

from services.registry.api.dependencies import VerificationsDep
from services.registry.api.models import Number
from tidegate.kernel.protocol.models import DeploymentSpec
from tidegate.kernel.protocol.verification import (
    ScratchTask,
    Verification,
    VerificationOptions,
    VerificationResult,
)
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(
    prefix="/v1/models/{name}/versions/{number}/verification", tags=["models"], route_class=JsonRoute
)


class VerificationTask(BaseModel):
    """The Deployment that a scratch replica runs, and the samples that the version must answer."""

    deployment: DeploymentSpec
    task: ScratchTask


@router.get("")
async def get_verification(
    verifications: VerificationsDep,
    name: str,
    number: Number,
    wait_s: Annotated[
        float,
        Query(
            ge=0,
            le=60,
            description="Longest time in seconds to wait for the result of a pending verification.",
        ),
    ] = 0.0,
) -> Verification:
    """Return the verification of a version, with its capacity card."""
    return await verifications.read(name, number, wait_s)


@router.post("", status_code=202)
async def verify(
    verifications: VerificationsDep, name: str, number: Number, body: VerificationOptions | None = None
) -> Verification:
    """Start the verification of a version, even if it was verified or rejected before.

    Running Deployments of the version continue. Return 409 if the verification of versions is off.
    """
    return await verifications.begin(name, number, body or VerificationOptions())


@router.get("/task")
async def get_task(verifications: VerificationsDep, name: str, number: Number) -> VerificationTask:
    """Return the Deployment and the samples for a scratch replica. Only for the autoscaler."""
    deployment, task = await verifications.task(name, number)
    return VerificationTask(deployment=deployment, task=task)


@router.put("/result")
async def put_result(
    verifications: VerificationsDep, name: str, number: Number, body: VerificationResult
) -> Verification:
    """Write the result of a verification. Only for the autoscaler."""
    return await verifications.settle(name, number, body)
