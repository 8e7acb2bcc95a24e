"""Read, write and delete the training baselines of versions. Each change is in the audit log."""

from __future__ import annotations

from typing import Any

from services.registry.adapters.sql import baselines
from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.application.transactions import Transactions
from services.registry.domain import names
from services.registry.domain.desired_state import ChangeNotification
from tidegate.kernel.errors import BadRequest, NotFound


class Baselines:
    """Read, write and delete the training baselines of versions."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    async def get(self, model: str, number: int) -> dict[str, Any]:
        """Return a version's baseline. Raise NotFound if the version or its baseline does not exist."""
        async with self._transactions.read() as reader:
            await _check_version(reader, model, number)
            found = await baselines.find(reader.connection, model, number)
        if found is None:
            raise NotFound(
                f"Version {number} of model {model!r} has no training baseline. Set one: "
                f"tidegate drift {model} --baseline FILE.csv"
            )
        return found

    async def put(self, model: str, number: int, document: dict[str, Any]) -> str:
        """Set a version's baseline. Return the sha256 of the baseline.

        Raise NotFound for an unknown version, or BadRequest if ``document`` is not a baseline.
        """
        # Import the module only here. It loads numpy, which needs memory, and few registries get a baseline.
        from tidegate.kernel.profiles.baseline import Baseline

        try:
            document = Baseline.from_json(document).to_json()
        except ValueError as error:
            raise BadRequest(
                f"The body is not a baseline ({error}). `tidegate deploy --baseline FILE.csv` makes one."
            ) from None
        async with self._transactions.change() as writer:
            await _check_version(writer, model, number)
            digest = await baselines.put(writer.connection, model, number, document, writer.now)
            notification = ChangeNotification("version", f"{model}/{number}", "updated")
            await writer.note(notification, None, {"baseline_sha256": digest})
        return digest

    async def delete(self, model: str, number: int) -> None:
        """Delete a version's baseline. Raise NotFound if the version or its baseline does not exist."""
        async with self._transactions.change() as writer:
            await _check_version(writer, model, number)
            if not await baselines.drop(writer.connection, model, number):
                raise NotFound(f"Version {number} of model {model!r} has no training baseline.")
            notification = ChangeNotification("version", f"{model}/{number}", "updated")
            await writer.note(notification, None, {"baseline_sha256": None})


async def _check_version(reader: DesiredStateReader, model: str, number: int) -> None:
    if not await reader.versions(model, number):
        raise names.unknown_version(model, number)
