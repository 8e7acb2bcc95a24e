"""The commands ``rollout`` and ``promote``: replace a version by means of a canary or a shadow."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import Control, Doc, control, part
from tidegate.cli.canary_state import ENDED, event_line, line_of, read
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json, seconds
from tidegate.cli.progress import Steps

if TYPE_CHECKING:
    from pathlib import Path

Endpoint = Annotated[str, typer.Argument(metavar="NAME", help="The endpoint's name.")]
_POLL_S = 1.0
# The longest time in seconds that `promote` waits until the traffic has moved.
_SETTLE_S = 5.0


def rollout(
    name: Endpoint,
    to: Annotated[
        str | None, typer.Option("--to", metavar="VERSION", help="The canary: v2, 2 or a deployment's name.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="LIST", help="The canary's shares in percent. [1,5,25,50,100]")
    ] = None,
    hold: Annotated[str | None, typer.Option(metavar="TIME", help="Shortest time of a step. [60s]")] = None,
    min_samples: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Fewest requests that the canary gets in a step. [500]"),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Also judge this metric of the feedback, such as score. With --ab, repeatable: NAME, "
            "NAME=LABEL, errors or latency. You can add :up or :down, and the smallest lift to detect (:5%).",
        ),
    ] = None,
    direction: Annotated[
        str | None,
        typer.Option(metavar="up|down", help="Which values of --metric are better: up (default) or down."),
    ] = None,
    full_capacity: Annotated[
        bool,
        typer.Option(
            "--full-capacity",
            help="Start the canary with all of its minimum replicas, not only a share of them.",
        ),
    ] = False,
    swap: Annotated[
        bool,
        typer.Option(
            "--swap",
            help="No canary: stop the present version, then start this one. Requests wait meanwhile.",
        ),
    ] = False,
    pause: Annotated[
        bool, typer.Option("--pause", help="Pause the rollout: keep the canary's present share.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a paused rollout.")] = False,
    shadow: Annotated[
        bool,
        typer.Option(
            "--shadow", help="No canary: send copies of requests to the version, and compare its answers."
        ),
    ] = False,
    rate: Annotated[
        float | None,
        typer.Option(
            metavar="PERCENT", min=0, max=100, help=("Shadow: percent of the requests to copy. [100]")
        ),
    ] = None,
    max_per_s: Annotated[
        float | None,
        typer.Option(metavar="N", help=("Shadow: most copies per second of each gateway process.")),
    ] = None,
    tolerance: Annotated[
        str | None,
        typer.Option(
            metavar="RTOL[,ATOL]",
            help=("Shadow: accepted difference of numbers, relative and absolute. [1e-4,1e-6]"),
        ),
    ] = None,
    lasts: Annotated[
        str | None, typer.Option("--for", metavar="TIME", help="Shadow: end the copies after this time.")
    ] = None,
    wake: Annotated[
        bool, typer.Option("--wake", help="Shadow: let copies wake a sleeping deployment.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the rollout has ended.")] = False,
    plot: Annotated[
        str | None,
        typer.Option(metavar="FILE.svg", help="Draw the canary's share, errors and evidence over time."),
    ] = None,
    ab: Annotated[
        bool, typer.Option("--ab", help="No canary: compare versions by the feedback of callers (A/B test).")
    ] = False,
    share: Annotated[
        int | None,
        typer.Option(
            metavar="PERCENT",
            min=1,
            max=99,
            help=("--ab: percent of the traffic for the treatments; default: 50."),
        ),
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help=(
                "--ab: the unit whose requests stay at one version: header:NAME, parameter:NAME or key. "
                "Default: header:X-Unit-Id."
            ),
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help=("--ab: end when each version has this many outcomes.")),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(metavar="TIME", help=("--ab: end after this time (7d), or at this time (ISO 8601).")),
    ] = None,
    json: Json = False,
) -> None:
    """Roll out a version as a canary, an A/B test or a shadow, or show a rollout and its evidence.

    The canary's share grows in steps. The canary is promoted if it is as good as the present versions, and
    rolled back if it makes more errors or is slower. `tidegate promote NAME` and `tidegate rollback NAME`
    end the rollout immediately. With --shadow, the version gets copies of the requests, and its answers are
    only compared. Examples: tidegate rollout digits --to v2 --steps 5,50,100 --hold 2m --wait
    and tidegate rollout digits --to v2 --shadow --rate 20 --tolerance 1e-3
    and tidegate rollout digits --to v2 --ab --share 50 --metric score:5%
    """
    from tidegate.cli import experiment as experiments
    from tidegate.cli import shadow as shadows

    plane = control()
    of_shadow = rate is not None or max_per_s is not None or tolerance or lasts or wake
    if (pause or resume) and (to is not None or (pause and resume)):
        raise UsageError("--pause and --resume change a running canary. Use one of them, without --to.")
    if ab or share is not None or unit or samples or until:
        others = (shadow, steps, hold, min_samples, direction, full_capacity, swap, wait, plot, pause, resume)
        if to is None or not ab or of_shadow or any(others):
            raise UsageError(
                "--ab needs --to VERSION, and accepts only --share, --metric, --unit, --samples and --until."
            )
        experiments.start(plane, name, to, experiments.options_of(share, metric, unit, samples, until))
        compared = experiments.read(plane, name)
        output.show(compared, json, lambda: experiments.show(compared))
        return
    if shadow or of_shadow:
        if to is None or not shadow:
            raise UsageError("--rate, --max-per-s, --tolerance, --for and --wake need --to VERSION --shadow.")
        if steps or hold or min_samples or metric or direction or full_capacity or swap or wait or plot:
            raise UsageError(
                "--shadow has no steps: leave out --steps, --hold, --min-samples, --metric, --direction, "
                "--full-capacity, --swap, --wait, --plot. `tidegate shadow NAME --wait` waits for a verdict."
            )
        shadows.start(plane, name, to, shadows.options_of(rate, max_per_s, tolerance, lasts, wake=wake))
    elif to is not None:
        options = options_of(steps, hold, min_samples, metric, direction)
        _start(plane, name, to, options, full_capacity=full_capacity, swap=swap)
    elif steps or hold or min_samples or metric or direction or full_capacity or swap:
        raise UsageError(
            "--steps, --hold, --min-samples, --metric, --direction, --full-capacity and --swap start a "
            "rollout: add --to VERSION."
        )
    elif pause or resume:
        _change(plane, name, "pause" if pause else "resume")
    found = _waited(plane, name) if wait else read(plane, name)
    if plot is not None:
        _draw(found, plot)
    output.show(found, json, lambda: show(found))
    if wait and (found["rollout"] is None or found["rollout"]["phase"] != "promoted"):
        raise typer.Exit(4)


def promote(name: Endpoint, json: Json = False) -> None:
    """Send all traffic to a canary or a shadow now, even if its evidence is weak or bad.

    Example: tidegate promote digits
    """
    plane = control()
    promoted = _change(plane, name, "promote")["targets"][0]["deployment"]
    settled = _settled(plane, name)
    found = {**read(plane, name), "promoted": promoted}
    if found["rollout"] is not None and found["rollout"]["deployment"] == promoted:
        output.show(found, json, lambda: show(found))
    else:  # the promoted Deployment was a shadow
        output.show(found, json, lambda: output.line(f"{promoted} gets all traffic of {name}", style="bold"))
    if not settled:
        output.say(
            f"The present version serves until {promoted} has a ready replica. "
            f"Follow it: tidegate traffic {name}"
        )


def _settled(plane: Control, name: str) -> bool:
    """Wait until the traffic has moved to the endpoint's targets. Return True when it has moved.

    Return False if it has not moved after ``_SETTLE_S`` seconds.
    """
    end = time.monotonic() + _SETTLE_S
    while plane.registry.get(f"/v1/endpoints/{part(name)}")["previous"]:
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def options_of(
    steps: str | None,
    hold: str | None,
    min_samples: int | None,
    metrics: Sequence[str] | None = None,
    direction: str | None = None,
) -> dict[str, Any]:
    """Return a rollout's options for the registry. Raise UsageError for a wrong option."""
    options: dict[str, Any] = {}
    if steps is not None:
        try:
            options["steps"] = [int(part.strip().removesuffix("%")) for part in steps.split(",")]
        except ValueError:
            raise UsageError(f"--steps {steps!r}: write whole percentages, as in 1,5,25,50,100.") from None
    if hold is not None:
        options["hold_s"] = seconds(hold)
    if min_samples is not None:
        options["min_samples"] = min_samples
    if direction not in (None, "up", "down") or (direction is not None and not metrics):
        raise UsageError("--direction is up or down, and needs --metric NAME.")
    if metrics:
        if len(metrics) > 1:
            raise UsageError("A canary has one --metric. Compare several with --ab.")
        options |= {"metric": metrics[0], "direction": direction or "up"}
    return options


