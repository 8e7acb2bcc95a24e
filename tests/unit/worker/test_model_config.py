"""The text of Triton's model configuration, read back with Triton's own message."""

from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc.model_config_pb2 import ModelConfig

from services.worker.domain import model_config
from services.worker.domain.devices import replica_gpus
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol.models import DeploymentSpec, Signature, TensorSpec, Version

pytestmark = pytest.mark.unit

X = TensorSpec(name="x", datatype="FP32", shape=[-1, 16])
Y = TensorSpec(name="y", datatype="BYTES", shape=[4])
LABEL = TensorSpec(name="label", datatype="INT64", shape=[])


def built(signature: Signature | None, backend: str = "python", **settings: object) -> ModelConfig:
    version = Version(
        model="m", number=1, format="onnx", artifact_sha256="0" * 64, artifact_size=1, filename="m.onnx",
        signature=signature, created_at=datetime(2025, 1, 1, tzinfo=UTC),
    )  # fmt: skip
    spec = DeploymentSpec.model_validate({"name": "m-v1", "model": "m", "version": 1, **settings})
    gpus = replica_gpus(spec.resources)
    text = model_config.build(version, spec, model="m", backend=backend, gpus=gpus)
    return text_format.Parse(text, ModelConfig())


def test_batching_signature() -> None:
    config = built(Signature(inputs=[X], outputs=[Y], max_batch_size=8), instances=3, threads=2)
    assert (config.name, config.backend, config.max_batch_size) == ("m", "python", 8)
    assert [(t.name, list(t.dims)) for t in config.input] == [("x", [-1, 16])]
    assert text_format.MessageToString(config.output[0]).split()[3] == "TYPE_STRING"
    assert (config.instance_group[0].count, config.instance_group[0].kind) == (3, 2)
    assert config.parameters["threads"].string_value == "2"
    assert not config.HasField("dynamic_batching")


def test_a_model_with_gpus_has_its_instances_on_each_of_them() -> None:
    """It used to be KIND_CPU even if the replica had GPUs."""
    signature = Signature(inputs=[X], outputs=[Y], max_batch_size=8)
    (group,) = built(signature, "onnxruntime", instances=2, resources={"gpus": 2}).instance_group
    assert (group.count, group.kind, list(group.gpus)) == (2, 1, [0, 1])
    (group,) = built(signature, resources={"gpu_memory_mb": 4000}).instance_group
    assert (group.count, group.kind, list(group.gpus)) == (1, 1, [0])


def test_scalar_rows_spell_out_the_row_axis() -> None:
    config = built(Signature(inputs=[X], outputs=[LABEL], max_batch_size=8))
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [-1, -1, 16]
    assert list(config.output[0].dims) == [-1]
    assert config.parameters[model_config.ROWS].string_value == "8"


def test_without_signature_the_model_describes_itself() -> None:
    config = built(None)
    assert not config.input
    assert not config.output


def test_scalar_without_rows_is_refused() -> None:
    with pytest.raises(ModelFailed, match="shape \\[1\\]"):
        built(Signature(inputs=[LABEL], outputs=[Y]))


@pytest.mark.parametrize(
    ("backend", "key"), [("onnxruntime", "intra_op_thread_count"), ("pytorch", "INTRA_OP_THREAD_COUNT")]
)
def test_native_backends_get_their_threads(backend: str, key: str) -> None:
    config = built(Signature(inputs=[X], outputs=[Y], max_batch_size=8), backend, threads=4)
    assert config.parameters[key].string_value == "4"


@given(st.text(min_size=1, max_size=40).filter(lambda name: "\0" not in name))
def test_any_name_survives(name: str) -> None:
    tensor = TensorSpec(name=name, datatype="FP32", shape=[1])
    config = built(Signature(inputs=[tensor], outputs=[Y], max_batch_size=1))
    assert config.input[0].name == name


USERS = """
# name: "not this"
max_batch_size: 4
input [ { name: "inner", data_type: TYPE_FP32, dims: [ 2 ] } ]
name: 'mine' platform: "ensemble"
parameters { key: "a" value: { string_value: "name: \\"x\\" {" } }
"""


def test_top_level_skips_comments_strings_and_nested_fields() -> None:
    fields = model_config.top_level(USERS)
    assert fields["name"] == "mine"
    assert fields["platform"] == "ensemble"
    assert fields["max_batch_size"] == "4"
    assert list(fields) == ["max_batch_size", "input", "name", "platform", "parameters"]


