"""``python -m benchmarks.llm_queue [NAME ...]``: measure the queues of language models on a real stack.

    bands      under overload, the bands high, normal and low get slots 16 : 4 : 1
    overload   3 times more callers than slots: no request is refused or lost, goodput stays the same
    cancel     the time from a caller's disconnect until the next request has the slot
    affinity   two replicas, 20 shared prompts: hit rate and time to first token, with affinity and without
    hot        two replicas and one frequent prompt: both replicas get the same load
    slack      a batch of 500 prompts in the slots that interactive requests leave free
    loss       kill -9 of a worker with 16 streams: no stream is lost

All run on one stack with llama.cpp and SmolLM2. The script prints numbers, and writes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson
import psutil

from benchmarks import smollm2
from benchmarks.errors import BenchmarkFailed
from benchmarks.session import session
from benchmarks.stack import Stack, tidegate

WORDS = (
    *("river", "stone", "cloud", "letter", "garden", "window", "silver", "engine", "market", "bridge"),
    *("forest", "candle", "mirror", "harbor", "valley", "winter", "summer", "signal", "copper", "planet"),
)


@dataclass(slots=True)
class Answer:
    """One answer. ``first_s``: the seconds to the first token; None without a token."""

    status: int = 0
    first_s: float | None = None
    total_s: float = 0.0
    text: str = ""
    error: str = ""
    ended: float = 0.0
    cached: int = 0
    prompt: int = 0

    @property
    def ok(self) -> bool:
        """Return True if the answer is complete."""
        return self.status == 200 and not self.error and self.first_s is not None


@dataclass
class Load:
    """Callers of one model over one HTTP client."""

    client: httpx.AsyncClient
    model: str
    answers: list[Answer] = field(default_factory=list)

    async def ask(self, prompt: str, tokens: int, *, band: str = "", system: str = "") -> Answer:
        """Send a request as a stream, and return the answer."""
        messages = [{"role": "system", "content": system}] if system else []
        body = {
            "model": self.model,
            "messages": [*messages, {"role": "user", "content": prompt}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        headers = {"X-Request-Timeout-Ms": "600000"} | ({"X-Tidegate-Priority": band} if band else {})
        answer, began = Answer(), time.monotonic()
        try:
            async with self.client.stream(
                "POST", "/v1/chat/completions", json=body, headers=headers
            ) as response:
                answer.status = response.status_code
                if response.status_code != 200:
                    answer.error = (await response.aread()).decode()[:200]
                async for line in response.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        self._add(answer, orjson.loads(line[6:]), time.monotonic() - began)
        except httpx.HTTPError as error:
            answer.error = repr(error)
        answer.ended = time.monotonic()
        answer.total_s = answer.ended - began
        self.answers.append(answer)
        return answer

    @staticmethod
    def _add(answer: Answer, event: dict[str, Any], at: float) -> None:
        if "error" in event:
            answer.error = orjson.dumps(event["error"]).decode()
        for choice in event.get("choices", ()):
            if text := choice.get("delta", {}).get("content"):
                answer.first_s = answer.first_s or at
                answer.text += text
        if usage := event.get("usage"):
            answer.prompt = usage.get("prompt_tokens", 0)
            answer.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0) or 0


def a_prompt(seed: int, words: int = 30) -> str:
    """Return a prompt that no other request has."""
    draw = random.Random(seed)
    return f"{seed}: " + " ".join(draw.choice(WORDS) for _ in range(words))


def quantile(values: list[float], share: float) -> float:
    """Return a quantile; NaN without values."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else float("nan")


def show(what: str, answers: list[Answer]) -> None:
    """Print what happened to the requests of a load."""
    good = [answer for answer in answers if answer.ok]
    first = [answer.first_s * 1e3 for answer in good if answer.first_s is not None]
    bad = Counter(f"{answer.status} {answer.error[:80]}" for answer in answers if not answer.ok)
    print(
        f"{what}: {len(good)}/{len(answers)} complete, first token p50 {quantile(first, 0.5):.0f} ms, "
        f"p99 {quantile(first, 0.99):.0f} ms{', failed: ' + str(dict(bad)) if bad else ''}",
        flush=True,
    )


