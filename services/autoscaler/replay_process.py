"""Run a replay, or the check of one, in a process of its own: ``python -m`` this module.

Reads one document from stdin and writes one to stdout: ``{"result": ...}`` or ``{"error": ...}``. It runs in
a process of its own because it computes for seconds, and the loop must not wait for that.
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
from services.autoscaler.domain.replay.comparison import Comparison, PolicyVariant, run
from services.autoscaler.domain.replay.fleet import ReplicaTiming
from services.autoscaler.domain.snapshot import Policy
from tidegate.kernel.errors import BadRequest, TidegateError
from tidegate.kernel.protocol.models import Deployment, Version

SHOWN_DIFFERENCES = 20
NICE = 10


def main() -> int:
    """One document in, one out."""
    os.nice(NICE)  # beside it run the loop and, in the embedded stack, the workers
    order: dict[str, Any] = orjson.loads(sys.stdin.buffer.read())
    try:
        told = {"result": verify(**order["verify"]) if "verify" in order else study(order)}
    except TidegateError as error:
        told = {"error": {"message": error.message, "reason": error.reason}}
    sys.stdout.buffer.write(orjson.dumps(told))
    return 0


def study(order: Mapping[str, Any]) -> dict[str, Any]:
    """Replay what is ordered. Raises BadRequest."""
    times, seconds = _arrivals(order["arrivals"], order["seed"])
    found = run(
        Comparison(
            deployment=Deployment.model_validate(order["deployment"]),
            version=Version.model_validate(order["version"]),
            policy=Policy(**order["policy"]),
            service=ReplicaTiming(**order["service"]),
            arrivals=times,
            seconds=seconds,
            start_at=order["start_at"],
            period_s=order["period_s"],
            seed=order["seed"],
            variants=[PolicyVariant(**variant) for variant in order["variants"]],
            others=order["others"],
            history={int(minute): count for minute, count in order["history"].items()},
        )
    )
    if order["picture"]:
        title = f"{found['deployment']}: {found['requests']:,} requests, {order['title']}"
        drawn = draw(title, found["timelines"], found["target_wait_ms"])
        found["picture"] = base64.b64encode(drawn).decode()
    return found


def verify(path: str, since: float, until: float, deployment: str | None) -> dict[str, Any]:
    """Decide the recorded rounds between two times again, and compare with what was decided then."""
    history, counts = Recordings(Path(path), 0), Counter[str]()
    different: list[dict[str, Any]] = []
    first = last = None
    for now, before, after in decide_again(history.chunks(since, until)):
        if not since <= now <= until:
            continue
        first, last = first or now, now
        counts["rounds"] += 1
        then, today = (
            [each for each in found if deployment in (None, each["deployment"])] for found in (before, after)
        )
        counts["decisions"] += len(then)
        counts["reproduced"] += sum(each in today for each in then)
        if then != today:
            different.append({"at": now, "then": then, "now": today})
    history.close()
    return {
        "rounds": counts["rounds"],
        "decisions": counts["decisions"],
        "reproduced": counts["reproduced"],
        "since": first,
        "until": last,
        "different": different[:SHOWN_DIFFERENCES],
        "differences": len(different),
    }


def _arrivals(order: Mapping[str, Any], seed: int) -> tuple[list[float], float]:
    """The times of arrivals and how long the replay goes on, both in seconds."""
    seconds = float(order.get("seconds") or 0.0)
    if order["kind"] == "synthetic":
        shape, rps, factor = order["shape"], order["rps"], order["factor"]
        return arrivals.synthetic(shape, rps=rps, factor=factor, seconds=seconds, seed=seed), seconds
    if order["kind"] == "csv":
        times = arrivals.from_csv(order["text"])
        return times, max(seconds, times[-1] + 1.0)
    counts = {int(second): count for second, count in order["by_second"].items()}
    if not counts:
        raise BadRequest("No arrival of this Deployment is recorded in that time.")
    return arrivals.recorded(counts, order["since"]), seconds


if __name__ == "__main__":
    sys.exit(main())
