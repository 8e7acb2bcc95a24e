"""A private Prometheus on loopback: it reads the metrics of every part and evaluates Tidegate's rules."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from tidegate.kernel.settings.base import Settings
from tidegate.stack.child import Child, Port, Probe
from tidegate.stack.token import METRICS_TOKEN

USER = "metrics"
"""The name with which the metrics token is the password."""

MISSING = (
    "Prometheus is not installed: run `tidegate up --with-monitoring`, or `sudo apt-get install prometheus`. "
    "TIDEGATE_MONITORING=auto starts without it."
)
# The files with Tidegate's recording rules and alerts. A missing file is not an error.
_FOLDER = Path(__file__).parents[2] / "deploy" / "monitoring"
RECORDING, ALERTS = _FOLDER / "rules.yml", _FOLDER / "alerts.yml"
# The first release of Prometheus that knows the field `keep_firing_for` of alerts. Earlier releases would not
# start with our file of alerts, so they do not get it.
ALERTS_SINCE = (2, 42)
SERVICES = ("gateway", "registry", "router", "autoscaler")
# This value is used instead of a password hash if no hash can be computed. Prometheus refuses to start with
# this value, so it never runs without a password.
_NO_HASH = "!"
VERSION_LIMIT_S = 10.0
# A query can read at most this many samples, of 16 bytes each. Prometheus's default is 50 million.
MOST_SAMPLES = 5_000_000
# The most samples in the metrics of one target. Prometheus rejects a target with more, so that no target can
# fill Prometheus's memory. A gateway has 121 samples for each Deployment (241 for a language model) and about
# 10 for each endpoint. So the limit is enough for 1,000 Deployments, or for 750 Deployments of language
# models.
PAGE_SAMPLES = 200_000


@dataclass(frozen=True, slots=True)
class Place:
    """The port, the targets and the limits of Prometheus. Prometheus writes only to ``home``.

    ``targets``: the address of each service. ``tls``: the services that use TLS. ``days``: how many days
    metrics are stored. ``max_mb``: the largest size of the stored metrics on disk, in MB.
    """

    home: Path
    port: int
    targets: Mapping[str, str]
    tls: frozenset[str]
    token_file: Path
    interval_s: float = 10.0
    days: float = 15.0
    max_mb: int = 1024
    alertmanager: str = ""
    rules: tuple[Path, ...] = (RECORDING, ALERTS)


def installed() -> str | None:
    """Return the path of Prometheus's program; None if it is not installed."""
    return shutil.which("prometheus")


