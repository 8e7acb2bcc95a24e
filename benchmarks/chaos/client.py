"""A client that submits jobs and keeps a list of the 202s that it received for its inputs."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from benchmarks.chaos.verdict import inputs_of
from benchmarks.client import Answer, Client

CALLERS = 32
AGAIN_S = 0.2
ATTEMPT_LIMIT_S = 30.0
PAGE = 1000

Doc = dict[str, Any]


class JobsClient:
    """Submits jobs at a steady rate, retries each until it gets a 202, and later reads all results."""

    def __init__(self, port: int, model: str, webhook: str) -> None:
        self._client = Client(port)
        self._model = model
        self._webhook = webhook
        self.told: defaultdict[int, set[str]] = defaultdict(set)
        self.trouble: Counter[str] = Counter()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    async def submit(self, count: int, rate: float) -> None:
        """Submit all jobs, ``rate`` per second, each with its own idempotency key."""
        numbers = iter(range(count))
        began = time.monotonic()

        async def caller() -> None:
            for number in numbers:
                await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
                await self._submit(number)

        await asyncio.gather(*(caller() for _ in range(CALLERS)))

    async def _submit(self, number: int) -> None:
        data = inputs_of(number)
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, len(data)], "data": data}
        body = {
            "model": self._model,
            "inputs": [tensor],
            "webhook": self._webhook,
            "metadata": {"number": number},
        }
        headers = {"Content-Type": "application/json", "Idempotency-Key": f"chaos-{number}"}
        answer = await self._persist("POST", "/v1/jobs", json.dumps(body).encode(), headers, 202)
        self.told[number].add(json.loads(answer.body)["id"])

    async def results(self) -> dict[int, Any]:
        """Return the result of every accepted job by its number: outputs, or the error."""
        waiting = [(number, id_) for number, ids in self.told.items() for id_ in ids]
        found: dict[int, Any] = {}

        async def caller() -> None:
            while waiting:
                number, id_ = waiting.pop()
                answer = await self._persist("GET", f"/v1/jobs/{id_}/result")
                told = json.loads(answer.body)
                found[number] = told["outputs"][0]["data"] if answer.status == 200 else told

        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        return found

    async def records(self) -> list[Doc]:
        """Return every job's record in the store."""
        found: list[Doc] = []
        cursor = ""
        while True:
            answer = await self._persist("GET", f"/v1/jobs?limit={PAGE}{cursor}", ok=200)
            page = json.loads(answer.body)
            found += page["items"]
            if page["next"] is None:
                return found
            cursor = f"&cursor={page['next']}"

    async def _persist(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        ok: int | None = None,
    ) -> Answer:
        """Repeat a request until its response satisfies ``ok``. Count the other responses."""
        while True:
            try:
                async with asyncio.timeout(ATTEMPT_LIMIT_S):
                    answer = await self._client.request(method, path, body, headers or {})
                if answer.status == ok or (ok is None and answer.status < 503):
                    return answer
                self.trouble[f"HTTP {answer.status}"] += 1
            except (OSError, EOFError) as error:
                self.trouble[type(error).__name__] += 1
            await asyncio.sleep(AGAIN_S)
