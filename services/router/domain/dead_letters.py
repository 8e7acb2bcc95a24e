"""Records of requests and jobs that were given up (dead letters), their limits and their replay. Pure."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from tidegate.kernel.broker.topology import JOBS_PREFIX, deployment_of
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Request
from tidegate.kernel.protocol.jobs import NewJob
from tidegate.kernel.telemetry import LONGEST_ID


class Replay(NamedTuple):
    """A replay of a dead letter: its job, its Deployment, and its time (seconds since the epoch)."""

    job: str
    to: str
    at: float


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A request or job that was given up. ``at``: the time in seconds since the epoch.

    ``letter``: the id of the dead letter. ``id``: the id of the request or job, in hexadecimal digits.
    ``payload``: the key of the blob with the request. If there is no blob, ``payload`` is empty, and
    ``missing`` says why.
    """

    at: float
    cause: str
    queue: str
    id: str
    attempt: int
    size: int
    trace: str
    letter: str = ""
    tenant: str = ""
    payload: str = ""
    payload_bytes: int = 0
    missing: str = ""
    replays: tuple[Replay, ...] = ()

    @property
    def kind(self) -> str:
        """Return ``job`` or ``request``."""
        return "job" if self.queue.startswith(JOBS_PREFIX) else "request"

    @property
    def deployment(self) -> str:
        """Return the Deployment that the letter was for; empty if it is unknown."""
        return deployment_of(self.queue)

    def to_json(self) -> dict[str, Any]:
        """Return the letter as a line of the journal."""
        return asdict(self) | {"replays": [list(each) for each in self.replays]}

    def public(self) -> dict[str, Any]:
        """Return the letter as users see it: without the key of its blob."""
        fields = asdict(self) | {"kind": self.kind, "deployment": self.deployment}
        fields["replays"] = [each._asdict() for each in self.replays]
        fields["payload"] = bool(self.payload)
        return fields

    def log_ids(self) -> dict[str, str]:
        """Return the ids for log lines: the id of the caller's request and, for a job, the job's id."""
        return {"request_id": self.trace[:LONGEST_ID]} | ({"job": self.id} if self.kind == "job" else {})


_FIELDS = frozenset(field.name for field in fields(DeadLetter))


def new_letter_id() -> str:
    """Return a new id: 16 hexadecimal digits."""
    return os.urandom(8).hex()


def read_letter(line: dict[str, Any]) -> DeadLetter:
    """Read a dead letter from a line of the journal. Raise TypeError or ValueError if it is not a letter.

    Lines of earlier releases have no letter id and no payload. Then the letter gets a new id.
    """
    values = {name: value for name, value in line.items() if name in _FIELDS}
    values["replays"] = tuple(Replay(*each) for each in values.get("replays", ()))
    letter = DeadLetter(**values)
    if letter.letter:
        return letter
    return replace(
        letter, letter=new_letter_id(), missing="the release that wrote this letter kept no payloads"
    )


class DeadLetterLimits(NamedTuple):
    """Limits on dead letters: their number, their age (seconds), and the bytes of all payloads."""

    max_letters: int
    keep_s: float
    payload_bytes: int


class Overdue(NamedTuple):
    """The dead letters that exceed the limits, in two lists. Each list begins with the oldest letter.

    ``letters``: the letters to delete. ``payloads``: the letters that stay, but lose their payload.
    """

    letters: list[DeadLetter]
    payloads: list[DeadLetter]


def overdue(letters: Sequence[DeadLetter], now: float, limits: DeadLetterLimits) -> Overdue:
    """Return the letters above the limits of age or number, and the payloads above the limit of bytes.

    ``letters``: all letters, oldest first. The oldest are deleted first.
    """
    beyond = len(letters) - limits.max_letters
    deleted: list[DeadLetter] = []
    kept: list[DeadLetter] = []
    for at, letter in enumerate(letters):
        (deleted if at < beyond or letter.at + limits.keep_s <= now else kept).append(letter)
    payload_bytes = sum(letter.payload_bytes for letter in kept if letter.payload)
    payloads = []
    for letter in kept:
        if payload_bytes <= limits.payload_bytes:
            break
        if letter.payload:
            payload_bytes -= letter.payload_bytes
            payloads.append(letter)
    return Overdue(deleted, payloads)


def without_claim(request: Request, data: Sequence[Buffer]) -> list[Buffer]:
    """Return a request's frame in pieces, with the tensors ``data`` in place of its claim."""
    head = envelope.request_head(
        request.id,
        request.deadline_ms,
        request.rows,
        request.key,
        list(data),
        tenant=request.tenant,
        trace=request.trace,
        attempt=request.attempt,
        flags=request.flags & ~envelope.CLAIM,
    )
    return [head, *data]


def job_of_letter(
    letter: DeadLetter,
    request: Request,
    data: list[Buffer],
    *,
    id: bytes,
    route: dict[str, Any],
    deployment: str,
    endpoint: str,
    principal: str,
    now_ms: int,
    expires_ms: int,
) -> NewJob:
    """Return the job that replays a letter. ``data``: the request's tensors, or a claim to them."""
    safe = route["retry"] == "safe"
    flags = request.flags & ~(envelope.STREAM | envelope.CLAIM | envelope.RETRY_SAFE)
    flags |= envelope.RETRY_SAFE if safe else 0
    flags |= 0 if data is request.data else envelope.CLAIM
    frame = envelope.request_frame(
        id,
        expires_ms,
        request.rows,
        request.key,
        data,
        tenant=principal.encode()[:255],
        trace=request.trace,
        flags=flags,
    )
    return NewJob(
        id=id,
        frame=frame,
        model=route["model"],
        endpoint=endpoint,
        deployment=deployment,
        version=route["version"],
        principal=principal,
        created_ms=now_ms,
        expires_ms=expires_ms,
        retry_safe=safe,
        metadata={"replay_of": letter.letter},
    )


def endpoint_of(endpoints: dict[str, Any], deployment: str, model: str) -> str:
    """Return the name of the Endpoint that has this Deployment as a target; else the model's name."""
    for name, endpoint in endpoints.items():
        if any(target["deployment"] == deployment for target in endpoint["targets"]):
            return name
    return model


def matching(letters: Iterable[DeadLetter], deployment: str | None, cause: str | None) -> list[DeadLetter]:
    """Return the letters of this Deployment (None means any) and this cause (None means any)."""
    return [
        letter
        for letter in letters
        if deployment in (None, letter.deployment) and cause in (None, letter.cause)
    ]