def replicas(stack: Stack, model: str) -> list[dict[str, Any]]:
    """Return the ready replicas of a model."""
    token = (stack.state / "token").read_text().strip()
    url = f"http://127.0.0.1:{stack.env['TIDEGATE_AUTOSCALER_PORT']}/v1/replicas"
    found = httpx.get(url, headers={"Authorization": f"Bearer {token}"}, trust_env=False, timeout=60)
    items = found.raise_for_status().json()["items"]
    return [r for r in items if r["state"] == "ready" and r["deployment"].startswith(f"{model}-v")]


async def metric(port: int, name: str) -> Counter[str]:
    """Return a metric of one process, by its labels."""
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        text = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
    found: Counter[str] = Counter()
    for line in text.splitlines():
        if line.startswith((f"{name}{{", f"{name} ")):
            labels, value = line.removeprefix(name).rsplit(" ", 1)
            found[labels] += int(float(value))
    return found


async def bands(stack: Stack, load: Load) -> None:
    """Send far more requests than slots in all bands together, and count the first 84 answers by band."""
    order: list[str] = []

    async def ask(band: str, number: int) -> None:
        answer = await load.ask(a_prompt(number), 2, band=band)
        if answer.ok:
            order.append(band)

    async with asyncio.TaskGroup() as group:
        for number in range(70):
            for at, band in enumerate(("low", "normal", "high")):
                group.create_task(ask(band, 1000 * at + number))
    counted = order[8:92]  # the first ones took slots that were free
    print(f"bands: of 84 slots under overload {dict(Counter(counted))}; 16:4:1 is 64, 16, 4", flush=True)
    print(f"bands: {len(order)} of 210 requests complete", flush=True)


async def closed(load: Load, callers: int, seconds: float, tokens: int, *, band: str = "") -> list[Answer]:
    """Let callers send one request after another, and return the answers that ended in time."""
    stop_at = time.monotonic() + seconds
    answers: list[Answer] = []

    async def call(caller: int) -> None:
        number = caller * 100_000
        while time.monotonic() < stop_at:
            number += 1
            answers.append(await load.ask(a_prompt(number), tokens, band=band))

    await asyncio.gather(*(call(caller) for caller in range(callers)))
    return answers


async def overload(stack: Stack, load: Load, *, seconds: float = 25.0, tokens: int = 16) -> None:
    """Compare the goodput with a caller for each slot, and with 3 times more callers, in turns."""
    slots = sum(int(replica["parallel"]) for replica in replicas(stack, load.model))
    rates: dict[int, list[float]] = {slots: [], 3 * slots: []}
    for _ in range(2):
        for callers in rates:
            began = time.monotonic()
            answers = await closed(load, callers, seconds, tokens)
            rates[callers].append(sum(a.ok for a in answers) / (time.monotonic() - began))
            show(f"overload: {callers} callers, {slots} slots", answers)
    best, loaded = max(rates[slots]), max(rates[3 * slots])
    print(
        f"overload: {best:.2f} answers/s with {slots} callers, {loaded:.2f} with {3 * slots}: "
        f"goodput {loaded / best:.2f}x",
        flush=True,
    )


async def cancel(stack: Stack, load: Load) -> None:
    """Fill all slots, let a request wait, disconnect a running caller, and time the waiting one's start."""
    slots = int(replicas(stack, load.model)[0]["parallel"])
    taken: list[float] = []
    polls: list[float] = []
    for turn in range(5):
        running = [asyncio.create_task(load.ask(a_prompt(turn * 50 + n), 400)) for n in range(slots)]
        await _until(lambda: _busy(stack, load.model, slots))
        port = replicas(stack, load.model)[0]["metrics_port"]
        before = await metric(port, "tidegate_worker_llm_taken_total")
        waiting = asyncio.create_task(load.ask("hello", 1))
        await asyncio.sleep(0.3)
        began = time.monotonic()
        running[0].cancel()
        calls = 0
        while await metric(port, "tidegate_worker_llm_taken_total") == before:
            calls += 1
        taken.append(time.monotonic() - began)
        polls.append(taken[-1] / (calls + 1))
        await waiting
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await _until(lambda: _busy(stack, load.model, 0))
    print(
        f"cancel: a disconnect frees the slot for the next request in {quantile(taken, 0.5) * 1e3:.0f} ms "
        f"(p50 of 5), {max(taken) * 1e3:.0f} ms at most; one HTTP call to the worker took "
        f"{quantile(polls, 0.5) * 1e3:.0f} ms meanwhile",
        flush=True,
    )


