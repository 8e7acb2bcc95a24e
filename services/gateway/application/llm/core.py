"""Run a request to a language model: find the model, check access, estimate tokens, stream the events.

There are several APIs for language models (OpenAI's, TGI's, Ollama's). Each API converts a request to an
:class:`LlmCall`. It converts the resulting :class:`LlmEvents` to its own form of answer. So limits, usage,
bands and retries are the same in all APIs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from prometheus_client import Counter

from services.gateway.application.access import Grant
from services.gateway.application.feedback import HEADER as FEEDBACK_ID
from services.gateway.application.feedback import PendingId
from services.gateway.application.inference.core import InferenceCore, InferenceResult, Timing
from services.gateway.application.inference.failover import FAILOVERS
from services.gateway.application.llm.accounting import CallAccount, LlmAccounting
from services.gateway.application.llm.token_limits import Reservation
from services.gateway.application.prefix_affinity import PrefixAffinity
from services.gateway.domain.contract import Decoded
from services.gateway.domain.llm.band import FRAME_PRIORITY
from services.gateway.domain.llm.estimate import NO_TOKENS, TokenEstimate, estimate, states_answer
from services.gateway.domain.llm.failover import LIMITED, other_target
from services.gateway.domain.llm.queue_place import QueuePlace, place
from services.gateway.domain.llm.refusal import EngineRefused, check_waits
from services.gateway.domain.llm.resumption import StreamProgress
from services.gateway.domain.routing import DeploymentRoute, EndpointRoute
from services.gateway.domain.traffic_split import Origin
from services.gateway.domain.usage_cost import UsageCost, compute_us
from tidegate.kernel import telemetry
from tidegate.kernel.errors import (
    BadRequest,
    ColdStart,
    ModelFailed,
    NoCapacity,
    NotFound,
    Overloaded,
    TidegateError,
    TooMany,
    WorkerLost,
)
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.access import ANONYMOUS, INFER, Principal
from tidegate.kernel.protocol.llm import (
    EVENTS,
    KV_TOKENS,
    META,
    REPLICA,
    REQUEST,
    Band,
    LlmRequest,
    Meta,
    Resume,
)
from tidegate.kernel.protocol.tensors import pack_strings, unpack_strings

log = telemetry.logger(__name__)

LOSSES = Counter(
    "tidegate_gateway_lost_streams_total",
    "Streams of language models whose worker was lost, by the gateway's action: continue, end or fail.",
    ["action"],
)
# If a request has lost more workers than this, it fails, because the request itself may crash the workers.
MAX_LOSSES = 2
_INPUTS = (envelope.tensor(REQUEST, "BYTES", (1,)),)
# For a request without ``stream``, one timeout applies to the whole answer. So the timeout is extended by
# MS_PER_TOKEN for each token of the answer. For a request with ``stream``, the timeout starts again at each
# event. An engine on a CPU needs about MS_PER_TOKEN for a token while all engine slots are in use.
MS_PER_TOKEN = 200.0
# The time that a request takes in an engine depends on its tokens. To share an engine fairly, this many
# estimated tokens count as one request (Sheng et al., "Fairness in Serving Large Language Models", OSDI
# 2024).
TOKENS_OF_A_REQUEST = 256


class QueuedAt(NamedTuple):
    """The state of a Deployment's queue when a request was queued.

    ``at``: the time by the monotonic clock. ``before``: the number of requests that were ahead of the
    request. ``completed``: the number of the Deployment's requests that this gateway had answered by then.
    """

    route: DeploymentRoute
    at: float
    before: int
    completed: int


@dataclass(slots=True)
class LlmCall:
    """One request to a language model. ``model`` is an endpoint's name, or ``name:adapter``.

    ``path`` and ``body`` have the form of OpenAI's API. ``timeout_ms`` limits the time to the first event and
    between two events; None means the endpoint's timeout. ``received``: the size of the caller's body, in
    bytes. ``headers``: the caller's headers, for the endpoint's traffic rules.

    The core sets ``account``, ``estimate``, ``usage`` (prompt tokens, answer tokens, cached prompt tokens),
    ``queued`` and ``feedback_id``. The code of the API counts the bytes of the answer in ``cost.sent``.
    """

    model: str
    path: str
    body: dict[str, Any]
    band: Band = "normal"
    timeout_ms: float | None = None
    principal: Principal = ANONYMOUS
    trace: bytes = b""
    received: int = 0
    headers: Mapping[bytes, bytes] = field(default_factory=dict)
    cost: UsageCost = field(default_factory=UsageCost)
    account: CallAccount | None = None
    estimate: TokenEstimate = NO_TOKENS
    usage: tuple[int, int, int] = (0, 0, 0)
    queued: QueuedAt | None = None
    feedback_id: bytes = b""

    @property
    def endpoint(self) -> str:
        """Return the endpoint's name, without the adapter."""
        return self.model.partition(":")[0]

    @property
    def adapter(self) -> str:
        """Return the name of the LoRA adapter, or an empty string."""
        return self.model.partition(":")[2]

    @property
    def streamed(self) -> bool:
        """Return True if the caller wants the answer as a stream of events."""
        return self.body.get("stream") is True

    @property
    def stated(self) -> bool:
        """Return True if the request sets a limit for the tokens of its answer."""
        return states_answer(self.body)

    @property
    def grant(self) -> Grant | None:
        """Return the grant of the admitted request.

        It is None before the admission, and if usage is not counted.
        """
        return None if self.account is None else self.account.grant

    def answer_headers(self) -> list[tuple[bytes, bytes]]:
        """Return the response headers that show the caller's limits, and the id for feedback."""
        limits = [] if self.account is None else self.account.headers()
        return [*limits, (FEEDBACK_ID, self.feedback_id)] if self.feedback_id else limits


