"""Metrics of language models with the usual names: time to first token, inter-token latency and others.

Buckets follow the conventions of OpenTelemetry for GenAI (``gen_ai.server.time_to_first_token`` and others).
"""

from __future__ import annotations

from bisect import bisect_left
from time import perf_counter

from prometheus_client import Counter, Histogram

from tidegate.kernel.protocol.llm import Band

_SHORT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 30, 60)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_LONG = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 300, 900)
_COUNTS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)


FIRST_TOKEN = Histogram(
    "tidegate_llm_time_to_first_token_seconds",
    "Time from a request to its first event.",
    ["endpoint", "band"],
    buckets=_SHORT,
)
INTER_TOKEN = Histogram(
    "tidegate_llm_inter_token_latency_seconds",
    "Time between two tokens of an answer.",
    ["endpoint", "band"],
    buckets=_PER_TOKEN,
)
DURATION = Histogram(
    "tidegate_llm_request_duration_seconds",
    "Time from a request to the end of its answer.",
    ["endpoint", "band"],
    buckets=_LONG,
)
QUEUED = Histogram(
    "tidegate_llm_queue_time_seconds",
    "Time from a request to its start in an engine.",
    ["endpoint", "band"],
    buckets=_LONG,
)
PROMPT = Histogram(
    "tidegate_llm_prompt_tokens", "Tokens of a request's prompt.", ["endpoint", "band"], buckets=_COUNTS
)
ANSWER = Histogram(
    "tidegate_llm_answer_tokens", "Tokens of a request's answer.", ["endpoint", "band"], buckets=_COUNTS
)
CACHED = Counter(
    "tidegate_llm_cached_prompt_tokens_total",
    "Prompt tokens that an engine had in its prefix cache.",
    ["endpoint", "band"],
)
TOKENS = Counter(
    "tidegate_llm_tokens_total",
    "Tokens of all requests, by kind: prompt or answer. They are counted as they arrive.",
    ["endpoint", "band", "kind"],
)
_ALL = (FIRST_TOKEN, INTER_TOKEN, DURATION, QUEUED, PROMPT, ANSWER, CACHED, TOKENS)


class _Series:
    """The metrics of one endpoint and band. They are looked up once, because a lookup by labels is slow."""

    __slots__ = ("answer", "answered", "cached", "duration", "first", "inter", "prompt", "prompted", "queued")

    def __init__(self, endpoint: str, band: Band) -> None:
        labels = (endpoint, band)
        self.first, self.inter = FIRST_TOKEN.labels(*labels), INTER_TOKEN.labels(*labels)
        self.duration, self.queued = DURATION.labels(*labels), QUEUED.labels(*labels)
        self.prompt, self.answer = PROMPT.labels(*labels), ANSWER.labels(*labels)
        self.cached = CACHED.labels(*labels)
        self.prompted, self.answered = TOKENS.labels(*labels, "prompt"), TOKENS.labels(*labels, "answer")


class CallMeter:
    """Measures the times and tokens of one request."""

    __slots__ = ("_gaps", "_last", "_series", "_started", "_streamed", "_usage")

    def __init__(self, series: _Series, *, streamed: bool) -> None:
        self._series = series
        self._streamed = streamed
        self._started = self._last = perf_counter()
        self._usage = (0, 0, 0)
        self._gaps: dict[int, tuple[int, float]] | None = None

    def events(self, usage: tuple[int, int, int] | None, tokens: int, compute_s: float) -> None:
        """Measure the arrival of events.

        ``usage``: the prompt, answer and cached tokens so far; None if the engine does not report them.
        ``tokens``: the number of new events. If ``usage`` is None, each event counts as one token of the
        answer. ``compute_s``: the seconds in the engine so far.
        """
        now = perf_counter()
        if self._gaps is None:
            self._gaps = {}
            if self._streamed:
                self._series.first.observe(now - self._started)
            self._series.queued.observe(max(0.0, now - self._started - compute_s))
        else:
            count = max(1, usage[1] - self._usage[1] if usage is not None else tokens)
            each = (now - self._last) / count
            bucket = bisect_left(_PER_TOKEN, each)
            counted, total = self._gaps.get(bucket, (0, 0.0))
            self._gaps[bucket] = (counted + count, total + now - self._last)
        self._last = now
        if usage is not None:
            self._usage = usage

    def end(self) -> None:
        """Count the request at its end. Count its tokens even if its caller has disconnected."""
        series, (prompt, answer, cached) = self._series, self._usage
        if self._gaps is not None:
            series.duration.observe(perf_counter() - self._started)
            for bucket, (count, total) in self._gaps.items():
                # Like `observe`, but in one step for many values of a bucket.
                series.inter._buckets[bucket].inc(count)
                series.inter._sum.inc(total)
        if prompt or answer:
            series.prompt.observe(prompt)
            series.answer.observe(answer)
            series.prompted.inc(prompt)
            series.answered.inc(answer)
            series.cached.inc(cached)


class LlmMeters:
    """Create the meters of requests to language models.

    Only endpoints of the route table may be passed to :meth:`begin`, so that callers cannot create new
    metrics.
    """

    def __init__(self) -> None:
        self._series: dict[tuple[str, Band], _Series] = {}

    def begin(self, endpoint: str, band: Band, *, streamed: bool) -> CallMeter:
        """Start measuring a request. Without ``streamed``, no time to the first token is measured."""
        series = self._series.get((endpoint, band))
        if series is None:
            series = self._series[endpoint, band] = _Series(endpoint, band)
        return CallMeter(series, streamed=streamed)

    def forget(self, endpoint: str) -> None:
        """Remove the metrics of an endpoint that was deleted."""
        for key in [key for key in self._series if key[0] == endpoint]:
            del self._series[key]
        for metric in _ALL:
            metric.remove_by_labels({"endpoint": endpoint})
