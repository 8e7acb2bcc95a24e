"""Contain a model's process as much as this machine allows.

There are three degrees of containment (docs/adr/019-a-sandbox-for-the-models-process.md). The first degree in
this list that is possible is used:

- user and mounts: for a worker that is root with CAP_SYS_ADMIN. The model has a separate user, and
  cannot see the state folder.
- user: for a worker that is root without CAP_SYS_ADMIN, as in a container. The model has a separate user.
- mounts: for a worker that is not root. The model has the worker's user, but cannot see the state folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from services.worker.adapters import sandbox_entry
from services.worker.adapters.path_access import (
    OTHERS_PASS,
    OTHERS_READ,
    OTHERS_WRITE,
    first_closed,
    is_open_to,
    is_usable,
)
from services.worker.adapters.sandbox_degrees import NONE, possible
from services.worker.settings import WorkerSettings
from tidegate.kernel import telemetry
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.model_users import HOST, NOTE, ModelUser

log = telemetry.logger(__name__)

Mode = Literal["auto", "required", "off"]

CODE = Path(__file__).parents[3]
# The value of the variables USER and LOGNAME for the model. No account has this name.
USER = "model"
GPU_DEVICES = "nvidia*"


@dataclass(frozen=True, slots=True)
class FileNeeds:
    """The paths that a command needs, in addition to those that every user may read.

    The model's user owns the paths in ``write`` and can change no others. In a degree with mounts, the
    command sees ``shared_memory`` as /dev/shm. ``group``: the cgroup in which the command starts; None for
    the worker's cgroup.
    """

    cwd: Path
    read: Sequence[Path] = ()
    write: Sequence[Path] = ()
    shared_memory: Path | None = None
    group: Path | None = None


class Sandbox:
    """Run the processes of one worker's model with as few rights as possible.

    If the machine refuses a degree of containment, the sandbox changes to the next weaker degree and stays
    there. ``hidden``: folders that the model cannot see, besides ``state``. ``note``: the file to which the
    uid of the model's user is written, for the launcher.
    """

    def __init__(
        self, mode: Mode, state: Path, hidden: Iterable[Path] = (), note: Path | None = None
    ) -> None:
        self._mode = mode
        self._note = note
        self._state = state.absolute()
        self._hidden = [self._state, *hidden]
        self._degrees, self._why = ([NONE], "") if mode == "off" else possible()
        self._user: ModelUser | None = None
        self._spawned = False
        self._warned = mode == "off"

    @classmethod
    def off(cls) -> Sandbox:
        """Return a sandbox that does not restrict the model."""
        return cls("off", Path("/"))

    @property
    def degree(self) -> str:
        """Return a text about the degree of containment, for the replica's report."""
        if self._mode == "off":
            return "off"
        now = self._degrees[0]
        words = [f"user {self._user.uid}" if self._user else "user of its own"] if now.user else []
        return ", ".join([*words, *(["own mounts"] if now.mounts else [])]) or f"none: {self._why}"

    @property
    def mounts(self) -> bool:
        """Return True if the model's process has a separate mount namespace."""
        return self._degrees[0].mounts

    @property
    def user(self) -> int | None:
        """Return the uid of the model's user, which is also its gid.

        Return None if the model runs as the worker's user.
        """
        return self._user.uid if self._user and self._degrees[0].user else None

    def choose_degree(self, needs: FileNeeds) -> None:
        """Choose the strongest degree in which a command with these needs can run.

        Raises Unavailable if the settings require containment and no degree works.
        """
        while self._degrees[0].user:
            try:
                self._check(needs, self._claimed())
                break
            except (Unavailable, OSError) as error:
                self.weaken(error.message if isinstance(error, Unavailable) else str(error))
        if self._degrees == [NONE] and self._mode == "required":
            raise Unavailable(
                f"The model cannot be contained: {self._why}. TIDEGATE_MODEL_SANDBOX=required forbids "
                "running it without a sandbox. Remove the cause, or set TIDEGATE_MODEL_SANDBOX=auto."
            )
        if not self._degrees[0].user and not self._warned:
            self._warned = True
            log.warning(
                "the model runs as the worker's user",
                extra={"sandbox": self.degree, "why": self._why},
            )

    def _claimed(self) -> int:
        if self._user is None:
            # Two replicas must not have the same user, because each could send signals to the other's
            # processes. So the user is locked in two folders. The lock in HOST excludes other workers of this
            # machine. The lock in the cache excludes workers in other containers that share the cache.
            self._user = ModelUser.claim(HOST, self._state / "cache" / "users")
            if self._note is not None:
                self._note.write_text(str(self._user.uid))
        return self._user.uid

    def weaken(self, why: str) -> None:
        """Change to the next weaker degree. ``why``: the reason for the change, as a text for messages.

        If no degree is left and the mode is ``auto``, the model runs without a sandbox. In other modes,
        Unavailable is raised.
        """
        self._why = " ".join(why.split())[:300]
        if len(self._degrees) > 1:
            self._degrees = self._degrees[1:]
        if self._degrees == [NONE] and self._mode != "auto":
            raise Unavailable(
                f"The model cannot be contained: {self._why}. Remove the cause, or set "
                "TIDEGATE_MODEL_SANDBOX=auto to run it without a sandbox."
            )

    async def spawn(
        self, needs: FileNeeds, command: Sequence[str], environment: Mapping[str, str], **how: Any
    ) -> asyncio.subprocess.Process | None:
        """Start a command in the current degree. Return None if the machine refuses this degree.

        If the machine refuses the degree, the sandbox changes to the next weaker one. The calling code must
        then prepare the folders for the new degree and call this method again. In every degree, the command
        ends when this worker ends. Only the command's user can read the files that the command writes.
        ``how`` is passed to ``create_subprocess_exec``. Raises Unavailable like :meth:`weaken`.
        """
        if self._user is not None:
            self._user.begin()
            self._spawned = True
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", sandbox_entry.__file__, *self._options(needs), "--", *command,
                cwd=needs.cwd, env={}, stdin=theirs.fileno(), **how,
            )  # fmt: skip
            theirs.close()
            try:
                refused = await _exchange(ours, environment)
            except BaseException:
                await _end(process)
                raise
        if not refused:
            return process
        await _end(process)
        self.weaken(refused)
        return None

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment variables for the model's user, with ``home`` as HOME.

        Return an empty dict if the model runs as the worker's user.
        """
        return {} if self.user is None else {"HOME": str(home), "USER": USER, "LOGNAME": USER}

    def unusable_variables(self) -> list[str]:
        """Return those of the variables TMPDIR and HF_HOME that the model cannot use.

        Such a variable is not set, or names a folder in which the model's user cannot read and write.
        """
        return [
            key
            for key in ("TMPDIR", "HF_HOME")
            if self.user is not None and not is_usable(os.environ.get(key), self.user, OTHERS_WRITE)
        ]

    def unreadable(self, paths: Iterable[str]) -> list[str]:
        """Return those of these paths that exist, but that the model's user cannot read."""
        uid = self.user
        found = [Path(path) for path in paths if path.startswith("/") and Path(path).exists()]
        return [str(path) for path in found if uid is not None and not is_usable(path, uid, OTHERS_READ)]

    def make_private(self, folder: Path) -> None:
        """Create a folder that only the model's user can open."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        if self.user is not None:
            os.chown(folder, self.user, self.user)

    def let_through(self, folder: Path, *, to_read: bool = False) -> None:
        """Let the model's user pass through a folder, but no other users except the owner.

        ``to_read``: True to let the model's user list the folder, too.
        """
        if self.user is not None:
            os.chown(folder, -1, self.user)
            folder.chmod(0o750 if to_read else 0o710)

    def release(self) -> None:
        """Release the model's user, so that another worker can use it.

        The user is also released when this process ends.
        """
        if self._user is not None:
            self._user.release()
            self._user = None

    def end_all(self) -> None:
        """End all processes of the model's user."""
        if self._user is not None and self._spawned:
            self._user.end_all()
            self._spawned = False

    def _options(self, needs: FileNeeds) -> list[str]:
        options = ["--parent", str(os.getpid()), "--cwd", str(needs.cwd)]
        if needs.group is not None:
            options += ["--group", str(needs.group / "cgroup.procs")]
        if self.mounts:
            options += ["--mounts", *self._rearranged(needs)]
        if self.user is not None:
            groups = ",".join(map(str, device_groups()))
            options += ["--user", str(self.user), str(self.user), groups]
        return options

    def _check(self, needs: FileNeeds, uid: int) -> None:
        """Raise Unavailable if the user cannot reach a path that the command needs.

        In a degree without mounts, this method also changes the modes of folders. It closes the hidden
        folders, except the state folder, to other users. It lets other users pass through the state folder to
        the needed paths.
        """
        for path in filter(Path.exists, needs.read):
            if not is_open_to(path.stat(), uid, OTHERS_READ | OTHERS_PASS):
                raise Unavailable(f"other users cannot read {path}: run `chmod -R a+rX` on it")
        if self._degrees[0].mounts:
            return
        for folder in filter(Path.is_dir, self._hidden[1:]):
            folder.chmod(stat.S_IMODE(folder.stat().st_mode) & ~stat.S_IRWXO)
        for path in (needs.cwd, *needs.read, *needs.write):
            self._open_way(path.resolve())
            unreadable = first_closed(path.resolve(), uid)
            if unreadable is not None:
                raise Unavailable(f"other users cannot pass through {unreadable}, a parent folder of {path}")

    def _open_way(self, path: Path) -> None:
        """Let other users pass through the state folder and the folders in it on the way to ``path``.

        They still cannot list these folders.
        """
        state = self._state.resolve()
        for folder in [each for each in path.parents if each == state or each.is_relative_to(state)]:
            mode = stat.S_IMODE(folder.stat().st_mode)
            if mode & stat.S_IRWXO != OTHERS_PASS and folder.stat().st_gid != self.user:
                folder.chmod(mode & ~stat.S_IRWXO | OTHERS_PASS)

    def _rearranged(self, needs: FileNeeds) -> list[str]:
        """Return options for `sandbox_entry.py`: which folders to hide, and which paths to show in them."""
        uid = self.user
        needed = [path for path in (needs.cwd, *needs.read, *needs.write) if path.exists()]
        hidden = {path.resolve() for path in self._hidden if path.is_dir()}
        if uid is not None:
            hidden |= {c for path in needed if (c := first_closed(path.resolve(), uid)) is not None}
        hidden = {h for h in hidden if not any(h != other and h.is_relative_to(other) for other in hidden)}
        options = [] if uid is not None else ["--namespace"]
        for folder in sorted(hidden):
            options += ["--hide", str(folder)]
        shown = {(each, path) for path in needed for each in _targets(path, hidden)}
        writable = {path.resolve() for path in (needs.cwd, *needs.write)}
        if uid is None:
            # The model runs as the worker's user. If it could write to the folders of its code, it could
            # change the code of its next process. So these folders are shown as read-only.
            guarded = [*needs.read, CODE, Path(sys.prefix)]
            shown |= {(p.resolve(), p) for p in guarded if p.is_dir() and os.access(p, os.W_OK)
                      and not any(p.resolve().is_relative_to(h) for h in hidden)}  # fmt: skip
        for target, path in sorted(shown):
            kind = "--write" if path.resolve() in writable else "--read"
            options += [kind, str(path), str(target)]
        if needs.shared_memory is not None:
            options += ["--write", str(needs.shared_memory), "/dev/shm"]
        return options