@dataclass(slots=True)
class LlmEvents:
    """The next events of an answer, as the engine's JSON.

    If the request did not set ``stream``, the only event is the complete answer.
    """

    events: list[bytes]
    meta: Meta
    timing: Timing
    route: DeploymentRoute
    request: Decoded


class LlmCore:
    """Runs requests to language models, for every API."""

    def __init__(self, core: InferenceCore, accounting: LlmAccounting) -> None:
        self._core = core
        self._accounting = accounting
        self._affinity = PrefixAffinity(lambda deployment: core.fleet(deployment).replicas)

    def find(self, model: str) -> tuple[EndpointRoute, DeploymentRoute]:
        """Return the endpoint and the Deployment for a model's name.

        Raise NotFound for an unknown model or adapter, BadRequest for a model that is not a language model.
        """
        endpoint, route = self._core.find(model.partition(":")[0], "")
        return endpoint, _checked(model, route)

    def pick(
        self, model: str, origin: Callable[[], Origin] | None = None
    ) -> tuple[EndpointRoute, DeploymentRoute]:
        """Return the endpoint and the Deployment for a request. Raise the errors of :meth:`find`.

        The calling code must call this method once for each request, because each call counts towards the
        traffic shares.
        """
        endpoint, route = self._core.pick(model.partition(":")[0], "", origin)
        return endpoint, _checked(model, route)

    def models(self, principal: Principal) -> list[tuple[str, DeploymentRoute]]:
        """Return the language models that a principal may use, sorted by name.

        Each adapter is listed as a model of its own.
        """
        found: list[tuple[str, DeploymentRoute]] = []
        for endpoint in self._core.table().endpoints.values():
            route = next(iter(endpoint.targets), None)
            if route is None or route.llm is None or not principal.may(INFER, endpoint.name):
                continue
            names = [endpoint.name, *(f"{endpoint.name}:{adapter}" for adapter in route.llm.adapters)]
            found += [(name, route) for name in names]
        return sorted(found, key=lambda each: each[0])

    def job_charge(
        self, principal: Principal, endpoint: str, path: str, body: Mapping[str, Any], context: int | None
    ) -> Callable[[], Awaitable[Reservation | None]]:
        """Return a function that charges the estimated tokens of a job.

        The function contains only the estimate and not the body, so the body's memory can be freed.
        """
        tokens = estimate(path, body, context)
        return partial(self._accounting.charge_job, principal, endpoint, tokens, stated=states_answer(body))

    def place(self, call: LlmCall) -> QueuePlace | None:
        """Return the estimated queue position of a waiting request; None before the request is queued."""
        if call.queued is None:
            return None
        route, at, before, completed = call.queued
        fleet = self._core.fleet(route.name)
        return place(
            before=before,
            left=self._core.load(route).completed - completed,
            waited_s=time.monotonic() - at,
            room=route.llm.slots if route.llm is not None else 1,
            ready=fleet.ready,
            start_ms=fleet.start_ms,
        )

    async def stream(self, call: LlmCall) -> AsyncGenerator[LlmEvents]:
        """Yield the events of a request as the engine makes them.

        Raise :class:`EngineRefused` if the engine refuses the request. Raise a TidegateError if the gateway
        refuses it, or if it fails. Closing the generator cancels the request. The request's usage is counted
        in all cases.
        """
        check_waits(call.body)
        origin = partial(Origin, call.headers, call.principal.id, lambda: call.body)
        endpoint, route = self.pick(call.model, origin)
        assert route.llm is not None
        pending = self._core.feedback.begin(endpoint.name, "", origin, call.trace, call.principal)
        if pending is not None:
            call.feedback_id = pending.id(route)
        call.estimate = estimate(call.path, call.body, route.llm.context)
        account = call.account = await self._accounting.open(call, endpoint.name, self._core.load(route))
        load, others = self._core.load(route), self._core.fleet(route.name).elsewhere
        call.queued = QueuedAt(route, time.monotonic(), load.outstanding + others, load.completed)
        try:
            async with aclosing(self._continued(call, endpoint, route, origin, pending)) as answers:
                async for answer in answers:
                    yield answer
        except (GeneratorExit, asyncio.CancelledError):
            account.left = True
            raise
        finally:
            account.close()

    async def _continued(
        self,
        call: LlmCall,
        endpoint: EndpointRoute,
        route: DeploymentRoute,
        origin: Callable[[], Origin],
        pending: PendingId | None = None,
    ) -> AsyncGenerator[LlmEvents]:
        """Yield the events of a request. If its worker is lost, continue on another worker if possible.

        If the target cannot take the request now, send the request to another Deployment of the endpoint (see
        ``other_target``). Two cases are excluded: a rule of the endpoint chose the target, or the caller
        already has events.
        """
        timeout_ms = _timeout_ms(call, endpoint)
        failed: list[str] = []
        progress = StreamProgress(call.path, call.body)
        losses = 0
        refused: EngineRefused | None = None
        last: LlmEvents | None = None
        while True:
            resume = progress.resume() if losses else None
            try:
                async with aclosing(
                    self._run(call, endpoint, route, timeout_ms, resume, again=bool(losses))
                ) as answers:
                    async for answer in answers:
                        if resume is not None:
                            answer.events = [e for each in answer.events if (e := progress.aligned(each))]
                        progress.add(answer.events, answer.meta)
                        if answer.events:
                            last = answer
                            yield answer
                return
            except (EngineRefused, Overloaded, NoCapacity, ColdStart, TooMany) as error:
                if last is not None:
                    raise
                refused = _refusal(error, refused)
                failed.append(route.name)
                route = _elsewhere(call, endpoint, failed, refused, error, origin)
                # Start over: the other model may split text into other tokens.
                progress = StreamProgress(call.path, call.body)
                if pending is not None:
                    call.feedback_id = pending.id(route, moved=True)
            except WorkerLost as error:
                losses += 1
                if not _continues(progress, losses, error, route.retry_safe):
                    break
                log.warning(
                    "a stream continues on another worker",
                    extra={"deployment": route.name, "losses": losses, "tokens": progress.tokens},
                )
        if last is not None and (missing := progress.last_events()):
            yield replace(last, events=missing, meta=Meta())

    async def _run(
        self,
        call: LlmCall,
        endpoint: EndpointRoute,
        route: DeploymentRoute,
        timeout_ms: float,
        resume: Resume | None,
        *,
        again: bool,
    ) -> AsyncGenerator[LlmEvents]:
        """Yield the events of one attempt. ``again``: True if the worker of an earlier attempt was lost."""
        began = time.perf_counter()
        request = _decoded(call, resume, "high" if again else call.band)
        decode_s = time.perf_counter() - began
        wait_ms = 0.0
        # A message may wait in the replica's own queue for ``wait_ms``. Then it moves to the Deployment's
        # queue, and the request may run twice. So use the replica's queue only if the Deployment is
        # retry_safe.
        if route.llm is not None and route.retry_safe:
            wait_ms = route.llm.affinity_wait_ms
        salt = f"{call.principal.id}\0{call.adapter}".encode()
        with self._affinity.place(route.name, wait_ms, call.path, call.body, salt) as placement:
            answers = self._core.stream_from(
                route,
                request,
                timeout_ms,
                decode_s,
                call.trace,
                call.cost.begin,
                flow=endpoint.flow_of(call.principal),
                cost=1 + call.estimate.total / TOKENS_OF_A_REQUEST,
                admitted=again,
                replica=placement.replica,
                wait_ms=wait_ms,
            )
            del request
            async with aclosing(answers):
                async for answer in answers:
                    placement.taken_by(answer.parameters.get(REPLICA))
                    yield _events(call, answer)


