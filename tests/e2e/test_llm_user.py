"""A person with a language model: `up --llm`, `chat` on a terminal and in a pipe, `bench`, the SDK."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PATIENCE_S
from tests.e2e.conftest import REPO, Stack
from tests.e2e.terminal import CTRL_C, CTRL_D, terminal
from tidegate import AsyncClient, Client
from tidegate.cli.llm_example import PROMPT, snippet
from tidegate.kernel.errors import NotFound

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def up(stack: Stack) -> Any:
    """The document of the first `tidegate up --llm`."""
    return stack.cli("up", "--llm", timeout_s=280)


@pytest.fixture
def model(up: Any) -> str:
    return str(up["llm"]["model"])


def waits_until_idle(stack: Stack, model: str) -> None:
    """Wait until the engine has a free slot again: a short chat is answered."""
    with Client(stack.settings.gateway_url, timeout_s=PATIENCE_S) as client:
        assert client.chat(model, "Hello?", max_tokens=1).usage


def test_up_deploys_a_model_and_asks_it_something(stack: Stack, up: Any) -> None:
    told = up["llm"]
    assert told["prompt"] == PROMPT
    assert told["text"].strip()
    assert told["usage"]["completion_tokens"] > 1
    assert told["base_url"] == f"{stack.settings.gateway_url}/v1"
    again = stack.run("up", "--llm")
    assert again.returncode == 0, again.stderr
    assert "smollm2-v1 was there already" in again.stderr
    assert PROMPT in again.stdout
    assert "OpenAI(base_url=" in again.stdout
    assert len(stack.cli("versions", "smollm2")["items"]) == 1


def test_one_message_from_the_command_line_or_a_pipe(stack: Stack, model: str) -> None:
    done = stack.run("chat", model, "Say hello.", "--max-tokens", "8", "--temperature", "0", "--stats")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "first token after" in done.stderr
    command = [sys.executable, "-P", "-m", "tidegate.cli", "chat", model, "--json", "--max-tokens", "8"]
    piped = subprocess.run(
        [*command, "--temperature", "0"],
        input="Say hello.",
        env=stack.env,
        cwd=REPO,
        text=True,
        capture_output=True,
    )
    document = json.loads(piped.stdout)
    assert document["text"].strip()
    assert document["usage"]["completion_tokens"] <= 8
    assert document["first_token_s"] > 0


def test_an_unknown_model(stack: Stack, model: str) -> None:
    done = stack.run("chat", "smolm2", "Hello?", env={**stack.env, "TIDEGATE_CONTEXT": ""})
    assert done.returncode == 3
    assert "Did you mean smollm2" in done.stderr


def test_a_stack_that_is_down(stack: Stack) -> None:
    env = {**stack.env, "TIDEGATE_GATEWAY_URL": "http://127.0.0.1:9", "TIDEGATE_API_KEY": "tg_x"}
    done = stack.run("chat", "smollm2", "Hello?", env=env)
    assert done.returncode == 6
    assert "tidegate up" in done.stderr


def test_a_session_on_a_terminal(stack: Stack, model: str) -> None:
    long = ("--max-tokens", "1500", "--set", "ignore_eos=true")
    with terminal("chat", model, *long, env=stack.env, cwd=REPO) as screen:
        screen.wait_for(">>> ")
        screen.type("Write a long story.\n")
        screen.wait_for("story.\n")
        screen.wait_for_output()
        screen.type(CTRL_C)
        screen.wait_for("The answer was cancelled.")
        waits_until_idle(stack, model)
        screen.wait_for(">>> ")
        screen.type("/stats\n")
        screen.wait_for("Figures are shown.")
        screen.wait_for(">>> ")
        screen.type(CTRL_C)
        screen.wait_for("once more, or Ctrl-D", again=CTRL_C)
        screen.wait_for(">>> ")
        screen.type(CTRL_C)
        assert screen.end(again=CTRL_C) == 130


def test_a_session_ends_with_its_input(stack: Stack, model: str) -> None:
    with terminal("chat", model, "--max-tokens", "4", "--stats", env=stack.env, cwd=REPO) as screen:
        screen.wait_for(">>> ")
        screen.type("Hello?\n")
        screen.wait_for("tokens in")
        screen.wait_for(">>> ")
        screen.type(CTRL_D)
        assert screen.end() == 0


def test_bench_counts_every_request(stack: Stack, model: str) -> None:
    options = ("--answer-tokens", "4", "--prompt-tokens", "50", "--ignore-eos")
    found = stack.cli("bench", model, "--callers", "6", "--requests", "9", *options)
    assert (found["answered"], found["failed"], found["tokens"]) == (9, 0, 36)
    assert found["first_token"]["p50_ms"] > 0
    assert found["prompt_tokens"] == pytest.approx(9 * 50, rel=0.15)


def test_bench_without_a_model(stack: Stack, model: str) -> None:
    done = stack.run("bench", "nobody")
    assert done.returncode == 3
    assert "There is no model 'nobody'" in done.stderr


async def test_the_sdk_streams_and_cancels(stack: Stack, model: str) -> None:
    url = stack.settings.gateway_url
    with Client(url, timeout_s=PATIENCE_S) as client:
        with client.chat(
            model, "Write a long story.", stream=True, max_tokens=1500, ignore_eos=True
        ) as stream:
            texts = [next(stream).text for _ in range(4)]
        assert stream.so_far.text == "".join(texts)
        whole = client.chat(model, "Say hello.", temperature=0, max_tokens=8)
        streamed = client.chat(model, "Say hello.", temperature=0, max_tokens=8, stream=True).result()
        assert streamed.text  # the packaged weights are not exact: two greedy answers may differ
        assert streamed.usage is not None
        assert whole.usage is not None
        assert streamed.usage.prompt_tokens == whole.usage.prompt_tokens
        assert client.complete(model, "Once upon a", max_tokens=3).text
        with pytest.raises(NotFound):
            client.chat("nobody", "Hello?")
    async with AsyncClient(url, timeout_s=PATIENCE_S) as other:
        async with other.chat(
            model, "Write a long story.", stream=True, max_tokens=1500, ignore_eos=True
        ) as answer:
            async for _ in answer:
                break
        assert (await other.chat(model, "Say hello.", max_tokens=8)).text


def test_the_snippet_for_openais_client(stack: Stack, model: str, tmp_path: Path) -> None:
    pytest.importorskip("openai", reason="the package openai is not installed")
    program = tmp_path / "program.py"
    program.write_text(snippet(stack.settings.gateway_url, needs_key=False))
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", str(program)], env={**os.environ}, text=True, capture_output=True, timeout=280
    )
    assert done.returncode == 0, f"{time.monotonic() - began:.0f} s\n{done.stderr}"
    assert done.stdout.strip()
