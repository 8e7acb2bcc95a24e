"""Settings of the gateway; only ``app.py`` and the wiring read them."""

from __future__ import annotations

import re
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from services.gateway.domain.cors import Origins
from tidegate.kernel.protocol.caller_limits import CallerLimits
from tidegate.kernel.settings.base import Settings

Scope = Literal["infer", "publish", "operate", "admin"]


class GatewaySettings(Settings):
    """The settings that only the gateway has."""

    service: ClassVar[str] = "gateway"

    gateway_workers: int = Field(
        1, ge=1, le=64, description=("Number of gateway processes, which share the port.")
    )
    envelope_max_frames: int = Field(
        256, ge=1, le=4096, description="Largest number of requests in one envelope."
    )
    cost_header: bool = Field(
        False, description="Send the cost of each answer as `X-Tidegate-Cost`; a stream of events has none."
    )
    shadow_host_busy: float = Field(
        0.9,
        gt=0,
        le=1,
        description=(
            "Share of a worker host's cores, 0 to 1. While a larger share is busy, no shadow copies are sent."
        ),
    )
    async_url: str = Field(
        "",
        description=(
            "Store of SageMaker's asynchronous inference: `file://`, `s3://`, `gs://` or `az://`. Inputs "
            "are read from it, and answers are written to it. Empty: asynchronous calls are refused."
        ),
    )
    max_body_bytes: int = Field(
        256 * 2**20, description="Largest request body that the gateway accepts, in bytes."
    )
    max_json_bytes: int = Field(
        64 * 2**20,
        description="Largest JSON part of a body, in bytes. Larger tensors must be sent as binary data.",
    )
    max_inflight_bytes: int = Field(
        512 * 2**20,
        description="Maximum number of bytes of request bodies in memory per gateway process. Answers have a "
        "separate limit of the same size.",
    )
    max_grpc_connections: int = Field(
        4096,
        ge=1,
        description=(
            "Maximum number of gRPC connections of a gateway process. Above this number, a new connection "
            "replaces an idle one."
        ),
    )
    max_waiting_jobs: int = Field(
        1_000_000,
        ge=1,
        description=(
            "Maximum number of jobs that wait for one Deployment; further jobs are refused with 503."
        ),
    )
    max_batch_bytes: int = Field(
        2**31,
        ge=1,
        description=("Largest decompressed file of a batch, in bytes. The blob store keeps the file."),
    )
    max_batch_line_bytes: int = Field(
        16 * 2**20, ge=1, description="Longest line in the file of a batch, in bytes."
    )
    max_batch_lines: int = Field(
        1_000_000, ge=1, description="Maximum number of lines in the file of a batch."
    )
    max_files: int = Field(
        1000,
        ge=1,
        description=(
            "Maximum number of files of OpenAI's API that one caller keeps; further files are refused "
            "with 429."
        ),
    )
    max_files_bytes: int = Field(
        10 * 2**30,
        ge=1,
        description="Maximum number of bytes of the files of OpenAI's API that one caller keeps.",
    )
    file_retention_s: float = Field(
        30 * 86_400.0,
        ge=3600,
        le=30 * 86_400,
        description="How long an uploaded file of OpenAI's API is kept, in seconds, if the upload has no "
        "`expires_after`.",
    )
    feedback_window_s: float = Field(
        7 * 86_400.0,
        ge=60,
        le=90 * 86_400,
        description="How long `POST /v1/feedback` accepts the outcomes of an answer, in seconds.",
    )
    access_log: Literal["file", "stdout", "off"] = Field(
        "file",
        description=(
            "Where the gateway writes the access log: `log/access.log` in the state folder, its own output, "
            "or nowhere."
        ),
    )
    access_log_sample: float = Field(
        0.01,
        ge=0,
        le=1,
        description=(
            "Share of successful requests that are logged in addition to those of "
            "TIDEGATE_ACCESS_LOG_FIRST_PER_S; 1: all."
        ),
    )
    access_log_first_per_s: int = Field(
        20,
        ge=0,
        description=("Number of successful requests per second that each gateway process always logs."),
    )
    access_log_errors_per_s: int = Field(
        200,
        ge=1,
        description=(
            "Maximum number of failed requests per second that each gateway process logs. A burst may "
            "have ten times as many. One more line states how many were left out."
        ),
    )
    access_log_mb: int = Field(
        256, ge=1, description="Maximum disk space for the access log and its rotated parts, in MiB."
    )
    access_log_days: float = Field(
        7.0, gt=0, description="How long a rotated part of the access log is kept, in days."
    )
    trace_slow_ms: float = Field(
        1000.0,
        ge=0,
        description=(
            "Requests that take longer than this, in milliseconds, are always exported as traces. So are "
            "failed requests."
        ),
    )
    llm_queue_comments: bool = Field(
        False,
        description=(
            "Streams of language models report in comments (`: x-tidegate-queue`) how many requests wait "
            "before them. The header `X-Tidegate-Queue: on` or `off` decides for one request."
        ),
    )
    report_interval_s: float = Field(0.5, description="How often a gateway reports its load, in seconds.")
    auth: Literal["auto", "required"] = Field(
        "auto",
        description=(
            "`required`: every request needs a credential. `auto`: inference needs no credential if the "
            "gateway listens on a loopback address; on other addresses `auto` means `required`."
        ),
    )
    model_control: Literal["operate", "infer", "off"] = Field(
        "operate",
        description=(
            "Who may load and unload models by Triton's API. `operate`: callers with this scope; `infer`: "
            "every caller that may use the model, as in Triton; `off`: no caller."
        ),
    )
    shared_memory: Literal["local", "off"] = Field(
        "local",
        description=(
            "`local`: callers on the gateway's host may put tensors into system shared memory, and register "
            "segments of their own user. `off`: no caller may."
        ),
    )
    header_forward_pattern: str = Field(
        "",
        description=(
            "Regular expression for names of request headers in lower case. A header whose whole name "
            "matches becomes a parameter of the request for the model; credentials never become one. Empty: "
            "no header. Requests whose parameters differ do not share a model call."
        ),
    )
    usage_interval_s: float = Field(
        2.0, gt=0, description="How often a gateway reports its callers' usage, in seconds."
    )
    jwks_url: str = Field(
        "",
        description="JWKS with the keys that verify JWTs of callers: an http(s) URL or the path of a file.",
    )
    jwt_issuer: str = Field(
        "", description="The value that the claim `iss` of a token must have; required with a JWKS."
    )
    jwt_audience: str = Field(
        "", description="The value that the claim `aud` of a token must contain; required with a JWKS."
    )
    jwt_roles_claim: str = Field(
        "roles", description="Claim that has a token's roles. `a.b` is the claim `b` inside the claim `a`."
    )
    jwt_role_scopes: dict[str, list[Scope]] = Field(
        {},
        description="Scopes of each role, as JSON. Empty: each role has the scope of the same name.",
    )
    jwt_limits: dict[str, CallerLimits] = Field(
        {},
        description="Limits of each caller with a JWT, by role, as JSON. If a caller has several of these "
        "roles, the first one in this setting applies. `*` applies to callers with none of them: "
        '`{"batch": {"rate": 5}, "*": {"rate": 50}}`.',
    )

    cors_origins: str = Field(
        "",
        description="Origins, separated by commas, whose web pages may call the gateway, such as "
        "`https://console.example`. `*`: every origin. Empty: none.",
    )

    @field_validator("header_forward_pattern")
    @classmethod
    def _is_a_pattern(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: str) -> str:
        Origins.of(value)
        return value

    @model_validator(mode="after")
    def _tokens_are_for_us(self) -> Self:
        # An issuer signs tokens for many applications. Without the issuer and the audience, tokens for other
        # applications would be accepted.
        if self.jwks_url and not (self.jwt_issuer and self.jwt_audience):
            raise ValueError("TIDEGATE_JWKS_URL needs TIDEGATE_JWT_ISSUER and TIDEGATE_JWT_AUDIENCE")
        return self
