"""The bootstrap: reading locks, explaining failures, choosing and ordering the steps."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest

from deploy.bootstrap import command, environments, paths, python_check, system
from deploy.bootstrap.command import Runner
from deploy.bootstrap.install import _undone, run, steps
from deploy.bootstrap.progress import Progress
from deploy.bootstrap.step import Step, StepFailed, fingerprint, stamped

ROOT = Path(__file__).parents[3]


class Silent:
    """A display that records each report."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, str]] = []

    def started(self, name: str) -> None:
        self.reports.append(("started", name))

    def doing(self, name: str, detail: str) -> None:
        self.reports.append((detail, name))

    def finished(self, name: str, *, ok: bool) -> None:
        self.reports.append(("ok" if ok else "failed", name))

    def close(self) -> None:
        pass


class Installation:
    """Steps whose results are names in a set."""

    def __init__(self, *done: str) -> None:
        self.done = set(done)
        self.order: list[str] = []

    def step(self, name: str, *after: str, fails: bool = False) -> Step:
        def work(report: object) -> None:
            if fails:
                raise StepFailed(f"{name} failed", "mend it")
            self.order.append(name)
            self.done.add(name)

        return Step(name, name, lambda: name in self.done, work, after)


def test_steps_after_an_undone_step_are_undone():
    made = Installation("system", "services", "triton")
    steps = [
        made.step("system"),
        made.step("venv", "system"),
        made.step("services", "venv"),
        made.step("tests", "services"),
        made.step("triton", "system"),
    ]
    assert [step.name for step in _undone(steps)] == ["venv", "services", "tests"]


def test_steps_run_after_their_dependencies():
    made = Installation()
    steps = [made.step("c", "b"), made.step("b", "a"), made.step("a"), made.step("d", "a")]
    run(steps, Runner(), cast("Progress", Silent()))
    assert made.order.index("a") < made.order.index("b") < made.order.index("c")
    assert made.done == {"a", "b", "c", "d"}


def test_a_step_that_is_done_meanwhile_does_not_run():
    made = Installation("b")
    run([made.step("a"), made.step("b", "a")], Runner(), cast("Progress", Silent()))
    assert made.order == ["a"]


def test_the_first_failure_ends_the_bootstrap():
    made, progress = Installation(), Silent()
    steps = [made.step("a", fails=True), made.step("b", "a")]
    with pytest.raises(StepFailed, match="a failed"):
        run(steps, Runner(), cast("Progress", progress))
    assert progress.reports == [("started", "a"), ("failed", "a")]


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("SSLError(SSLCertVerificationError(1, 'certificate verify failed'))", "PIP_CERT"),
        ("Failed to establish a new connection: [Errno -3] Temporary failure in name resolution", "network"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "serves altered files"),
        ("E: dpkg was interrupted, you must manually run", "dpkg --configure -a"),
        ("a thing that nobody foresaw", "Read the log"),
    ],
)
def test_a_failure_is_explained_by_its_log(tmp_path: Path, text: str, remedy: str):
    log = tmp_path / "log"
    log.write_text(f"before\n{text}\n")
    assert remedy in command.explain(log)


def test_a_failed_command_has_its_log(tmp_path: Path):
    log = tmp_path / "log"
    seen: list[str] = []
    with pytest.raises(StepFailed) as failed:
        Runner().run(
            ["sh", "-c", "echo No space left on device; exit 3"], log, what="it", on_line=seen.append
        )
    assert "exit code 3" in failed.value.what
    assert "disk is full" in failed.value.remedy
    assert seen == ["No space left on device"]


def test_an_unsupported_python_is_rejected_with_the_remedy(monkeypatch: pytest.MonkeyPatch):
    assert python_check.wrong_version() == ""
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    assert "TIDEGATE_PYTHON" in python_check.wrong_version()


def test_pins_are_the_unconditional_ones(tmp_path: Path):
    lock = tmp_path / "lock"
    lines = ("a-b==1.0 \\", "    --hash=sha256:00", "c==2 ; sys_platform == 'win32' \\", "d[x]==3 \\")
    lock.write_text("\n".join(lines))
    assert environments.pins(lock) == [("a-b", "1.0"), ("d", "3")]


def test_a_filled_environment_has_every_package(tmp_path: Path):
    lock, stamp = tmp_path / "lock", tmp_path / "stamp"
    lock.write_text("a-b==1.0 \\\n    --hash=sha256:00\n")
    site = tmp_path / "lib" / f"python{paths.python_version()}" / "site-packages"
    (site / "A_b-1.0.dist-info").mkdir(parents=True)
    assert not environments.filled(tmp_path, lock, stamp)
    stamp.write_text(environments.lock_fingerprint(lock))
    assert environments.filled(tmp_path, lock, stamp)
    (site / "A_b-1.0.dist-info").rmdir()
    assert not environments.filled(tmp_path, lock, stamp)


