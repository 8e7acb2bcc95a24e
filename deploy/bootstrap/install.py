"""Which steps there are, and running them: at the same time where one does not need the other."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

from deploy.bootstrap import environments, progress, system, triton
from deploy.bootstrap.command import OTHERWISE, Runner, tail
from deploy.bootstrap.paths import Paths, from_environment
from deploy.bootstrap.python_check import optimized
from deploy.bootstrap.step import Step, StepFailed, Tell

WORKERS = 3
"""One waits for the network or the disk while the others unpack."""

SLOW = f"""\
  Note: {sys.executable} was compiled without optimizations, as pyenv does it.
  It works, but serves a quarter fewer requests. The system's own is a better one,
  TIDEGATE_PYTHON=/usr/bin/python3 make up, and so is one of pyenv's that was built
  with PYTHON_CONFIGURE_OPTS=--enable-optimizations."""


def steps(paths: Paths, runner: Runner, *, dev: bool) -> list[Step]:
    """Everything that must be there before the stack can start; with ``dev`` what the tests need too."""
    packages = system.Packages(paths, runner)
    installs = [_locked(paths, runner, "services", "Packages of the services", "requirements.lock", "venv")]
    if dev:
        installs += [
            _locked(paths, runner, "tests", "Packages of the tests", "requirements-dev.lock", "services"),
            Step(
                "postgres",
                "PostgreSQL, for the tests",
                # Where nothing can be installed, the tests say what they skip.
                done=lambda: not system.postgres_missing() or not system.can_install(),
                work=packages.install_postgres,
                after=("rabbitmq",),
            ),
        ]
    return [
        Step(
            "system",
            "Python's system packages",
            done=lambda: not system.python_missing(paths),
            work=packages.install_python,
        ),
        Step(
            "rabbitmq",
            "RabbitMQ",
            done=lambda: not system.rabbitmq_missing(),
            work=packages.install_rabbitmq,
            after=("system",),
        ),
        Step(
            "venv",
            "Virtual environment",
            done=lambda: environments.usable(paths.venv, "pip") and environments.connected(paths),
            work=partial(_make_venv, paths, runner),
            after=("system",),
        ),
        *installs,
        Step(
            "triton",
            "Triton Inference Server",
            done=lambda: triton.installed(paths),
            work=partial(triton.install, paths, runner),
            after=("venv",),
        ),
        _model_env(paths, runner),
    ]


def _make_venv(paths: Paths, runner: Runner, tell: Tell) -> None:
    if not environments.usable(paths.venv, "pip"):
        tell(str(paths.venv))
        environments.create(paths, paths.venv, runner, log=paths.log("venv"), pip=True)
    environments.connect(paths)


def _locked(paths: Paths, runner: Runner, name: str, title: str, lock_name: str, after: str) -> Step:
    lock, stamp = paths.root / lock_name, paths.venv / f".{name}.stamp"

    def work(tell: Tell) -> None:
        environments.install(paths, paths.venv, [lock], runner, paths.log(name), tell)
        stamp.write_text(environments.lock_fingerprint(lock))

    return Step(name, title, lambda: environments.filled(paths.venv, lock, stamp), work, (after,))


def _model_env(paths: Paths, runner: Runner) -> Step:
    env, log = paths.model_env, paths.log("model-env")
    lock, stamp = paths.root / "requirements-model.lock", paths.model_env / ".stamp"

    def work(tell: Tell) -> None:
        if not environments.usable(env, "sys"):
            environments.create(paths, env, runner, log=log, pip=False)
        environments.install(paths, env, [lock], runner, log, tell)
        stamp.write_text(environments.lock_fingerprint(lock))

    def done() -> bool:
        return environments.filled(env, lock, stamp) and environments.usable(env, "sys")

    return Step("model-env", "The models' Python environment", done, work, ("venv",))


def run(wanted: Sequence[Step], runner: Runner, show: progress.Progress) -> None:
    """Run the steps, several at a time; the first failure ends the others. Raises what the step raised."""
    waiting = {step.name: step for step in wanted}
    running: dict[Future[None], str] = {}
    with ThreadPoolExecutor(max_workers=WORKERS) as pool:
        try:
            while waiting or running:
                blocked = {*waiting, *running.values()}
                for step in [s for s in waiting.values() if not blocked & set(s.after)]:
                    running[pool.submit(_one, step, show)] = waiting.pop(step.name).name
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    future.result()
        except BaseException:
            runner.end()
            raise


def _one(step: Step, show: progress.Progress) -> None:
    show.started(step.name)
    ok = False
    try:
        # Asked again: what it builds on may have been made anew meanwhile, or may have made it.
        if not step.done():
            step.work(lambda detail: show.doing(step.name, detail))
        ok = True
    finally:
        show.finished(step.name, ok=ok)


def main(argv: Sequence[str]) -> int:
    """Do what is not done yet; the exit code."""
    parser = argparse.ArgumentParser(prog="bootstrap", description="Install what Tidegate needs.")
    parser.add_argument("--dev", action="store_true", help="also what the tests need")
    arguments = parser.parse_args(argv)
    paths, runner = from_environment(), Runner()
    try:
        system.check_platform()
    except StepFailed as failure:
        return _explain(failure)
    todo = _undone(steps(paths, runner, dev=arguments.dev))
    if not todo:
        return 0
    print("Installing what is missing (only the first time):", flush=True)
    if not optimized():
        print(SLOW, flush=True)
    show = progress.for_output({step.name: step.title for step in todo})
    try:
        run(todo, runner, show)
    except BaseException as error:
        show.close()
        return _explain(error)
    show.close()
    return 0


def _undone(wanted: Sequence[Step]) -> list[Step]:
    """The steps whose result is not there, and those that build on one of them."""
    todo: dict[str, Step] = {}
    for step in wanted:
        if todo.keys() & set(step.after) or not step.done():
            todo[step.name] = step
    return list(todo.values())


def _explain(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        print("\nInterrupted. The same command goes on where it stopped.", file=sys.stderr)
        return 130
    failure = error if isinstance(error, StepFailed) else _unexpected(error)
    print(f"\n{failure.what}", file=sys.stderr)
    if failure.log is not None:
        print(
            f"\nThe log, {_short(failure.log)}, ends with:\n{_indented(tail(failure.log))}", file=sys.stderr
        )
    print(f"\nWhat to do: {failure.remedy}", file=sys.stderr)
    return 1


def _unexpected(error: BaseException) -> StepFailed:
    if isinstance(error, OSError):
        return StepFailed(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), OTHERWISE)
    return StepFailed(
        f"{type(error).__name__}: {error}", "This is a defect of the installer: please report it."
    )


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