async def _exchange(ours: socket.socket, environment: Mapping[str, str]) -> str:
    """Send the environment to the new process. Return the reason if a step was refused, else ""."""
    loop = asyncio.get_running_loop()
    # If the process has ended, it has already sent the reason, which is read below.
    with contextlib.suppress(ConnectionError):
        text = "".join(f"{key}={value}\0" for key, value in environment.items())
        await loop.sock_sendall(ours, os.fsencode(text))
        ours.shutdown(socket.SHUT_WR)
    read = bytearray()
    with contextlib.suppress(ConnectionError):
        while data := await loop.sock_recv(ours, 4096):
            read += data
    return read.decode(errors="replace")


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


def sandbox_of(settings: WorkerSettings, folder: Path) -> Sandbox:
    """Return a sandbox for the replica in ``folder``.

    It hides the state folder, the secrets, and the local stores of blobs and artifacts.
    """
    urls = (settings.blob_url, settings.artifact_url)
    stores = [Path(url.removeprefix("file://")) for url in urls if url.startswith("file:///")]
    hidden = [settings.secrets_path, *stores]
    return Sandbox(settings.model_sandbox, settings.state_path, hidden, folder / NOTE)


def device_groups() -> list[int]:
    """Return the groups whose members may use a GPU that is closed to other users."""
    found = (path.stat() for path in Path("/dev").glob(GPU_DEVICES) if not path.is_dir())
    return sorted({each.st_gid for each in found if each.st_gid and not each.st_mode & stat.S_IWOTH})


def _targets(path: Path, hidden: Iterable[Path]) -> set[Path]:
    """Return the paths at which ``path`` must be made visible again.

    These are ``path`` itself and the same path without symlinks, each only if it is in a hidden folder.
    """
    return {each for each in (path.absolute(), path.resolve()) if any(each.is_relative_to(h) for h in hidden)}
