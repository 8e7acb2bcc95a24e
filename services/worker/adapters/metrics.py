"""The worker's Prometheus metrics."""

from prometheus_client import Counter, Gauge, Histogram

ANSWERED = Counter("tidegate_worker_requests_total", "Requests by outcome.", ["outcome"])
CALL_SECONDS = Histogram(
    "tidegate_worker_call_seconds",
    "Duration of a model call.",
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
    "Jobs by outcome; dropped: its message was a duplicate; lost: it was no longer this worker's.",
    ["outcome"],
)
LEASES = Counter("tidegate_worker_job_leases_total", "Jobs kept beyond their messages.")
REDELIVERED = Counter("tidegate_worker_redelivered_total", "Requests taken over from a worker that died.")
SUSPECTS = Counter(
    "tidegate_worker_suspects_total", "Requests and jobs that were lost, run with nothing beside them."
)
CHUNKS = Counter("tidegate_worker_chunks_total", "Answers of streams.")
FIRST_CHUNK_SECONDS = Histogram(
    "tidegate_worker_first_chunk_seconds",
    "Time from a stream's start to its first answer.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
)
IN_HAND = Gauge("tidegate_worker_in_hand", "Requests that wait here or are in a call.")
TRITON_RESTARTS = Counter(
    "tidegate_worker_triton_restarts_total", "Times that Triton crashed and was restarted."
)
MODEL_DEATHS = Counter(
    "tidegate_worker_model_deaths_total",
    "Times that the model's process or its Triton ended, or was ended because it did not answer.",
)
