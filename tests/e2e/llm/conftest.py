"""A stack with a real language model: SmolLM2-135M in llama.cpp, as packages bring both."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import smollm2
from deploy.bootstrap.step import StepFailed
from tests.e2e.conftest import Stack

SLOTS = 2
# SmolLM2 has no template for tools. This one is ChatML, as SmolLM2 wants it, with tools as Hermes has them.
TOOL_TEMPLATE = Path(__file__).parent / "tools.jinja"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The packaged model. Without the package, the test is skipped and says why."""
    try:
        return smollm2.provide("q4")
    except StepFailed as failure:
        pytest.skip(f"{failure.what} {failure.remedy}")


@pytest.fixture(scope="session")
def smol(stack: Stack, smollm2_gguf: Path) -> str:
    """The model, deployed as ``smol``. It also returns embeddings."""
    arguments = {"embedding": "true", "pooling_type": "mean", "chat_template": TOOL_TEMPLATE.read_text()}
    options = [word for name, value in arguments.items() for word in ("--engine-arg", f"{name}={value}")]
    stack.deploy(smollm2_gguf, "smol", "--slots", str(SLOTS), "--context", "1024", "--min", "1", *options)
    return "smol"
