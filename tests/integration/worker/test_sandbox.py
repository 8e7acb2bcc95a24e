"""What a hostile model can reach in each kind of worker, with a real Triton and a real pip."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import pytest
import uvloop

from services.worker.adapters.environments import Environments
from services.worker.adapters.host_cache import HostCache
from services.worker.adapters.sandbox import FileNeeds, Mode, Sandbox
from services.worker.adapters.triton_install import TritonInstall
from tests.conftest import PATIENCE_S
from tests.integration.worker.contained import OTHER, REPLICA, ROOT
from tests.integration.worker.test_environments import wheel
from tidegate.kernel import model_users
from tidegate.kernel.errors import ModelFailed, Unavailable

pytestmark = pytest.mark.integration

Contained = Callable[..., Any]
ANYBODY = 60_123
AS = {
    "root": [],
    # As the worker of a container: no mounts, no look at other users' processes.
    "root of a container": [
        "setpriv", "--bounding-set", "-all,+chown,+dac_override,+fowner,+kill,+setgid,+setuid",
        "--inh-caps", "-all", "--no-new-privs",
    ],
    "root without capabilities": ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"],
    "a user": ["setpriv", f"--reuid={ANYBODY}", f"--regid={ANYBODY}", "--clear-groups"],
}  # fmt: skip


@pytest.fixture
def contained(open_folder: Path, runtime: Path) -> Contained:
    """Run the hostile model in a kind of worker and return its answer."""
    if os.geteuid() != 0:
        pytest.skip("other users can be tried by root only")
    wheel(open_folder / "wheels", "tidepool", "1.0", "DEPTH = 3\n")

    def run(kind: str, fails: bool = False) -> Any:
        if kind in ("a user", "root of a container") and not others_reach(Path(sys.prefix), ROOT):
            pytest.skip("other users cannot reach this checkout, for example below /root")
        command = [*AS[kind], sys.executable, "-m", "tests.integration.worker.contained"]
        with passable(runtime):
            done = subprocess.run(
                [*command, open_folder, runtime],
                cwd=ROOT, env={**os.environ, "HOME": str(open_folder), "TIDEGATE_SERVICE_TOKEN": "hush"},
                capture_output=True, text=True, timeout=5 * PATIENCE_S, check=False,
            )  # fmt: skip
        if "unshare" in done.stderr or "new namespaces" in done.stderr:
            pytest.skip("this kernel gives a user no namespaces")
        if fails:
            assert done.returncode != 0
            return done.stderr
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout)

    return run


@contextmanager
def passable(path: Path) -> Iterator[None]:
    """Let others pass through the folders of this checkout on the way to a path.

    A stack that was started here has closed its state folder, which the runtime lies in.
    """
    ways = [each for each in path.parents if each.is_relative_to(ROOT) and each != ROOT]
    before = {each: each.stat().st_mode for each in ways}
    for each, mode in before.items():
        each.chmod(mode | 0o001)
    try:
        yield
    finally:
        for each, mode in before.items():
            each.chmod(mode)


def others_reach(*paths: Path) -> bool:
    return all(each.stat().st_mode & 1 for path in paths for each in (path, *path.parents))


@pytest.mark.parametrize("kind", ["root", "root of a container", "a user"])
def test_a_hostile_model(kind: str, contained: Contained) -> None:
    said = contained(kind)
    found = said["found"]
    own_user, mounts = kind != "a user", kind != "root of a container"
    assert said["degree"].startswith("user 2000") == own_user, said["degree"]
    assert ("own mounts" in said["degree"]) == mounts

    secret = ("token", "webhook secret", "database", "assignment", "region", "cache through /proc")
    written = (
        "own model", "new beside the model", "artifact", "new in the cache", "module", "log",
        "new in the state folder", "new in the environment", "environment is whole",
        "chmod of the model", "chmod of a module",
    )  # fmt: skip
    for name in (*secret, *written, "environ", "memory", "files", "root"):
        assert found[name].startswith("refused"), (name, found[name])
    # The same user may signal its own processes: that is said in docs/models.md.
    assert found["signal"] == ("refused: PermissionError" if own_user else "done")

    seen = {name: found[name] for name in ("state", "replicas", "cache", "environments", "way up")}
    if mounts:
        assert seen["state"] == seen["way up"] == "['cache', 'replicas']"
        assert seen["replicas"] == str([REPLICA])
        assert seen["cache"] == "['envs']"
        assert OTHER not in str(found)
        assert "tidegate-test" not in found["shared memory"]
    else:
        assert set(seen.values()) == {"refused: PermissionError"}

    status = found["status"]
    assert (status["CapEff"], status["CapPrm"], status["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")
    assert [name for name in found["variables"] if name.startswith("TIDEGATE_")] == ["TIDEGATE_REPLICA"]
    assert "MINE" in found["variables"]
    assert not said["left"], "nothing in /dev/shm"
    assert said["modes"]["artifact"] == "0o444"
    if own_user:
        assert said["modes"]["module"] == "0o444"


def test_required_and_not_to_be_had(contained: Contained) -> None:
    said = contained("root without capabilities", fails=True)
    assert "The model cannot be contained: the worker lacks the capabilities CHOWN" in said


def in_sandbox(state: Path, *command: str, mode: Mode = "auto", **environment: str) -> tuple[str, str]:
    """Run a command in the sandbox of this process, and return its output and the degree."""
    sandbox = Sandbox(mode, state)
    needs = FileNeeds(state / "replicas" / "r" / "run-1")
    needs.cwd.mkdir(parents=True, exist_ok=True)

    async def run() -> str:
        process = None
        while process is None:
            sandbox.choose_degree(needs)
            sandbox.make_private(needs.cwd)
            process = await sandbox.spawn(needs, command, environment, stdout=PIPE, stderr=STDOUT)
        return (await process.communicate())[0].decode()

    try:
        return uvloop.run(run()), sandbox.degree
    finally:
        sandbox.release()


def test_the_environment_is_the_commands_alone(open_folder: Path) -> None:
    """A Deployment's LD_PRELOAD must not load before the process is contained."""
    said, _ = in_sandbox(
        open_folder / "state", "/bin/cat", "/proc/self/environ", LD_PRELOAD="/no.so", A="b c"
    )
    assert said.count("cannot be preloaded") == 1, said
    assert said.endswith("LD_PRELOAD=/no.so\0A=b c\0")


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_nothing_is_inherited_and_files_are_private(mode: Mode, open_folder: Path) -> None:
    """Under uvloop a child may inherit more than its standard streams, and would block the worker."""
    with (open_folder / "held").open("w") as held:
        os.set_inheritable(held.fileno(), True)
        script = "ls /proc/self/fd; umask; touch new; stat -c %a new; pwd"
        said, degree = in_sandbox(open_folder / "state", "/bin/sh", "-c", script, mode=mode)
    *handles, umask, mode_of_new, folder = said.split()
    assert set(handles) <= {"0", "1", "2", "3"}, "3 is the folder that is listed"
    assert (umask, mode_of_new) == ("0077", "600")
    assert folder == str(open_folder / "state/replicas/r/run-1")
    assert (degree == "off") == (mode == "off")