def _refusal(error: TidegateError, earlier: EngineRefused | None) -> EngineRefused:
    """Return the failure that the caller gets if no other target answers.

    If ``error`` is an EngineRefused, return it. Any other error only means that this target cannot take the
    request. Then return ``earlier``. If ``earlier`` is None, raise ``error``.

    If ``earlier`` has the status 429, return it in all cases. Then the request may go only to ``failover``,
    and the 429 says when the caller may try again.
    """
    if earlier is not None and earlier.status == LIMITED:
        return earlier
    if isinstance(error, EngineRefused):
        return error
    if earlier is None:
        raise error
    return earlier


def _elsewhere(
    call: LlmCall,
    endpoint: EndpointRoute,
    failed: list[str],
    refused: EngineRefused,
    error: TidegateError,
    origin: Callable[[], Origin],
) -> DeploymentRoute:
    """Return another Deployment for a request that failed with ``error``. Raise ``refused`` if there is none.

    Also raise ``refused`` if one of the endpoint's traffic rules applies to the request. ``failed``: the
    names of the Deployments that have refused the request, in the order of the attempts.
    """
    stays = endpoint.has_rule_for(origin())
    other = None if stays else other_target(endpoint, failed, refused.status, call.adapter)
    if other is None:
        raise refused from None
    FAILOVERS.labels(endpoint.name, failed[-1], other.name).inc()
    log.warning(
        "a request is sent to another Deployment",
        extra={"deployment": failed[-1], "other": other.name, "problem": error.message},
    )
    return other


