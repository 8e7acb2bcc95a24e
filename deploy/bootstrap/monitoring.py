"""Install Prometheus from the system's packages, for `tidegate up --with-monitoring`."""

from __future__ import annotations

from deploy.bootstrap import progress, system
from deploy.bootstrap.command import Runner
from deploy.bootstrap.install import explain_failure, run
from deploy.bootstrap.paths import from_environment
from deploy.bootstrap.step import Step


def main() -> int:
    """Install Prometheus unless it is installed. Return the exit code."""
    paths, runner = from_environment(), Runner()
    packages = system.Packages(paths, runner)
    step = Step(
        "prometheus",
        "Prometheus",
        done=lambda: not system.prometheus_missing(),
        work=lambda report: packages.install(system.prometheus_missing, "prometheus-package", report),
    )
    if step.done():
        return 0
    show = progress.for_output({step.name: step.title})
    try:
        run([step], runner, show)
    except BaseException as error:
        show.close()
        return explain_failure(error)
    show.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