def version_of(program: str) -> tuple[int, ...]:
    """Return the version of Prometheus, such as ``(2, 42)``; empty if it is unknown."""
    try:
        done = subprocess.run(
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=VERSION_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(rb"version (\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else ()


def place(settings: Settings, version: tuple[int, ...] = ALERTS_SINCE) -> Place:
    """Return the port, the targets and the limits of Prometheus for these settings and this version."""
    host = "127.0.0.1" if settings.host in {"0.0.0.0", "::"} else settings.host
    host = f"[{host}]" if ":" in host else host
    return Place(
        home=settings.state_path / "data" / "prometheus",
        port=settings.prometheus_port,
        targets={name: f"{host}:{getattr(settings, f'{name}_port')}" for name in SERVICES},
        tls=frozenset({"gateway"} if settings.tls_cert else ()),
        token_file=settings.state_path / METRICS_TOKEN,
        interval_s=settings.scrape_interval_s,
        days=settings.prometheus_days,
        max_mb=settings.prometheus_max_mb,
        alertmanager=settings.alertmanager_url,
        rules=(RECORDING, ALERTS) if version >= ALERTS_SINCE else (RECORDING,),
    )


def child(program: str, place: Place, environ: Mapping[str, str]) -> Child:
    """Return the process of Prometheus. It starts last, so that it delays no service, and stops first."""
    token_file = place.token_file
    own = f"http://(127[.]0[.]0[.]1|localhost):{place.port}"
    file, access = place.home / "prometheus.yml", place.home / "web.yml"
    return Child(
        name="prometheus",
        argv=(
            program,
            f"--config.file={file}",
            f"--storage.tsdb.path={place.home / 'data'}",
            f"--storage.tsdb.retention.time={round(place.days * 86_400)}s",
            f"--storage.tsdb.retention.size={place.max_mb}MB",
            f"--web.config.file={access}",
            f"--web.listen-address=127.0.0.1:{place.port}",
            # Only Prometheus's own pages may read the metrics in a browser. By default, any web site in a
            # browser on this machine could read them.
            f"--web.cors.origin={own}",
            f"--query.max-samples={MOST_SAMPLES}",
            "--query.timeout=30s",
            "--log.level=warn",
        ),
        env=environ,
        probe=Probe("http", place.port, login=(USER, token_file), path="/-/ready"),
        stop_order=5,
        ports=(Port(place.port, "TIDEGATE_PROMETHEUS_PORT"),),
        after=("gateway",),
        folders=(place.home,),
        files={file: config(place), access: web_config(token_file)},
        grace_s=10.0,
    )


def web_config(token_file: Path) -> str:
    """Return the configuration of Prometheus's web pages, with the metrics token as their password.

    Without this password, every user and every model on this machine could read all metrics on these pages.
    """
    hashed = _bcrypt(token_file.read_text().strip()) if token_file.is_file() else _NO_HASH
    return yaml.safe_dump({"basic_auth_users": {USER: hashed}})


def _bcrypt(password: str) -> str:
    with warnings.catch_warnings():
        # Suppress the warning that `crypt` is deprecated. Only Python 3.13 and later lack it, and the
        # services run on 3.11 and 3.12.
        warnings.simplefilter("ignore", DeprecationWarning)
        import crypt
    # bcrypt's lowest cost factor is enough, because the password has 256 random bits. The salt is derived
    # from the password, so that the same password always has the same hash.
    salt = hashlib.sha256(password.encode()).hexdigest()[:22]
    return crypt.crypt(password, f"$2b$04${salt}") or _NO_HASH


def config(place: Place) -> str:
    """Return the configuration of Prometheus as YAML."""
    interval = f"{round(place.interval_s * 1e3)}ms"
    token = {"credentials_file": str(place.token_file)}
    workers = {
        "url": f"http://{place.targets['autoscaler']}/prometheus/workers",
        "authorization": token,
        "refresh_interval": interval,
    }
    document: dict[str, Any] = {
        "global": {
            "scrape_interval": interval,
            "scrape_timeout": f"{round(min(place.interval_s, 10.0) * 900)}ms",
            "evaluation_interval": interval,
        },
        "rule_files": [str(path) for path in place.rules],
        **_alerting(place.alertmanager),
        "scrape_configs": [
            *(_service(name, place, token) for name in place.targets),
            {"job_name": "workers", "sample_limit": PAGE_SAMPLES, "http_sd_configs": [workers]},
        ],
    }
    return yaml.safe_dump(document, sort_keys=False)


def _alerting(url: str) -> dict[str, Any]:
    """Return the part of the configuration that sends alerts to an Alertmanager; empty without a URL."""
    if not url:
        return {}
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    found: dict[str, Any] = {"scheme": parts.scheme, "static_configs": [{"targets": [host]}]}
    if parts.path.strip("/"):
        found["path_prefix"] = parts.path
    if parts.username:
        found["basic_auth"] = {
            "username": unquote(parts.username),
            "password": unquote(parts.password or ""),
        }
    return {"alerting": {"alertmanagers": [found]}}


def _service(name: str, place: Place, token: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "job_name": name,
        "sample_limit": PAGE_SAMPLES,
        "authorization": dict(token),
        "static_configs": [{"targets": [place.targets[name]]}],
    }
    if name in place.tls:
        # Do not verify the certificate, because it is issued for the gateway's public name, and not for this
        # address. This is safe, because the requests stay on this machine.
        found |= {"scheme": "https", "tls_config": {"insecure_skip_verify": True}}
    return found
