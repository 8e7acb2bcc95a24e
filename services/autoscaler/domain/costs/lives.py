"""Book the time of every replica: turn the totals that workers report into amounts by hour.

A life is the time of a replica from its launch to its end, as the launcher shows it. The launcher normally
knows the moment of the end. Otherwise the end lies between the last round that saw the replica and the next
round.

Each booking adds the growth of the worker's totals since the previous booking. At the end of a life, the time
of unfinished calls is booked as lost. The time that no report covers is booked as ``stopping`` if the worker
has sent its last report, and as ``unreported`` if the worker crashed. So the booked times of an ended life
add up to its duration exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from services.autoscaler.domain.launcher import Running, pool_of
from tidegate.kernel.protocol.models import Deployment
from tidegate.kernel.protocol.prices import PriceList, Rate, rate_of
from tidegate.kernel.protocol.replica_time import IDLE, WASTED, Part, ReplicaTime, Spent

NS = 1_000_000_000
HOUR_S = 3600
# A kind of booked time: the time that a replica ran, as the launcher saw it. A cost report compares it with
# the sum of all other kinds.
OBSERVED = "observed"
STOPPING, UNREPORTED = "stopping", "unreported"
# If a replica ended while no autoscaler ran, its end is assumed to be at most this many seconds after its
# last sign of life.
SILENT_S = 1.0
# A worker's process is assumed to end this many seconds after the worker's last report.
EXIT_S = 0.1
MOST_RATES = 10_000


class Place(NamedTuple):
    """The key of a booked amount.

    ``hour``: the beginning of the hour, in seconds since the epoch. ``part``: the kind of time.
    """

    hour: int
    deployment: str
    model: str
    version: int
    part: Part


class Amount(NamedTuple):
    """A booked amount: time with counts of requests and tokens, and what the time costs.

    ``token_cost`` is the cost of a provider's tokens.
    """

    spent: Spent
    cost: float = 0.0
    token_cost: float = 0.0

    def plus(self, other: Amount) -> Amount:
        """Return the sum of this amount and another one."""
        cost, token_cost = self.cost + other.cost, self.token_cost + other.token_cost
        return Amount(self.spent.plus(other.spent), cost, token_cost)


@dataclass(slots=True)
class Life:
    """A replica's life. Times are seconds since the epoch.

    ``seen_at``: when the replica was last seen. ``gone_at``: when the replica was first missing; None while
    it runs. If the moment of its end is known, ``seen_at`` and ``gone_at`` are this moment.

    ``booked_at``: the time of the last booking. ``observed_ns``: the duration that is already booked as
    observed. ``counted``: the totals that are already booked. ``covered_ns`` and ``calls_ns``: the values of
    the same names in the worker's last :class:`ReplicaTime`.
    """

    replica: str
    deployment: str
    model: str
    version: int
    launched_at: float
    seen_at: float
    booked_at: float
    rate: Rate
    gone_at: float | None = None
    observed_ns: int = 0
    counted: dict[Part, Spent] = field(default_factory=dict)
    covered_ns: int = 0
    calls_ns: int = 0

    def end(self, at: float) -> bool:
        """End this life at a known moment. Return False if its end was known before."""
        if self.gone_at is not None:
            return False
        self.seen_at = self.gone_at = max(at, self.seen_at)
        return True

    @property
    def counted_ns(self) -> int:
        """Return the booked time in nanoseconds: the sum of ``counted``."""
        return sum(spent.ns for spent in self.counted.values())

    @property
    def pending_ns(self) -> int:
        """Return the time that the worker's booked totals do not cover yet."""
        return max(0, _ns(self.seen_at - self.launched_at) - self.counted_ns)

    @property
    def unobserved_ns(self) -> int:
        """Return how much of the replica's running time is not booked as observed yet, in nanoseconds."""
        return max(0, _ns(self.seen_at - self.launched_at) - self.observed_ns)


Bookings = dict[Place, Amount]


