"""Run the Lua scripts in ``lua/``. Each runs after ``head.lua``, which defines the keys and transitions."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from tidegate.kernel.store.connection import answer

FOLDER = Path(__file__).parent / "lua"

Argument = bytes | str | int


class Scripts:
    """The Lua scripts on one server. A call is atomic, and its effect is on disk when the call returns."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._known: dict[str, Any] = {}

    async def run(self, name: str, arguments: list[Argument]) -> Any:
        """Run the script ``name`` and return its result. Raises ``StoreUnavailable``."""
        script = self._known.get(name)
        if script is None:
            script = self._known[name] = self._redis.register_script(_source(name))
        return await answer(script(args=arguments))


@cache
def _source(name: str) -> str:
    head, body = ((FOLDER / f"{part}.lua").read_text() for part in ("head", name))
    return f"{head}\nlocal function main()\n{body}\nend\nlocal found = main()\nsettle()\nreturn found"
