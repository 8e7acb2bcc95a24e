"""Three symptoms: adoption falls, cost grows faster than usage, errors rise under load. Pure."""

from __future__ import annotations

import math
from statistics import fmean, pstdev

from services.router.domain.diagnosis.case import Case, Day
from services.router.domain.diagnosis.finding import Remedy, Symptom, span, usual_of
from services.router.domain.diagnosis.latency import more_replicas
from services.router.domain.watch.window import Window

# Adoption falls only if two conditions are true. The mean number of callers per day is at most FALLS_TO times
# the earlier mean. The two means differ by at least STANDARD_ERRORS standard errors.
FALLS_TO = 0.7
STANDARD_ERRORS = 4.0
LEAST_CALLERS = 5
FLAT_ERRORS = 0.01
# Cost grows only if the number of replicas grows by a large factor. This factor is at least MORE_REPLICAS. It
# is also at least MORE_THAN_USAGE times the factor by which the number of requests grows.
MORE_REPLICAS, MORE_THAN_USAGE = 1.3, 1.5
IDLE = 0.5
AIM = 0.6
# Errors rise only if the share of failed requests is at least LEAST_ERRORS, and at least MORE_ERRORS times
# the earlier share.
LEAST_ERRORS, MORE_ERRORS = 0.02, 3.0
BUSY = 0.8
# The reasons with which requests are rejected if the replicas lack capacity.
REJECTIONS = ("overloaded", "deadline_passed", "no_capacity", "cold_start")


def adoption_falls(case: Case) -> Symptom | None:
    """Return the symptom if the number of callers per day falls, although errors do not rise.

    If the endpoint had few different callers (for example, because it works without API keys), compare
    requests per day instead.
    """
    count = case.spans.recent_days
    recent, before = list(case.days[-count:]), list(case.days[:-count])
    if len(recent) < count or len(before) < max(3, count):
        return None
    by_callers = fmean(day.callers for day in before) >= LEAST_CALLERS
    now, past = (fmean(_users(day, by_callers) for day in days) for days in (recent, before))
    error = math.sqrt(max(_variance(before, by_callers), past) / count)
    if past < LEAST_CALLERS or now > FALLS_TO * past or past - now < STANDARD_ERRORS * error:
        return None
    rates = [
        sum(day.failed for day in days) / max(1, sum(day.requests for day in days))
        for days in (recent, before)
    ]
    if rates[0] - rates[1] > FLAT_ERRORS:
        return None
    what = "callers" if by_callers else "requests"
    length = span(case.spans.day_s * count)
    return Symptom(
        case.endpoint,
        "adoption_falls",
        f"fewer {what}",
        (
            f"{now:.3g} {what} a day in the last {length}; before, {past:.3g} a day in {len(before)} days",
            f"errors did not rise: {rates[0]:.2%} of the requests fail; before, {rates[1]:.2%}",
        ),
        Remedy(
            f"tidegate usage --by day,principal --endpoint {case.endpoint} --since 14d",
            "the command shows which callers left, and when; ask the owners of these callers why",
        ),
        {"per_day": now, "before": past, "unit": what, "error_rate": rates[0]},
    )


def _users(day: Day, by_callers: bool) -> int:
    return day.callers if by_callers else day.requests


def _variance(days: list[Day], by_callers: bool) -> float:
    return pstdev(_users(day, by_callers) for day in days) ** 2


def per_thousand(window: Window) -> float | None:
    """Return the replica seconds per 1,000 requests; None without requests."""
    return 1000 * window.replica_s / window.requests if window.requests else None


def cost_grows(case: Case) -> Symptom | None:
    """Return the symptom if replicas were added and are mostly idle."""
    now, usual = per_thousand(case.recent), usual_of([per_thousand(each) for each in case.past])
    running = usual_of([_replicas(each) for each in case.past])
    rate = usual_of([each.rate for each in case.past])
    used = case.recent.utilization
    if not case.comparable or now is None or used is None or None in (usual, running, rate):
        return None
    assert usual is not None
    assert running is not None
    assert rate is not None
    replicas = _replicas(case.recent)
    growth = replicas / running.middle if running.middle else 0.0
    usage = case.recent.rate / rate.middle if rate.middle else 1.0
    if growth < MORE_REPLICAS or growth < MORE_THAN_USAGE * usage or used > IDLE:
        return None
    if not usual.exceeded(now, MORE_THAN_USAGE):
        return None
    return Symptom(
        case.endpoint,
        "cost_grows",
        "too many replicas",
        (
            f"1,000 requests take {now:.3g} s of replica time in the last {span(case.spans.window_s)}; "
            f"usually they take {usual.middle:.3g} s",
            f"{replicas:.1f} replicas run, {growth:.1f} times the usual number; the number of requests is "
            f"{usage:.1f} times the usual one",
            f"the replicas work {used:.0%} of their time",
        ),
        _fewer_replicas(case, replicas, used),
        {"per_thousand_s": now, "usual_s": usual.middle, "replicas": replicas, "utilization": used},
    )


def _replicas(window: Window) -> float:
    return window.replica_s / window.seconds if window.seconds else 0.0


def _fewer_replicas(case: Case, replicas: float, used: float) -> Remedy:
    main = case.main
    enough = max(1, math.ceil(replicas * used / AIM))
    if main.override is not None:
        why = f"an operator holds {main.name} at {main.override} replicas; about {enough} would be enough"
        return Remedy(f"tidegate scale {main.name} --auto", why)
    if main.low > enough:
        why = f"the minimum of {main.name} is {main.low} replicas; about {enough} would be enough"
        return Remedy(f"tidegate policy {main.name} --set min_replicas={enough}", why)
    why = f"about {enough} replicas would be enough: start replicas later, and end them sooner"
    return Remedy(f"tidegate policy {main.name} --set scaling.aggressiveness=economy", why)


def errors_under_load(case: Case) -> Symptom | None:
    """Return the symptom if errors rise together with the utilisation of the replicas."""
    window, before = case.recent, case.before
    if case.learning or window.requests < 1 or window.failed < 10:
        return None
    if window.error_rate < LEAST_ERRORS or window.error_rate < MORE_ERRORS * before.error_rate:
        return None
    rejected = sum(window.outcomes.get(reason, 0) for reason in REJECTIONS)
    used, earlier = window.utilization or 0.0, before.utilization or 0.0
    if rejected < window.failed / 2 or not (
        used >= BUSY or used > 1.3 * earlier or window.rate > 1.5 * before.rate
    ):
        return None
    worst = max(REJECTIONS, key=lambda reason: window.outcomes.get(reason, 0))
    return Symptom(
        case.endpoint,
        "errors_under_load",
        "too few replicas",
        (
            f"{window.error_rate:.1%} of {window.requests} requests failed in the last "
            f"{span(case.spans.window_s)}, mostly {worst}; before, {before.error_rate:.2%}",
            f"the replicas work {used:.0%} of their time; before, {earlier:.0%}",
            f"{window.rate:.3g} requests arrive per second; before, {before.rate:.3g}",
        ),
        more_replicas(case),
        {"error_rate": window.error_rate, "before": before.error_rate, "utilization": used, "reason": worst},
    )
