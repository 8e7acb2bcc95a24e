"""``python -m benchmarks.llm_limits``: check a limit of tokens over two gateway processes.

A key may use 1,000 tokens per minute at a language model. For five minutes, callers send more than that, with
random lengths. They disconnect in the middle of a third of their streams. The tokens of the admitted
requests must be within 2 % of five times the limit. The usage that the registry keeps must equal the sum of
the streams' own counts, and the engine's own sum, for the requests that were not cut off.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks import options, report, session, smollm2, stack
from benchmarks.errors import BenchmarkFailed
from benchmarks.stack import Stack

CALLERS = 8
CUT = 1 / 3
CHATS = 0.5
TOLERANCE = 0.02
ENDPOINT = "chat"
# The registry has the usage of a request within this time.
USAGE_S = 30.0
PROMPTS = ("Hi", "Name a colour.", "Count to ten.", "What is the capital of France?", "Tell me a story.")


@dataclass(slots=True)
class Outcome:
    """The outcomes of all requests. Tokens are those that the streams reported themselves."""

    statuses: Counter[int] = field(default_factory=Counter)
    completed: int = 0
    cut: int = 0
    tokens: int = 0
    seconds: float = 0.0
    retry_after: list[int] = field(default_factory=list)


def main() -> int:
    """Measure, print, write llm_limits.json. Return 1 if a bar is missed."""
    chosen = _arguments()
    machine = report.machine()
    model = smollm2.provide("q4")
    workers = {"TIDEGATE_GATEWAY_WORKERS": str(chosen.gateways)}
    with session.session(), stack.tidegate("llm-limits", workers) as running:
        running.deploy(model, ENDPOINT, "--slots", "4", "--context", "512")
        limited = _run(
            running, chosen, "limited", ("--tokens-per-minute", str(chosen.limit)), CUT, chosen.seconds
        )
        whole = _run(running, chosen, "whole", (), 0.0, chosen.whole)
    verdicts = judge(limited, whole, chosen)
    print(f"\n{report.machine_line(machine)}; {chosen.gateways} gateway processes, {CALLERS} callers\n")
    for name, each in (("limited", limited), ("without cuts", whole)):
        print(f"{name}: {json.dumps(each)}")
    print("\n" + "\n".join(f"{verdict}  {text}" for verdict, text in verdicts))
    out: Path = chosen.out / "llm_limits.json"
    report.write_json(out, {"machine": machine, "limited": limited, "whole": whole, "bars": verdicts})
    print(f"\nResults: {out}")
    return 1 if any(verdict == "MISS" for verdict, _ in verdicts) else 0


def _run(
    running: Stack, chosen: argparse.Namespace, name: str, limits: tuple[str, ...], cut: float, seconds: float
) -> dict[str, Any]:
    """Send requests with a new key, and return its figures."""
    key = json.loads(running.command("keys", "create", name, "--endpoint", ENDPOINT, *limits, "--json"))
    before = _engine(running)
    outcome = asyncio.run(offer(running.url, key["key"], cut, seconds, chosen.seed))
    usage = _usage(running, key["id"], outcome)
    after = _engine(running)
    return {
        "seconds": round(outcome.seconds, 1),
        "statuses": dict(outcome.statuses),
        "completed": outcome.completed,
        "cut_off": outcome.cut,
        "tokens_of_completed_streams": outcome.tokens,
        "tokens_in_usage": usage,
        "tokens_of_the_engine": after - before,
        "longest_retry_after_s": max(outcome.retry_after, default=0),
    }


async def offer(url: str, key: str, cut: float, seconds: float, seed: int) -> Outcome:
    """Keep all callers busy for ``seconds``; a share ``cut`` of the streams is cut off in the middle."""
    outcome, began = Outcome(), time.monotonic()
    headers = {"Authorization": f"Bearer {key}"}

    async def caller(number: int) -> None:
        draw = random.Random(seed + number)
        while time.monotonic() < began + seconds:
            # A connection for each request, so that the kernel distributes them to the processes.
            async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120, trust_env=False) as http:
                waits = await _ask(http, draw, cut, outcome)
            if waits:
                await asyncio.sleep(draw.uniform(0.1, 0.5))

    await asyncio.gather(*map(caller, range(CALLERS)))
    outcome.seconds = time.monotonic() - began
    return outcome


async def _ask(http: httpx.AsyncClient, draw: random.Random, cut: float, outcome: Outcome) -> bool:
    """Send one request. Return True if it was refused."""
    body: dict[str, Any] = {"model": ENDPOINT, "stream": True, "stream_options": {"include_usage": True}}
    prompt = draw.choice(PROMPTS)
    # A chat has about 35 more tokens, from its template. Short completions use the rest of a minute's limit.
    if draw.random() < CHATS:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": prompt}]
        body["max_tokens"] = draw.randint(4, 32)
    else:
        path, body["prompt"] = "/v1/completions", prompt
        body["max_tokens"] = draw.randint(1, 32)
    leave_after = draw.randint(1, 3) if draw.random() < cut else None
    events = 0
    async with http.stream("POST", path, json=body) as answer:
        outcome.statuses[answer.status_code] += 1
        if answer.status_code != 200:
            outcome.retry_after.append(int(answer.headers.get("retry-after", 0)))
            return answer.status_code == 429
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            events += 1
            if leave_after is not None and events > leave_after:
                outcome.cut += 1
                return False
            usage = json.loads(line[6:]).get("usage")
            if usage:
                outcome.tokens += usage["total_tokens"]
                outcome.completed += 1
    return False


def _usage(running: Stack, key_id: str, outcome: Outcome) -> int:
    """Return the tokens that the registry has counted for a key, when it has all of its requests."""
    sent, deadline = outcome.statuses[200], time.monotonic() + USAGE_S
    while True:
        items = json.loads(running.command("usage", "--json"))["items"]
        mine = [item for item in items if item["principal"] == key_id]
        if sum(item["requests"] for item in mine) >= sent:
            return sum(item["tokens_in"] + item["tokens_out"] for item in mine)
        if time.monotonic() > deadline:
            raise BenchmarkFailed(f"the registry has not counted all {sent} requests within {USAGE_S:g} s")
        time.sleep(1.0)


def _engine(running: Stack) -> int:
    """Return the tokens that the engine has counted, as its replica reports them when it is idle."""
    last, same = -1, 0
    while same < 3:
        (status,) = json.loads(running.command("status", "--json"))["deployments"]
        facts = [each["llm"] for each in status["replicas"] if each.get("llm")]
        total = sum(each["prompt_tokens"] + each["answer_tokens"] for each in facts)
        same = same + 1 if total == last and not any(each["running"] for each in facts) else 0
        last = total
        time.sleep(1.0)
    return last


def judge(
    limited: dict[str, Any], whole: dict[str, Any], chosen: argparse.Namespace
) -> list[tuple[str, str]]:
    """Return the bars: the budget, and the equality of all counts."""
    allowed = chosen.limit * chosen.seconds / 60
    used = limited["tokens_in_usage"]
    rows = [
        (
            abs(used - allowed) <= TOLERANCE * allowed,
            f"{used} tokens were admitted in {chosen.seconds:g} s, {allowed:g} +- {TOLERANCE:.0%} is right "
            f"({limited['cut_off']} of {limited['statuses'].get(200, 0)} streams were cut off)",
        ),
        (set(limited["statuses"]) <= {200, 429}, f"only 200 and 429: {limited['statuses']}"),
        (
            whole["tokens_in_usage"] == whole["tokens_of_completed_streams"] == whole["tokens_of_the_engine"],
            f"{whole['completed']} complete streams: usage {whole['tokens_in_usage']}, the streams "
            f"{whole['tokens_of_completed_streams']}, the engine {whole['tokens_of_the_engine']} tokens",
        ),
    ]
    return [("PASS" if well else "MISS", text) for well, text in rows]


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__, seconds=300)
    parser.add_argument("--gateways", type=int, default=2, help="gateway processes (default: 2)")
    parser.add_argument("--limit", type=int, default=1000, help="tokens per minute (default: 1000)")
    parser.add_argument(
        "--whole", type=float, default=30.0, help="seconds without cuts and limit (default: 30)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the lengths and cuts (default: 1)")
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
