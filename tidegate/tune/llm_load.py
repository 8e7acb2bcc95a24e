"""Send load to a language model or another endpoint, in a closed loop of callers or at random times."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tidegate.tune.http_call import HttpAnswer, Target, posted
from tidegate.tune.llm_figures import CallRecord, LlmFigures, figures_of

# A request has failed if its answer is not complete after this many seconds.
SILENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class LlmLoadPlan:
    """A load on an endpoint, either as a closed loop or as an open loop.

    A closed loop has ``callers``, each with one request at a time. An open loop sends ``rate`` requests per
    second on average, at random times. The load ends after ``seconds`` seconds or ``requests`` requests,
    whichever comes first. ``body`` takes the number of a request, and returns the body of this request.
    ``keep_text``: True to keep the text of the answers in the records.
    """

    target: Target
    body: Callable[[int], bytes]
    callers: int | None = None
    rate: float | None = None
    seconds: float | None = None
    requests: int | None = None
    timeout_s: float = SILENCE_S
    seed: int = 0
    keep_text: bool = False


@dataclass(slots=True)
class LlmLoad:
    """A load that runs or has ended. ``records``: every request that was sent.

    ``began``: the value of ``time.perf_counter`` at the start. ``duration``: how many seconds the load took;
    0 while it runs.
    """

    plan: LlmLoadPlan
    records: list[CallRecord] = field(default_factory=list)
    began: float = 0.0
    duration: float = 0.0
    _stopped: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def running(self) -> int:
        """Return the number of requests in flight."""
        return sum(each.ended is None for each in self.records)

    def stop(self) -> None:
        """End the load now, and cancel requests in flight."""
        self._stopped.set()

    def figures(self, after_s: float = 0.0) -> LlmFigures:
        """Return the figures up to now, without the first ``after_s`` seconds of the load.

        If the load has ended, the figures go up to its end.
        """
        return figures_of(self.records, after_s, self.duration or self._now())

    async def run(self) -> None:
        """Run the load to its end.

        When the time of the load is over, a closed loop cancels the requests in flight. An open loop waits
        for their answers.
        """
        plan, self.began = self.plan, time.perf_counter()
        work = asyncio.create_task(self._closed() if plan.rate is None else self._open(plan.rate))
        stop = asyncio.create_task(self._stopped.wait())
        limit = plan.seconds if plan.rate is None else None
        try:
            await asyncio.wait({work, stop}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            self.duration = self._now()
            for task in (work, stop):
                task.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)

    def _now(self) -> float:
        return time.perf_counter() - self.began

    async def _closed(self) -> None:
        async def caller() -> None:
            while self.plan.requests is None or len(self.records) < self.plan.requests:
                await self._call()

        await asyncio.gather(*(caller() for _ in range(self.plan.callers or 1)))

    async def _open(self, rate: float) -> None:
        chance, at, calls = random.Random(self.plan.seed), 0.0, set[asyncio.Task[None]]()
        try:
            while self.plan.requests is None or len(self.records) < self.plan.requests:
                at += chance.expovariate(rate)
                if self.plan.seconds is not None and at > self.plan.seconds:
                    break
                await asyncio.sleep(max(0.0, at - self._now()))
                calls.add(asyncio.create_task(self._call()))
                await asyncio.sleep(0)
            await asyncio.gather(*calls)
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    async def _call(self) -> None:
        record = CallRecord(self._now())
        body = self.plan.body(len(self.records))
        self.records.append(record)
        try:
            await asyncio.wait_for(self._answered(record, body), self.plan.timeout_s)
        except asyncio.CancelledError:
            record.cut = True
            raise
        except asyncio.TimeoutError:
            record.problem = f"no answer within {self.plan.timeout_s:g} s"
        except (OSError, EOFError, ValueError) as error:
            record.problem = f"the connection broke: {error or type(error).__name__}"
        finally:
            record.ended = self._now()
            record.tokens = record.tokens or len(record.token_times)
        if record.problem:
            await asyncio.sleep(0.1)  # avoid a busy loop if the server rejects requests immediately

    async def _answered(self, record: CallRecord, body: bytes) -> None:
        async with posted(self.plan.target, body) as answer:
            record.status = answer.status
            if answer.status != 200:
                record.problem = _problem(answer.status, await answer.body())
            elif answer.streams:
                await self._stream(record, answer)
            else:
                _count(record, _parsed(await answer.body()))

    async def _stream(self, record: CallRecord, answer: HttpAnswer) -> None:
        async for line in answer.lines():
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            event = _parsed(data)
            if event.get("error"):
                record.problem = _message(event)
                return
            _count(record, event)
            text = _text(event)
            if text:
                record.token_times.append(self._now())
                if self.plan.keep_text:
                    record.text += text
        record.problem = "the stream ended without [DONE]"


def _text(event: dict[str, Any]) -> str:
    choices = event.get("choices")
    if not choices:
        return ""
    first = choices[0]
    delta = first.get("delta") or {}
    return delta.get("content") or delta.get("reasoning_content") or first.get("text") or ""


def _count(record: CallRecord, document: dict[str, Any]) -> None:
    usage = document.get("usage")
    if isinstance(usage, dict):
        record.tokens = int(usage.get("completion_tokens") or 0)
        record.prompt_tokens = int(usage.get("prompt_tokens") or 0)
        record.cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


def _parsed(data: bytes) -> dict[str, Any]:
    found = json.loads(data)
    return found if isinstance(found, dict) else {}


def _message(document: dict[str, Any]) -> str:
    told = document.get("error")
    return str(told.get("message") or told) if isinstance(told, dict) else str(told)


def _problem(status: int, body: bytes) -> str:
    try:
        return f"{status}: {_message(_parsed(body))}"
    except ValueError:
        return f"{status}: {body[:200].decode('utf-8', 'replace')}"
