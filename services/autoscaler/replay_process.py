"""Run a replay, or verify recorded decisions: ``python -m services.autoscaler.replay_process``.

Reads a JSON request from stdin and writes ``{"result": ...}`` or ``{"error": ...}`` to stdout. A replay
computes for seconds, so it runs in a separate process and does not delay the control loop.
"""

from __future__ import annotations

import base64
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from services.autoscaler.adapters.history.recordings import Recordings
from services.autoscaler.adapters.replay_picture import draw
from services.autoscaler.domain.recording import decide_again
from services.autoscaler.domain.replay import arrivals
from services.autoscaler.domain.replay.comparison import Comparison, PolicyVariant, compare
from services.autoscaler.domain.replay.fleet import ReplicaTiming
from services.autoscaler.domain.snapshot import Policy
from tidegate.kernel.errors import BadRequest, TidegateError
from tidegate.kernel.protocol.models import Deployment, Version

SHOWN_DIFFERENCES = 20
NICE = 10


def main() -> int:
    """Handle one request, and return the exit code."""
    os.nice(NICE)  # low priority: the control loop and the workers of the embedded stack come first
    request: dict[str, Any] = orjson.loads(sys.stdin.buffer.read())
    try:
        answer = {"result": verify(**request["verify"]) if "verify" in request else replay(request)}
    except TidegateError as error:
        answer = {"error": {"message": error.message, "reason": error.reason}}
    sys.stdout.buffer.write(orjson.dumps(answer))
    return 0


def replay(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compare scaling policies on the arrivals that ``request`` describes.

    Raise BadRequest if the arrivals are invalid, or if none were recorded.
    """
    times, seconds = _arrivals(request["arrivals"], request["seed"])
    found = compare(
        Comparison(
            deployment=Deployment.model_validate(request["deployment"]),
            version=Version.model_validate(request["version"]),
            policy=Policy(**request["policy"]),
            service=ReplicaTiming(**request["service"]),
            arrivals=times,
            seconds=seconds,
            start_at=request["start_at"],
            period_s=request["period_s"],
            seed=request["seed"],
            variants=[PolicyVariant(**variant) for variant in request["variants"]],
            others=request["others"],
            history={int(minute): count for minute, count in request["history"].items()},
        )
    )
    if request["picture"]:
        title = f"{found['deployment']}: {found['requests']:,} requests, {request['title']}"
        drawn = draw(title, found["timelines"], found["target_wait_ms"])
        found["picture"] = base64.b64encode(drawn).decode()
    return found


def verify(path: str, since: float, until: float, deployment: str | None) -> dict[str, Any]:
    """Repeat the decisions that were recorded from ``since`` to ``until``. Return the differences.

    ``deployment``: compare only its decisions; None compares the decisions of all Deployments.
    """
    recordings, counts = Recordings(Path(path), 0), Counter[str]()
    different: list[dict[str, Any]] = []
    first = last = None
    for now, before, after in decide_again(recordings.chunks(since, until)):
        if not since <= now <= until:
            continue
        first, last = first or now, now
        counts["rounds"] += 1
        then, now_decided = (
            [each for each in found if deployment in (None, each["deployment"])] for found in (before, after)
        )
        counts["decisions"] += len(then)
        counts["reproduced"] += sum(each in now_decided for each in then)
        if then != now_decided:
            different.append({"at": now, "then": then, "now": now_decided})
    recordings.close()
    return {
        "rounds": counts["rounds"],
        "decisions": counts["decisions"],
        "reproduced": counts["reproduced"],
        "since": first,
        "until": last,
        "different": different[:SHOWN_DIFFERENCES],
        "differences": len(different),
    }


def _arrivals(source: Mapping[str, Any], seed: int) -> tuple[list[float], float]:
    """Return the times of arrivals and the length of the replay, both in seconds."""
    seconds = float(source.get("seconds") or 0.0)
    if source["kind"] == "synthetic":
        shape, rps, factor = source["shape"], source["rps"], source["factor"]
        return arrivals.synthetic(shape, rps=rps, factor=factor, seconds=seconds, seed=seed), seconds
    if source["kind"] == "csv":
        times = arrivals.from_csv(source["text"])
        return times, max(seconds, times[-1] + 1.0)
    counts = {int(second): count for second, count in source["by_second"].items()}
    if not counts:
        raise BadRequest("No arrivals of this Deployment were recorded in that time.")
    return arrivals.recorded(counts, source["since"]), seconds


if __name__ == "__main__":
    sys.exit(main())
