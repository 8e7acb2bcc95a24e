"""The text of Triton's model configuration, read back with Triton's own message."""

from datetime import UTC, datetime

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc.model_config_pb2 import ModelConfig

from services.worker.domain import model_config
from tidegate.errors import ModelFailed
from tidegate.protocol.models import DeploymentSpec, Signature, TensorSpec, Version

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
    return text_format.Parse(model_config.build(version, spec, model="m", backend=backend), ModelConfig())


def test_batching_signature() -> None:
    config = built(Signature(inputs=[X], outputs=[Y], max_batch_size=8), instances=3, threads=2)
    assert (config.name, config.backend, config.max_batch_size) == ("m", "python", 8)
    assert [(t.name, list(t.dims)) for t in config.input] == [("x", [-1, 16])]
    assert text_format.MessageToString(config.output[0]).split()[3] == "TYPE_STRING"
    assert (config.instance_group[0].count, config.instance_group[0].kind) == (3, 2)
    assert config.parameters["threads"].string_value == "2"
    assert not config.HasField("dynamic_batching")


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
    changed = model_config.adapt(USERS, model="served", instances=1)
    assert changed == USERS.replace("'mine'", '"served"')
    assert model_config.adapt(changed, model="served", instances=1) == changed


def test_adapt_adds_what_is_missing() -> None:
    config = text_format.Parse(model_config.adapt("max_batch_size: 4", model="m", instances=2), ModelConfig())
    assert (config.name, config.max_batch_size, config.instance_group[0].count) == ("m", 4, 2)
    own = 'name: "m"\ninstance_group [ { count: 5 kind: KIND_GPU } ]'
    assert model_config.adapt(own, model="m", instances=2) == own


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
