"""Requests in flight, and the queue of requests to each Deployment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from services.gateway.domain.chunk_order import ChunkOrder
from services.gateway.domain.fair_lane import FairLane, Flow, FlowKey, Standing
from services.gateway.domain.replica_fleet import ReplicaFleet, window_of
from services.gateway.domain.routing import DeploymentRoute
from tidegate.kernel import telemetry
from tidegate.kernel.broker.connection import Refused, Unroutable
from tidegate.kernel.broker.topology import REPLIES_KEPT_S, Queue, replica_queue, requests_queue
from tidegate.kernel.errors import SequenceLost, TidegateError, Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Reply
from tidegate.kernel.protocol.llm import Band
from tidegate.kernel.protocol.presence import GatewayLoad

log = telemetry.logger(__name__)

ReplyOrError = Reply | TidegateError
# A function that returns the frame of a request. Its arguments are the data and the size of the data.
Framed = Callable[..., bytes | list[Buffer]]
OnReply = Callable[[ReplyOrError], None]

NOT_SENT_AGAIN = (
    "the connection to the broker was lost after this request was sent. It was not sent again, because its "
    "deployment has `retry: never`"
)
SEQUENCE_UNKNOWN = (
    "the connection to the broker was lost after this request of a sequence was sent. The model may or may "
    "not have run the request: start the sequence again"
)
SEQUENCE_LOST = (
    "the replica of this sequence has ended, and the sequence's state is lost: start the sequence again"
)
# A heartbeat reports at most this many flows of each FairLane. These are the flows with the most unanswered
# requests.
MOST_FLOWS = 64


@dataclass(slots=True)
class Lane:
    """The RabbitMQ queues for one request, which is for a language model or belongs to a sequence.

    ``sequence``: True if the request belongs to a sequence. ``shared``: for a sequence, the queue of its
    replica; for a language model, the queue of the request's band. ``own``: the queue of the preferred
    replica, or None. A request that is still in ``own`` after ``wait_ms`` milliseconds moves to ``shared``.
    """

    shared: Queue
    own: Queue | None = None
    wait_ms: float = 0.0
    sequence: bool = False


def lane_of(deployment: str, band: Band, replica: str, wait_ms: float) -> Lane:
    """Return the queues of a request to a language model. ``replica``: the preferred replica, or empty."""
    own = replica_queue(deployment, replica, band) if replica else None
    return Lane(requests_queue(deployment, band), own, wait_ms)


@dataclass(slots=True)
class PendingRequest:
    """A request that waits for its reply.

    ``done``: called once, with the reply or an error. For a stream, it is called with each chunk and with the
    end.

    ``order``: for a stream, the expected order of its chunks; None for any other request. ``timeout_s``: for
    a stream, the longest time between two chunks. So each chunk of the stream sets a later ``deadline``.

    ``frame``: the request as it is sent; a list of pieces if it is large. It is None while the data is
    uploaded to the blob store, and after a stream's first chunk. ``size``: the bytes of the data. It includes
    uploaded data, because the worker loads that data into memory.

    ``lane``: set only if the request is for a language model or belongs to a sequence. Such a request is sent
    in a separate message.

    ``fair``: the :class:`FairLane` that the request shares with other callers' requests. ``flow``: the
    caller's requests in ``fair``. ``published``: True if the request was published, False if it waits in
    ``fair``. ``cost``: how much the request uses of its caller's share in ``fair``.
    """

    id: bytes
    done: OnReply
    route: DeploymentRoute
    frame: bytes | list[Buffer] | None
    size: int
    deadline: float
    timer: asyncio.TimerHandle
    timeout_s: float
    fair: FairLane[PendingRequest]
    flow: Flow[PendingRequest]
    cost: float = 1.0
    priority: int = 0
    order: ChunkOrder | None = None
    claim: bytes | None = None
    lane: Lane | None = None
    sent: bool = False
    resent: bool = False
    published: bool = False


@dataclass(slots=True)
class DeploymentQueue:
    """The requests and counters of one Deployment.

    ``waiting``: the requests to publish in this event-loop turn.

    ``lanes``: a :class:`FairLane` for each band. A FairLane counts the published requests, and holds the
    requests that cannot be published yet. ``lane``: the FairLane of the band ``normal``. Only language models
    use other bands.

    ``sequences``: the requests of sequences. They are published immediately, because their order must not
    change.
    """

    amqp_queue: Queue
    waiting: list[PendingRequest] = field(default_factory=list)
    load: GatewayLoad = field(default_factory=GatewayLoad)
    lane: FairLane[PendingRequest] = field(default_factory=FairLane)
    lanes: dict[Band, FairLane[PendingRequest]] = field(default_factory=dict)
    sequences: FairLane[PendingRequest] = field(default_factory=FairLane)

    def __post_init__(self) -> None:
        self.lanes["normal"] = self.lane

    def band(self, band: Band) -> FairLane[PendingRequest]:
        """Return the :class:`FairLane` of a band. The first call creates it."""
        lane = self.lanes.get(band)
        if lane is None:
            lane = self.lanes[band] = FairLane()
            lane.window = self.lane.window
        return lane

    def standing(self, key: FlowKey) -> Standing | None:
        """Return the number of a caller's unanswered requests, and the caller's fair share (0 to 1).

        The share is the part of the Deployment's capacity that the caller may use. Return None if no other
        caller has unanswered requests.
        """
        contended, mine, share = False, 0, 1.0
        for lane in self.lanes.values():
            flow = lane.flow(key)
            if lane.contended(flow):
                contended, share = True, min(share, lane.share(flow))
            mine += flow.outstanding
        return Standing(mine + self.lane.elsewhere(flow), share) if contended else None

    def learn(self, fleet: ReplicaFleet) -> None:
        """Set the window of each :class:`FairLane`, and store the loads of flows at other gateways.

        The window is the number of published requests that keeps the replicas busy. The load of a flow is its
        unanswered requests and its weight.
        """
        for lane in self.lanes.values():
            lane.window = window_of(fleet)
            lane.learn(fleet.flows_elsewhere)

    def begin(self, pending: PendingRequest) -> None:
        """Count a new request."""
        self.load.outstanding += 1
        self.load.arrived += 1
        pending.fair.arrive(pending.flow)

    def settle(self, pending: PendingRequest) -> FairLane[PendingRequest]:
        """Count a request as completed, and return its :class:`FairLane`.

        The FairLane may now have room to publish another request.
        """
        self.load.outstanding -= 1
        self.load.completed += 1
        pending.fair.settle(pending.flow, published=pending.published)
        return pending.fair

    def report(self) -> GatewayLoad:
        """Return the counters, with the number of unanswered requests of each flow."""
        flows: dict[str, list[int]] = {}
        for lane in self.lanes.values():
            for name, (outstanding, weight) in lane.loads(MOST_FLOWS).items():
                known = flows.get(name, (0, 0))[0]
                flows[name] = [known + outstanding, weight]
        self.load.flows = flows
        return self.load


def frame_of(
    id_: bytes,
    deadline_ms: int,
    rows: int,
    key: bytes,
    data: list[Buffer],
    tenant: bytes,
    trace: bytes,
    flags: int,
    size: int,
) -> bytes | list[Buffer]:
    """Return a request's frame as bytes. If ``size`` is large, return pieces, so that no data is copied."""
    head = envelope.request_head(id_, deadline_ms, rows, key, data, tenant=tenant, trace=trace, flags=flags)
    return b"".join((head, *data)) if size <= envelope.LARGE else [head, *data]


