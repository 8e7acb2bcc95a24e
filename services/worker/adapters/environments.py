"""Build and cache Python environments for versions with requirements, on top of the models' Python.

``<folder>/<digest>/`` is a virtual environment. ``<digest>.ok`` exists when the environment is complete, and
contains its size in bytes. ``<digest>.log`` is the output of pip. An environment is built at its final path,
because its scripts contain that path. So a folder without the ``.ok`` file is incomplete, and is built again.
While pip runs, the folder belongs to the model's user, if the sandbox uses a separate user
(``adapters/sandbox.py``). Afterwards only the worker's user can write to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.worker.adapters import pip_home
from services.worker.adapters.environment_files import hand_over, is_whole, take_over
from services.worker.adapters.file_lock import exclusive
from services.worker.adapters.host_cache import ENVIRONMENTS, HostCache, tree_size
from services.worker.adapters.sandbox import FileNeeds, Sandbox
from services.worker.adapters.triton_install import TritonInstall, prefixes
from tidegate.kernel import telemetry
from tidegate.kernel.errors import ModelFailed

log = telemetry.logger(__name__)

# Variables that are passed to pip and to the builds of packages. They contain no credential of Tidegate.
_PASSED_ON = frozenset({
    "PATH", "HOME", "USER", "TMPDIR", "TZ", "LANG", "NETRC", "CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS",
    "SSH_AUTH_SOCK", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
    # The launcher finds the processes of a killed worker by these variables.
    "TIDEGATE_REPLICA", "TIDEGATE_STATE_DIR",
})  # fmt: skip
_PASSED_ON_PREFIXES = ("PIP_", "LC_", "SSL_CERT_", "XDG_", "GIT_")
_PROXIES = frozenset({"http_proxy", "https_proxy", "all_proxy", "no_proxy"})
# Variables that would make pip install the packages into another folder. They are not passed on.
_IGNORED_SETTINGS = frozenset(
    {"PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PIP_PYTHON", "PIP_REQUIRE_VIRTUALENV"}
)
_FLAGS = (
    "--no-input", "--disable-pip-version-check", "--root-user-action=ignore", "--progress-bar=off",
    "--no-warn-script-location",
)  # fmt: skip
_PIPED: dict[str, Any] = {
    "stdout": asyncio.subprocess.PIPE,
    "stderr": asyncio.subprocess.STDOUT,
    # Give the command a process group of its own, so that it can be killed together with its children.
    "start_new_session": True,
    "limit": 1024 * 1024,  # the longest line that can be read, in bytes
}
_PROGRESS = ("Collecting", "Downloading", "Using cached", "Building", "Installing")
_TAIL_LINES = 12

_DESCRIBE = (
    "import json, site, sys; print(json.dumps([sys.version, sys.prefix,"
    " [p for p in site.getsitepackages() if p in sys.path]]))"
)


@dataclass(frozen=True, slots=True)
class BasePython:
    """The models' Python, on top of which an environment is built."""

    python: Path
    version: str
    prefix: str
    site_packages: tuple[str, ...]

    def packages(self) -> list[str]:
        """Return the installed packages with their versions.

        They are part of an environment's digest. So if a package changes, a new environment is built.
        """
        return sorted(p.name for site in self.site_packages for p in Path(site).glob("*.dist-info"))