class LifeBook:
    """The lives that are not completely booked yet.

    ``sharing`` says, by Deployment, how much replica time one second of a call takes: 0.5 if two calls run at
    the same time.
    """

    def __init__(self, lives: Iterable[Life] = ()) -> None:
        self.lives = {life.replica: life for life in lives}
        self.sharing: dict[str, float] = {}
        # If an ended replica is not in `lives` and was launched before this time, its life is already booked.
        # The first call of `note` assumes this for every ended replica.
        self._noted_at = float("inf")
        self._prices: PriceList | None = None
        self._rates: dict[tuple[str, int, str], Rate] = {}

    def copy(self) -> dict[str, Life]:
        """Return the lives as they are now, for :meth:`restore`."""
        return {name: replace(life, counted=dict(life.counted)) for name, life in self.lives.items()}

    def restore(self, lives: Mapping[str, Life]) -> None:
        """Undo a booking that could not be stored. Keep the newer times at which replicas were seen."""
        for name, life in lives.items():
            newer = self.lives.get(name)
            if newer is not None:
                life.seen_at, life.gone_at = newer.seen_at, newer.gone_at
            self.lives[name] = life

    def note(
        self,
        running: Sequence[Running],
        deployments: Mapping[str, Deployment],
        devices: Mapping[str, str],
        prices: PriceList,
        now: float,
    ) -> bool:
        """Record the replicas that exist at ``now``. Return True if a replica has ended since the last call.

        ``devices`` has the device that each replica reports.
        """
        alive: set[str] = set()
        ended = False
        for each in running:
            life = self.lives.get(each.replica)
            if life is None:
                if not each.alive and (each.ended_at is None or each.launched_at < self._noted_at):
                    continue  # already booked, or the time of its end is not known
                life = self.lives[each.replica] = _begun(each, deployments, prices)
            if (deployment := deployments.get(each.deployment)) is not None:
                life.rate = self._rate_of(deployment, prices, devices.get(each.replica, life.rate.gpu))
            if (waited := self.lives.get(each.worker)) is not None:  # this worker left its warm pool
                ended |= waited.end(each.launched_at)
            if each.alive:
                alive.add(each.replica)
                life.seen_at, life.gone_at = max(now, life.launched_at), None
            elif each.ended_at is not None:
                ended |= life.end(each.ended_at)
        for life in self.lives.values():
            if life.replica not in alive and life.gone_at is None:
                life.gone_at, ended = now, True
        self._noted_at = max([now, *(each.launched_at for each in running)])
        return ended

    def book(
        self, reports: Mapping[str, ReplicaTime], prices: PriceList, now: float
    ) -> tuple[Bookings, list[str]]:
        """Return the amounts to book now, and the replicas that are then booked completely."""
        found: Bookings = {}
        closed: list[str] = []
        self._learn_sharing(reports)
        for life in list(self.lives.values()):
            report = reports.get(life.replica) or _of_pool(life)
            grown = _growth(life, report)
            if life.gone_at is not None:
                until, rest = _rest(life, report)
                _add_all(life.counted, rest)
                _add_all(grown, rest)
                closed.append(life.replica)
                del self.lives[life.replica]
            else:
                until = life.seen_at
            _observe(life, grown, until)
            _spread(found, life, grown, prices, until)
            life.booked_at = until
        return found, closed

    def _rate_of(self, deployment: Deployment, prices: PriceList, device: str) -> Rate:
        """Return a replica's rate. Rates are cached, because each round needs the rates of all replicas."""
        if prices is not self._prices or len(self._rates) >= MOST_RATES:
            self._prices = prices
            self._rates.clear()
        key = (deployment.name, deployment.revision, device)
        if key not in self._rates:
            self._rates[key] = rate_of(deployment, prices, device)
        return self._rates[key]

    def _learn_sharing(self, reports: Mapping[str, ReplicaTime]) -> None:
        sums: dict[str, list[int]] = {}
        for life in self.lives.values():
            report = reports.get(life.replica)
            if report is None or report.calls_ns <= life.calls_ns:
                continue
            found = sums.setdefault(life.deployment, [0, 0])
            found[0] += report.covered_ns - life.covered_ns
            found[1] += report.calls_ns - life.calls_ns
            life.covered_ns, life.calls_ns = report.covered_ns, report.calls_ns
        for deployment, (covered_ns, calls_ns) in sums.items():
            self.sharing[deployment] = min(1.0, covered_ns / calls_ns)