def _start(
    plane: Control, name: str, to: str, options: Doc, *, full_capacity: bool = False, swap: bool = False
) -> None:
    if swap and (options or full_capacity):
        raise UsageError("--swap starts no canary. Leave out all options of canaries.")
    if full_capacity:
        options["full_capacity"] = True

    number = to.removeprefix("v")
    canary = {"version": int(number)} if number.isdecimal() else {"deployment": to}
    plane.registry.post(
        f"/v1/endpoints/{part(name)}/rollout",
        {**canary, "options": options, **({"swap": True} if swap else {})},
    )


def _change(plane: Control, name: str, what: str) -> Doc:
    endpoint: Doc = plane.registry.post(f"/v1/endpoints/{part(name)}/rollout/{what}", {})
    return endpoint


def _waited(plane: Control, name: str) -> Doc:
    with Steps().shown() as steps:
        while True:
            found = read(plane, name)
            rollout = found["rollout"]
            if rollout is None:
                return found
            ended = rollout["phase"] in ENDED
            steps.change(name, "done" if ended else "waiting", line_of(found))
            if ended:
                return found
            time.sleep(_POLL_S)


def show(found: Mapping[str, Any]) -> None:
    """Print a rollout with its evidence and history. Also print the shadow, if it exists."""
    from tidegate.cli import output, shadow

    rollout, shadowed = found["rollout"], found.get("shadow")
    if shadowed is not None:
        shadow.show(shadowed)
    if rollout is None:
        if shadowed is None:
            name = found["endpoint"]
            output.line(f"{name} has no rollout. Start one: tidegate rollout {name} --to VERSION")
        return
    output.line(line_of(found), style="bold")
    rows = [
        (
            metric,
            f"{each['canary_rate']:.2%} of {each['canary']}",
            f"{each['base_rate']:.2%} of {each['base']}",
            f"{each['e_worse']:.3g} of {each['roll_back_at']:.3g}",
            f"{each['e_fine']:.3g} of {each['fine_at']:.3g}"
            if each.get("decides_promotion", True)
            else "not needed",
        )
        for metric, each in found.get("evidence", {}).items()
    ]
    if rows:
        output.table(rows, ("bad events", "canary", "baseline", "evidence of harm", "evidence of no harm"))
    quality = found.get("evidence", {}).get("quality")
    if quality:
        metric = rollout["options"]["metric"]
        output.line(
            f"mean of {metric}: canary {quality['canary_mean']:.4g}, baseline {quality['base_mean']:.4g}",
            style="dim",
        )
    if found.get("slow_ms"):
        slow, very_slow = found["slow_ms"]
        output.line(f"slow: above {slow:.3g} ms, very slow: above {very_slow:.3g} ms", style="dim")
    for event in rollout["history"]:
        output.line(event_line(event))


def _draw(found: Mapping[str, Any], plot: str) -> None:
    from pathlib import Path

    from tidegate.cli.canary_picture import svg

    if not found.get("points"):
        raise UsageError(
            "This rollout has no measurements yet, so there is nothing to draw. Leave out --plot for now."
        )
    target: Path = Path(plot)
    target.write_text(svg(found))
