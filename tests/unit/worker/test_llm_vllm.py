"""vLLM as an engine: its command line, its events, its metrics, and how a lost stream continues."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import PATIENCE_S
from tests.unit.worker.conftest import LLM_RUNTIME

pytestmark = pytest.mark.unit

NAMES = ("calls", "keeper", "vllm", "vllm_command", "vllm_events", "vllm_metrics", "vllm_resume")
CHAT = "/v1/chat/completions"
CONFIG = {
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "max_position_embeddings": 2048,
}  # fmt: skip


@pytest.fixture(scope="module")
def llm(llm_module) -> Any:
    return SimpleNamespace(**{name: llm_module(name) for name in NAMES})


def plan(**fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": "m", "weights": "weights", "slots": 8, "context": 8192, "kv_total": 16384, "threads": 2,
        "gpus": [], "arguments": {}, "adapters": {}, "engine_python": "/e/bin/python",
    }  # fmt: skip
    return found | fields


def options(words: list[str]) -> dict[str, str]:
    """Return each option with the words after it."""
    found: dict[str, str] = {}
    for word in words[3:]:
        if word.startswith("--"):
            name, found[word] = word, ""
        else:
            found[name] = f"{found[name]} {word}".strip()
    return found


def command(llm: Any, **fields: Any) -> dict[str, str]:
    return options(llm.vllm_command.command(plan(**fields), CONFIG, Path("/m"), "/s", bf16=False))


def test_the_command_has_the_slots_and_no_more_context_than_the_model(llm: Any):
    found = command(llm)
    assert (found["--max-num-seqs"], found["--max-model-len"]) == ("8", "2048")
    assert (found["--model"], found["--served-model-name"], found["--uds"]) == ("/m/weights", "m", "/s")
    assert (found["--dtype"], found["--block-size"], found["--enforce-eager"]) == ("float32", "32", "")


def test_arguments_of_the_deployment_are_passed_and_override_the_defaults(llm: Any):
    found = command(
        llm,
        arguments={
            "tensor_parallel_size": 2,
            "dtype": "bfloat16",
            "enable_prefix_caching": False,
            "trust-remote-code": True,
        },
    )
    assert found["--tensor-parallel-size"] == "2"
    assert found["--dtype"] == "bfloat16"
    assert "--no-enable-prefix-caching" in found
    assert found["--trust-remote-code"] == ""


def test_all_gpus_of_the_replica_are_used_unless_the_deployment_divides_them(llm: Any):
    assert command(llm, gpus=[0, 1])["--tensor-parallel-size"] == "2"
    assert "--dtype" not in command(llm, gpus=[0, 1])
    divided = command(llm, gpus=[0, 1], arguments={"pipeline_parallel_size": 2})
    assert "--tensor-parallel-size" not in divided


def test_a_share_of_a_gpu_limits_the_memory(llm: Any):
    assert command(llm, gpus=[0], gpu_share=0.245)["--gpu-memory-utilization"] == "0.245"
    own = command(llm, gpus=[0], gpu_share=0.245, arguments={"gpu_memory_utilization": 0.2})
    assert own["--gpu-memory-utilization"] == "0.2"


def test_adapters_are_loaded_from_the_artifact(llm: Any):
    found = command(llm, adapters={"legal": "adapters/legal"})
    assert found["--lora-modules"] == "legal=/m/weights/adapters/legal"
    assert "--enable-lora" in found


@pytest.mark.parametrize("name", ["host", "max_num_seqs", "--max-model-len", "api_key"])
def test_an_argument_that_the_runtime_sets_is_refused(llm: Any, name: str):
    with pytest.raises(ValueError, match="is set by"):
        command(llm, arguments={name: 1})


def test_the_environment_has_no_secret_and_room_for_the_tokens(llm: Any):
    seen = {
        "TIDEGATE_UPSTREAM_CREDENTIAL": "s",
        "PYTHONPATH": "/x",
        "LD_LIBRARY_PATH": "/triton",
        "HOME": "/h",
    }
    found = llm.vllm_command.environment(plan(kv_total=60_000), CONFIG, seen, Path("/e/lib"), "/p")
    assert found.keys() & {"TIDEGATE_UPSTREAM_CREDENTIAL", "PYTHONPATH"} == set()
    assert (found["LD_LIBRARY_PATH"], found["HOME"]) == ("/e/lib:/triton", "/h")
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "3"  # 60,000 tokens of 45 KiB
    assert (found["TMPDIR"], found["TORCHINDUCTOR_CACHE_DIR"]) == ("/p", "/h/.cache/torchinductor")
    assert "VLLM_TARGET_DEVICE" not in llm.vllm_command.environment(
        plan(gpus=[0]), CONFIG, {}, Path("/e/lib"), "/p"
    )


def test_metrics_of_all_engines_are_added_up(llm: Any):
    text = "\n".join(
        f'vllm:num_requests_running{{engine="{i}"}} 2.0\nvllm:kv_cache_usage_perc{{engine="{i}"}} 0.25\n'
        f'vllm:cache_config_info{{block_size="32",engine="{i}",num_gpu_blocks="100"}} 1.0'
        for i in range(2)
    )
    assert llm.vllm_metrics.read_metrics(text) == {"running": 4, "kv_used": 1600, "kv_total": 6400}


def chunk(**more: Any) -> bytes:
    return json.dumps({"id": "c", "object": "chat.completion.chunk", "model": "m", **more}).encode()


def choice(index: int = 0, text: str = "x", ids: tuple[int, ...] = (7,)) -> dict[str, Any]:
    return {"index": index, "delta": {"content": text}, "token_ids": list(ids)}


def usage(prompt: int, answer: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def test_ids_and_counts_become_facts_and_leave_the_event(llm: Any):
    events = llm.vllm_events.VllmEvents({"model": "shown", "stream": True})
    [first], meta = events.read(chunk(choices=[choice()], usage=usage(3, 1), prompt_token_ids=[1, 2, 3]))
    assert meta == {"prompt_ids": [1, 2, 3], "ids": [7], "usage": [3, 1, 0]}
    event = json.loads(first)
    assert event["model"] == "shown"
    assert event["choices"] == [{"index": 0, "delta": {"content": "x"}}]
    assert event.keys() & {"usage", "prompt_token_ids"} == set()


def test_what_the_caller_asked_for_stays(llm: Any):
    body = {"return_token_ids": True, "stream_options": {"continuous_usage_stats": True}}
    [event], _ = llm.vllm_events.VllmEvents(body).read(chunk(choices=[choice()], usage=usage(3, 1)))
    assert json.loads(event)["choices"][0]["token_ids"] == [7]
    assert json.loads(event)["usage"]["completion_tokens"] == 1


def test_the_counts_of_several_choices_are_added_up_and_have_no_ids(llm: Any):
    events = llm.vllm_events.VllmEvents({"n": 2})
    seen = [
        events.read(chunk(choices=[choice(i)], usage=usage(3, n)))[1] for i, n in ((0, 1), (1, 1), (0, 2))
    ]
    assert [meta["usage"] for meta in seen] == [[3, 1, 0], [3, 2, 0], [3, 3, 0]]
    assert all("ids" not in meta for meta in seen)
    assert events.read(chunk(choices=[], usage=usage(3, 9)))[1]["usage"] == [3, 9, 0]


def test_a_failure_in_the_stream_has_its_status_and_is_checked_first(llm: Any):
    checked: list[bool] = []
    events = llm.vllm_events.VllmEvents({}, lambda: checked.append(True))
    assert events.read(b'{"error": {"message": "EngineCore died", "code": 500}}')[1] == {"status": 500}
    assert events.read(b'{"error": {"message": "too long", "code": 400}}')[1] == {"status": 400}
    assert checked == [True]


# --- a lost stream ---------------------------------------------------------------------------------------

WORDS = {1: "The", 2: " sea", 3: "", 4: " is \U0001f30a", 5: " wide"}


def decode(ids: list[int]) -> str:
    """Decode like a tokenizer whose tokens 3 and 4 make one character together."""
    text = "".join(WORDS[i] for i in ids)
    return text + "�" if ids[-1:] == [3] else text


@pytest.mark.parametrize(
    ("emitted", "text", "expected"),
    [
        ([1, 2], "The sea", (2, "")),
        ([1, 2, 3], "The sea", (2, "")),  # half a character: its token is generated again
        ([1, 2, 3, 4, 5], "The sea is \U0001f30a w", (4, " w")),  # held back for a stop word
        ([], "", (0, "")),
    ],
)
def test_only_tokens_whose_text_was_sent_are_kept(llm: Any, emitted: list[int], text: str, expected: Any):
    assert llm.vllm_resume.kept(emitted, text, decode) == expected


def test_a_text_that_is_not_of_these_tokens_is_refused(llm: Any):
    with pytest.raises(llm.calls.Refused):
        llm.vllm_resume.kept([1, 2] * 20, "An ocean", decode)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({}, None), ({"temperature": 0.5, "stop": "x"}, None), ({"n": 2}, "several choices"),
        ({"tools": [{}]}, "tools"), ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"), ({"stream": False}, "only streams"),
    ],
)  # fmt: skip
def test_only_what_continues_soundly_is_continued(llm: Any, more: dict[str, Any], reason: str | None):
    found = llm.vllm_resume.refusal(CHAT, {"stream": True, **more})
    assert found is None if reason is None else reason in found


def test_a_continuation_has_what_is_left_of_the_tokens(llm: Any):
    body = {"max_tokens": 10, "min_tokens": 3, "temperature": 0, "messages": [], "model": "shown", "seed": 4}
    sent = llm.vllm_resume.request(body, [1, 2, 3, 4], 2, 100, "m")
    assert (sent["max_tokens"], sent["min_tokens"], sent["temperature"], sent["seed"]) == (8, 1, 0, 4)
    assert (sent["prompt"], sent["model"]) == ([1, 2, 3, 4], "m")
    assert "messages" not in sent
    assert llm.vllm_resume.request({}, [1, 2, 3, 4], 2, 100, "m")["max_tokens"] == 96


def part(text: str, ids: list[int], answer: int, finish: str | None = None) -> bytes:
    choices = [{"index": 0, "text": text, "token_ids": ids, "finish_reason": finish}]
    return json.dumps(
        {"id": "x", "object": "text_completion", "choices": choices, "usage": usage(9, answer)}
    ).encode()


def test_a_continuation_looks_like_the_rest_of_the_stream(llm: Any):
    resume = {"prompt": [8, 9], "emitted": [1, 2, 3], "text": "The sea i", "id": "c1", "created": 5}
    events = llm.vllm_resume.ContinuedEvents(CHAT, {"model": "shown"}, resume, 2, " i")
    assert events.read(part(" ", [3], 1)) == ([], {"usage": [2, 3, 0]}), (
        "the caller has that text and that id"
    )
    [second], meta = events.read(part("is wide", [4, 5], 3, "stop"))
    assert meta == {"usage": [2, 5, 0], "ids": [4, 5]}
    found = json.loads(second)
    assert (found["id"], found["created"], found["object"]) == ("c1", 5, "chat.completion.chunk")
    assert found["choices"][0]["delta"] == {"content": "s wide"}
    assert found["choices"][0]["finish_reason"] == "stop"


def test_another_text_than_the_one_that_was_sent_is_an_error(llm: Any):
    resume = {"prompt": [8], "emitted": [1], "text": "Th"}
    events = llm.vllm_resume.ContinuedEvents(CHAT, {}, resume, 0, "Th")
    with pytest.raises(llm.calls.Refused, match="a different text"):
        events.read(part("An", [2], 1))


def test_a_stream_that_was_lost_after_its_last_token_only_ends(llm: Any):
    resume = {"prompt": [8], "emitted": [1, 2], "text": "The sea", "id": "c1", "created": 5}
    assert llm.vllm_resume.finished(CHAT, {"max_tokens": 3}, resume) is None
    ends = [json.loads(event) for event in llm.vllm_resume.finished(CHAT, {"max_tokens": 2}, resume)]
    assert ends[0]["choices"][0]["finish_reason"] == "length"
    assert ends[1]["usage"]["completion_tokens"] == 2


# --- the keeper of the server's processes ----------------------------------------------------------------

# A server with a child in a session of its own, like vLLM's engine. It prints both process ids.
SERVER = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""


def kept_server(folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
    folder.mkdir()
    keeper = subprocess.Popen(
        [sys.executable, "-I", "-S", str(LLM_RUNTIME / "keeper.py"), str(folder),
         sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert keeper.stdout is not None
    return keeper, [int(pid) for pid in keeper.stdout.readline().split()]


def wait_gone(pids: list[int]) -> None:
    until = time.monotonic() + PATIENCE_S
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < until, left
        time.sleep(0.01)


def test_nothing_of_a_server_outlives_the_process_that_started_it(tmp_path: Path):
    keeper, pids = kept_server(tmp_path / "f")
    assert keeper.stdin is not None
    keeper.stdin.close()  # as the kernel does when that process is killed
    assert keeper.wait(PATIENCE_S) == 128 + signal.SIGTERM
    wait_gone(pids)
    assert not (tmp_path / "f").exists()


def test_nothing_is_left_of_a_server_that_was_killed(tmp_path: Path):
    keeper, pids = kept_server(tmp_path / "f")
    os.kill(pids[0], signal.SIGKILL)
    assert keeper.wait(PATIENCE_S) == 128 + signal.SIGKILL
    wait_gone(pids)


@pytest.mark.parametrize("problem", [ConnectionRefusedError(), http.client.BadStatusLine("x")])
def test_a_server_that_breaks_off_its_answer_is_not_healthy(llm: Any, monkeypatch, problem: Exception):
    def get(*_: Any) -> Any:
        raise problem

    monkeypatch.setattr(llm.vllm, "get", get)
    server = object.__new__(llm.vllm.Vllm)
    server._server = None
    assert not server._healthy()