def _begun(running: Running, deployments: Mapping[str, Deployment], prices: PriceList) -> Life:
    deployment, at = deployments.get(running.deployment), running.launched_at
    cost = prices.cores * prices.core_hour + prices.memory_gib * prices.gib_hour
    rate = Rate(per_hour=cost, cores=prices.cores, memory_gib=prices.memory_gib)
    model, version = (deployment.model, deployment.version) if deployment else ("", 0)
    return Life(running.replica, running.deployment, model, version, at, at, at, rate)


def _of_pool(life: Life) -> ReplicaTime | None:
    """Return the time of a waiting worker of a warm pool as idle time, because it sends no report.

    Return None for other workers.
    """
    if pool_of(life.deployment) is None:
        return None
    idle = Spent(max(0, _ns(life.seen_at - life.launched_at)))
    return ReplicaTime(life.replica, life.deployment, parts={Part(IDLE): idle})


def _growth(life: Life, report: ReplicaTime | None) -> dict[Part, Spent]:
    """Return the growth of the totals since the last booking, and remember the new totals."""
    grown: dict[Part, Spent] = {}
    for part, spent in report.parts.items() if report is not None else ():
        more = spent.minus(life.counted.get(part, Spent()))
        if any(more) and min(more) >= 0:
            grown[part] = more
            life.counted[part] = spent
    return grown


def _rest(life: Life, report: ReplicaTime | None) -> tuple[float, dict[Part, Spent]]:
    """Return when a replica ended, and its time that is not booked yet: lost, stopping or unreported."""
    assert life.gone_at is not None
    open_ns = report.open_ns if report is not None else 0
    rest = {Part(WASTED, "lost"): Spent(open_ns)} if open_ns else {}
    reported_ns = life.counted_ns + open_ns
    sign = max(life.seen_at, life.launched_at + reported_ns / NS)
    ended = report is not None and report.ended
    if ended:  # a worker exits right after its last report
        end = min(sign + EXIT_S, max(sign, life.gone_at))
    else:  # the replica died between the last round that saw it and the next round
        end = max(sign, min((life.seen_at + life.gone_at) / 2, sign + SILENT_S))
    left = max(0, _ns(end - life.launched_at) - reported_ns)
    if left:
        rest[Part(STOPPING if ended else UNREPORTED)] = Spent(left)
    return end, rest


def _observe(life: Life, grown: dict[Part, Spent], until: float) -> None:
    observed = _ns(until - life.launched_at)
    if observed > life.observed_ns:
        grown[Part(OBSERVED)] = Spent(observed - life.observed_ns)
        life.observed_ns = observed


def _spread(
    found: Bookings, life: Life, grown: Mapping[Part, Spent], prices: PriceList, until: float
) -> None:
    """Add ``grown`` to ``found``, divided among the hours since the last booking.

    ``grown``: the growth of the totals in the period from the last booking to ``until``. Each hour gets a
    part of the growth, in proportion to the seconds of the period that are in this hour.
    """
    hours = list(_hours(life.booked_at, until))
    token_price = prices.tokens.get(life.model)
    for part, spent in grown.items():
        left, left_s = spent, sum(seconds for _, seconds in hours)
        for hour, seconds in hours:
            share = seconds / left_s if left_s else 1.0
            piece = left if share >= 1.0 else Spent(*(int(count * share) for count in left))
            left, left_s = left.minus(piece), left_s - seconds
            if not any(piece):
                continue
            tokens = piece.tokens_in, piece.tokens_out, piece.tokens_cached
            cost = 0.0 if part.kind == OBSERVED else life.rate.cost(piece.ns)
            amount = Amount(piece, cost, token_price.cost(*tokens) if token_price and any(tokens) else 0.0)
            place = Place(hour, life.deployment, life.model, life.version, part)
            found[place] = found[place].plus(amount) if place in found else amount


def _hours(since: float, until: float) -> Iterator[tuple[int, float]]:
    """Yield each hour that a period touches, and how many seconds of the period are in it.

    The last hour may have 0 seconds.
    """
    hour = int(since // HOUR_S) * HOUR_S
    while hour + HOUR_S < until:
        yield hour, hour + HOUR_S - max(since, hour)
        hour += HOUR_S
    yield hour, max(0.0, until - max(since, hour))


def _add_all(to: dict[Part, Spent], more: Mapping[Part, Spent]) -> None:
    for part, spent in more.items():
        to[part] = to.get(part, Spent()).plus(spent)


def _ns(seconds: float) -> int:
    return int(seconds * NS)
