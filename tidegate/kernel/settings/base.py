"""Settings that several services need.

They come from ``TIDEGATE_*`` variables in the environment, or from the file ``tidegate.env`` in the state
folder.

``docs/settings.md`` lists the settings of all services for users. Each service has a subclass of
:class:`Settings` in its own ``settings.py``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, PrivateAttr, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from typing_extensions import Self

from tidegate.kernel import credentials
from tidegate.kernel.settings import file as settings_file

# For each setting that has a server's URL: the name of this server.
SERVERS = {
    "amqp_url": credentials.RABBITMQ,
    "redis_url": credentials.VALKEY,
    "jobs_url": credentials.VALKEY_JOBS,
}


_SECRET = ("token", "password", "secret", "key")


def is_secret(name: str, value: str) -> bool:
    """Return True if a setting's value is a secret, or may contain one.

    This is the case if ``name`` is that of a secret, or if ``value`` is a URL for which :func:`secrets_in`
    returns True.
    """
    return name.lower().endswith(_SECRET) or ("://" in value and secrets_in(value))


# Options in a URL's query may be credentials, such as a signature.
_SECRET_OPTION = re.compile(r"(?i)(pass|pwd|secret|token|key|sig|cred)[^=]*=")


def secrets_in(url: str) -> bool:
    """Return True if a URL has a password, has an option that may be a credential, or cannot be parsed."""
    try:
        parts = urlsplit(url)
        return bool(parts.password) or any(map(_SECRET_OPTION.search, re.split("[&;]", parts.query)))
    except ValueError:
        return True


DEFAULT, COMPUTED, FILE, ENVIRONMENT = "default", "computed", "file", "environment"
"""The sources of a setting's value. A computed one follows from others."""

# `tidegate up` passes settings to the services as environment variables. The environment variable with this
# name holds a JSON object. It maps each passed variable to the source of its value.
SOURCES = "TIDEGATE_SETTING_SOURCES"

_environ: ContextVar[Mapping[str, str] | None] = ContextVar("environ", default=None)


class _Variables(EnvSettingsSource):
    """A settings source that reads a mapping in place of the environment."""

    def __init__(self, settings_cls: type[BaseSettings], variables: Mapping[str, str]) -> None:
        self._variables = variables
        super().__init__(settings_cls)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return {name.lower(): value for name, value in self._variables.items() if value}


