"""Read, write and delete the model cards of versions. Each change is in the audit log."""

from __future__ import annotations

import hashlib

from services.registry.adapters.sql import cards
from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.application.transactions import Transactions
from services.registry.domain import names, version_metadata
from services.registry.domain.desired_state import ChangeNotification
from tidegate.kernel.errors import NotFound


class Cards:
    """Read, write and delete the model cards of versions."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    async def get(self, model: str, number: int) -> str:
        """Return a version's model card. Raise NotFound if the version or its model card does not exist."""
        async with self._transactions.read() as reader:
            await _check_version(reader, model, number)
            found = await cards.find(reader.connection, model, number)
        if found is None:
            raise _no_card(model, number)
        return found

    async def put(self, model: str, number: int, text: str) -> str:
        """Set a version's model card. Return the card's text.

        Raise NotFound if the version does not exist, or BadRequest if the text is empty or too long.
        """
        version_metadata.check_card(text)
        async with self._transactions.change() as writer:
            await _check_version(writer, model, number)
            if await cards.find(writer.connection, model, number) != text:
                await cards.put(writer.connection, model, number, text, writer.now)
                digest = hashlib.sha256(text.encode()).hexdigest()
                await writer.note(_updated(model, number), None, {"card_sha256": digest})
        return text

    async def delete(self, model: str, number: int) -> None:
        """Delete a version's model card. Raise NotFound if the version or its model card does not exist."""
        async with self._transactions.change() as writer:
            await _check_version(writer, model, number)
            if not await cards.drop(writer.connection, model, number):
                raise _no_card(model, number)
            await writer.note(_updated(model, number), None, {"card_sha256": None})


async def _check_version(reader: DesiredStateReader, model: str, number: int) -> None:
    if await reader.version(model, number) is None:
        raise names.unknown_version(model, number)


def _updated(model: str, number: int) -> ChangeNotification:
    return ChangeNotification("version", f"{model}/{number}", "updated")


def _no_card(model: str, number: int) -> NotFound:
    return NotFound(
        f"Version {number} of model {model!r} has no model card. Set one: "
        f"tidegate card {model}@{number} --set README.md"
    )
