"""Models of Triton's image clients, made here: they name the strongest color of an image."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from tests.triton_examples.models import Example

SIDE = 299
COLORS = ["red", "green", "blue"]
_INPUT, _OUTPUT = "input", "InceptionV3/Predictions/Softmax"
_LABELS = 'label_filename: "labels.txt"'
_CONFIG = f"""
max_batch_size: 8
input {{ name: "{_INPUT}" data_type: TYPE_FP32 format: FORMAT_NHWC dims: [ {SIDE}, {SIDE}, 3 ] }}
output {{ name: "{_OUTPUT}" data_type: TYPE_FP32 dims: [ {len(COLORS)} ] {_LABELS} }}
"""
# A PPM file with one color: its pixels are what follows the first line.
_DECODE = f"""
    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        files = pb_utils.get_input_tensor_by_name(request, "INPUT").as_numpy().ravel()
        pixels = [np.frombuffer(each.split(b"\\n", 1)[1][:3], np.uint8) for each in files]
        images = [np.full(({SIDE}, {SIDE}, 3), each, np.float32) for each in pixels]
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", np.stack(images))])
"""
_ENSEMBLE = f"""
platform: "ensemble"
max_batch_size: 8
input {{ name: "INPUT" data_type: TYPE_STRING dims: [ 1 ] }}
output {{ name: "OUTPUT" data_type: TYPE_FP32 dims: [ {len(COLORS)} ] {_LABELS} }}
ensemble_scheduling {{
  step {{
    model_name: "decode" model_version: -1
    input_map {{ key: "INPUT" value: "INPUT" }} output_map {{ key: "OUTPUT" value: "pixels" }}
  }}
  step {{
    model_name: "color" model_version: -1
    input_map {{ key: "{_INPUT}" value: "pixels" }} output_map {{ key: "{_OUTPUT}" value: "OUTPUT" }}
  }}
}}
"""


class ColorModel:
    """An ONNX model in a directory of Triton's: the softmax of the mean of each channel."""

    def write(self, folder: Path) -> None:
        """Write the model as a directory of Triton's."""
        (folder / "1").mkdir(parents=True)
        onnx.save(_colors(), str(folder / "1" / "model.onnx"))
        (folder / "config.pbtxt").write_text('backend: "onnxruntime"' + _CONFIG)
        _write_labels(folder)


class ImageEnsemble:
    """An ensemble that decodes the bytes of an image, then names its strongest color."""

    def write(self, folder: Path) -> None:
        """Write the ensemble and its two models, each as a directory of Triton's."""
        decoder = Example(
            _DECODE, [("INPUT", "STRING", [1])], [("OUTPUT", "FP32", [SIDE, SIDE, 3])]
        )  # fmt: skip
        decoder.write(folder / "decode")
        ColorModel().write(folder / "color")
        whole = folder / folder.name
        (whole / "1").mkdir(parents=True)
        (whole / "config.pbtxt").write_text(_ENSEMBLE)
        _write_labels(whole)


def _write_labels(folder: Path) -> None:
    (folder / "labels.txt").write_text("\n".join(COLORS) + "\n")


def _colors() -> onnx.ModelProto:
    nodes = [
        helper.make_node("ReduceMean", [_INPUT], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("Softmax", ["mean"], [_OUTPUT], axis=1),
    ]
    image = helper.make_tensor_value_info(_INPUT, TensorProto.FLOAT, ["n", SIDE, SIDE, 3])
    classes = helper.make_tensor_value_info(_OUTPUT, TensorProto.FLOAT, ["n", len(COLORS)])
    graph = helper.make_graph(nodes, "colors", [image], [classes])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
