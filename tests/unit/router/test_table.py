"""The route table: which targets serve before, during and after a roll-over."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.domain.table import build_table, failing, ready_counts, serving_targets, settled
from tidegate.kernel.protocol.experiments import Experiment
from tidegate.kernel.protocol.models import (
    Deployment,
    DesiredState,
    Endpoint,
    Override,
    Rollout,
    Signature,
    StickyTraffic,
    Target,
    TensorSpec,
    TrafficRule,
    Version,
)
from tidegate.kernel.protocol.presence import ReplicaReport
from tidegate.kernel.protocol.reserves import holders, reserved_targets, with_reserves
from tidegate.kernel.protocol.scaling import Scaling

pytestmark = pytest.mark.unit

BORN = datetime(2024, 1, 1, tzinfo=UTC)
SIGNATURE = Signature(
    inputs=[TensorSpec(name="x", datatype="FP32", shape=[2])],
    outputs=[TensorSpec(name="y", datatype="FP32")],
    max_batch_size=8,
)
LEARNED = {"inputs": ["learned"]}


def version(number: int, model: str = "digits", signature: Signature | None = SIGNATURE) -> Version:
    return Version(
        model=model,
        number=number,
        format="onnx",
        artifact_sha256="0" * 64,
        artifact_size=1,
        filename="model.onnx",
        signature=signature,
        created_at=BORN,
    )


def deployment(number: int, model: str = "digits", **given_: Any) -> Deployment:
    return Deployment(
        name=f"{model}-v{number}", model=model, version=number, revision=1, created_at=BORN, **given_
    )


def targets(*wanted: str) -> list[Target]:
    """``a:3`` is Deployment a with weight 3; ``a`` has 100."""
    found = []
    for each in wanted:
        name, _, weight = each.partition(":")
        found.append(Target(deployment=name, weight=int(weight or 100)))
    return found


def endpoint(now: list[Target], before: list[Target] | None = None) -> Endpoint:
    return Endpoint(name="digits", targets=now, previous=before or [], revision=1, default_timeout_ms=500)


def world(one: Endpoint, *, versions: int = 3) -> DesiredState:
    return DesiredState(
        revision=1,
        versions=[version(n) for n in range(1, versions + 1)],
        deployments=[deployment(n) for n in range(1, 4)],
        endpoints=[one],
    )


def serving(one: Endpoint, **ready: int) -> list[str]:
    counts = {name.replace("_", "-"): count for name, count in ready.items()}
    return [t.deployment for t in serving_targets(one, counts)]


ROLLING = endpoint(targets("digits-v2"), targets("digits-v1"))
CANARY = endpoint(targets("digits-v1:90", "digits-v2:10"), targets("digits-v1"))


def test_without_a_roll_over_targets_serve_even_when_asleep():
    assert serving(endpoint(targets("digits-v1"))) == ["digits-v1"]


def test_a_roll_over_waits_for_its_first_replica():
    assert serving(ROLLING) == ["digits-v1"]
    assert serving(ROLLING, digits_v1=3) == ["digits-v1"]
    assert serving(ROLLING, digits_v2=1) == ["digits-v2"]


def test_a_split_waits_for_all_of_its_targets():
    assert serving(CANARY, digits_v1=1) == ["digits-v1"]
    assert serving(CANARY, digits_v2=1) == ["digits-v1"]
    assert serving(CANARY, digits_v1=1, digits_v2=1) == ["digits-v1", "digits-v2"]


def test_a_target_without_weight_is_not_waited_for():
    shadow = endpoint(targets("digits-v2", "digits-v3:0"), targets("digits-v1"))
    assert serving(shadow, digits_v2=1) == ["digits-v2", "digits-v3"]


def test_settled_endpoints_no_longer_need_previous():
    for one, ready, expected in (
        (ROLLING, {}, []),
        (ROLLING, {"digits-v2": 1}, [ROLLING]),
        (CANARY, {"digits-v2": 1}, []),
        (endpoint(targets("digits-v1")), {"digits-v1": 1}, []),
        (endpoint(targets("digits-v1"), targets("digits-v1")), {}, [...]),
    ):
        found = settled(world(one), ready)
        assert found == ([one] if expected == [...] else expected)


@given(st.dictionaries(st.sampled_from(["digits-v1", "digits-v2", "digits-v3"]), st.integers(0, 3)))
def test_the_compiled_table_has_the_serving_targets(ready):
    for one in (ROLLING, CANARY):
        compiled = build_table(world(one), ready, {})
        assert compiled["endpoints"]["digits"]["targets"] == [
            t.model_dump() for t in serving_targets(one, ready)
        ]
        assert (settled(world(one), ready) == [one]) == (serving_targets(one, ready) == one.targets)


def test_the_way_of_a_roll_over():
    """Every step has a serving Deployment; after settling nothing changes."""
    steps: list[tuple[Endpoint, dict[str, int]]] = [
        (endpoint(targets("digits-v1")), {"digits-v1": 1}),
        (ROLLING, {"digits-v1": 1}),
        (ROLLING, {"digits-v1": 1, "digits-v2": 1}),
        (endpoint(targets("digits-v2")), {"digits-v1": 1, "digits-v2": 1}),
        (endpoint(targets("digits-v2")), {"digits-v2": 1}),
    ]
    seen = []
    for one, ready in steps:
        (target,) = build_table(world(one), ready, {})["endpoints"]["digits"]["targets"]
        assert ready[target["deployment"]] > 0
        seen.append(target["deployment"])
    assert sum(before != after for before, after in pairwise(seen)) == 1


def test_the_fields_for_a_gateway():
    one = world(endpoint(targets("digits-v1")))
    one.deployments[0] = deployment(1, max_replicas=0, min_replicas=0, retry="never", max_queue=7)
    compiled = build_table(one, {"digits-v1": 2}, {})
    assert compiled["deployments"]["digits-v1"] == {
        "model": "digits",
        "version": 1,
        "queue": "requests.v1.digits-v1",
        "format": "onnx",
        "signature": SIGNATURE.model_dump(exclude_none=True),
        "upstream": False,
        "max_queue": 7,
        "retry": "never",
        "wakeable": False,
        "ready": 2,
    }
    assert compiled["deployments"]["digits-v2"]["wakeable"]
    assert compiled["deployments"]["digits-v2"]["ready"] == 0


def test_an_explicit_version_reaches_the_endpoints_own_deployment_of_it():
    one = world(endpoint(targets("digits-v1")))
    measured = deployment(1).model_copy(update={"name": "zz-tune"})
    one.deployments.append(measured)
    entry = build_table(one, {}, {})["endpoints"]["digits"]
    assert entry["versions"] == {"1": "digits-v1", "2": "digits-v2", "3": "digits-v3"}


def test_explicit_versions_reach_every_deployment_of_the_model():
    one = world(endpoint(targets("digits-v2")))
    one.versions.append(version(1, "letters"))
    one.deployments.append(deployment(1, "letters"))
    compiled = build_table(one, {}, {})
    assert compiled["endpoints"]["digits"] == {
        "targets": [{"deployment": "digits-v2", "weight": 100}],
        "versions": {"1": "digits-v1", "2": "digits-v2", "3": "digits-v3"},
        "labels": {},
        "default_timeout_ms": 500,
        "weight": 1,
        "failover": [],
        "reserved": {},
        "rules": [],
        "sticky": None,
        "shadow": None,
        "compared": False,
        "experiment": "",
        "feedback": False,
        "withheld": {},
    }


def test_aliases_of_the_endpoints_models_are_labels():
    one = world(endpoint(targets("digits-v2")))
    one.aliases = {"digits": {"champion": 2, "old": 9}, "letters": {"champion": 1}}
    labels = build_table(one, {}, {})["endpoints"]["digits"]["labels"]
    assert labels == {"champion": "2", "old": "9"}, "also of versions that no Deployment runs"


def test_a_learned_signature_replaces_a_missing_one():
    one = world(endpoint(targets("digits-v1")))
    one.versions[0] = version(1, signature=None)
    learned = {"digits-v1": LEARNED, "digits-v2": LEARNED}
    compiled = build_table(one, {}, learned)["deployments"]
    assert compiled["digits-v1"]["signature"] == LEARNED
    assert compiled["digits-v2"]["signature"] == SIGNATURE.model_dump(exclude_none=True), (
        "what was registered stands"
    )
    assert build_table(one, {}, {})["deployments"]["digits-v1"]["signature"] is None


@pytest.mark.parametrize(
    "one",
    [
        world(endpoint(targets("digits-v1", "gone"))),
        world(endpoint(targets("gone"))),
        world(endpoint(targets("digits-v1")), versions=0),
        world(endpoint(targets("digits-v3")), versions=2),
    ],
    ids=["one target is gone", "all targets are gone", "no versions", "a version is gone"],
)
def test_a_table_names_only_its_own_deployments(one):
    """Otherwise a gateway could not read the table, and would keep an old one."""
    compiled = build_table(one, {}, {})
    for entry in compiled["endpoints"].values():
        named = {t["deployment"] for t in entry["targets"]} | set(entry["versions"].values())
        assert named <= compiled["deployments"].keys()


def test_equal_input_gives_equal_bytes():
    one = world(CANARY)
    other = one.model_copy(deep=True)
    assert orjson.dumps(build_table(one, {"digits-v1": 1}, {})) == orjson.dumps(
        build_table(other, {"digits-v1": 1}, {})
    )


def test_ready_replicas_are_counted():
    states: list[Any] = ["ready", "ready", "starting", "draining", "failed"]
    reports = [ReplicaReport(f"r{n}", "a", 1, "h", n, state) for n, state in enumerate(states)]
    assert ready_counts([*reports, ReplicaReport("q", "b", 1, "h", 9, "starting")]) == {"a": 2}


def test_no_request_reaches_a_deployment_outside_the_endpoints_regions():
    far = {"engine": "openai-url", "upstream": "https://models.example", "region": "us"}
    one = endpoint(targets("digits-v1:1", "digits-v2:1"), targets("digits-v2"))
    rule = TrafficRule(deployment="digits-v2", header="X-Far")
    desired = world(one.model_copy(update={"forbidden_regions": ["us"], "rules": [rule]}))
    desired.deployments[1] = deployment(2, llm=far)
    table = build_table(desired, {"digits-v1": 1, "digits-v2": 1}, {})["endpoints"]["digits"]
    assert [target["deployment"] for target in table["targets"]] == ["digits-v1"]
    assert set(table["versions"].values()) == {"digits-v1", "digits-v3"}, "not by its version either"
    assert table["rules"] == []


SPLIT = targets("digits-v1:90", "digits-v2:10")


@pytest.mark.parametrize(
    ("policy", "ready", "failed", "left"),
    [
        ("wake", {"digits-v1": 1, "digits-v2": 1}, [], ["digits-v1", "digits-v2"]),
        ("wake", {"digits-v1": 1}, [], ["digits-v1", "digits-v2"]),
        ("wake", {"digits-v1": 1}, ["digits-v2"], ["digits-v1"]),
        ("others", {"digits-v1": 1}, [], ["digits-v1"]),
        ("others", {}, [], ["digits-v1", "digits-v2"]),
        ("fail", {"digits-v1": 1}, ["digits-v2"], ["digits-v1", "digits-v2"]),
    ],
)
def test_the_share_of_an_unready_target(policy, ready, failed, left):
    one = endpoint(SPLIT).model_copy(update={"when_unready": policy})
    entry = build_table(world(one), ready, {}, frozenset(failed))["endpoints"]["digits"]
    assert [t["deployment"] for t in entry["targets"]] == left
    assert set(entry["withheld"]) == {"digits-v1", "digits-v2"} - set(left), "each with its reason"


def test_a_paused_target_gives_its_share_to_the_others():
    state = world(endpoint(SPLIT))
    state.deployments[1] = deployment(2, override=Override(replicas=0))
    entry = build_table(state, {"digits-v1": 1}, {})["endpoints"]["digits"]
    assert entry["withheld"] == {"digits-v2": "the Deployment is paused"}


def test_a_canary_gets_no_traffic_before_it_is_ready_whatever_the_policy():
    rollout = Rollout(deployment="digits-v2", base=targets("digits-v1"), id="r")
    for policy in ("wake", "others", "fail"):
        one = endpoint(SPLIT).model_copy(update={"rollout": rollout, "when_unready": policy})
        entry = build_table(world(one), {"digits-v1": 1}, {})["endpoints"]["digits"]
        assert entry["withheld"] == {"digits-v2": "the canary is not ready yet"}


def test_a_condemned_canary_gets_no_traffic_while_the_registry_is_away():
    rollout = Rollout(deployment="digits-v2", base=targets("digits-v1"), id="r")
    one = endpoint(SPLIT).model_copy(update={"rollout": rollout, "when_unready": "fail"})
    ready = {"digits-v1": 1, "digits-v2": 1}
    entry = build_table(world(one), ready, {}, condemned=frozenset({"r"}))["endpoints"]["digits"]
    assert [t["deployment"] for t in entry["targets"]] == ["digits-v1"]
    assert "rolled back" in entry["withheld"]["digits-v2"]
    assert not build_table(world(one), ready, {}, condemned=frozenset({"other"}))["endpoints"]["digits"][
        "withheld"
    ]


def test_rules_and_sticky_keys_are_in_the_table():
    one = endpoint(SPLIT).model_copy(
        update={
            "rules": [TrafficRule(deployment="digits-v2", header="X-Beta")],
            "sticky": StickyTraffic(by="key"),
        }
    )
    entry = build_table(world(one), {}, {})["endpoints"]["digits"]
    assert entry["rules"] == [{"deployment": "digits-v2", "header": "X-Beta", "value": None, "tenant": None}]
    assert entry["sticky"] == {"by": "key", "name": None}


def test_failing_deployments_come_from_reports():
    def report(name, state):
        return ReplicaReport(replica="r", deployment=name, generation=1, host="h", pid=1, state=state)

    assert failing([report("a", "failed"), report("b", "ready")]) == {"a"}


def test_the_failover_serves_while_every_share_is_given_away():
    one = endpoint(targets("digits-v1"))
    one = one.model_copy(update={"failover": ["gone", "digits-v2", "digits-v3"], "when_unready": "others"})

    def now(**ready: int) -> tuple[list[str], list[str]]:
        counts = {name.replace("_", "-"): count for name, count in ready.items()}
        entry = build_table(world(one), counts, {})["endpoints"]["digits"]
        return [each["deployment"] for each in entry["targets"]], sorted(entry["withheld"])

    assert now(digits_v1=1, digits_v2=1) == (["digits-v1"], [])
    assert now(digits_v3=1) == (["digits-v3"], ["digits-v1"])
    assert now(digits_v2=1, digits_v3=1) == (["digits-v2"], ["digits-v1"])
    assert now() == (["digits-v1"], []), "nobody is ready: its requests wait"
    assert build_table(world(one), {}, {})["endpoints"]["digits"]["failover"] == ["digits-v2", "digits-v3"]


def test_a_region_that_is_forbidden_is_no_failover():
    far = {"address": "https://models.example/v2/models/digits", "region": "us"}
    one = endpoint(targets("digits-v1")).model_copy(
        update={"failover": ["digits-v2"], "forbidden_regions": ["us"]}
    )
    there = world(one)
    there.deployments[1] = deployment(2, upstream=far)
    assert build_table(there, {}, {})["endpoints"]["digits"]["failover"] == []


def test_reserved_replicas_are_a_deployment_that_only_their_endpoint_uses():
    one = endpoint(targets("digits-v1:10", "digits-v2:90")).model_copy(update={"reserved": 2})
    other = one.model_copy(update={"name": "other", "reserved": 0})
    there = world(one)
    there.endpoints.append(other)
    desired = with_reserves(there)
    stored = {each.name for each in there.deployments}
    (reserve,) = [each for each in desired.deployments if each.name not in stored]
    assert (reserve.name, reserve.version) == ("digits-v2-for-digits", 2)
    assert (reserve.min_replicas, reserve.max_replicas) == (2, 2)
    assert holders(desired) == {reserve.name: "digits-v2"}
    assert holders(there) == {}, "nothing is derived yet"
    foreign = deployment(1).model_copy(update={"name": reserve.name})
    assert holders(there.model_copy(update={"deployments": [*there.deployments, foreign]})) == {}
    table = build_table(desired, {"digits-v2-for-digits": 2}, {})
    assert table["endpoints"]["digits"]["reserved"] == {"digits-v2": "digits-v2-for-digits"}
    assert table["endpoints"]["other"]["reserved"] == {}
    for each in table["endpoints"].values():
        assert "digits-v2-for-digits" not in each["versions"].values()
    assert with_reserves(world(other)) == world(other)


def test_the_reserve_of_the_previous_target_stays_until_the_new_one_serves():
    rolling = endpoint(targets("digits-v2"), targets("digits-v1")).model_copy(update={"reserved": 1})
    assert reserved_targets(rolling) == ["digits-v2", "digits-v1"]
    names = {each.name for each in with_reserves(world(rolling)).deployments}
    assert names >= {"digits-v1-for-digits", "digits-v2-for-digits"}


def test_an_experiment_counts_only_while_each_variant_is_ready():
    """Without its treatment, the control would get all units, and the shares would seem wrong."""
    experiment = Experiment(treatments=["digits-v2"], control="digits-v1", id="x1")
    one = world(endpoint(targets("digits-v1", "digits-v2")).model_copy(update={"experiment": experiment}))
    waiting = build_table(one, {"digits-v1": 1}, {})["endpoints"]["digits"]
    assert waiting["withheld"] == {"digits-v2": "the variant is not ready yet"}
    assert (waiting["experiment"], waiting["compared"], waiting["feedback"]) == ("", False, True)
    fails = one.model_copy(deep=True)
    fails.endpoints[0].when_unready = "fail"
    assert build_table(fails, {"digits-v1": 1}, {})["endpoints"]["digits"]["withheld"] == waiting["withheld"]
    both = build_table(one, {"digits-v1": 1, "digits-v2": 1}, {})["endpoints"]["digits"]
    assert (both["experiment"], both["compared"], both["withheld"]) == ("x1", True, {})
    ended = experiment.model_copy(update={"phase": "complete"})
    over = world(endpoint(targets("digits-v1")).model_copy(update={"experiment": ended}))
    shown = build_table(over, {"digits-v1": 1}, {})["endpoints"]["digits"]
    assert (shown["experiment"], shown["compared"], shown["feedback"]) == ("", False, False)


def test_reserved_replicas_have_no_schedule():
    windows = [{"start": "0 8 * * *", "end": "0 18 * * *", "min_replicas": 9}]
    there = world(endpoint(targets("digits-v2")).model_copy(update={"reserved": 2}))
    there.deployments = [
        each.model_copy(update={"scaling": Scaling.model_validate({"schedule": windows})})
        for each in there.deployments
    ]
    reserve = next(each for each in with_reserves(there).deployments if each.name == "digits-v2-for-digits")
    assert reserve.scaling.schedule == []


def test_a_deployment_that_has_the_name_of_a_reserve_is_none():
    there = world(endpoint(targets("digits-v2")).model_copy(update={"reserved": 1}))
    there.deployments.append(there.deployments[0].model_copy(update={"name": "digits-v2-for-digits"}))
    assert build_table(with_reserves(there), {}, {})["endpoints"]["digits"]["reserved"] == {}
