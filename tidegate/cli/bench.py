"""``tidegate bench``: send load to an endpoint, and print the times and rates that its callers see."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli.api import Control, part, settings, token_of, unreachable
from tidegate.cli.exit_codes import ERROR, INTERRUPTED, UsageError
from tidegate.cli.options import Json, seconds
from tidegate.client.errors import Unreachable
from tidegate.kernel.errors import NotFound

if TYPE_CHECKING:
    from tidegate.kernel.settings.base import Settings
    from tidegate.tune.http_call import Target
    from tidegate.tune.llm_figures import LlmFigures
    from tidegate.tune.llm_load import LlmLoadPlan

_LOAD, _REQUEST = "The load", "The request"


def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The endpoint's name.")],
    callers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            help="Concurrent callers, each with one request at a time. [8]",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help=("Instead of --callers: requests per second on average, at random times."),
            rich_help_panel=_LOAD,
        ),
    ] = None,
    duration: Annotated[
        str | None, typer.Option("--for", metavar="TIME", help="Duration. [20s]", rich_help_panel=_LOAD)
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help=("Instead of a duration: number of requests."), rich_help_panel=_LOAD),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Length of each prompt, in tokens.", rich_help_panel=_REQUEST)
    ] = 128,
    shared_tokens: Annotated[
        int,
        typer.Option(min=0, help="Number of first tokens that all prompts share.", rich_help_panel=_REQUEST),
    ] = 0,
    answer_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer, in tokens.", rich_help_panel=_REQUEST)
    ] = 64,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos",
            help="Continue each answer up to --answer-tokens (llama.cpp, vLLM).",
            rich_help_panel=_REQUEST,
        ),
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Your own prompts, one in each line.", rich_help_panel=_REQUEST),
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="K=JSON",
            help=("Another field of the request, such as top_k=40; repeatable."),
            rich_help_panel=_REQUEST,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            metavar="JSON",
            help=(
                "For a model that is no language model: the request, as JSON of the Open Inference Protocol."
            ),
            rich_help_panel=_REQUEST,
        ),
    ] = None,
    priority: Annotated[
        str | None,
        typer.Option(help="Priority: high, normal or low; default: normal.", rich_help_panel=_REQUEST),
    ] = None,
    timeout: Annotated[str, typer.Option(metavar="TIME", help="Longest time for a whole answer.")] = "10m",
    seed: Annotated[
        int | None, typer.Option(help="Seed of the words and arrival times. The same seed repeats a run.")
    ] = None,
    json: Json = False,
) -> None:
    """Send load to a language model, or with --data to another endpoint. Print times and rates.

    In a closed loop (--callers), each caller waits for its answer before its next request. In an open loop
    (--rate), requests may arrive faster than they are answered. Ctrl-C ends the measurement and prints its
    figures. Example: tidegate bench smollm2 --callers 4 --for 30s --prompt-tokens 200 --answer-tokens 100
    """
    from tidegate.cli import load_display, output
    from tidegate.cli.chat import members
    from tidegate.tune.llm_load import LlmLoadPlan
    from tidegate.tune.prompts import ChatBodies, Prompts

    if callers is not None and rate is not None:
        raise UsageError("Give either --callers (a closed loop) or --rate (an open loop).")
    found, limit_s = settings(), seconds(timeout)
    chosen_seed = random.randrange(2**31) if seed is None else seed
    if data is None:
        options = {
            "max_tokens": answer_tokens,
            **({"ignore_eos": True} if ignore_eos else {}),
            **members(more),
        }
        made = Prompts(prompt_tokens, _lines(prompts), shared_tokens, chosen_seed)
        fit = _first_call(found, name, made, options, prompt_tokens, limit_s)
        path, body = "/v1/chat/completions", ChatBodies(name, fit, options).body
    else:
        path, body = _infer_path(name), _same(data)
    plan = LlmLoadPlan(
        target=_target(found, path, limit_s, priority),
        body=body,
        callers=None if rate is not None else callers or 8,
        rate=rate,
        seconds=seconds(duration) if duration else None if requests else 20.0,
        requests=requests,
        timeout_s=limit_s,
        seed=chosen_seed,
    )
    figures, interrupted = load_display.run(plan)
    output.show(_document(name, plan, figures, interrupted), json, lambda: load_display.show(figures))
    if figures.problems:
        for problem, count in figures.problems.items():
            output.say(f"{count} failed: {problem}", style="red")
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if not figures.answered and figures.failed:
        raise typer.Exit(ERROR)


def _document(name: str, plan: LlmLoadPlan, figures: LlmFigures, interrupted: bool) -> dict[str, Any]:
    load = {"callers": plan.callers, "rate": plan.rate, "seed": plan.seed, "interrupted": interrupted}
    return {"model": name, **load, **figures.document()}


def _lines(file: Path | None) -> list[str]:
    from tidegate.cli.publish import read_lines

    if file is None:
        return []
    found = [line for line in read_lines(file) if line.strip()]
    if not found:
        raise UsageError(f"{file} has no prompt. Write one prompt in each line.")
    return found


def _first_call(
    found: Settings, name: str, prompts: Any, options: dict[str, Any], wanted: int, limit_s: float
) -> Any:
    """Send one request, which also starts the model. Return prompts of about ``wanted`` tokens.

    The answer reports how many tokens its prompt had. This number shows how many words a prompt of ``wanted``
    tokens needs.

    If the user gave the prompts, or if the answer reports no number, return ``prompts`` unchanged.
    """
    from dataclasses import replace

    from tidegate.cli.conversation import no_such_model
    from tidegate.cli.waiting_line import WaitingLine, state_of
    from tidegate.client import Client
    from tidegate.tune.prompts import fitted

    with Client(found.gateway_url, timeout_s=limit_s, api_key=token_of(found) or None) as client:
        try:
            with WaitingLine(name, lambda: state_of(Control(found), name)):
                first = client.chat(name, prompts.prompt(0), **{**options, "max_tokens": 1})
        except NotFound as error:
            error.message = no_such_model(client, name)
            raise
        except Unreachable:
            raise unreachable("gateway", found.gateway_url) from None
    if prompts.given or first.usage is None:
        return prompts
    return replace(prompts, words=fitted(prompts.words, first.usage.prompt_tokens, wanted))


def _target(found: Settings, path: str, limit_s: float, priority: str | None) -> Target:
    from tidegate.cli.chat import PRIORITY
    from tidegate.client.flow import MAX_TIMEOUT_MS
    from tidegate.tune.http_call import Target
    from tidegate.tune.measurement import GatewayAddress

    limit_ms = str(min(round(limit_s * 1000), MAX_TIMEOUT_MS))
    address = GatewayAddress.of(found.gateway_url)
    headers = {"X-Request-Timeout-Ms": limit_ms, **({PRIORITY: priority} if priority else {})}
    return Target(address, path, token_of(found), headers)


def _infer_path(name: str) -> str:
    return f"/v2/models/{part(name)}/infer"


def _same(data: str) -> Any:
    from tidegate.cli.infer import text_of_option

    body = text_of_option(data).encode()
    return lambda _: body