def test_adapt_changes_only_the_name() -> None:
    changed = adapted(USERS, model="served", backend=None)
    assert changed == USERS.replace("'mine'", '"served"')
    assert adapted(changed, model="served", backend=None) == changed


def adapted(text: str, *, instances: int = 1, threads: int = 1, **how: Any) -> str:
    fields = {"name": "m-v1", "model": "m", "version": 1, "instances": instances, "threads": threads}
    return model_config.adapt(text, DeploymentSpec.model_validate(fields), **{"model": "m", **how})


def parsed(text: str) -> Any:
    return text_format.Parse(text, ModelConfig())


def test_adapt_adds_what_is_missing() -> None:
    config = parsed(adapted("max_batch_size: 4", instances=2, backend="python"))
    assert (config.name, config.max_batch_size, config.instance_group[0].count) == ("m", 4, 2)
    assert config.backend == "python"
    own = 'name: "m" backend: "python"\ninstance_group [ { count: 5 kind: KIND_GPU } ]'
    assert adapted(own, instances=2, backend="python") == own
    config = parsed(adapted("", threads=3, backend="onnxruntime"))
    assert (config.name, config.backend) == ("m", "onnxruntime")
    assert config.parameters["intra_op_thread_count"].string_value == "3"
    own = "parameters { key: 'intra_op_thread_count' value { string_value: '7' } }"
    config = parsed(adapted(own, threads=3, backend="onnxruntime"))
    assert config.parameters["intra_op_thread_count"].string_value == "7"


def test_adapt_puts_a_model_without_instance_group_on_the_replicas_gpus() -> None:
    (group,) = parsed(adapted("", instances=2, backend="python", gpus=(0, 1))).instance_group
    assert (group.count, group.kind, list(group.gpus)) == (2, 1, [0, 1])
    own = 'name: "m" backend: "python"\ninstance_group [ { count: 5 kind: KIND_CPU } ]'
    assert adapted(own, backend="python", gpus=(0,)) == own, "the user's own word stands"
    assert "instance_group" not in adapted(ensemble("a"), backend=None, gpus=(0,))


def test_adapt_puts_our_runtime_in_the_place_of_a_backend() -> None:
    text = """default_model_filename: "net.onnx" name: "x" platform: "onnxruntime_onnx" max_batch_size: 3
    dynamic_batching { }"""
    config = parsed(adapted(text, backend="onnxruntime", stand_in=True))
    assert (config.name, config.backend, config.platform) == ("m", "python", "")
    assert (config.default_model_filename, config.max_batch_size) == ("", 3)
    assert config.HasField("dynamic_batching")
    assert parsed(adapted("", backend="onnxruntime", stand_in=True)).backend == "python"


def ensemble(*parts: str) -> str:
    steps = ", ".join(f'{{ model_name: "{part}" model_version: -1 }}' for part in parts)
    return f'platform: "ensemble" # model_name: "not"\nensemble_scheduling {{ step [ {steps} ] }}'


def test_parts_are_loaded_before_what_is_made_of_them() -> None:
    configs = {
        "all": ensemble("b", "inner"),
        "inner": ensemble("z", "a", "elsewhere"),
        "a": "", "b": 'parameters { key: "model_name" value { string_value: "c" } }', "z": "",
    }  # fmt: skip
    assert model_config.served_model(configs, "m") == "all"
    assert model_config.load_order(configs, "all") == ["a", "b", "z", "inner", "all"]
    assert model_config.load_order(configs, "b") == ["a", "z", "inner", "all", "b"]
    circle = {"a": ensemble("b"), "b": ensemble("a")}
    assert sorted(model_config.load_order(circle, "a")) == ["a", "b"]


def test_served_model() -> None:
    ensemble = 'platform: "ensemble"'
    assert model_config.served_model({"only": ""}, "m") == "only"
    assert model_config.served_model({"a": "", "m": ""}, "m") == "m"
    assert model_config.served_model({"a": "", "e": ensemble, "b": ""}, "m") == "e"
    with pytest.raises(ModelFailed, match="a, b"):
        model_config.served_model({"a": "", "b": ""}, "m")
    with pytest.raises(ModelFailed, match="no Triton model"):
        model_config.served_model({}, "m")


def test_backend_of() -> None:
    assert model_config.backend_of('backend: "python"') == "python"
    assert model_config.backend_of('platform: "onnxruntime_onnx"') == "onnxruntime"
    assert model_config.backend_of("max_batch_size: 1") is None