def _busy(stack: Stack, model: str, count: int) -> bool:
    return all(replica["inflight"] == count for replica in replicas(stack, model))


async def _until(condition: Callable[[], bool], limit_s: float = 120.0) -> None:
    end = time.monotonic() + limit_s
    while not await asyncio.to_thread(condition):
        if time.monotonic() > end:
            raise BenchmarkFailed("a condition was not fulfilled in time")
        await asyncio.sleep(0.1)


def shared_prompt(number: int) -> str:
    """Return one of the long beginnings that many prompts share: about 400 tokens."""
    return f"Topic {number}. " + a_prompt(number * 7919, 250)


async def affinity(stack: Stack, load: Load, *, rounds: int = 6, prompts: int = 20) -> None:
    """Send 20 shared prompts in random order to two replicas, with affinity and without."""
    for wait_ms, what in ((100.0, "with affinity"), (0.0, "random routing")):
        set_affinity(stack, load.model, wait_ms)
        await _until(lambda: len(replicas(stack, load.model)) == 2)
        before = await metric(stack.gateway_port, "tidegate_gateway_llm_prefix_total")
        draw, salt = random.Random(1), time.time_ns()
        order = [number for _ in range(rounds) for number in draw.sample(range(prompts), prompts)]
        answers: list[Answer] = []
        todo = iter(order)

        async def caller(todo=todo, answers=answers, salt=salt) -> None:  # type: ignore[no-untyped-def]
            for number in todo:
                answers.append(
                    await load.ask(f"Question {len(answers)}", 4, system=f"{salt} {shared_prompt(number)}")
                )

        await asyncio.gather(*(caller() for _ in range(3)))
        after = await metric(stack.gateway_port, "tidegate_gateway_llm_prefix_total")
        warm = answers[prompts:]
        cached, read = sum(a.cached for a in warm), sum(a.prompt for a in warm)
        print(f"affinity: {what}: outcomes {dict(after - before)}", flush=True)
        share = f"{cached / max(read, 1):.0%}"
        print(f"affinity: {what}: {cached} of {read} prompt tokens in the engine's cache: {share}")
        show(f"affinity: {what}", warm)


def set_affinity(stack: Stack, model: str, wait_ms: float) -> None:
    """Set how long requests wait for the replica that has read their prompt."""
    stack.command("deploy", str(smollm2.provide("q4")), "--name", model, "--affinity-wait-ms", f"{wait_ms:g}")


async def hot(stack: Stack, load: Load) -> None:
    """Send one frequent prompt only, to two replicas, and compare how many requests each has run."""
    await _until(lambda: len(replicas(stack, load.model)) == 2)
    before = {r["replica"]: r["completed"] for r in replicas(stack, load.model)}
    prompt, answers = shared_prompt(424242), list[Answer]()

    async def caller(number: int) -> None:
        for turn in range(15):
            answers.append(await load.ask(f"Question {number} {turn}", 8, system=prompt))

    await asyncio.gather(*(caller(number) for number in range(8)))
    await asyncio.sleep(2)
    after = {r["replica"]: r["completed"] for r in replicas(stack, load.model)}
    counts = [after[name] - before.get(name, 0) for name in after]
    show("hot", answers)
    print(
        f"hot: requests by replica {counts}: {max(counts) / (sum(counts) / len(counts)):.2f}x of even",
        flush=True,
    )


