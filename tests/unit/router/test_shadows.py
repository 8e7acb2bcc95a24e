"""Shadow traffic in the router: sums over gateways, and the verdict in words."""

from __future__ import annotations

import pytest

from services.router.domain.shadow_report import judge, report
from services.router.domain.shadow_watch import GATEWAYS_KEPT, ShadowWatch
from tidegate.kernel.protocol.latency_buckets import bucket_of
from tidegate.kernel.protocol.presence import GatewayReport
from tidegate.kernel.protocol.shadow import DifferingAnswer, OutputCounts, ShadowCounts

pytestmark = pytest.mark.unit


def counts(answered: int, agreed: int, *, call_ms: tuple[float, float] = (1.0, 1.0), **more) -> ShadowCounts:
    found = ShadowCounts("s1", answered, answered, answered, answered, agreed, **more)
    found.outputs["y"] = OutputCounts(answered, agreed, rows=answered, top1=answered, max_abs=0.5)
    for times, ms in ((found.primary_call, call_ms[0]), (found.shadow_call, call_ms[1])):
        times[bucket_of(ms / 1e3)] += answered
    return found


def seen(gateway: str, given: ShadowCounts) -> GatewayReport:
    sent = GatewayReport(gateway, 0.0, shadows={"digits": given})
    return GatewayReport.from_json(sent.to_json())


def test_totals_of_gateways_are_added_also_of_those_that_ended():
    watch = ShadowWatch("s1")
    watch.observe("digits", [seen("a", counts(10, 9)), seen("b", counts(5, 5))])
    watch.observe("digits", [seen("b", counts(20, 20))])
    watch = ShadowWatch.from_json(watch.to_json())
    assert (watch.total().answered, watch.total().agreed) == (30, 29)
    assert watch.total().outputs["y"].compared == 30


def test_counts_of_another_shadow_are_ignored():
    watch = ShadowWatch("s2")
    watch.observe("digits", [seen("a", counts(10, 9))])
    assert watch.total().answered == 0


def test_counts_that_begin_anew_are_added():
    watch = ShadowWatch("s1")
    watch.observe("digits", [seen("a", counts(10, 9))])
    watch.observe("digits", [seen("a", counts(3, 3))])
    assert watch.total().answered == 13


def test_the_memory_is_limited():
    watch = ShadowWatch("s1")
    for at in range(3 * GATEWAYS_KEPT):
        watch.observe("digits", [seen(f"g{at}", counts(1, 1))])
    assert len(watch.seen) <= GATEWAYS_KEPT + 1
    assert watch.total().answered == 3 * GATEWAYS_KEPT


def test_the_last_differing_answers_are_kept():
    total = ShadowCounts("s1")
    for at in range(30):
        total.add(ShadowCounts("s1", differing=[DifferingAnswer(f"r{at}", "y", "much", float(at))]))
    assert [each.request for each in total.differing] == [f"r{at}" for at in range(20, 30)]


@pytest.mark.parametrize(
    ("given", "verdict", "why"),
    [
        (ShadowCounts("s1"), "none", "no request has been answered"),
        (
            ShadowCounts("s1", 7, refused={"no ready replica": 7}),
            "none",
            "no copy was sent (no ready replica: 7)",
        ),
        (counts(20, 20), "too few", "20 answers were compared; 100 are needed"),
        (counts(200, 200), "agrees", "200 of 200 answers agree"),
        (counts(200, 199), "agrees", "199 of 200 answers agree"),
        (counts(200, 150), "differs", "75.00% of 200 answers agree; output 'y' agrees in 75.00%"),
        (
            counts(100, 100, failed={"model_failed": 25}),
            "fails",
            "25 of 125 copies failed (model_failed: 25)",
        ),
        (counts(200, 200, call_ms=(1.0, 3.0)), "slower", "90% of the shadow's calls take"),
    ],
)
def test_the_verdict(given, verdict, why):
    judged = judge(given)
    assert (judged.verdict, why in judged.why) == (verdict, True), judged


def test_the_report():
    found = report(counts(200, 150))
    assert found["outputs"]["y"] == {
        "compared": 200, "agreed": 150, "agreement": 0.75, "unlike": 0, "max_abs": 0.5, "max_rel": 0.0,
        "rows": 200, "top1": 1.0,
    }  # fmt: skip
    assert 0.68 < found["agreement_at_least"] < 0.75
    assert found["latency_ms"]["primary"] is None
    assert found["latency_ms"]["shadow_call"]["p99"] == pytest.approx(1.0, rel=0.11)
