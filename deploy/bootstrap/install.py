"""The steps of the bootstrap. Steps that do not depend on each other run in parallel."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from graphlib import TopologicalSorter
from pathlib import Path

from deploy.bootstrap import environments, progress, system, triton
from deploy.bootstrap.command import OTHERWISE, Runner, tail
from deploy.bootstrap.paths import Paths, from_environment
from deploy.bootstrap.python_check import optimized
from deploy.bootstrap.step import Report, Step, StepFailed

WORKERS = 3
"""One step waits for the network or the disk while the others unpack."""

SLOW = f"""\
  Note: {sys.executable} was compiled without optimizations, as pyenv does by default.
  Tidegate works with it, but serves 25 % fewer requests. Use the system's Python
  (TIDEGATE_PYTHON=/usr/bin/python3 make up), or build Python in pyenv
  with PYTHON_CONFIGURE_OPTS=--enable-optimizations."""


def steps(paths: Paths, runner: Runner, *, dev: bool) -> list[Step]:
    """Return the steps that the stack needs before it can start. With ``dev``, add steps for the tests."""
    packages = system.Packages(paths, runner)
    found = [
        Step(
            "system",
            "Python's system packages",
            done=lambda: not system.python_missing(paths),
            work=partial(packages.install, partial(system.python_missing, paths), "system"),
        ),
        Step(
            "rabbitmq",
            "RabbitMQ",
            done=lambda: not system.rabbitmq_missing(),
            work=partial(packages.install, system.rabbitmq_missing, "rabbitmq-package"),
            after=("system",),
        ),
        Step(
            "venv",
            "Virtual environment",
            done=lambda: environments.usable(paths.venv, "pip") and environments.connected(paths),
            work=partial(_make_venv, paths, runner),
            after=("system",),
        ),
        _locked(paths, runner, "services", "Packages of the services", "requirements.lock", "venv"),
        Step(
            "triton",
            "Triton Inference Server",
            done=lambda: triton.installed(paths),
            work=partial(triton.install, paths, runner),
            after=("venv",),
        ),
        _model_env(paths, runner),
    ]
    if dev:
        found += [
            _locked(paths, runner, "tests", "Packages of the tests", "requirements-dev.lock", "services"),
            Step(
                "postgres",
                "PostgreSQL, for the tests",
                # Without root, PostgreSQL cannot be installed. Then this step counts as done, and tests that
                # need PostgreSQL are skipped.
                done=lambda: not system.postgres_missing() or not system.can_install(),
                work=partial(packages.install_for_tests, system.postgres_missing, "postgres-package"),
                after=("rabbitmq",),
            ),
            Step(
                "prometheus",
                "Prometheus, for the tests",
                done=lambda: not system.prometheus_missing() or not system.can_install(),
                work=partial(packages.install_for_tests, system.prometheus_missing, "prometheus-package"),
                after=("postgres",),
            ),
        ]
    return found


def _make_venv(paths: Paths, runner: Runner, report: Report) -> None:
    if not environments.usable(paths.venv, "pip"):
        report(str(paths.venv))
        environments.create(paths, paths.venv, runner, log=paths.log("venv"), pip=True)
    environments.connect(paths)


def _locked(paths: Paths, runner: Runner, name: str, title: str, lock_name: str, after: str) -> Step:
    lock, stamp = paths.root / lock_name, paths.venv / f".{name}.stamp"

    def work(report: Report) -> None:
        environments.install(paths, paths.venv, lock, stamp, runner, paths.log(name), report)

    return Step(name, title, lambda: environments.filled(paths.venv, lock, stamp), work, (after,))


def _model_env(paths: Paths, runner: Runner) -> Step:
    env, log = paths.model_env, paths.log("model-env")
    lock, stamp = paths.root / "requirements-model.lock", paths.model_env / ".stamp"

    def work(report: Report) -> None:
        if not environments.usable(env, "sys"):
            environments.create(paths, env, runner, log=log, pip=False)
        environments.install(paths, env, lock, stamp, runner, log, report)

    def done() -> bool:
        return environments.filled(env, lock, stamp) and environments.usable(env, "sys")

    return Step("model-env", "The models' Python environment", done, work, ("venv",))


def run(wanted: Sequence[Step], runner: Runner, show: progress.Progress) -> None:
    """Run the steps, several at the same time. If one fails, end the others and raise its error."""
    by_name = {step.name: step for step in wanted}
    order = TopologicalSorter({step.name: by_name.keys() & set(step.after) for step in wanted})
    order.prepare()
    running: dict[Future[None], str] = {}
    with ThreadPoolExecutor(max_workers=WORKERS) as pool:
        try:
            while order.is_active():
                running |= {pool.submit(_run_one, by_name[name], show): name for name in order.get_ready()}
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    order.done(running.pop(future))
        except BaseException:
            runner.end()
            raise


def _run_one(step: Step, show: progress.Progress) -> None:
    show.started(step.name)
    ok = False
    try:
        # Check again, because an earlier step may have done this step's work or changed this step's input.
        if not step.done():
            step.work(partial(show.doing, step.name))
        ok = True
    finally:
        show.finished(step.name, ok=ok)


def main(argv: Sequence[str]) -> int:
    """Run the steps that are not done yet. Return the exit code."""
    parser = argparse.ArgumentParser(prog="bootstrap", description="Install what Tidegate needs.")
    parser.add_argument("--dev", action="store_true", help="also install the packages that the tests need")
    arguments = parser.parse_args(argv)
    paths, runner = from_environment(), Runner()
    try:
        system.check_platform()
    except StepFailed as failure:
        return explain_failure(failure)
    todo = _undone(steps(paths, runner, dev=arguments.dev))
    if not todo:
        return 0
    print("Installing the missing parts (only the first time):", flush=True)
    if not optimized():
        print(SLOW, flush=True)
    show = progress.for_output({step.name: step.title for step in todo})
    try:
        run(todo, runner, show)
    except BaseException as error:
        show.close()
        return explain_failure(error)
    show.close()
    return 0


def _undone(wanted: Sequence[Step]) -> list[Step]:
    """Return the steps that are not done, and the steps that depend on them."""
    todo: dict[str, Step] = {}
    for step in wanted:
        if todo.keys() & set(step.after) or not step.done():
            todo[step.name] = step
    return list(todo.values())


def explain_failure(error: BaseException) -> int:
    """Print why the installation stopped and what the user must do. Return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("\nInterrupted. The same command continues where it stopped.", file=sys.stderr)
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
