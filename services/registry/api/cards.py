"""Routes of the model cards of versions."""

from __future__ import annotations

from fastapi import APIRouter, Response

from services.registry.api.bodies import ModelCard
from services.registry.api.dependencies import CardsDep, guarded, with_content_etag
from services.registry.api.models import Number
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1/models/{name}/versions/{number}/card", tags=["models"], route_class=JsonRoute)
GUARDED = guarded("card")


@router.get("")
async def get_card(cards: CardsDep, name: str, number: Number, response: Response) -> ModelCard:
    """Return a version's model card."""
    text = await cards.get(name, number)
    return with_content_etag(ModelCard(text=text), response, text)


@router.put("", dependencies=[GUARDED])
async def put_card(
    cards: CardsDep, name: str, number: Number, body: ModelCard, response: Response
) -> ModelCard:
    """Set or replace a version's model card, a Markdown text."""
    text = await cards.put(name, number, body.text)
    return with_content_etag(ModelCard(text=text), response, text)


@router.delete("", dependencies=[GUARDED], status_code=204)
async def delete_card(cards: CardsDep, name: str, number: Number) -> None:
    """Delete a version's model card."""
    await cards.delete(name, number)
