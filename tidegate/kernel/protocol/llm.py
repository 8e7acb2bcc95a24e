"""Language models: a request and its events, as they travel between gateway, worker and engine.

A version of format ``llm`` is a decoupled model with one input and two outputs. The input contains the URL
path and the body of an OpenAI-compatible request. One output contains the engine's next events, complete and
in order. The other output contains facts about these events for Tidegate.

The engine itself does templates, tools, sampling and guided decoding. So the worker passes the body on, and
changes only what Tidegate needs, for example for token counts (:mod:`services.worker.runtimes.llm`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.envelope import LAST_PRIORITY, PRIORITY_SHIFT
from tidegate.kernel.protocol.models import Signature, TensorSpec
from tidegate.kernel.protocol.usage import MOST_TOKENS

REQUEST, EVENTS, META = "request", "events", "meta"

SIGNATURE = Signature(
    inputs=[TensorSpec(name=REQUEST, datatype="BYTES", shape=[1])],
    outputs=[
        TensorSpec(name=EVENTS, datatype="BYTES", shape=[-1]),
        TensorSpec(name=META, datatype="BYTES", shape=[1]),
    ],
    max_batch_size=0,
    decoupled=True,
)

# The band of a request. Each band has its own queue in the broker. BAND_WEIGHTS has the weight of each band.
Band = Literal["high", "normal", "low"]
BAND_WEIGHTS: dict[Band, int] = {"high": 16, "normal": 4, "low": 1}

# The priority that request frames of each band have in their flags.
BAND_PRIORITY: dict[Band, int] = {"high": 1, "normal": 0, "low": LAST_PRIORITY}
# A request's message expires this many milliseconds after the deadline for the first part of the answer. So
# the broker still has the message if a replica is lost during a long stream. The broker then delivers the
# message to another replica, and this replica tells the gateway that the request was lost.
KEPT_MS = 3_600_000

# The name of a parameter in a request's call key (its encoded names, shapes and parameters). The value is the
# gateway's estimate of the tokens that the request may occupy in the engine's KV cache (prompt and answer).
# The Deployment's ``kv_tokens`` limits the sum of these values over a worker's requests.
KV_TOKENS = "kv_tokens"
# A parameter of the first reply to a request. Its value is the name of the replica that runs the request.
REPLICA = "tidegate_replica"


def band_of(flags: int) -> Band:
    """Return the band that the flags of a request frame contain."""
    priority = flags >> PRIORITY_SHIFT & LAST_PRIORITY
    return next((band for band, known in BAND_PRIORITY.items() if known == priority), "normal")


def encoded(value: Any) -> bytes:
    """Return a part of a request as JSON. Raise BadRequest if it is nested too deeply to be encoded."""
    try:
        return orjson.dumps(value)
    except TypeError as error:
        raise BadRequest(f"the request cannot be sent to the engine: {error}") from None


@dataclass(frozen=True, slots=True)
class Resume:
    """The part of a stream that the caller already has. With it, another engine can continue the stream.

    ``prompt``, ``emitted``: the token ids of the prompt and of the answer so far, as the lost engine reported
    them. ``text``: the text of the emitted tokens. ``id``, ``created``: the values of the members ``id`` and
    ``created`` in the events that the caller already has.
    """

    prompt: list[int]
    emitted: list[int]
    text: str
    id: str = ""
    created: int = 0


@dataclass(frozen=True, slots=True)
class LlmRequest:
    """A request to an engine.

    ``path``: the URL path in the engine's API, such as ``/v1/chat/completions``.
    """

    path: str
    body: dict[str, Any]
    resume: Resume | None = None

    def to_bytes(self) -> bytes:
        """Return the request as JSON: the only element of the input tensor :data:`REQUEST`.

        Raise BadRequest if the request is nested too deeply to be encoded.
        """
        return encoded({"path": self.path, "body": self.body, "resume": self.resume})

    @classmethod
    def from_bytes(cls, raw: bytes | memoryview) -> LlmRequest:
        """Read a request. Raise ValueError, KeyError or TypeError for any other text."""
        document = orjson.loads(raw)
        resume = document.get("resume")
        return cls(document["path"], document["body"], Resume(**resume) if resume else None)


@dataclass(frozen=True, slots=True)
class Meta:
    """Facts about the events of one chunk.

    ``status``: 200, or the HTTP status with which the engine refused the request. After a refusal, the only
    event is the body of the engine's error. ``retry_after_s``: the seconds until a retry, if the engine or
    the provider states them.

    ``usage``: the numbers of prompt tokens, answer tokens and cached prompt tokens of the stream up to this
    chunk; None: not reported yet.

    Two members are only for streams that can be continued. ``prompt_ids``: the token ids of the prompt, in
    one of the first chunks. ``ids``: the token ids of the part of the answer that is in this chunk. A stream
    can be continued only while the total number of ``ids`` equals the answer tokens in ``usage``.
    """

    status: int = 200
    retry_after_s: float | None = None
    usage: tuple[int, int, int] | None = None
    prompt_ids: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)

    @classmethod
    def from_bytes(cls, raw: bytes | memoryview) -> Meta:
        """Read the only element of the output :data:`META`; absent members have their defaults."""
        document = orjson.loads(raw)
        usage = document.get("usage")
        return cls(
            document.get("status", 200),
            document.get("retry_after_s"),
            (
                (min(usage[0], MOST_TOKENS), min(usage[1], MOST_TOKENS), min(usage[2], MOST_TOKENS))
                if usage
                else None
            ),
            document.get("prompt_ids", []),
            document.get("ids", []),
        )
