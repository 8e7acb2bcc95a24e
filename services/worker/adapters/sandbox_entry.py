"""Contain this process, then exec a command: ``python -I -S sandbox_entry.py OPTIONS... -- COMMAND...``.

This script runs before every process of a model, so it imports little and starts quickly. The command keeps
the script's pid, so signals to the worker's child reach the command. The options and their arguments:

--parent PID               pid of the worker; the command is killed when the worker ends
--cwd FOLDER               working folder of the command
--group FILE               join the cgroup with this list of processes (cgroup.procs)
--mounts                   hide and show paths in a separate mount namespace
--namespace                mount in a separate user namespace, for a worker that is not root
--hide FOLDER              mount an empty folder over FOLDER
--read PATH TARGET         show PATH at TARGET, read-only
--write PATH TARGET        show PATH at TARGET, writable
--user UID GID GROUPS      become this user; GROUPS is a comma-separated list, or empty

Standard input is a socket. The script reads the command's environment from it, as NAME=VALUE with a NUL after
each variable. The script itself does not run in that environment, because the model's author can set
variables such as LD_PRELOAD there. If a step is refused, the script writes the reason to the socket and does
not execute the command. Otherwise the socket is closed when the command is executed.
"""

# pathlib is not used, because its import takes longer than everything else here.
# ruff: noqa: PTH103, PTH112, PTH120, PTH123, PTH208

from __future__ import annotations

import ctypes
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_REC = 1024, 2048, 4096, 16384
MS_PRIVATE, MS_RELATIME = 1 << 18, 1 << 21
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
SIGKILL = 9
# Flags that a mount must keep when it becomes read-only: (flag of statvfs, flag of mount).
KEPT = ((2, MS_NOSUID), (4, MS_NODEV), (8, MS_NOEXEC), (1024, MS_NOATIME), (2048, MS_NODIRATIME),
        (4096, MS_RELATIME))  # fmt: skip

ARGUMENT_COUNTS = {
    "--parent": 1, "--cwd": 1, "--group": 1, "--mounts": 0, "--namespace": 0, "--hide": 1, "--read": 2,
    "--write": 2, "--user": 3,
}  # fmt: skip

libc = ctypes.CDLL(None, use_errno=True)


def call(what: str, name: str, *arguments: Any) -> None:
    """Call a function of libc. Raise OSError if it fails; ``what`` is the step's name in the error."""
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """Call mount(2)."""
    arguments = [None if word is None else os.fsencode(word) for word in (source, target, kind)]
    call(f"mount on {target}", "mount", *arguments, ctypes.c_ulong(flags), options and options.encode())


def own_namespaces(new_user: bool) -> None:
    """Enter a new mount namespace.

    ``new_user``: True to enter a new user namespace, too. In it, the process keeps its user.
    """
    uid, gid = os.geteuid(), os.getegid()
    flags = CLONE_NEWNS | (CLONE_NEWUSER if new_user else 0)
    call("new namespaces", "unshare", flags)
    if new_user:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    mount("none", "/", None, MS_REC | MS_PRIVATE)


def rearrange(options: list[list[str]]) -> None:
    """Hide folders, but show the paths in them that the command needs.

    Only the paths of the option ``--write`` are writable.
    """
    hidden = [arguments[1] for arguments in options if arguments[0] == "--hide"]
    # Open each path before the folders are hidden, because it cannot be found after that. Open it in the new
    # namespace, because a path of another namespace cannot be mounted here.
    shown = [
        (os.open(arguments[1], os.O_PATH | os.O_CLOEXEC), arguments[2], arguments[0] == "--write")
        for arguments in options
        if arguments[0] in ("--read", "--write")
    ]
    for folder in hidden:
        mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=0755")
    for handle, target, writable in shown:
        show(handle, target, writable)
    for folder in hidden:
        # Make only the folder itself read-only. The paths that are mounted in it keep their own flags.
        mount("none", folder, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def show(handle: int, target: str, writable: bool) -> None:
    """Mount an open file or folder at a path. Create the path if it does not exist."""
    source = f"/proc/self/fd/{handle}"
    if not os.path.lexists(target):
        if os.path.isdir(source):
            os.makedirs(target, 0o755)
        else:
            os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    mount(source, target, None, MS_BIND | MS_REC)
    if not writable:
        found = os.statvfs(target).f_flag
        kept = sum(flag for bit, flag in KEPT if found & bit)
        mount("none", target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | kept)


def become(uid: int, gid: int, groups: list[int]) -> None:
    """Become another user. The process cannot become root again."""
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def contain(options: list[list[str]]) -> None:
    """Contain this process as the options say. Raise OSError if a step is refused."""
    by_name = {arguments[0]: arguments[1:] for arguments in options}
    os.umask(0o022)
    if "--group" in by_name:
        with open(by_name["--group"][0], "w") as file:
            file.write("0")
    if "--mounts" in by_name:
        own_namespaces("--namespace" in by_name)
        rearrange(options)
    # Without this, the command would have the old working folder, and could reach hidden files from there.
    os.chdir(by_name["--cwd"][0])
    if "--user" in by_name:
        uid, gid, groups = by_name["--user"]
        become(int(uid), int(gid), [int(group) for group in groups.split(",") if group])
    if "--mounts" in by_name or "--user" in by_name:
        call("no new privileges", "prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # Set the signal for the parent's death only after the change of the user, because that change clears it.
    call("end with the worker", "prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    if os.getppid() != int(by_name["--parent"][0]):
        raise OSError(0, "the worker has ended")
    os.umask(0o077)


def split(arguments: list[str]) -> tuple[list[list[str]], list[str]]:
    """Return the options, each with its arguments, and the command."""
    options, at = [], 0
    while arguments[at] != "--":
        end = at + 1 + ARGUMENT_COUNTS[arguments[at]]
        options.append(arguments[at:end])
        at = end
    return options, arguments[at + 1 :]


def environment() -> tuple[int, dict[bytes, bytes]]:
    """Read the command's environment from standard input, a socket. Return the socket and the environment."""
    # Close all other descriptors. With uvloop, this process may inherit some from the worker, and the model
    # must not get them.
    os.closerange(3, 1 + max(map(int, os.listdir("/proc/self/fd"))))
    socket = os.dup(0)  # this copy is closed when the command is executed
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    read = []
    while data := os.read(socket, 65536):
        read.append(data)
    pairs = [pair.partition(b"=") for pair in b"".join(read).split(b"\0")[:-1]]
    return socket, {key: value for key, _, value in pairs}


def main() -> int:
    """Contain this process and execute the command. Return 1 if a step is refused."""
    socket, by_name = environment()
    options, command = split(sys.argv[1:])
    try:
        contain(options)
        os.execve(command[0], command, by_name)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        os.write(socket, f"{error.strerror}{where}".encode())
    return 1


if __name__ == "__main__":
    sys.exit(main())