def test_a_stamp_matches_one_value(tmp_path: Path):
    stamp = tmp_path / "stamp"
    assert not stamped(stamp, "x")
    stamp.write_text(fingerprint("ab", "c"))
    assert not stamped(stamp, fingerprint("a", "bc"))
    assert stamped(stamp, fingerprint("ab", b"c"))


@pytest.mark.parametrize("lock", sorted(ROOT.glob("requirements*.lock")), ids=lambda path: path.name)
def test_locks_have_hashes_and_name_no_index(lock: Path):
    text = lock.read_text()
    pinned = re.findall(r"^[a-z0-9].*==", text, re.MULTILINE)
    assert pinned
    assert text.count("--hash=sha256:") >= len(pinned)
    assert "://" not in text
    assert "--index" not in text


def test_postgres_and_prometheus_are_only_installed_for_the_tests():
    here = paths.from_environment()
    names = {dev: [step.name for step in steps(here, Runner(), dev=dev)] for dev in (False, True)}
    assert {"postgres", "prometheus"}.isdisjoint(names[False])
    assert {"postgres", "prometheus"} <= set(names[True])


def test_without_root_the_step_of_postgres_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A user without root must be able to run `make test`."""
    monkeypatch.setattr(system, "POSTGRES", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    (step,) = [s for s in steps(paths.from_environment(), Runner(), dev=True) if s.name == "postgres"]
    assert system.postgres_missing() == ["postgresql"]
    assert step.done(), "without apt-get there is nothing to do"
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/apt-get" if name == "apt-get" else None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert not step.done()


def test_a_missing_prometheus_says_what_to_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(system, "rabbitmq_missing", list)
    packages = system.Packages(paths.from_environment(), Runner())
    monkeypatch.setattr(system, "python_missing", lambda _: [])
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(StepFailed) as failed:
        packages.install(system.prometheus_missing, "prometheus-package", lambda _: None)
    assert "PATH has `prometheus`" in failed.value.remedy
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/apt-get" if name == "apt-get" else None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(StepFailed) as failed:
        packages.install(system.prometheus_missing, "prometheus-package", lambda _: None)
    assert "--no-install-recommends prometheus\n" in failed.value.remedy
    assert "systemctl disable --now prometheus " in failed.value.remedy


@pytest.mark.parametrize("status", [0, 100])
def test_the_package_of_postgres_makes_no_cluster(tmp_path: Path, status: int):
    """The setting changes during the installation, and is restored afterwards."""
    conf, seen = tmp_path / "createcluster.conf", tmp_path / "seen"
    conf.write_text("#create_main_cluster = true\n")
    apt = tmp_path / "apt-get"
    apt.write_text(
        f'#!/bin/sh\ncase "$*" in *" postgresql") cat "{conf}" >"{seen}"; exit {status};; esac\nexit 0\n'
    )
    apt.chmod(0o755)
    script = system.INSTALL.replace("/etc/postgresql-common/createcluster.conf", str(conf))
    script = script.replace("/usr/sbin/policy-rc.d", str(tmp_path / "policy-rc.d"))
    done = subprocess.run(
        ["sh", "-c", script, "install", "postgresql"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == status
    assert seen.read_text().startswith("create_main_cluster = false")
    assert conf.read_text() == "#create_main_cluster = true\n"
    assert not (tmp_path / "policy-rc.d").exists()


@pytest.mark.parametrize("works", [True, False])
def test_missing_packages_are_installed_or_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool
):
    server = tmp_path / "rabbitmq-server"
    apt = tmp_path / "apt-get"
    apt.write_text(f"#!/bin/sh\n{'install -m 755 /dev/null ' + str(server) if works else 'true'}\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(system, "RABBITMQ", (server,))
    monkeypatch.setattr(system, "INSTALL", "#UPDATE\napt-get install $@\n")
    packages = system.Packages(paths.Paths(tmp_path, tmp_path, tmp_path), Runner())
    if works:
        packages.install(system.rabbitmq_missing, "rabbitmq-package", lambda _: None)
        assert server.exists()
    else:
        with pytest.raises(StepFailed, match="Still missing after the installation: rabbitmq-server"):
            packages.install(system.rabbitmq_missing, "rabbitmq-package", lambda _: None)
