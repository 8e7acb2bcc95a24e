"""What the documentation lets a reader type, with the real curl: unchanged, but for the gateway's port."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.conftest import REPO, Digits, Stack
from tidegate import Client

pytestmark = pytest.mark.e2e

DOCUMENTED = "http://127.0.0.1:8000"
PIXELS = 64


@pytest.fixture(autouse=True)
def curl() -> str:
    """The command; without it there is nothing to test here."""
    found = shutil.which("curl")
    if found is None:
        pytest.skip("curl is not installed")
    return found


def shown(page: str, language: str) -> str:
    """The only block of a page, in this language, that calls the example with curl."""
    blocks = re.findall(
        rf"^( *)```{language}\n(.*?)^ *```", (REPO / page).read_text(), re.DOTALL | re.MULTILINE
    )
    (found,) = [
        "\n".join(line.removeprefix(indent) for line in block.splitlines())
        for indent, block in blocks
        if f"curl -s {DOCUMENTED}/v2/models/digits/infer" in block
    ]
    return found


def typed(stack: Stack, folder: Path, commands: str) -> Any:
    """What the commands print, which must be JSON."""
    script = commands.replace(DOCUMENTED, stack.settings.gateway_url)
    done = subprocess.run(
        ["sh", "-euc", script], cwd=folder, env=stack.env, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def same(answer: Any, expected: Any) -> None:
    """An answer over curl is that of the SDK, in the protocol's shape."""
    label, probabilities = answer["outputs"]
    assert (label["name"], label["datatype"], label["shape"]) == ("label", "INT64", [1])
    assert (probabilities["name"], probabilities["shape"]) == ("probabilities", [1, 10])
    assert label["data"] == expected["label"].tolist()
    assert np.allclose(probabilities["data"], expected["probabilities"].ravel(), atol=1e-5)


def test_json_as_the_readme_has_it(stack: Stack, served: str, client: Client, tmp_path: Path):
    command, _, printed = shown("README.md", "console").removeprefix("$ ").rpartition("\n")
    answer = typed(stack, tmp_path, command)
    sent = json.loads(re.search(r"-d '(.*)'", command)[1])  # type: ignore[index]
    same(answer, client.infer(served, {"image": np.array([sent["inputs"][0]["data"]], np.float32)}))
    documented = json.loads(printed)
    assert answer["outputs"][0] == documented["outputs"][0], "the label"
    assert answer.keys() == documented.keys()
    assert [output.keys() for output in answer["outputs"]] == [o.keys() for o in documented["outputs"]]


def test_binary_as_the_protocol_has_it(stack: Stack, served: str, client: Client, tmp_path: Path):
    answer = typed(stack, tmp_path, shown("docs/protocol.md", "sh"))
    assert (tmp_path / "request.bin").read_bytes().endswith(b"}" + bytes(4 * PIXELS))
    same(answer, client.infer(served, {"image": np.zeros((1, PIXELS), np.float32)}))


def test_binary_both_ways(stack: Stack, served: str, digits: Digits, curl: str, tmp_path: Path):
    """All of the held-out images that go into one call, and the answer as it comes, with its headers."""
    images = digits.images[:PIXELS]
    tensor = {"name": "image", "datatype": "FP32", "shape": list(images.shape)}
    head = json.dumps(
        {
            "inputs": [tensor | {"parameters": {"binary_data_size": images.nbytes}}],
            "outputs": [{"name": "label", "parameters": {"binary_data": True}}],
        }
    ).encode()
    body, headers, answer = (tmp_path / name for name in ("body", "headers", "answer"))
    body.write_bytes(head + images.tobytes())
    subprocess.run(
        [
            curl, "--silent", "--show-error", "--fail", "--data-binary", f"@{body}",
            "--header", f"Inference-Header-Content-Length: {len(head)}",
            "--header", "Content-Type: application/octet-stream",
            "--header", "Expect: 100-continue",
            "--dump-header", headers, "--output", answer,
            f"{stack.settings.gateway_url}/v2/models/{served}/infer",
        ],
        check=True,
        timeout=60,
    )  # fmt: skip
    assert "HTTP/1.1 100 Continue" in headers.read_text()
    length = int(re.search(r"(?im)^inference-header-content-length: (\d+)", headers.read_text())[1])  # type: ignore[index]
    found = answer.read_bytes()
    (output,) = json.loads(found[:length])["outputs"]
    assert output["parameters"] == {"binary_data_size": len(found) - length}
    assert (np.frombuffer(found[length:], np.int64) == digits.labels[:PIXELS]).all()
