"""Two symptoms of latency: the application feels slow, and response times are inconsistent. Pure."""

from __future__ import annotations

from statistics import median

from services.router.domain.diagnosis.case import LEAST_BLOCKS, Case
from services.router.domain.diagnosis.finding import Remedy, Symptom, Usual, ms, span, usual_of
from services.router.domain.watch.window import ReplicaWork, Window
from tidegate.kernel.protocol.traffic import LEDGER

# A smaller growth of a latency (seconds) is no symptom, because users do not notice it.
LEAST_FELT_S = 0.002
SLOWER, CLEARLY = 1.75, 1.4
# Response times are inconsistent only if three conditions are true. p50 is at most SAME_MIDDLE times its
# usual value. p99 is more than WIDER times its usual value. The ratio p99/p50 is more than WIDER times its
# usual value.
WIDER, SAME_MIDDLE = 2.0, 1.5
# With fewer answers, p99 is only the slowest one or two answers.
LEAST_ANSWERS = 200
# A replica stands out if its calls take this many times as long as those of the other replicas.
STANDS_OUT = 2.0
STUCK_PART = 0.3
UNKNOWN = "unknown"
# The words for the parts of a request's time in texts that users read.
WORDS = {
    "decode": "reading requests",
    "transit": "queue and network",
    "wait": "waiting for a batch",
    "compute": "model",
    "encode": "writing answers",
}


def feels_slow(case: Case) -> Symptom | None:
    """Return the symptom if p95 is far above the usual p95 of the endpoint.

    The part of a request's time that grew most shows the cause.
    """
    now, usual = case.recent.quantile_s(0.95), usual_of([each.quantile_s(0.95) for each in case.past])
    if not case.comparable or now is None or usual is None:
        return None
    if not usual.exceeded(now, SLOWER, CLEARLY) or now - usual.middle < LEAST_FELT_S:
        return None
    if not case.lasts(lambda third: (third.quantile_s(0.95) or 0.0) > usual.middle * SLOWER):
        return None
    grown = growth(case)
    part = max(grown, key=lambda each: grown[each])
    cause, remedy = _slow_remedy(case, part)
    ordered = sorted(grown, key=lambda each: -grown[each])
    parts = ", ".join(f"{WORDS[name]} {grown[name] * 1e3:+.3g} ms" for name in ordered)
    return Symptom(
        case.endpoint,
        "feels_slow",
        cause,
        (
            f"p95 is {ms(now)} in the last {span(case.spans.window_s)}; usually it is {ms(usual.middle)}, "
            f"and at most {ms(usual.high)}",
            f"p95 by part: {parts}",
        ),
        remedy,
        {
            "p95_ms": now * 1e3,
            "usual_p95_ms": usual.middle * 1e3,
            "growth_ms": {k: v * 1e3 for k, v in grown.items()},
        },
    )


def growth(case: Case) -> dict[str, float]:
    """Return the growth of the 95th percentile of each part of a request's time, in seconds."""
    before = case.before
    return {
        part: (case.recent.quantile_s(0.95, part) or 0.0) - (before.quantile_s(0.95, part) or 0.0)
        for part in LEDGER
    }


def _slow_remedy(case: Case, part: str) -> tuple[str, Remedy]:
    name, main = case.endpoint, case.main
    if part == "compute":
        if is_new(case):
            return "model", Remedy(
                f"tidegate rollback {name}",
                f"the version of {main.name} is new, and the version before it was faster",
            )
        return "model", Remedy(
            f"tidegate logs {name} --since {max(1, round(case.spans.window_s / 60))}m",
            "the same version became slower: the logs of its replicas show why",
        )
    if part in ("decode", "encode"):
        return "client", Remedy(
            f"tidegate usage --by principal --endpoint {name}",
            (
                "requests or answers are larger: the command shows the bytes of each caller; binary tensors "
                "are quicker than JSON"
            ),
        )
    if case.recent.cold_s > 0.02 * case.recent.seconds and case.recent.cold_s > case.before.cold_s:
        return "cold start", Remedy(
            f"tidegate policy {main.name} --set min_replicas={max(1, main.low)}",
            f"requests waited for {case.recent.cold_s:.0f} s while no replica was ready: keep one running",
        )
    if part == "wait" and (case.recent.utilization or 0.0) < 0.5:
        return "batching", Remedy(
            f"tidegate deploy {main.model or name} --version {main.version} --batch-window-ms 0",
            "requests wait until a batch is full, although replicas are idle",
        )
    if (case.recent.utilization or 0.0) < 0.5:
        return "network", Remedy(
            "tidegate status", "replicas are idle: check the broker, the gateways and their machines"
        )
    return "queue", more_replicas(case)


def is_new(case: Case) -> bool:
    """Return True if the main Deployment is new.

    It is new if it answers now, and answered in fewer than half of the past blocks.
    """
    answered = sum(bool(block.answered_by.get(case.main.name)) for block in case.past)
    return bool(case.recent.answered_by.get(case.main.name)) and answered < len(case.past) / 2


def more_replicas(case: Case) -> Remedy:
    """Return the remedy for too few replicas."""
    main = case.main
    if main.override is not None:
        why = f"an operator holds the Deployment at {main.override} replicas"
        return Remedy(f"tidegate scale {main.name} --auto", why)
    if main.host_full:
        return Remedy(
            f"tidegate why {main.name}",
            "no more replicas fit on the host: free its memory or cores, or use a larger host",
        )
    needed = max(main.high + 1, round((main.ready or main.high) * 1.5))
    if main.ready >= main.high:
        why = f"all {main.high} allowed replicas are busy"
        return Remedy(f"tidegate policy {main.name} --set max_replicas={needed}", why)
    why = f"{main.ready} of at most {main.high} replicas are ready: start replicas sooner"
    return Remedy(f"tidegate policy {main.name} --set scaling.aggressiveness=latency", why)