class Settings(BaseSettings):
    """The shared settings. Every field is ``TIDEGATE_<FIELD>`` in the environment or in ``tidegate.env``.

    ``service``: the name of this process's account at RabbitMQ and the stores; empty: it has no account.
    ``holds_service_token``: False for a process that must not use the service token, even if it can read the
    token's file.
    """

    service: ClassVar[str] = ""
    holds_service_token: ClassVar[bool] = True
    model_config = SettingsConfigDict(
        env_prefix="TIDEGATE_", extra="ignore", validate_default=True, env_ignore_empty=True
    )

    state_dir: Path = Field(Path(".tidegate"), description="Folder for everything that Tidegate writes.")
    runtime_dir: Path | None = Field(
        None, description="Folder with Triton and the models' Python environment."
    )
    host: str = Field("127.0.0.1", description="Address on which every service listens.")
    gateway_port: int = Field(8000, description="REST port of the gateway.")
    gateway_grpc_port: int = Field(8001, description="gRPC port of the gateway.")
    registry_port: int = Field(8010, description="Port of the registry.")
    router_port: int = Field(8020, description="Port of the router.")
    autoscaler_port: int = Field(8030, description="Port of the autoscaler.")
    rabbitmq_port: int = Field(8072, description="AMQP port of the embedded RabbitMQ.")
    epmd_port: int = Field(8074, description="Port of epmd, the name server of the embedded RabbitMQ.")
    rabbitmq_dist_port: int = Field(
        8075, description="Port of the embedded RabbitMQ for Erlang's distribution protocol."
    )
    valkey_port: int = Field(8079, description="Port of the embedded Valkey for the live facts.")
    jobs_port: int = Field(8078, description="Port of the embedded Valkey for the jobs.")
    profile: Literal["default", "edge"] = Field(
        "default",
        description="`edge`: for a machine with one core and 1 GB. Then the control plane is one process, "
        "monitoring is off, and limits are lower.",
    )
    monitoring: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Run Prometheus with the stack. `auto`: if it is installed. `on`: always; it must be "
        "installed. `off`: never.",
    )
    prometheus_port: int = Field(8090, description="Port of the stack's Prometheus, on loopback.")
    prometheus_days: float = Field(
        15.0, gt=0, description="Days for which the stack's Prometheus keeps metrics."
    )
    prometheus_max_mb: int = Field(
        1024, ge=64, description="Maximum number of megabytes of metrics that the stack's Prometheus keeps."
    )
    scrape_interval_s: float = Field(
        10.0,
        ge=0.5,
        le=15,  # Prometheus's rules compute rates over one minute, so they need several values in a minute
        description="Seconds between two reads of every metric by the stack's Prometheus.",
    )
    alertmanager_url: str = Field(
        "",
        pattern="^(https?://[^/ ]+.*)?$",
        description="URL of an Alertmanager that gets the alerts of the stack's Prometheus. Empty: no alerts "
        "are sent.",
    )
    secrets_dir: Path | None = Field(
        None,
        description="Folder with the services' passwords for RabbitMQ and Valkey. They are used for URLs "
        "that name no user. Default: the state folder's `secrets`, for the embedded servers only.",
    )
    prices: Path | None = Field(
        None,
        description="Price file (YAML) for costs and budgets. Default: typical prices of rented machines.",
    )
    amqp_url: str = Field("", description="URL of RabbitMQ. Default: the embedded RabbitMQ.")
    amqp_driver: Literal["auto", "aio-pika"] = Field(
        "auto",
        description="AMQP client library. `auto`: Tidegate's own for requests, replies and jobs, and "
        "aio-pika for all other messages. `aio-pika`: aio-pika for all messages.",
    )
    redis_url: str = Field(
        "", description="URL of the Valkey or Redis for live facts. Default: the embedded Valkey."
    )
    jobs_url: str = Field(
        "",
        description="URL of the Valkey or Redis for jobs, which needs `appendfsync always`. Default: the "
        "embedded Valkey.",
    )
    database_url: str = Field(
        "", description="URL of the registry's database. Default: SQLite in the state folder."
    )
    artifact_url: str = Field(
        "",
        description="URL of the artifact store: a folder, `s3://`, `gs://` or `az://`. Default: a folder in "
        "the state folder.",
    )
    blob_url: str = Field(
        "",
        description="URL of the store of large payloads: a folder, `s3://`, `gs://` or `az://`. Gateways, "
        "workers and router need the same value. Default: a folder in the state folder.",
    )
    claim_above_bytes: int = Field(
        4 * 2**20,
        ge=0,
        le=15 * 2**20,  # RabbitMQ accepts no message above 16 MiB
        description="Largest size of tensors in a message, in bytes. Larger ones go through the blob store.",
    )
    ack_timeout_s: float = Field(
        1800.0,
        gt=0,
        description="RabbitMQ's `consumer_timeout`, in seconds. It does not limit how long a job may run.",
    )
    job_ttl_s: float = Field(
        86_400, ge=1, description="Seconds after which an accepted job expires if it has not ended."
    )
    job_retention_s: float = Field(
        86_400, ge=1, description="Seconds for which a job and its result are kept after the job ends."
    )
    max_api_body_bytes: int = Field(
        4 * 2**20,
        ge=1024,
        description="Largest body of an API call, except uploads and inference, in bytes.",
    )
    gateway_url: str = Field("", description="URL of the gateway for clients and the CLI.")
    registry_url: str = Field("", description="URL of the registry for workers and services.")
    router_url: str = Field("", description="URL of the router for the CLI.")
    autoscaler_url: str = Field("", description="URL of the autoscaler for the CLI.")
    tls_cert: Path | None = Field(
        None,
        description="Certificate chain (PEM) of the gateway. With its key (`TIDEGATE_TLS_KEY`), REST and "
        "gRPC use TLS.",
    )
    tls_key: Path | None = Field(
        None,
        description="Private key (PEM, without a password) of `TIDEGATE_TLS_CERT`. Both files are reloaded "
        "when they change.",
    )
    tls_ca: Path | None = Field(
        None,
        description="Certificates (PEM) that the CLI and the Python client trust besides the public ones.",
    )
    webhook_allow_private: bool = Field(False, description="Allow webhooks to addresses that are not public.")
    service_token: str = Field(
        "", description="Token of the control plane. Default: the content of `token` in the state folder."
    )
    api_key: str = Field(
        "",
        description="API key of the CLI and the Python client. With a key, all calls go through the gateway.",
    )
    model_sandbox: Literal["auto", "required", "off"] = Field(
        "auto",
        description="Sandbox of a model's process. `auto`: the strongest that the machine allows. "
        "`required`: a replica fails if it cannot have a sandbox. `off`: no sandbox.",
    )
    trusted_keys: Path | None = Field(
        None,
        description="Public keys that may sign models: a PEM file, or a folder of `*.pem` and `*.pub`. If it "
        "is set, workers load only models that one of these keys signed, and the registry accepts only their "
        "signatures.",
    )
    http_head_bytes: int = Field(
        64 * 1024, ge=1024, description="Largest head of an HTTP request in bytes, including trailers."
    )
    http_head_fields: int = Field(
        100, ge=10, description="Maximum number of fields in the head of an HTTP request."
    )
    http_header_timeout_s: float = Field(
        10.0, gt=0, description="Seconds within which the whole head of an HTTP request must arrive."
    )
    http_idle_timeout_s: float = Field(
        75.0,  # clients and load balancers close earlier, so no request meets a closing connection
        gt=0,
        description="Seconds for which an HTTP connection may be idle between two requests.",
    )
    http_body_bytes_per_s: int = Field(
        1024, ge=0, description="Slowest allowed rate of a request's body, in bytes per second."
    )
    http_body_grace_s: float = Field(
        20.0, gt=0, description="Seconds over which the rate of a request's body is measured."
    )
    http_connections: int = Field(
        16_384,
        ge=16,
        description="Maximum number of HTTP connections of one process. If there are more, unused ones are "
        "closed, oldest first.",
    )
    http_connections_per_peer: int = Field(
        8_192,
        ge=8,
        description="Maximum number of HTTP connections of one client address (IPv6: one /64 network) per "
        "process.",
    )
    http_pending_head_bytes: int = Field(
        64 * 2**20, ge=2**20, description="Maximum number of bytes of incomplete heads in memory per process."
    )
    log_level: str = Field("INFO", description="Lowest level of log lines: DEBUG, INFO, WARNING or ERROR.")

    _server_urls: dict[str, str] = PrivateAttr(default_factory=dict)
    _stated: dict[str, str] = PrivateAttr(default_factory=dict)
    _file: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources in order of precedence: arguments, environment, file in the state folder."""
        environ = _environ_now()
        stated = getattr(init_settings, "init_kwargs", {}).get("state_dir")
        state = Path(stated or environ.get("TIDEGATE_STATE_DIR") or ".tidegate")
        file = settings_file.read(state)
        return init_settings, _Variables(settings_cls, environ), _Variables(settings_cls, file)

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Self:
        """Return settings that are read from ``environ`` instead of the process's environment."""
        mark = _environ.set(environ)
        try:
            return cls()
        finally:
            _environ.reset(mark)

    def sources(self) -> dict[str, str]:
        """Return the source of each value, by field."""
        return {
            name: self._stated.get(name)
            or (DEFAULT if getattr(self, name) == _default_of(field) else COMPUTED)
            for name, field in type(self).model_fields.items()
        }

    @property
    def file_values(self) -> dict[str, str]:
        """Return all settings in the state folder's file, by variable. Include those of other services."""
        return dict(self._file)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_unset(cls, values: Any) -> Any:
        # `TIDEGATE_X=` in an env file means "the default", as in docker compose.
        return {k: v for k, v in values.items() if v != ""} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _derive(self) -> Self:
        self._note_sources()
        self._log_in()
        self.database_url = self.database_url or f"sqlite+aiosqlite:///{self.state_path}/data/registry.db"
        self.artifact_url = self.artifact_url or f"file://{self.state_path}/data/artifacts"
        self.blob_url = self.blob_url or f"file://{self.state_path}/data/blobs"
        reach = "127.0.0.1" if self.host in {"0.0.0.0", "::"} else self.host
        reach = f"[{reach}]" if ":" in reach else reach
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TIDEGATE_TLS_CERT and TIDEGATE_TLS_KEY go together: set both, or neither")
        for name in ("tls_cert", "tls_key", "tls_ca"):
            if (path := getattr(self, name)) is not None:
                setattr(self, name, path.absolute())
        for service in ("gateway", "registry", "router", "autoscaler"):
            if not getattr(self, f"{service}_url"):
                scheme = "https" if service == "gateway" and self.tls_cert else "http"
                setattr(self, f"{service}_url", f"{scheme}://{reach}:{getattr(self, f'{service}_port')}")
        token_file = self.state_path / "token"
        if not self.holds_service_token:
            self.service_token = ""
        elif not self.service_token and token_file.is_file():
            self.service_token = token_file.read_text().strip()
        return self

    def _note_sources(self) -> None:
        environ = _environ_now()
        self._file = settings_file.read(self.state_dir)
        handed_on = json.loads(environ.get(SOURCES) or "{}")
        for name in type(self).model_fields:
            variable = f"TIDEGATE_{name.upper()}"
            if environ.get(variable):
                self._stated[name] = handed_on.get(variable, ENVIRONMENT)
            elif self._file.get(variable):
                self._stated[name] = FILE

    def _log_in(self) -> None:
        """Add this service's user and password to the URLs of the servers at which it has an account."""
        embedded = {
            "amqp_url": f"amqp://127.0.0.1:{self.rabbitmq_port}/",
            "redis_url": f"redis://127.0.0.1:{self.valkey_port}/0",
            "jobs_url": f"redis://127.0.0.1:{self.jobs_port}/0",
        }
        for field, server in SERVERS.items():
            stated: str = getattr(self, field)
            url = stated or embedded[field]
            self._server_urls[field] = stated
            # Without a folder of secrets, the URL of an external server already contains the user and the
            # password. So add them in two cases: the server is embedded, or a folder of secrets is set.
            if self.secrets_dir is not None or not stated:
                url = credentials.logged_in(url, self.secrets_path, server, self.service)
            setattr(self, field, url)

    @property
    def server_urls(self) -> dict[str, str]:
        """Return the URL of each server as it was configured, by the name of the setting.

        The URL does not contain a password that Tidegate added. An empty URL means the embedded server.
        """
        return dict(self._server_urls)

    @property
    def secrets_path(self) -> Path:
        """Return the absolute path of the folder of secrets."""
        return (self.secrets_dir or self.state_dir / "secrets").absolute()

    @property
    def state_path(self) -> Path:
        """Return the absolute path of the state folder."""
        return self.state_dir.absolute()

    @property
    def gateway_grpc_target(self) -> str:
        """Return the address of the gateway for gRPC clients: ``host:port``."""
        reach = "127.0.0.1" if self.host in {"0.0.0.0", "::"} else self.host
        return f"[{reach}]:{self.gateway_grpc_port}" if ":" in reach else f"{reach}:{self.gateway_grpc_port}"

    @property
    def runtime_path(self) -> Path:
        """Return the absolute path of the folder with Triton and the models' environment."""
        return (self.runtime_dir or self.state_dir / "runtime").absolute()


def _environ_now() -> Mapping[str, str]:
    found = _environ.get()
    return os.environ if found is None else found


def _default_of(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True, validated_data={})
