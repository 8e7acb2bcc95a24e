"""Scaling of language models: waiting prompts, busy slots and the KV cache are the demand."""

from __future__ import annotations

import orjson
import pytest

from services.autoscaler.domain.llm_load import measure_llm, slots_of
from services.autoscaler.domain.llm_rules import llm_needs, words
from services.autoscaler.domain.memory import LlmLoad, LoadMemory
from services.autoscaler.domain.recording import (
    LastRound,
    RecordedRound,
    decide_again,
    write_chunk,
    write_round,
)
from services.autoscaler.domain.replay import arrivals
from services.autoscaler.domain.replay.comparison import LIVE
from services.autoscaler.domain.replay.controllers import DecideController
from services.autoscaler.domain.replay.fleet import ReplicaTiming
from services.autoscaler.domain.replay.run import replay
from services.autoscaler.domain.snapshot import Policy
from services.autoscaler.domain.tuning import tuning
from tests.unit.autoscaler.conftest import START, World, a_deployment, a_version
from tidegate.kernel.protocol.presence import (
    EngineReport,
    GatewayLoad,
    GatewayReport,
    GatewayView,
    ReplicaReport,
)

NAME = "digits-v1"
LLM = a_version().model_copy(update={"format": "llm"})


def needs(load: LlmLoad, ready: int = 1, start_s: float = 20.0, **given) -> dict[str, int]:
    tuned = tuning(a_deployment(**given), Policy(), start_s)
    return {need.rule: need.replicas for need in llm_needs(load, tuned, ready, start_s)}


def test_the_reason_names_requests_tokens_and_slots():
    load = LlmLoad(waiting=12, waiting_tokens=9600, slots=4, running=4)
    assert words(load) == "12 requests with 9,600 tokens wait; 4 of 4 slots are busy"
    one = LlmLoad(waiting=1, waiting_tokens=80, slots=8, running=3, engine_waiting=2)
    assert (
        words(one)
        == "1 request with 80 tokens waits, 2 more in the engine's own queue; 3 of 8 slots are busy"
    )


def test_waiting_tokens_scale_up_only_if_a_new_replica_could_help():
    load = LlmLoad(waiting=12, waiting_tokens=9600, slots=4, running=4, tokens_per_s=120.0)
    assert needs(load) == {"tokens": 4}, "80 s of work, 20 s until a new replica is ready"
    assert needs(load, start_s=100.0) == {"tokens": 1}, "it would be too late"
    assert needs(load, ready=2) == {"tokens": 8}
    assert needs(load, start_s=100.0, scaling={"aggressiveness": "latency"}, target_wait_ms=80_000) == {
        "tokens": 2
    }


@pytest.mark.parametrize(
    "load",
    [
        LlmLoad(waiting=12, waiting_tokens=9600, slots=4, running=4),
        LlmLoad(waiting=12, waiting_tokens=9600, slots=4, running=3, tokens_per_s=1.0),
        LlmLoad(slots=4, running=4, tokens_per_s=1.0),
    ],
    ids=["rate unknown", "a slot is free", "nothing waits"],
)
def test_tokens_that_need_nothing(load):
    assert needs(load) == {}


def test_the_kv_cache():
    full = LlmLoad(waiting=3, waiting_tokens=3000, slots=4, running=4, kv_used=4000, kv_total=4096)
    assert needs(full) == {"kv": 3}
    assert needs(LlmLoad(slots=4, running=4, kv_used=4090, kv_total=4096)) == {"kv": 1}, "nothing waits"


def report(state: str = "ready", inflight: int = 0, **facts) -> ReplicaReport:
    llm = EngineReport(**facts) if facts else None
    return ReplicaReport("r", NAME, 1, "h", 1, state, inflight=inflight, llm=llm)  # type: ignore[arg-type]


def test_the_slots_of_a_replica():
    llm = a_deployment(llm={"slots": 16}, instances=1)
    assert slots_of(llm, [report()]) == 16
    assert slots_of(llm, [report(slots=8)]) == 8, "as the engine says"
    assert slots_of(a_deployment(), []) == 4, "the default"


def test_the_load_of_a_language_model():
    view = GatewayView(
        [
            GatewayReport("g1", 0, {NAME: GatewayLoad(5, 9, 4, 0, 3, 900)}),
            GatewayReport("g2", 0, {NAME: GatewayLoad(2, 2, 0, 0, 1, 50)}),
        ]
    )
    engines = [
        report(running=4, kv_used=100, kv_total=500),
        report(inflight=2),
        report("starting", inflight=9),
    ]
    load, _ = measure_llm(a_deployment(), view, engines, LoadMemory(), Policy(), START)
    assert load == LlmLoad(4, 950, slots=8, running=6, kv_used=100, kv_total=500)
    idle, _ = measure_llm(
        a_deployment(), view, [report(running=0, kv_used=480, kv_total=500)], LoadMemory(), Policy(), START
    )
    assert idle.kv_used == 0, "an idle engine keeps old prompts only as a cache"
    assert measure_llm(a_deployment(), None, [], LoadMemory(), Policy(), START)[0] == LlmLoad()


