"""What a hostile model can reach, with a real Triton and a real pip, below each kind of worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.worker.contained import OTHER, REPLICA, ROOT
from tests.integration.worker.test_environments import wheel

pytestmark = pytest.mark.integration

Contained = Callable[[str], dict[str, Any]]
ANYBODY = 60_123
AS = {
    "root": [],
    # As the worker of a container: no mounts, no look at other users' processes.
    "root of a container": [
        "setpriv", "--bounding-set", "-all,+chown,+dac_override,+fowner,+kill,+setgid,+setuid",
        "--inh-caps", "-all", "--no-new-privs",
    ],
    "a user": ["setpriv", f"--reuid={ANYBODY}", f"--regid={ANYBODY}", "--clear-groups"],
}  # fmt: skip


@pytest.fixture
def contained(open_folder: Path, runtime: Path) -> Contained:
    """Runs the hostile model as a kind of worker: what it says."""
    if os.geteuid() != 0:
        pytest.skip("other users can be tried by root only")
    wheel(open_folder / "wheels", "tidepool", "1.0", "DEPTH = 3\n")

    def run(kind: str) -> dict[str, Any]:
        if kind == "a user" and not others_reach(Path(sys.prefix), ROOT, runtime):
            pytest.skip("this checkout is closed to other users")
        command = [*AS[kind], sys.executable, "-m", "tests.integration.worker.contained"]
        done = subprocess.run(
            [*command, open_folder, runtime],
            cwd=ROOT, env={**os.environ, "HOME": str(open_folder), "TIDEGATE_SERVICE_TOKEN": "hush"},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        if "unshare" in done.stderr or "new namespaces" in done.stderr:
            pytest.skip("this kernel gives a user no namespaces")
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return run


def others_reach(*paths: Path) -> bool:
    return all(each.stat().st_mode & 1 for path in paths for each in (path, *path.parents))


@pytest.mark.parametrize("kind", AS)
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
