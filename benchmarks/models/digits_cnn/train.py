"""Train a small convolutional network on handwritten digits with numpy, and write it as ONNX.

    <runtime>/model-env/bin/python3 benchmarks/models/digits_cnn/train.py FOLDER

``model.onnx``   input ``image`` FP32[n, 1, 8, 8] (0 to 1); output ``scores`` FP32[n, 10]
``samples.npz``  images that are not in the training set: ``image``, ``labels``
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SEED, EPOCHS, BATCH, RATE = 7, 12, 32, 1e-3
FIRST, SECOND, CLASSES = 32, 64, 10


def patches(images: Any) -> Any:
    """Return the 3 x 3 neighbourhood of each pixel: [n, 8, 8, channels * 9]."""
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(len(images), 8, 8, -1)


def unpatched(gradient: Any, channels: int) -> Any:
    """Return the gradient of the images from that of their patches."""
    n = len(gradient)
    parts = gradient.reshape(n, 8, 8, channels, 3, 3)
    found = np.zeros((n, channels, 10, 10), np.float32)
    for row in range(3):
        for column in range(3):
            found[:, :, row : row + 8, column : column + 8] += parts[..., row, column].transpose(0, 3, 1, 2)
    return found[:, :, 1:-1, 1:-1]


def step(weights: dict[str, Any], images: Any, truth: Any) -> dict[str, Any]:
    """Return the gradients of the cross entropy of a batch."""
    n = len(images)
    first = patches(images)
    a = np.maximum(first @ weights["w1"] + weights["b1"], 0).transpose(0, 3, 1, 2)
    second = patches(a)
    b = np.maximum(second @ weights["w2"] + weights["b2"], 0)
    blocks = b.reshape(n, 4, 2, 4, 2, SECOND)
    pooled = blocks.max(axis=(2, 4))
    flat = pooled.transpose(0, 3, 1, 2).reshape(n, -1)
    scores = flat @ weights["w3"] + weights["b3"]
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    shares[np.arange(n), truth] -= 1
    shares /= n
    d_flat = (shares @ weights["w3"].T).reshape(n, SECOND, 4, 4).transpose(0, 2, 3, 1)
    mask = blocks == pooled[:, :, None, :, None]
    d_b = (mask * d_flat[:, :, None, :, None]).reshape(n, 8, 8, SECOND) * (b > 0)
    d_a = unpatched(d_b @ weights["w2"].T, FIRST) * (a > 0)
    d_first = d_a.transpose(0, 2, 3, 1)
    return {
        "w3": flat.T @ shares, "b3": shares.sum(0),
        "w2": second.reshape(-1, FIRST * 9).T @ d_b.reshape(-1, SECOND), "b2": d_b.sum((0, 1, 2)),
        "w1": first.reshape(-1, 9).T @ d_first.reshape(-1, FIRST), "b1": d_first.sum((0, 1, 2)),
    }  # fmt: skip


def train(images: Any, truth: Any) -> dict[str, Any]:
    """Return the weights after a few epochs of Adam."""
    random = np.random.default_rng(SEED)
    sizes = {"w1": (9, FIRST), "w2": (FIRST * 9, SECOND), "w3": (SECOND * 16, CLASSES)}
    weights = {
        name: random.normal(0, (2 / size[0]) ** 0.5, size).astype(np.float32) for name, size in sizes.items()
    }
    weights |= {
        name: np.zeros(size, np.float32) for name, size in (("b1", FIRST), ("b2", SECOND), ("b3", CLASSES))
    }
    mean = {name: np.zeros_like(each) for name, each in weights.items()}
    square = {name: np.zeros_like(each) for name, each in weights.items()}
    count = 0
    for _ in range(EPOCHS):
        order = random.permutation(len(images))
        for start in range(0, len(order), BATCH):
            at = order[start : start + BATCH]
            count += 1
            for name, gradient in step(weights, images[at], truth[at]).items():
                mean[name] = 0.9 * mean[name] + 0.1 * gradient
                square[name] = 0.999 * square[name] + 0.001 * gradient**2
                moved = mean[name] / (1 - 0.9**count) / (np.sqrt(square[name] / (1 - 0.999**count)) + 1e-8)
                weights[name] = (weights[name] - RATE * moved).astype(np.float32)
    return weights


def export(weights: dict[str, Any]) -> bytes:
    """Return the network as ONNX, with a free batch axis."""
    tensors = {
        "k1": weights["w1"].T.reshape(FIRST, 1, 3, 3), "b1": weights["b1"],
        "k2": weights["w2"].T.reshape(SECOND, FIRST, 3, 3), "b2": weights["b2"],
        "w3": weights["w3"], "b3": weights["b3"],
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["image", "k1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["a1"]),
        helper.make_node("Conv", ["a1", "k2", "b2"], ["c2"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["a2"]),
        helper.make_node("MaxPool", ["a2"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "digits-cnn",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", CLASSES])],
        [numpy_helper.from_array(np.ascontiguousarray(each), name) for name, each in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    serialized: bytes = model.SerializeToString()
    return serialized


def main() -> None:
    """Train, and write the files."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    images, truth = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    seen, heldout, seen_truth, heldout_truth = train_test_split(
        images, truth, test_size=0.4, random_state=SEED, stratify=truth
    )
    (folder / "model.onnx").write_bytes(export(train(seen, seen_truth)))
    np.savez(folder / "samples.npz", image=heldout, labels=heldout_truth)


if __name__ == "__main__":
    main()
