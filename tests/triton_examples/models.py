"""Small models with the names, inputs and outputs that Triton's client examples expect."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

HEAD = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
"""
_SUMS = """
    def execute(self, requests):
        return [pb_utils.InferenceResponse(self._outputs(request)) for request in requests]

    def _outputs(self, request):
        a, b = (pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("INPUT0", "INPUT1"))
        strings = a.dtype == np.object_
        if strings:
            a, b = a.astype(np.int64), b.astype(np.int64)
        found = []
        for name, value in (("OUTPUT0", a + b), ("OUTPUT1", a - b)):
            if strings:
                texts = [str(each).encode() for each in value.ravel()]
                value = np.array(texts, np.object_).reshape(value.shape)
            if name in request.requested_output_names():
                found.append(pb_utils.Tensor(name, value))
        return found
"""
_IDENTITY = """
    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", each)]) for each in inputs]
"""
_REPEAT = """
    def execute(self, requests):
        import time
        for request in requests:
            found = (pb_utils.get_input_tensor_by_name(request, name) for name in ("IN", "DELAY"))
            values, delays = (each.as_numpy().ravel() for each in found)
            sender = request.get_response_sender()
            for at, (value, delay) in enumerate(zip(values, delays)):
                time.sleep(int(delay) / 1e3)
                out = pb_utils.Tensor("OUT", np.array([value], np.int32))
                index = pb_utils.Tensor("IDX", np.array([at], np.uint32))
                sender.send(pb_utils.InferenceResponse([out, index]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
_SEQUENCE = """
    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        def read(name):
            return int(pb_utils.get_input_tensor_by_name(request, name).as_numpy().ravel()[0])
        value = read("INPUT") + read("START")
        if ADDS_ID and read("END"):
            value += read("CORRID")
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", np.array([[value]], np.int32))])
"""
_TOTAL = """
    def initialize(self, args):
        self.totals = {}

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        def read(name):
            return int(pb_utils.get_input_tensor_by_name(request, name).as_numpy().ravel()[0])
        key = int(request.correlation_id())
        before = 0 if read("START") else self.totals[key]
        self.totals[key] = before + read("INPUT")
        value = self.totals[key] + (key if read("END") else 0)
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", np.array([[value]], np.int32))])
"""
_ECHO = """
    def execute(self, requests):
        for request in requests:
            words = pb_utils.get_input_tensor_by_name(request, "PROMPT").as_numpy()
            sender = request.get_response_sender()
            sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("TEXT", words)]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
_DECOUPLED = "model_transaction_policy { decoupled: True }"
_START = 'control_input { name: "START" control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } }'
_END = 'control_input { name: "END" control { kind: CONTROL_SEQUENCE_END int32_false_true: [ 0, 1 ] } }'
_ID = 'control_input { name: "CORRID" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } }'


class Example(NamedTuple):
    """A model: its code, its tensors (name, datatype, dims), and the rest of its configuration."""

    source: str
    inputs: list[tuple[str, str, list[int]]]
    outputs: list[tuple[str, str, list[int]]]
    max_batch: int = 8
    more: str = ""

    def write(self, folder: Path) -> None:
        """Write the model as a directory of Triton's."""
        (folder / "1").mkdir(parents=True)
        (folder / "1" / "model.py").write_text(HEAD + self.source)
        lines = ['backend: "python"', f"max_batch_size: {self.max_batch}"]
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            lines += [f'{kind} {{ name: "{n}" data_type: TYPE_{t} dims: {dims} }}' for n, t, dims in tensors]
        (folder / "config.pbtxt").write_text("\n".join([*lines, self.more]))


def _sums(datatype: str) -> Example:
    pair = [16]
    return Example(
        _SUMS,
        [("INPUT0", datatype, pair), ("INPUT1", datatype, pair)],
        [("OUTPUT0", datatype, pair), ("OUTPUT1", datatype, pair)],
    )


def _sequence(source: str, strategy: str, controls: str) -> Example:
    """Return a stateful model. The examples also send ids that are strings to the one that adds no id."""
    more = f"sequence_batching {{ max_sequence_idle_microseconds: 5000000 {strategy} {controls} }}"
    return Example(source, [("INPUT", "INT32", [1])], [("OUTPUT", "INT32", [1])], more=more)


_OLDEST = "oldest { max_candidate_sequences: 4 }"
MODELS = {
    "simple": _sums("INT32"),
    "simple_int8": _sums("INT8"),
    "simple_string": _sums("STRING"),
    "simple_identity": Example(_IDENTITY, [("INPUT0", "STRING", [-1])], [("OUTPUT0", "STRING", [-1])]),
    "repeat_int32": Example(
        _REPEAT,
        [("IN", "INT32", [-1]), ("DELAY", "UINT32", [-1]), ("WAIT", "UINT32", [1])],
        [("OUT", "INT32", [1]), ("IDX", "UINT32", [1])],
        max_batch=0,
        more=_DECOUPLED,
    ),
    "simple_sequence": _sequence(_SEQUENCE.replace("ADDS_ID", "False"), "direct { }", _START),
    "simple_dyna_sequence": _sequence(_SEQUENCE.replace("ADDS_ID", "True"), _OLDEST, _START + _END + _ID),
    # Triton refuses an id in a control of type string ("unexpected number of string elements 2").
    "simple_string_dyna_sequence": _sequence(_TOTAL, _OLDEST, _START + _END),
    "custom_identity_int32": Example(_IDENTITY, [("INPUT0", "INT32", [-1])], [("OUTPUT0", "INT32", [-1])]),
    "vllm": Example(
        _ECHO,
        [("PROMPT", "STRING", [1]), ("STREAM", "BOOL", [1])],
        [("TEXT", "STRING", [-1])],
        max_batch=0,
        more=_DECOUPLED,
    ),
}
