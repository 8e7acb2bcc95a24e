"""The command line against the running stack: documents for scripts, text for people, exit codes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from tests.conftest import PATIENCE_S
from tests.e2e.conftest import REPO, Digits, Stack
from tests.e2e.terminal import CTRL_C, terminal


def test_documents(stack: Stack, served: str):
    assert "digits" in [m["name"] for m in stack.cli("models")["items"]]
    assert stack.cli("versions", "digits")["items"][0]["number"] == 1
    assert stack.cli("routes")["endpoints"]["digits"]["targets"] == [
        {"deployment": "digits-v1", "weight": 100}
    ]
    assert stack.cli("decisions", "digits-v1")["items"]
    assert stack.cli("status")


def test_text(stack: Stack, served: str):
    for command in ("status", "models", "replicas", "settings", "version"):
        done = stack.run(command)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        assert "\x1b[" not in done.stdout, "no colours in a pipe"


def test_the_live_view(stack: Stack, served: str):
    end = time.monotonic() + PATIENCE_S
    ready: list[int] = []
    while ready != [1]:
        assert time.monotonic() < end, "the router does not watch the endpoint"
        done = stack.run("top", "--once", "--json")
        items = json.loads(done.stdout).get("items", [])
        ready = [each["ready"] for each in items if each["endpoint"] == served]
    for quit_by in ("q", CTRL_C):
        with terminal("top", "--every", "0.5s", env=stack.env, cwd=REPO) as screen:
            screen.wait_for("req/s")
            screen.wait_for(served)
            screen.type(quit_by)
            assert screen.end() == 0
    assert stack.cli("diagnose", served)["endpoints"][0]["endpoint"] == served


def test_infer(stack: Stack, served: str, digits: Digits, tmp_path: Path):
    images = tmp_path / "images.npz"
    np.savez(images, image=digits.images[:2])
    for data in (["--data", json.dumps({"image": digits.images[:2].tolist()})], ["--file", str(images)]):
        answer = stack.cli("infer", served, *data)
        label = next(o for o in answer["outputs"] if o["name"] == "label")
        assert label["data"] == digits.labels[:2].tolist()


def test_apply_is_idempotent(stack: Stack, served: str, tmp_path: Path):
    file = tmp_path / "more.yaml"
    file.write_text(
        "kind: Deployment\nname: digits-spare\nmodel: digits\nversion: 1\nmin_replicas: 0\nmax_replicas: 1\n"
        "---\nkind: Endpoint\nname: digits-shared\ntargets:\n- deployment: digits-v1\n  weight: 100\n"
    )
    first, second = stack.cli("apply", "-f", str(file)), stack.cli("apply", "-f", str(file))
    assert "created" in json.dumps(first)
    assert "unchanged" in json.dumps(second)
    assert "created" not in json.dumps(second)


def test_exit_codes(stack: Stack, served: str):
    assert stack.run("versions", "nobody").returncode == 3
    assert stack.run("nonsense").returncode == 2
    assert stack.run("infer", "nobody", "--data", "[1]").returncode == 3


def test_up_leaves_a_context_by_which_commands_work_in_any_folder(stack: Stack, served: str, tmp_path: Path):
    # Nothing in the environment, a folder that is no stack's, and ports that are not the default.
    env = {k: v for k, v in stack.env.items() if not k.startswith("TIDEGATE_")}
    listed = stack.run("context", "list", "--json", env=env, cwd=tmp_path)
    mine = str(stack.settings.state_path)
    (context,) = [each for each in json.loads(listed.stdout)["items"] if each["state_dir"] == mine]
    assert context["url"] == stack.settings.gateway_url
    done = stack.run("--context", context["name"], "models", "--json", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert served in [model["name"] for model in json.loads(done.stdout)["items"]]
    assert list(tmp_path.iterdir()) == [], "nothing is left in the folder"
    assert stack.run("context", "use", context["name"], env=env, cwd=tmp_path).returncode == 0
    assert stack.run("status", env=env, cwd=tmp_path).returncode == 0
    elsewhere = {**env, "TIDEGATE_GATEWAY_URL": "http://127.0.0.1:9"}
    assert stack.run("models", env=elsewhere, cwd=tmp_path).returncode == 6, "its token is not for others"


def test_logs(stack: Stack, served: str):
    assert "route table" in stack.run("logs", "gateway", "-n", "200").stdout


def test_up_again_changes_nothing(stack: Stack, served: str):
    before = stack.child("gateway").pid
    assert stack.run("up").returncode == 0
    assert stack.child("gateway").pid == before