async def slack(stack: Stack, load: Load, *, prompts: int = 500, seconds: float = 60.0) -> None:
    """Measure interactive load alone, and beside a batch of jobs."""

    async def interactive() -> list[Answer]:
        """Send requests in an open loop, one every 1.5 s."""
        asked = []
        for number in range(int(seconds / 1.5)):
            asked.append(asyncio.create_task(load.ask(a_prompt(number), 8)))
            await asyncio.sleep(1.5)
        return list(await asyncio.gather(*asked))

    alone = await interactive()
    show("slack: interactive alone", alone)
    lines = [
        {
            "custom_id": str(n),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": load.model,
                "messages": [{"role": "user", "content": a_prompt(n, 5)}],
                "max_tokens": 2,
                "temperature": 0,
            },
        }
        for n in range(prompts)
    ]
    file = await load.client.post(
        "/v1/files",
        files={"file": ("batch.jsonl", b"\n".join(map(orjson.dumps, lines)))},
        data={"purpose": "batch"},
    )
    began = time.monotonic()
    batch = await load.client.post(
        "/v1/batches",
        json={
            "input_file_id": file.raise_for_status().json()["id"],
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        },
    )
    url = f"/v1/batches/{batch.raise_for_status().json()['id']}"
    beside = await interactive()
    show("slack: interactive beside the batch", beside)
    while (state := (await load.client.get(url)).json())["status"] in (
        "validating",
        "in_progress",
        "finalizing",
    ):
        await asyncio.sleep(1)
    p99 = [quantile([a.first_s for a in found if a.first_s], 0.99) for found in (alone, beside)]
    print(f"slack: batch {state['status']} {state['request_counts']} after {time.monotonic() - began:.0f} s")
    print(f"slack: interactive p99 {p99[1] / p99[0]:.2f}x of alone", flush=True)


async def loss(stack: Stack, load: Load) -> None:
    """Kill a worker with SIGKILL while 16 streams run. Compare the texts with undisturbed ones."""
    await _until(lambda: len(replicas(stack, load.model)) == 2)
    prompts = [a_prompt(n, 10) for n in range(16)]
    expected = await asyncio.gather(*(load.ask(prompt, 60) for prompt in prompts))
    streams = [asyncio.create_task(load.ask(prompt, 60)) for prompt in prompts]
    await asyncio.sleep(3)
    killed = replicas(stack, load.model)[0]
    psutil.Process(killed["pid"]).kill()
    answers = await asyncio.gather(*streams)
    same = sum(a.ok and a.text == e.text for a, e in zip(answers, expected, strict=True))
    errors = sum(bool(a.error) for a in answers)
    print(
        f"loss: kill -9 of {killed['replica']} with {killed['inflight']} requests: of 16 streams {same} have "
        f"the undisturbed text, {sum(a.ok for a in answers) - same} another text, {errors} an error event, "
        f"{16 - errors - sum(a.ok for a in answers)} neither",
        flush=True,
    )


EXPERIMENTS: dict[str, tuple[int, Callable[[Stack, Load], Awaitable[None]]]] = {
    "bands": (1, bands),
    "overload": (1, overload),
    "cancel": (1, cancel),
    "slack": (1, slack),
    "affinity": (2, affinity),
    "hot": (2, hot),
    "loss": (2, loss),
}


async def run(stack: Stack, names: list[str], model: str) -> None:
    """Run experiments, each with its number of replicas."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=stack.url, timeout=600, limits=limits, trust_env=False) as client:
        for name in names:
            count, experiment = EXPERIMENTS[name]
            stack.command("scale", model, str(count), "--force")
            await _until(lambda count=count: len(replicas(stack, model)) == count)  # type: ignore[misc]
            await experiment(stack, Load(client, model))


def main() -> int:
    """Start a stack, deploy the model, and run the experiments that were named; default: all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXPERIMENTS))
    names = parser.parse_args().names or list(EXPERIMENTS)
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        parser.error(f"there is no experiment {unknown[0]!r}: choose from {', '.join(EXPERIMENTS)}")
    model = "queue"
    with session(), tidegate("llm-queue") as stack:
        stack.deploy(smollm2.provide("q4"), model, "--slots", "4", "--context", "1024")
        asyncio.run(run(stack, names, model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
