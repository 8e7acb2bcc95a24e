"""Send a load to a language model, show the progress on stderr, and print the measurements."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress
from typing import TYPE_CHECKING

from tidegate.cli import output
from tidegate.cli.output import console, say
from tidegate.tune.llm_figures import LlmFigures
from tidegate.tune.llm_load import LlmLoad, LlmLoadPlan

if TYPE_CHECKING:
    from rich.status import Status

REFRESH_S = 0.5
# Seconds between two printed lines of progress if stderr is not a terminal.
QUIET_S = 5.0


def run(plan: LlmLoadPlan) -> tuple[LlmFigures, bool]:
    """Send the load until it ends, or until Ctrl-C or SIGTERM stops it.

    Return the measurements, and True if Ctrl-C or SIGTERM stopped the load.
    """
    return asyncio.run(_run(plan))


async def _run(plan: LlmLoadPlan) -> tuple[LlmFigures, bool]:
    load, interrupted = LlmLoad(plan), False

    def stop() -> None:
        nonlocal interrupted
        interrupted = True
        load.stop()

    loop = asyncio.get_running_loop()
    with suppress(NotImplementedError):  # asyncio has no signal handlers on Windows
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
    showing = asyncio.create_task(_show(load))
    try:
        await load.run()
    finally:
        showing.cancel()
        with suppress(asyncio.CancelledError):
            await showing
    return load.figures(), interrupted


async def _show(load: LlmLoad) -> None:
    if not console(stderr=True).is_terminal:
        while True:
            await asyncio.sleep(QUIET_S)
            say(_progress(load))
    status: Status
    with console(stderr=True).status("0 s") as status:
        while True:
            await asyncio.sleep(REFRESH_S)
            status.update(_progress(load))


def _progress(load: LlmLoad) -> str:
    figures = load.figures()
    failed = f", {figures.failed} failed" if figures.failed else ""
    first = figures.first_token.percentiles[50]
    median = f", first token p50 {first:.0f} ms" if first is not None else ""
    return (
        f"{figures.seconds:.0f} s: {figures.answered} answered, {load.running} running{failed}, "
        f"{figures.tokens_per_s:.1f} tokens/s{median}"
    )


def show(figures: LlmFigures) -> None:
    """Print the figures as a table and two lines."""
    rows = [
        (title, spread.mean, *spread.percentiles.values())
        for title, spread in (
            ("first token", figures.first_token),
            ("between tokens", figures.between_tokens),
            ("whole answer", figures.whole),
        )
        if spread.mean is not None
    ]
    output.table(_rounded(rows), ("ms", "mean", "p50", "p90", "p99"), empty="No answer was measured.")
    output.line(
        f"{figures.answered} answered, {figures.failed} failed, {figures.cut} cut off at the end, "
        f"in {figures.seconds:.1f} s"
    )
    cached = f" ({figures.cached_tokens} cached)" if figures.cached_tokens else ""
    output.line(
        f"{figures.tokens_per_s:.1f} tokens/s, {figures.requests_per_s:.2f} requests/s; "
        f"{figures.prompt_tokens} prompt tokens{cached}, {figures.tokens} answer tokens"
    )


def _rounded(rows: list[tuple[str | float | None, ...]]) -> list[list[str]]:
    return [[f"{cell:,.1f}" if isinstance(cell, float) else str(cell or "-") for cell in row] for row in rows]
