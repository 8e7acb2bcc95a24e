"""The GPUs of a replica, those that a model asks for, and the report of where it runs."""

import pytest

from services.worker.domain.devices import (
    InstanceGroup,
    check_instance_groups,
    describe,
    gpu_names,
    instance_groups,
    replica_gpus,
    usable_gpus,
)
from services.worker.domain.model_config import wants_cache
from services.worker.domain.pbtxt import messages
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol.models import Resources

pytestmark = pytest.mark.unit

LISTING = "GPU-aaaa, NVIDIA H100 80GB HBM3\nGPU-bbbb, Tesla T4\n"


def test_the_gpus_of_a_replica_are_numbered_from_zero() -> None:
    assert replica_gpus(Resources(gpus=0)) == ()
    assert replica_gpus(Resources(gpus=3)) == (0, 1, 2)
    assert replica_gpus(Resources(gpus=0, gpu_memory_mb=4000)) == (0,)


def test_a_library_without_a_use_for_gpus_refuses_them() -> None:
    assert usable_gpus("onnx", (0, 1), allow_cpu=False) == (0, 1)
    assert usable_gpus("sklearn", (), allow_cpu=False) == ()
    assert usable_gpus("sklearn", (0,), allow_cpu=True) == ()
    with pytest.raises(ModelFailed, match=r"scikit-learn runs on the CPU only\. .*allow_cpu=1"):
        usable_gpus("sklearn", (0,), allow_cpu=False)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("instance_group [ { count: 2 kind: KIND_GPU gpus: [ 0, 1 ] } ]", [InstanceGroup("gpu", (0, 1))]),
        ("instance_group { kind: KIND_GPU gpus: 1 gpus: 3 }", [InstanceGroup("gpu", (1, 3))]),
        ("instance_group: [ { count: 1 }, { kind: KIND_CPU } ]",
         [InstanceGroup("auto"), InstanceGroup("cpu")]),
        ("instance_group { count: 1 }\ninstance_group { kind: 1 gpus: [ 2 ] }",
         [InstanceGroup("auto"), InstanceGroup("gpu", (2,))]),
        ("instance_group { rate_limiter { resources [ { name: 'R' count: 4 } ] } kind: KIND_MODEL }",
         [InstanceGroup("model")]),
        ("# instance_group { kind: KIND_GPU }\nparameters { key: 'instance_group' }", []),
        ("optimization { instance_group { kind: KIND_GPU } }", []),
        ("instance_group [ { kind: KIND_GPU", [InstanceGroup("gpu")]),
    ],
)  # fmt: skip
def test_instance_groups_of_a_users_configuration(text: str, found: list[InstanceGroup]) -> None:
    assert instance_groups(text) == found


def test_a_gpu_that_the_replica_does_not_hold_is_refused() -> None:
    fine = [
        InstanceGroup("gpu", (0,)),
        InstanceGroup("gpu"),
        InstanceGroup("cpu"),
        InstanceGroup("auto"),
        InstanceGroup("auto", (1,)),
    ]
    check_instance_groups("m", fine, (0, 1))
    check_instance_groups(
        "m", [InstanceGroup("cpu"), InstanceGroup("auto"), InstanceGroup("model", (5,))], ()
    )
    with pytest.raises(ModelFailed, match=r"'m' requests a GPU .* has none\. .*gpus=1"):
        check_instance_groups("m", [InstanceGroup("gpu")], ())
    with pytest.raises(
        ModelFailed, match=r"requests GPU 0, but this replica has 0 .*inside the replica: none"
    ):
        check_instance_groups("m", [InstanceGroup("auto", (0,))], ())
    with pytest.raises(ModelFailed, match=r"requests GPU 1, 3, .* has 1 .*inside the replica: 0\).*gpus=4"):
        check_instance_groups("m", [InstanceGroup("gpu", (0, 1, 3))], (0,))


def test_where_a_model_runs() -> None:
    names = {0: "NVIDIA H100 80GB HBM3"}
    assert describe([InstanceGroup("cpu")], {}) == "cpu"
    assert describe([InstanceGroup("gpu", (0,))], names) == "cuda:0 (NVIDIA H100 80GB HBM3)"
    assert describe([InstanceGroup("gpu", (0, 1)), InstanceGroup("cpu"), InstanceGroup("cpu")], names) == (
        "cuda:0 (NVIDIA H100 80GB HBM3), cuda:1, cpu"
    )


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        (None, {0: "NVIDIA H100 80GB HBM3", 1: "Tesla T4"}),
        ("GPU-bbbb", {0: "Tesla T4"}),
        ("GPU-bb,GPU-aa", {0: "Tesla T4", 1: "NVIDIA H100 80GB HBM3"}),
        ("1", {0: "Tesla T4"}),
        ("7,GPU-cccc", {}),
        ("", {}),
    ],
)
def test_names_follow_the_numbers_inside_the_replica(setting: str | None, names: dict[int, str]) -> None:
    assert gpu_names(LISTING, setting) == names


def test_a_response_cache_is_asked_for_in_so_many_words() -> None:
    assert wants_cache("name: 'm' response_cache { enable: true }")
    assert wants_cache("response_cache: { enable: True } instance_group [ { count: 1 } ]")
    assert not wants_cache("response_cache { enable: false }")
    assert not wants_cache("response_cache { }")
    assert not wants_cache("# response_cache { enable: true }")
    assert not wants_cache("parameters { key: 'response_cache' value { string_value: 'enable: true' } }")


def test_messages_keep_their_scalars_only() -> None:
    text = "a { x: 1 b { x: 2 } y: 'z' c [ { x: 3 }, { x: 4 } ] n: [ 5, 6 ] } a { x: 7 }"
    assert messages(text, "a") == [{"x": ["1"], "y": ["'z'"], "n": ["5", "6"]}, {"x": ["7"]}]