def publish_failure(queue: Queue, error: Unavailable, lane: Lane | None = None) -> TidegateError | None:
    """Return the error for requests that could not be published because of ``error``.

    Return None if the requests may be sent again after the reconnect. ``lane``: the lane of the first
    request.
    """
    if isinstance(error, Unroutable):
        if lane is not None and lane.sequence:
            return SequenceLost(SEQUENCE_LOST)
        return Unavailable(
            f"the queue {queue.name} was deleted: send the request again. The gateway then declares "
            "the queue again",
            retry_after_s=1.0,
        )
    if isinstance(error, Refused):
        return Unavailable(error.message, retry_after_s=error.retry_after_s or 1.0)
    return None


def never_again(pending: PendingRequest) -> TidegateError | None:
    """Return the error for a request that was sent and may not be sent again; None for any other request."""
    if not pending.sent:
        return None
    if pending.lane is not None and pending.lane.sequence:
        return SequenceLost(SEQUENCE_UNKNOWN)
    return None if pending.route.retry_safe else Unavailable(NOT_SENT_AGAIN)


def prepare_again(pending: PendingRequest) -> None:
    """Prepare a request to be sent again after a reconnect."""
    if pending.sent and pending.order is not None:
        # The first copy may still run. So the second copy gets another attempt number, which shows to which
        # copy a chunk belongs. If the request has a lane, skip one number. The first copy gets the skipped
        # number if it moves from the preferred replica's queue to the shared queue.
        assert pending.frame is not None
        pending.order.attempt += 1 if pending.lane is None else 2
        pending.frame = renumbered(pending.frame, pending.order.attempt)
    pending.resent = pending.sent


def renumbered(frame: bytes | list[Buffer], attempt: int) -> bytes | list[Buffer]:
    """Return the frame with another attempt number."""
    if isinstance(frame, list):
        return [envelope.with_attempt(frame[0], attempt), *frame[1:]]
    return envelope.with_attempt(frame, attempt)


def message_of(frames: list[bytes | list[Buffer]]) -> bytes | list[Buffer]:
    """Return frames as one message. A frame in pieces must be the only frame."""
    if isinstance(frames[0], list):
        return envelope.pack_alone(envelope.REQUESTS, frames[0])
    return envelope.pack(envelope.REQUESTS, [frame for frame in frames if not isinstance(frame, list)])


def replies_in(body: Buffer) -> list[Reply]:
    """Return the replies in a message, or an empty list if the message cannot be read."""
    try:
        return [envelope.read_reply(frame) for frame in envelope.unpack(envelope.REPLIES, body)]
    except envelope.Undecodable as error:
        log.error("an envelope of replies could not be decoded", extra={"problem": str(error)})
        return []


def unheard(pending: Iterable[PendingRequest], away_s: float) -> list[PendingRequest]:
    """Return the streams that may have lost a chunk while the reply queue had no consumer.

    ``away_s``: the seconds without a consumer. After REPLIES_KEPT_S seconds without one, the broker deletes
    the queue, and workers cancel the streams. Before that, no chunk is lost, and the list is empty.
    """
    if away_s < REPLIES_KEPT_S:
        return []
    return [each for each in pending if each.order is not None and each.order.emitted]