def inconsistent_times(case: Case) -> Symptom | None:
    """Return the symptom if p99/p50 is far above its usual value, although p50 is about as before."""
    past = [each for each in case.past if each.timed() >= LEAST_ANSWERS]
    if case.recent.timed() < LEAST_ANSWERS or len(past) < LEAST_BLOCKS:
        return None
    now = width(case.recent)
    ratios, tails, middles = (
        usual_of([width(each) for each in past]),
        usual_of([each.quantile_s(0.99) for each in past]),
        usual_of([each.quantile_s(0.5) for each in past]),
    )
    p99, p50 = case.recent.quantile_s(0.99), case.recent.quantile_s(0.5)
    if None in (now, ratios, tails, middles, p99, p50):
        return None
    assert now is not None
    assert ratios is not None
    assert tails is not None
    assert middles is not None
    assert p99 is not None
    assert p50 is not None
    if not ratios.exceeded(now, WIDER, 1.3) or not tails.exceeded(p99, WIDER, 1.3):
        return None
    if p50 > middles.middle * SAME_MIDDLE or p99 - tails.middle < LEAST_FELT_S:
        return None
    has_tail = [(third.quantile_s(0.99) or 0.0) > tails.middle * WIDER for third in case.thirds]
    if has_tail and sum(has_tail) < len(has_tail) - 1:
        return None
    # If p50 is high in the last third of the window, all requests have become slow. That is another symptom,
    # ``feels_slow``. When it begins, p99 rises before p50.
    if case.thirds and (case.thirds[-1].quantile_s(0.5) or 0.0) > middles.middle * SAME_MIDDLE:
        return None
    cause, evidence, remedy = _tail_cause(case)
    if cause == UNKNOWN and not all(has_tail):
        return None  # perhaps another program on the host was busy for a short time
    return Symptom(
        case.endpoint,
        "inconsistent_times",
        cause,
        (_tail_text(case, p50, p99, now, ratios), *evidence),
        remedy,
        {"p50_ms": p50 * 1e3, "p99_ms": p99 * 1e3, "ratio": now, "usual_ratio": ratios.middle},
    )


def _tail_text(case: Case, p50: float, p99: float, now: float, ratios: Usual) -> str:
    return (
        f"p99 is {ms(p99)} and p50 is {ms(p50)} in the last {span(case.spans.window_s)}, a ratio of "
        f"{now:.1f}; usually the ratio is {ratios.middle:.1f}, and at most {ratios.high:.1f}"
    )


def width(window: Window) -> float | None:
    """Return p99/p50; None without answers."""
    p99, p50 = window.quantile_s(0.99), window.quantile_s(0.5)
    return p99 / p50 if p99 and p50 else None


def _tail_cause(case: Case) -> tuple[str, tuple[str, ...], Remedy]:
    replica = slow_replica(case.recent)
    if replica is not None:
        name, text = replica
        return (
            f"replica {name}",
            (text,),
            Remedy(f"tidegate drain {name}", "requests go to the other replicas, and a new replica starts"),
        )
    now, before = _batch(case.recent), _batch(case.before)
    if now is not None and before is not None and now > 1.5 * before:
        return (
            "batch size",
            (f"a call now has {now:.1f} requests on average; before, {before:.1f}",),
            Remedy(
                f"tidegate deploy {case.main.model or case.endpoint} --version {case.main.version} "
                f"--max-batch {max(1, round(before))}",
                "small requests wait for the larger calls",
            ),
        )
    return (
        UNKNOWN,
        ("no replica and no batch size is unusual",),
        Remedy(f"tidegate tune {case.endpoint}", "the command measures batches, instances and threads"),
    )


def slow_replica(window: Window) -> tuple[str, str] | None:
    """Return the slowest replica and how it differs; None if no replica stands out."""
    works = {name: work for name, work in window.replicas.items() if work.requests or work.stuck_s}
    if len(works) < 2:
        return None
    worst = max(works, key=lambda name: _badness(works[name], window.seconds))
    others = [work for name, work in works.items() if name != worst]
    usual = median(work.mean_call_ms or 0.0 for work in others)
    mine, batch = works[worst].mean_call_ms, works[worst].mean_batch
    stuck = works[worst].stuck_s
    if mine is not None and usual and mine > STANDS_OUT * usual:
        size = "" if batch is None else f", with {batch:.1f} requests in a call"
        return (
            worst,
            f"a call of {worst} takes {mine:.3g} ms{size}; a call of the other replicas takes {usual:.3g} ms",
        )
    if stuck > STUCK_PART * window.seconds and stuck > 3 * max(work.stuck_s for work in others):
        return worst, f"{worst} finished no request in {stuck:.0f} s, although it has requests"
    return None


def _badness(work: ReplicaWork, seconds: float) -> tuple[float, float]:
    return (work.mean_call_ms or 0.0, work.stuck_s / seconds if seconds else 0.0)


def _batch(window: Window) -> float | None:
    requests = sum(work.requests for work in window.replicas.values())
    return sum(work.batch for work in window.replicas.values()) / requests if requests else None