def _continues(progress: StreamProgress, losses: int, error: WorkerLost, retry_safe: bool) -> bool:
    """Return True if a stream continues after its worker was lost, False if it is complete.

    Raise WorkerLost if the stream is not complete and cannot continue.
    """
    action, problem = progress.after_loss(retry_safe=retry_safe)
    if action == "continue" and losses > MAX_LOSSES:
        action, problem = (
            "fail",
            f"{losses} workers were lost during this request. The last error: {error.message}",
        )
    LOSSES.labels(action).inc()
    if action == "fail":
        raise WorkerLost(
            "the worker ended in the middle of the stream, and the stream cannot continue on another one, "
            f"because {problem}. Send the request again"
        ) from None
    return action == "continue"


def _timeout_ms(call: LlmCall, endpoint: EndpointRoute) -> float:
    if call.timeout_ms is not None:
        return call.timeout_ms
    if call.streamed:
        return endpoint.timeout_ms
    return endpoint.timeout_ms + MS_PER_TOKEN * call.estimate.answer


def _decoded(call: LlmCall, resume: Resume | None, band: Band) -> Decoded:
    """Convert a call to a request for the queue."""
    raw = pack_strings([LlmRequest(call.path, call.body, resume).to_bytes()])
    key = envelope.call_key(_INPUTS, (), {KV_TOKENS: call.estimate.total})
    return Decoded("", 0, key, [raw], None, False, priority=FRAME_PRIORITY[band])


def _events(call: LlmCall, answer: InferenceResult) -> LlmEvents:
    """Return the events in a worker's answer. Store the answer's usage in ``call``.

    Raise EngineRefused if the engine has refused the request.
    """
    events: list[bytes] = []
    meta = Meta()
    for tensor, raw in zip(answer.outputs, answer.reply.data, strict=True):
        if tensor.name == EVENTS:
            events = [bytes(raw[4:])] if tensor.dims == (1,) else unpack_strings(raw)
        elif tensor.name == META:
            meta = Meta.from_bytes(raw[4:])  # skip the 4 bytes with the string's length
    if meta.status != 200:
        error = EngineRefused(meta.status, events[0] if events else b"", meta.retry_after_s)
        error.deployment = answer.route.name
        raise error
    cost = call.cost
    cost.answers += bool(events)
    cost.compute_us += compute_us(answer.reply)
    cost.route = answer.route
    if meta.usage is not None:
        call.usage = meta.usage
        cost.tokens_in, cost.tokens_out, cost.tokens_cached = meta.usage
    if call.account is not None:
        call.account.answered(meta.usage, len(events), answer.timing.compute)
    return LlmEvents(events, meta, answer.timing, answer.route, answer.request)


async def only_answer(answers: AsyncGenerator[LlmEvents]) -> LlmEvents:
    """Return the answer to a request without ``stream``. Raise ModelFailed if there is not exactly one."""
    found: LlmEvents | None = None
    async with aclosing(answers):
        async for answer in answers:
            if answer.events and found is not None:
                raise ModelFailed("the engine returned more than one answer to a request without stream")
            if answer.events:
                found = answer
    if found is None or len(found.events) != 1:
        raise ModelFailed("the engine returned no answer: see `tidegate logs`")
    return found


def _checked(model: str, route: DeploymentRoute) -> DeploymentRoute:
    """Return ``route``. Raise BadRequest if it has no language model, NotFound if it lacks the adapter."""
    name, _, adapter = model.partition(":")
    if route.llm is None:
        raise BadRequest(
            f"model {name!r} has the format {route.format}, so it is not a language model: use "
            f"/v2/models/{name}/infer",
            reason="not_a_language_model",
        )
    if adapter and adapter not in route.llm.adapters:
        raise NotFound(
            f"model {name!r} has no adapter {adapter!r}; it has {list(route.llm.adapters) or 'none'}"
        )
    return route