def test_the_rate_of_prompt_tokens():
    memory, load = LoadMemory(), LlmLoad()
    for second in range(11):
        engines = [report(prompt_tokens=1000 + 100 * second, cached_tokens=40 * second), report("starting")]
        load, memory = measure_llm(a_deployment(), None, engines, memory, Policy(), START + second)
    assert load.tokens_per_s == 60.0, "without those that were in the cache"
    load, memory = measure_llm(a_deployment(), None, [report(prompt_tokens=5)], memory, Policy(), START + 11)
    assert load.tokens_per_s == pytest.approx(600 / 11), (
        "an engine that started again does not count backwards"
    )


class LlmWorld(World):
    """A world with a language model: each waiting request has 800 prompt tokens."""

    waiting = 0

    def desired_state(self):
        return super().desired_state().model_copy(update={"versions": [LLM]})

    def gateways(self):
        view = super().gateways()
        for each in view.reports:
            for load in each.deployments.values():
                load.waiting, load.waiting_tokens = self.waiting, 800 * self.waiting
        return view

    def reports(self):
        found = super().reports()
        for each in found:
            each.batch_mean = 4.0
            each.llm = EngineReport(slots=4, running=min(4, self.outstanding.get(NAME, 0)), kv_total=100_000)
        return found


def test_full_slots_alone_start_nothing_and_a_queue_does():
    """A request takes 6 s. The rules for tensor models would start four replicas for four requests."""
    world = LlmWorld(a_deployment(min_replicas=1, max_replicas=5, target_wait_ms=2000, llm={"slots": 4}))
    world.call_ms = 6000.0
    world.run(5)
    world.outstanding[NAME] = 4
    world.run(10)
    assert world.target() == 1
    world.outstanding[NAME], world.waiting = 16, 12
    world.run(10)
    assert world.target() > 1
    last = next(d for d in reversed(world.decisions) if d.after > d.before)
    assert "12 requests with 9,600 tokens wait; 4 of 4 slots are busy" in last.reason
    assert last.inputs["llm"]["waiting_tokens"] == 9600
    assert world.target() <= 4


def test_to_zero_and_back():
    world = LlmWorld(a_deployment(min_replicas=0, max_replicas=2, scale_to_zero_after_s=5, llm={"slots": 4}))
    world.run(20)
    assert world.target() == 0
    world.outstanding[NAME], world.waiting = 3, 3
    world.run(4)
    assert world.target() == 1
    assert len(world.names()) == 1


def test_recorded_rounds_of_a_language_model_decide_the_same():
    world = LlmWorld(a_deployment(min_replicas=1, max_replicas=5, target_wait_ms=2000, llm={"slots": 4}))
    world.call_ms = 6000.0
    world.run(5)
    world.outstanding[NAME], world.waiting = 16, 12
    world.run(5)
    last = LastRound()
    rounds = [
        RecordedRound(now, write_round(seen, last), plan.decisions) for _, seen, plan, now in world.rounds
    ]
    chunk = orjson.loads(orjson.dumps(write_chunk(Policy(), world.rounds[0][0], rounds)))
    again = list(decide_again([chunk]))
    assert any(before for _, before, _ in again)
    assert all(before == after for _, before, after in again)


def test_a_replay_knows_slots_and_tokens():
    """Two requests a second of 6 s each keep 12 slots busy. That is three replicas, not twelve."""
    came = arrivals.synthetic("constant", rps=2.0, factor=1.0, seconds=600.0, seed=1)
    deployment = a_deployment(min_replicas=1, max_replicas=20, target_wait_ms=3000, llm={"slots": 4})
    controller = DecideController(LIVE, deployment, LLM, Policy())
    timing = ReplicaTiming(call_ms=6000.0, start_s=15.0, slots=4, prompt_tokens=800, deadline_s=120.0)
    found = replay(came, controller, timing, seconds=600.0, start_at=START)
    late = [sample.target for sample in found.samples[600:]]
    assert 3 <= min(late) <= max(late) <= 7
    assert found.left + len(found.waits) + len(found.expired) == len(came)
    assert any("tokens wait" in each.reason for each in found.decisions)
