"""The worker's Prometheus metrics."""

from prometheus_client import Counter, Gauge, Histogram

from tidegate.kernel.protocol.presence import EngineReport

ANSWERED = Counter("tidegate_worker_requests_total", "Requests by outcome.", ["outcome"])
CALL_SECONDS = Histogram(
    "tidegate_worker_call_seconds",
    "Duration of a model call, in seconds.",
    buckets=(0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
)
CALL_SIZE = Histogram(
    "tidegate_worker_call_requests", "Requests in a model call.", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256)
)
CONTRADICTIONS = Counter(
    "tidegate_worker_signature_contradictions_total", "Answers of the model that contradict its signature."
)
JOBS = Counter(
    "tidegate_worker_jobs_total",
    "Jobs by outcome. dropped: the message was a duplicate; lost: the job no longer belongs to this worker.",
    ["outcome"],
)
LEASES = Counter(
    "tidegate_worker_job_leases_total",
    "Jobs that run under a lease after their message was acked.",
)
REDELIVERED = Counter(
    "tidegate_worker_redelivered_total", "Requests and jobs that the broker delivered again."
)
SUSPECTS = Counter(
    "tidegate_worker_suspects_total",
    "Requests and jobs that ran alone, because an earlier call with them was lost.",
)
CHUNKS = Counter("tidegate_worker_chunks_total", "Answers of streams.")
FIRST_CHUNK_SECONDS = Histogram(
    "tidegate_worker_first_chunk_seconds",
    "Seconds from the start of a stream to its first answer.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
)
SEQUENCES = Gauge("tidegate_worker_sequences", "Sequences of a stateful model that this worker keeps.")
SEQUENCES_LOST = Counter(
    "tidegate_worker_sequences_lost_total", "Sequences that were lost when the model server ended."
)
IN_HAND = Gauge("tidegate_worker_in_hand", "Requests that wait in this worker or are in a call.")
TRITON_RESTARTS = Counter(
    "tidegate_worker_triton_restarts_total", "Times that Triton crashed and was restarted."
)
MODEL_DEATHS = Counter(
    "tidegate_worker_model_deaths_total",
    "Times that the model's process or Triton ended, or was killed because it did not answer.",
)
SAMPLED = Counter("tidegate_worker_sampled_rows_total", "Rows that the sampler counted in profiles.")
SAMPLES_DROPPED = Counter(
    "tidegate_worker_sampled_rows_dropped_total",
    "Rows that the sampler dropped, because its buffer was full.",
)
LLM_SLOTS = Gauge(
    "tidegate_worker_llm_slots", "The most requests that a language model runs at the same time."
)
LLM_TAKEN = Counter(
    "tidegate_worker_llm_taken_total",
    "Requests to a language model that this worker took, by band and by kind of queue (shared or replica).",
    ["band", "queue"],
)
LLM_RETURNED = Counter(
    "tidegate_worker_llm_returned_total",
    "Requests that were requeued to the shared queue, because no slot was free when they arrived.",
)
LLM_LOST = Counter(
    "tidegate_worker_llm_lost_total",
    "Requests that were answered with worker_lost, because their worker or their engine was lost.",
    ["what"],
)

LLM_GAUGES = {
    "slots": Gauge("tidegate_llm_slots", "The most requests that the engine runs at the same time."),
    "running": Gauge("tidegate_llm_requests_running", "Requests that run in a slot of the engine."),
    "waiting": Gauge("tidegate_llm_requests_waiting", "Requests in the engine's own queue."),
    "kv_used": Gauge("tidegate_llm_kv_cache_used_tokens", "Tokens of running requests in the KV cache."),
    "kv_total": Gauge("tidegate_llm_kv_cache_tokens", "The most tokens that the KV cache can hold."),
}
LLM_KV_USAGE = Histogram(
    "tidegate_llm_kv_cache_usage_ratio",
    "The used share of the KV cache, read every second.",
    buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1),
)
LLM_COUNTERS = {
    "prompt_tokens": Counter(
        "tidegate_llm_engine_prompt_tokens_total", "Prompt tokens that the engine has processed."
    ),
    "answer_tokens": Counter(
        "tidegate_llm_engine_answer_tokens_total", "Answer tokens that the engine has generated."
    ),
    "cached_tokens": Counter(
        "tidegate_llm_prefix_cache_hit_tokens_total", "Prompt tokens that were in the engine's prefix cache."
    ),
}


def count_engine(before: EngineReport, now: EngineReport) -> None:
    """Update the metrics of an engine from two readings. ``before``: the reading before ``now``."""
    for name, gauge in LLM_GAUGES.items():
        if (value := getattr(now, name)) is not None:
            gauge.set(value)
    for name, counter in LLM_COUNTERS.items():
        counter.inc(max(0, (getattr(now, name) or 0) - (getattr(before, name) or 0)))
    if now.kv_total:
        LLM_KV_USAGE.observe((now.kv_used or 0) / now.kv_total)