@pytest.mark.skipif(os.geteuid() != 0, reason="a user of its own is given by root only")
def test_what_is_refused_is_tried_with_less(open_folder: Path) -> None:
    state = open_folder / "state"
    cwd = state / "run-1"
    cwd.mkdir(parents=True)
    sandbox = Sandbox("auto", state)
    nothing = FileNeeds(cwd, shared_memory=open_folder / "nothing")

    async def run() -> None:
        sandbox.choose_degree(nothing)
        if sandbox.mounts:
            assert await sandbox.spawn(nothing, ["/bin/true"], {}) is None
        assert not sandbox.mounts
        sandbox.choose_degree(nothing)
        assert sandbox.degree == f"user {sandbox.user}"
        # And what this user cannot reach leaves nothing but the worker's own.
        unreadable = open_folder / "closed" / "below"
        unreadable.mkdir(parents=True)
        unreadable.parent.chmod(0o700)
        sandbox.choose_degree(FileNeeds(cwd, read=[unreadable]))
        assert sandbox.degree.startswith(f"none: other users cannot pass through {unreadable.parent}")

    try:
        uvloop.run(run())
        strict = Sandbox("required", state)
        if strict.mounts:
            strict.weaken("mounts are refused")
        with pytest.raises(Unavailable, match="The model cannot be contained: users are refused"):
            strict.weaken("users are refused")
    finally:
        sandbox.release()


WORKER = """
import asyncio, sys
from pathlib import Path
from services.worker.adapters.sandbox import FileNeeds, Sandbox

async def main():
    state = Path(sys.argv[1])
    cwd = state / "replicas" / "r-1-0-1" / "run-1"
    cwd.mkdir(parents=True)
    sandbox = Sandbox("auto", state, note=cwd.parent / "model-user")
    needs = FileNeeds(cwd)
    sandbox.choose_degree(needs)
    sandbox.make_private(cwd)
    script = "setsid sleep 600 & echo $!; echo $$; exec sleep 600"
    await (await sandbox.spawn(needs, ["/bin/sh", "-c", script], {})).wait()

asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="a user of its own is given by root only")
def test_a_killed_worker_takes_its_model_along(open_folder: Path) -> None:
    """A daemon that the model started ends with the next sweep."""
    state = open_folder / "state"
    worker = subprocess.Popen([sys.executable, "-c", WORKER, state], stdout=PIPE, cwd=ROOT)
    assert worker.stdout is not None
    daemon, model = int(worker.stdout.readline()), int(worker.stdout.readline())
    (uid,) = model_users.noted(state)
    model_users.end_left(uid)
    assert sorted(model_users.processes_of(uid)) == sorted([daemon, model]), "its worker lives"
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    worker.stdout.close()
    end = time.monotonic() + PATIENCE_S
    while model in model_users.processes_of(uid):
        assert time.monotonic() < end, "the model outlives its worker"
        time.sleep(0.01)
    model_users.end_left(uid)
    assert daemon not in model_users.processes_of(uid)


@pytest.mark.skipif(os.geteuid() != 0, reason="a user of its own is given by root only")
def test_a_folder_of_packages_that_pip_cannot_read(
    open_folder: Path, install: TritonInstall, tmp_path: Path
) -> None:
    wheel(tmp_path / "wheels", "tidepool", "1.0", "DEPTH = 3\n")
    sandbox = Sandbox("auto", open_folder / "state")
    environments = Environments(HostCache(open_folder / "state" / "cache"), install, lambda _: None, sandbox)
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels")}
    try:
        with pytest.raises(ModelFailed, match=f"user, which cannot read {tmp_path}/wheels of PIP_FIND_LINKS"):
            uvloop.run(environments.provide(["tidepool"], settings, 300))
    finally:
        sandbox.release()
