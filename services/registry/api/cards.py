"""Routes of the model cards of versions."""

from __future__ import annotations

from fastapi import APIRouter

from services.registry.api.bodies import ModelCard
from services.registry.api.dependencies import CardsDep
from services.registry.api.models import Number
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1/models/{name}/versions/{number}/card", tags=["models"], route_class=JsonRoute)


@router.get("")
async def get_card(cards: CardsDep, name: str, number: Number) -> ModelCard:
    """Return a version's model card."""
    return ModelCard(text=await cards.get(name, number))


@router.put("")
async def put_card(cards: CardsDep, name: str, number: Number, body: ModelCard) -> ModelCard:
    """Set a version's model card, a Markdown text. It replaces an earlier one."""
    return ModelCard(text=await cards.put(name, number, body.text))


@router.delete("", status_code=204)
async def delete_card(cards: CardsDep, name: str, number: Number) -> None:
    """Delete a version's model card."""
    await cards.delete(name, number)