class Environments:
    """The environments in ``cache``. ``report`` is called with a text about the progress."""

    def __init__(
        self,
        cache: HostCache,
        install: TritonInstall,
        report: Callable[[str], None],
        sandbox: Sandbox | None = None,
    ) -> None:
        self._cache = cache
        self._folder = cache.folder / ENVIRONMENTS
        self._sandbox = sandbox or Sandbox.off()
        self._install = install
        self._report = report

    async def provide(
        self, requirements: Sequence[str], env: Mapping[str, str], timeout_s: float
    ) -> TritonInstall:
        """Return the Triton installation with an environment for these requirements.

        If the environment does not exist, build it. ``env``: the Deployment's variables. Its settings of pip
        (``PIP_*``) override those of this process. Raises ModelFailed, with pip's errors, if the requirements
        cannot be installed within ``timeout_s``.
        """
        settings = {key: value for key, value in env.items() if key.startswith("PIP_")}
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            async with asyncio.timeout(timeout_s):
                base = await self._base()
                path = self._folder / self._digest(base, requirements, settings)
                waiting = "waiting for another replica to install the requirements"
                async with exclusive(path.with_suffix(".lock"), lambda: self._report(waiting)):
                    self._cache.use(path)
                    if incomplete := not is_whole(path):
                        await asyncio.to_thread(self._cache.make_room)
                        await self._build(path, base, requirements, settings)
        except TimeoutError:
            raise ModelFailed(f"The requirements were not installed within {timeout_s:g} s.") from None
        if incomplete:  # the size of the new environment is known only now
            await asyncio.to_thread(self._cache.make_room)
        return self._install.layered(path / "bin")

    async def _base(self) -> BasePython:
        python = self._install.python
        code, output = await _run([str(python), "-I", "-c", _DESCRIBE], _environment({}))
        if code != 0:
            raise ModelFailed(f"The models' Python {python} does not run: {output}")
        version, prefix, site_packages = json.loads(output)
        return BasePython(python, version, prefix, tuple(site_packages))

    def _digest(self, base: BasePython, requirements: Sequence[str], settings: Mapping[str, str]) -> str:
        parts = [
            list(requirements), base.version, base.prefix, base.packages(),
            list(self._install.constraints), sorted(settings.items()),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    async def _build(
        self, path: Path, base: BasePython, requirements: Sequence[str], settings: Mapping[str, str]
    ) -> None:
        self._report("creating an environment for the requirements")
        path.with_suffix(".ok").unlink(missing_ok=True)
        await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
        # The Deployment's settings of pip are left out. They must not affect this command, because it runs as
        # the worker's user.
        code, output = await _run(
            [str(base.python), "-I", "-m", "venv", "--without-pip", str(path)], _environment({})
        )
        if code != 0:
            raise ModelFailed(f"The environment for the requirements cannot be created: {output}")
        (own,) = path.glob("lib/python3*/site-packages")
        # Add the models' packages with addsitedir, which also reads their .pth files. The version's own
        # packages have precedence on the import path.
        below = [f"import site; site.addsitedir({site!r})" for site in base.site_packages]
        (own / "models.pth").write_text("\n".join(below) + "\n")
        (path / "requirements.txt").write_text("\n".join(requirements) + "\n")
        (path / "constraints.txt").write_text("\n".join(self._install.constraints) + "\n")
        home = path.with_suffix(".home")
        try:
            await self._install_into(path, home, _environment(settings))
            await asyncio.to_thread(take_over, path, self._sandbox.user)
        finally:
            await asyncio.to_thread(self._sandbox.end_all)
            await asyncio.to_thread(shutil.rmtree, home, ignore_errors=True)
        size = await asyncio.to_thread(tree_size, path)
        path.with_suffix(".ok").write_text(json.dumps({"bytes": size}))

    async def _install_into(self, path: Path, home: Path, environment: dict[str, str]) -> None:
        command = [
            sys.executable, "-P", "-m", "pip", "--python", str(path / "bin" / "python3"), "install", *_FLAGS,
            "-r", str(path / "requirements.txt"), "-c", str(path / "constraints.txt"),
        ]  # fmt: skip
        self._report("installing the requirements")
        code, output = await self._run_contained(path, home, command, environment)
        path.with_suffix(".log").write_text(output)
        if code != 0:
            unreadable = self._sandbox.unreadable(environment.get("PIP_FIND_LINKS", "").split())
            raise ModelFailed(f"The requirements cannot be installed: {_reason(output)}{_hint(unreadable)}")
        log.info("environment built", extra={"environment": path.name[:12]})

    async def _run_contained(
        self, path: Path, home: Path, command: Sequence[str], environment: dict[str, str]
    ) -> tuple[int, str]:
        """Run pip in the sandbox, because pip executes the setup code of packages."""
        read = [Path(sys.prefix), *prefixes(Path(sys.executable)), *self._install.roots()]
        needs = FileNeeds(home, read, [path])
        process = None
        while process is None:
            home.mkdir(exist_ok=True, mode=0o700)
            self._sandbox.choose_degree(needs)
            self._sandbox.make_private(home)
            await asyncio.to_thread(hand_over, path, self._sandbox.user)
            own = pip_home.make(home, environment, self._sandbox.user)
            process = await self._sandbox.spawn(needs, command, own, **_PIPED)
        return await _wait_for(process, self._progress)

    def _progress(self, line: str) -> None:
        if line.startswith(_PROGRESS):
            # " (from ...)" is cut off, because it contains a path of this host.
            self._report(f"installing the requirements: {line.partition(' (from ')[0][:200]}")


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    seen = {
        key: value
        for key, value in os.environ.items()
        if key in _PASSED_ON or key.startswith(_PASSED_ON_PREFIXES) or key.lower() in _PROXIES
    }
    kept = {key: value for key, value in (seen | dict(settings)).items() if key not in _IGNORED_SETTINGS}
    return kept | {"PYTHONUNBUFFERED": "1"}


def _hint(unreadable: Sequence[str]) -> str:
    if not unreadable:
        return ""
    return (
        f"\npip runs as the model's user, which cannot read {', '.join(unreadable)} of PIP_FIND_LINKS. "
        "Make these paths readable for every user."
    )


def _reason(output: str) -> str:
    """Return pip's errors, or the end of its output if pip reports no errors."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return "\n".join(dict.fromkeys(errors) if errors else lines[-_TAIL_LINES:])


async def _run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a command without a sandbox. Return its exit code and its output, including stderr."""
    process = await asyncio.create_subprocess_exec(
        *command, env=dict(environment), stdin=asyncio.subprocess.DEVNULL, **_PIPED
    )
    return await _wait_for(process, lambda _: None)


async def _wait_for(process: asyncio.subprocess.Process, on_line: Callable[[str], None]) -> tuple[int, str]:
    """Wait for a command and return its exit code and output. On cancellation, kill the process group."""
    assert process.stdout is not None
    lines = []
    try:
        async for raw in process.stdout:
            lines.append(raw.decode(errors="replace"))
            on_line(lines[-1].strip())
        return await process.wait(), "".join(lines)
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
