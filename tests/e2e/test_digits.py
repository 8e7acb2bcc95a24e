"""The example's held-out images through the gateway equal onnxruntime in process."""

from __future__ import annotations

import json
import urllib.request

import numpy as np
import tritonclient.http as triton

from tests.conftest import Figure
from tests.e2e.conftest import Digits, Stack
from tidegate import Client

TOLERANCE = 1e-5


def test_all_by_json_as_curl_sends_it(stack: Stack, served: str, digits: Digits, figure: Figure):
    url = f"{stack.settings.gateway_url}/v2/models/{served}/infer"
    labels, probabilities = [], []
    for image in digits.images:
        tensor = {"name": "image", "datatype": "FP32", "shape": [1, 64], "data": image.tolist()}
        request = urllib.request.Request(url, json.dumps({"inputs": [tensor]}).encode())
        with urllib.request.urlopen(request, timeout=120) as answer:
            outputs = {o["name"]: o for o in json.load(answer)["outputs"]}
        assert outputs["label"]["shape"] == [1]
        assert outputs["probabilities"]["shape"] == [1, 10]
        labels += outputs["label"]["data"]
        probabilities.append(outputs["probabilities"]["data"])
    assert labels == digits.labels.tolist()
    assert np.abs(np.array(probabilities, np.float32) - digits.probabilities).max() <= TOLERANCE
    figure(f"{len(labels)} held-out images by JSON: labels equal, probabilities within {TOLERANCE}")


def test_all_by_an_unmodified_tritonclient(stack: Stack, served: str, digits: Digits):
    address = stack.settings.gateway_url.removeprefix("http://")
    with triton.InferenceServerClient(address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(served)
        assert client.get_model_metadata(served)["inputs"][0]["shape"] == [-1, 64]
        for at in range(0, len(digits.images), 50):  # batches, the last one smaller
            images = digits.images[at : at + 50]
            tensor = triton.InferInput("image", images.shape, "FP32")
            tensor.set_data_from_numpy(images)
            answer = client.infer(served, [tensor])
            assert (answer.as_numpy("label") == digits.labels[at : at + 50]).all()
            off = np.abs(answer.as_numpy("probabilities") - digits.probabilities[at : at + 50])
            assert off.max() <= TOLERANCE


def test_all_by_the_sdk(client: Client, served: str, digits: Digits):
    answer = client.infer(served, {"image": digits.images[:60]})
    assert (answer["label"] == digits.labels[:60]).all()
    assert np.abs(answer["probabilities"] - digits.probabilities[:60]).max() <= TOLERANCE
    assert answer.model_version == "1"
    total = answer.timing["total"]
    parts = sum(value for name, value in answer.timing.items() if name != "total")
    assert abs(parts - total) < 0.01
