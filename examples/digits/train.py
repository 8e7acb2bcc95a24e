"""Train a classifier of handwritten digits, and write the files to serve it and to check its outputs.

It runs in the models' environment (scikit-learn, skl2onnx, onnxruntime) without a network, in a few seconds:

    <runtime>/model-env/bin/python3 examples/digits/train.py --out DIR

``model.onnx``     input ``image`` FP32[n, 64] (8 x 8 pixels, 0 to 16);
                   outputs ``label`` INT64[n], ``probabilities`` FP32[n, 10]
``heldout.npz``    images that are not in the training set: ``image``, ``truth``, and onnxruntime's own
                   ``label`` and ``probabilities``, one image at a time
``metadata.json``  metadata of the version for the registry: training date, accuracy, packages
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import FloatTensorType, Int64TensorType
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

SEED = 7
PIXELS, CLASSES = 64, 10
BATCH_TOLERANCE = 1e-5


def main() -> None:
    """Train, export, check the export, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the results; it is made if it is missing"
    )
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    images, truth = load_digits(return_X_y=True)
    seen, heldout, seen_truth, heldout_truth = train_test_split(
        images.astype(np.float32), truth, test_size=0.2, random_state=SEED, stratify=truth
    )
    onnx_file = export(train(seen, seen_truth))
    (out / "model.onnx").write_bytes(onnx_file)

    label, probabilities, batch_difference = answers(onnx_file, heldout)
    accuracy = float((label == heldout_truth).mean())
    np.savez(
        out / "heldout.npz", image=heldout, truth=heldout_truth, label=label, probabilities=probabilities
    )
    metadata = {
        "trained_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "metrics": {"accuracy": round(accuracy, 4), "heldout_images": float(len(heldout))},
        "dependencies": [
            f"{name}=={version(name)}" for name in ("scikit-learn", "skl2onnx", "onnxruntime", "numpy")
        ],
        "tags": {"task": "classification", "dataset": "scikit-learn digits"},
        "notes": f"One batch and one image at a time differ by at most {batch_difference:.1e}.",
    }
    (out / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    print(
        f"accuracy {accuracy:.4f} on {len(heldout)} held-out images, "
        f"{len(onnx_file) / 1024:.0f} KiB in {out / 'model.onnx'}"
    )
    if batch_difference > BATCH_TOLERANCE:
        raise SystemExit(
            f"A batch and single images differ by {batch_difference:.1e}, more than {BATCH_TOLERANCE:g}."
        )


def train(images: Any, truth: Any) -> Pipeline:
    """Train a small network on standardised pixels."""
    network = MLPClassifier(hidden_layer_sizes=(64,), max_iter=300, tol=1e-3, random_state=SEED)
    return make_pipeline(StandardScaler(), network).fit(images, truth)


def export(model: Pipeline) -> bytes:
    """Return the pipeline as ONNX, with a free batch axis and plain tensors as outputs."""
    converted = convert_sklearn(
        model,
        name="digits",
        initial_types=[("image", FloatTensorType([None, PIXELS]))],
        final_types=[("label", Int64TensorType([None])), ("probabilities", FloatTensorType([None, CLASSES]))],
        options={id(model): {"zipmap": False}},
    )
    serialized: bytes = converted.SerializeToString()
    return serialized


def answers(onnx_file: bytes, images: Any) -> tuple[Any, Any, float]:
    """Return labels and probabilities of single images, and the largest difference of a batch."""
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    outputs = ["label", "probabilities"]
    single = [session.run(outputs, {"image": image[None]}) for image in images]
    label = np.concatenate([each[0] for each in single])
    probabilities = np.concatenate([each[1] for each in single])
    batch_label, batch_probabilities = session.run(outputs, {"image": images})
    assert (batch_label == label).all(), "the labels of a batch differ from those of single images"
    return label, probabilities, float(np.abs(batch_probabilities - probabilities).max())


if __name__ == "__main__":
    main()
