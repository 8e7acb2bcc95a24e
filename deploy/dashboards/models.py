"""The dashboards of models: one endpoint, language models, drift."""

from __future__ import annotations

from deploy.dashboards.panels import DEPLOYMENT as DEPLOYMENTS
from deploy.dashboards.panels import ENDPOINT as ENDPOINTS
from deploy.dashboards.panels import Dashboard, Panel, Query, Row, Variable, lines, number

_D = 'deployment=~"$deployment"'
_E = 'endpoint=~"$endpoint"'
_M = 'model=~"$endpoint"'
_V = 'model=~"$model"'


def _quantiles(metric: str, selector: str, by: str, *quantiles: float) -> tuple[tuple[str, str], ...]:
    """Return a query and a legend for each quantile of a histogram.

    ``by``: the label by which the queries group the series.
    """
    return tuple(
        (
            f"histogram_quantile({q}, sum by ({by}, le) "
            f"(rate({metric}_bucket{{{selector}}}[$__rate_interval])))",
            f"{{{{{by}}}}} p{q * 100:.0f}",
        )
        for q in quantiles
    )


ENDPOINT = Dashboard(
    "endpoint",
    "endpoint",
    "One endpoint and its Deployments: requests, errors, latency and its parts, batches.",
    (
        number(
            "Requests per second", f"sum(endpoint:tidegate_requests:rate1m{{{_E}}})", unit="reqps", width=6
        ),
        number(
            "Failures in 5 minutes",
            f"max(endpoint:tidegate_failure_ratio:5m{{{_E}}})",
            unit="percentunit",
            red_above=0.01,
            width=6,
        ),
        number("p99", f"max(deployment:tidegate_request_seconds:p99_5m{{{_D}}} > 0)", unit="s", width=6),
        number("In flight", f"sum(tidegate_gateway_outstanding{{{_D}}})", width=6),
        Row("Requests"),
        lines(
            "Requests by outcome",
            (
                f"sum by (outcome) (rate(tidegate_gateway_requests_total{{{_M}}}[$__rate_interval]))",
                "{{outcome}}",
            ),
            unit="reqps",
            stacked=True,
            description="The outcome is `ok`, the reason of the error, or `caller_gone` (the caller left).",
        ),
        lines(
            "Failures",
            (f"endpoint:tidegate_failure_ratio:5m{{{_E}}}", "{{endpoint}} 5 minutes"),
            (f"endpoint:tidegate_failure_ratio:1h{{{_E}}}", "{{endpoint}} 1 hour"),
            (f"endpoint:tidegate_failure_ratio:6h{{{_E}}}", "{{endpoint}} 6 hours"),
            unit="percentunit",
        ),
        lines(
            "Latency",
            (f"deployment:tidegate_request_seconds:p50_5m{{{_D}}}", "{{deployment}} p50"),
            (f"deployment:tidegate_request_seconds:p95_5m{{{_D}}}", "{{deployment}} p95"),
            (f"deployment:tidegate_request_seconds:p99_5m{{{_D}}}", "{{deployment}} p99"),
            unit="s",
        ),
        lines(
            "Parts of the time",
            (
                f"sum by (part) (rate(tidegate_gateway_part_seconds_sum{{{_D}}}[$__rate_interval])) / on () "
                f"group_left sum(rate(tidegate_gateway_request_seconds_count{{{_D}}}[$__rate_interval]))",
                "{{part}}",
            ),
            unit="s",
            stacked=True,
            description="Means over all requests. `wait` is the time in the worker before the call, "
            "`compute` is the time of the call.",
        ),
        Panel(
            "Distribution of the latency",
            (
                Query(
                    f"sum by (le) (increase(tidegate_gateway_request_seconds_bucket{{{_D}}}"
                    "[$__rate_interval]))",
                    "{{le}}",
                ),
            ),
            kind="heatmap",
        ),
        lines(
            "In flight, and the age of the queue",
            (f"sum by (deployment) (tidegate_gateway_outstanding{{{_D}}})", "{{deployment}} in flight"),
            (f"deployment:tidegate_queue_age_seconds:predicted{{{_D}}}", "{{deployment}} seconds"),
        ),
        Row("Workers"),
        lines(
            "Requests in a call",
            (f"deployment:tidegate_call_requests:mean5m{{{_D}}}", "{{deployment}}"),
            description="The mean number of requests that share a call of the model.",
        ),
        lines(
            "Duration of a call, by replica",
            *_quantiles("tidegate_worker_call_seconds", _D, "replica", 0.5, 0.99),
            unit="s",
            description="A replica that differs from the others is stalled, or its machine is busy.",
        ),
        lines(
            "Requests by replica",
            (
                f"sum by (replica) (rate(tidegate_worker_requests_total{{{_D}}}[$__rate_interval]))",
                "{{replica}}",
            ),
            unit="reqps",
        ),
        lines(
            "Delivered again, alone, restarted",
            (f"sum(increase(tidegate_worker_redelivered_total{{{_D}}}[15m]))", "delivered again"),
            (f"sum(increase(tidegate_worker_suspects_total{{{_D}}}[15m]))", "ran alone"),
            (f"sum(increase(tidegate_worker_triton_restarts_total{{{_D}}}[15m]))", "restarts of Triton"),
            description="Counts of the last 15 minutes. Their usual cause is the death of a worker or a "
            "model.",
        ),
        lines(
            "Memory of the replicas",
            (f"tidegate_autoscaler_memory_bytes{{{_D}}}", "{{deployment}}"),
            (f"tidegate_autoscaler_gpu_memory_bytes{{{_D}}}", "{{deployment}} GPUs"),
            unit="bytes",
            description="The sum of all replicas of a Deployment. A GPU that several replicas share is "
            "counted once for each of them.",
        ),
        lines(
            "Utilization of the GPUs",
            (f"tidegate_autoscaler_gpu_utilization{{{_D}}}", "{{deployment}}"),
            unit="percentunit",
            description="Empty for Deployments without GPUs.",
        ),
        Row("Streams, limits, roll-outs"),
        lines(
            "First chunk of a stream",
            *_quantiles("tidegate_gateway_first_chunk_seconds", _D, "deployment", 0.5, 0.99),
            unit="s",
        ),
        lines(
            "Chunks",
            (
                f"sum by (deployment) (rate(tidegate_gateway_chunks_total{{{_D}}}[$__rate_interval]))",
                "{{deployment}}",
            ),
        ),
        lines(
            "Requests over a limit",
            (
                "sum by (key, limit) (rate(tidegate_gateway_limited_total[$__rate_interval]))",
                "{{key}} {{limit}}",
            ),
            description="Requests to all endpoints, because a limit belongs to a key and not to an endpoint.",
        ),
        lines(
            "Requests that went to another Deployment",
            (
                "sum by (deployment, other) "
                f"(rate(tidegate_gateway_failovers_total{{{_M}}}[$__rate_interval]))",
                "{{deployment}} to {{other}}",
            ),
            unit="reqps",
            description="The first Deployment could not answer, so a failover Deployment got the request.",
        ),
        lines(
            "Share of a canary",
            (f"max by (endpoint) (tidegate_router_canary_share{{{_E}}})", "{{endpoint}}"),
            unit="percent",
            highest=100,
        ),
        lines(
            "Evidence of a canary's harm",
            (f"max by (endpoint, metric) (tidegate_router_canary_harm{{{_E}}})", "{{endpoint}} {{metric}}"),
            description="The evidence divided by its limit. At 1, the canary is rolled back.",
        ),
        lines(
            "Copies for shadow traffic",
            (
                f"sum by (outcome) (rate(tidegate_gateway_shadow_copies_total{{{_M}}}[$__rate_interval]))",
                "{{outcome}}",
            ),
        ),
    ),
    (ENDPOINTS, DEPLOYMENTS),
)

LANGUAGE_MODELS = Dashboard(
    "language-models",
    "language models",
    "Tokens, waiting times, and the slots and caches of the engines.",
    (
        lines(
            "First token",
            (f"endpoint:tidegate_llm_first_token_seconds:p50_5m{{{_E}}}", "{{endpoint}} p50"),
            (f"endpoint:tidegate_llm_first_token_seconds:p99_5m{{{_E}}}", "{{endpoint}} p99"),
            unit="s",
        ),
        lines(
            "Between two tokens",
            *_quantiles("tidegate_llm_inter_token_latency_seconds", _E, "endpoint", 0.5, 0.99),
            unit="s",
        ),
        lines(
            "Whole request",
            *_quantiles("tidegate_llm_request_duration_seconds", _E, "endpoint", 0.5, 0.99),
            unit="s",
        ),
        lines(
            "Wait for a slot, by band",
            *_quantiles("tidegate_llm_queue_time_seconds", _E, "band", 0.5, 0.99),
            unit="s",
        ),
        lines(
            "Tokens per second",
            (f"endpoint:tidegate_llm_tokens:rate1m{{{_E}}}", "{{endpoint}} {{kind}}"),
        ),
        lines(
            "Tokens of a request",
            *_quantiles("tidegate_llm_prompt_tokens", _E, "endpoint", 0.5, 0.95),
            *(
                (expr, f"{legend} answer")
                for expr, legend in _quantiles("tidegate_llm_answer_tokens", _E, "endpoint", 0.5, 0.95)
            ),
        ),
        lines(
            "Prompt tokens from the cache",
            (f"endpoint:tidegate_llm_cached_prompt_ratio:5m{{{_E}}}", "{{endpoint}}"),
            unit="percentunit",
            highest=1,
        ),
        lines(
            "Requests by prefix affinity",
            ("sum by (outcome) (rate(tidegate_gateway_llm_prefix_total[$__rate_interval]))", "{{outcome}}"),
            unit="reqps",
            stacked=True,
        ),
        Row("Engines"),
        lines(
            "Slots",
            (f"sum by (deployment) (tidegate_llm_slots{{{_D}}})", "{{deployment}} slots"),
            (f"sum by (deployment) (tidegate_llm_requests_running{{{_D}}})", "{{deployment}} running"),
            (f"sum by (deployment) (tidegate_llm_requests_waiting{{{_D}}})", "{{deployment}} waiting"),
        ),
        lines(
            "KV cache",
            (
                f"sum by (deployment) (tidegate_llm_kv_cache_used_tokens{{{_D}}}) "
                f"/ (sum by (deployment) (tidegate_llm_kv_cache_tokens{{{_D}}}) > 0)",
                "{{deployment}}",
            ),
            unit="percentunit",
            highest=1,
        ),
        lines(
            "Tokens of the engine",
            *(
                (
                    f"sum by (deployment) "
                    f"(rate(tidegate_llm_engine_{kind}_tokens_total{{{_D}}}[$__rate_interval]))",
                    f"{{{{deployment}}}} {kind}",
                )
                for kind in ("answer", "prompt")
            ),
        ),
        lines(
            "Requests by queue",
            (
                f"sum by (queue) (rate(tidegate_worker_llm_taken_total{{{_D}}}[$__rate_interval]))",
                "{{queue}}",
            ),
            (
                f"sum(rate(tidegate_worker_llm_returned_total{{{_D}}}[$__rate_interval]))",
                "returned: no slot was free",
            ),
            unit="reqps",
            description="`own` is the queue of a replica that has already read the beginning of the prompt.",
        ),
        lines(
            "Lost streams",
            ("sum by (action) (increase(tidegate_gateway_lost_streams_total[15m]))", "{{action}}"),
            (
                f"sum by (what) (increase(tidegate_worker_llm_lost_total{{{_D}}}[15m]))",
                "lost {{what}}",
            ),
            description="Counts of the last 15 minutes. `continue`: another replica continued the answer.",
        ),
    ),
    (
        Variable("endpoint", "Endpoint", "endpoint:tidegate_llm_tokens:rate1m"),
        Variable("deployment", "Deployment", "tidegate_llm_slots"),
    ),
)

DRIFT = Dashboard(
    "drift",
    "drift and quality",
    "The drift of each version's inputs and outputs from its baseline, and the quality of its answers.",
    (
        lines(
            "Score by version",
            (f"max by (model, version) (tidegate_drift_score{{{_V}}})", "{{model}} {{version}}"),
            description="The largest distance of a column from the baseline, divided by its limit. 1 or "
            "more is too far.",
        ),
        lines(
            "Columns above their limits",
            (f"max by (model, version) (tidegate_drifted_columns{{{_V}}})", "{{model}} {{version}}"),
            description="Columns that were above their limits in two windows in a row.",
        ),
        lines(
            "Score by column",
            (
                f"max by (model, version, column) (tidegate_drift_column_score{{{_V}}})",
                "{{model}} {{version}} {{column}}",
            ),
            description="The three columns with the highest scores. A score of 1 or more is above the limit.",
        ),
        lines(
            "Quality",
            (
                f"max by (model, version, measure) (tidegate_quality{{{_V}}})",
                "{{model}} {{version}} {{measure}}",
            ),
            (
                f"max by (model, version) (tidegate_estimated_accuracy{{{_V}}})",
                "{{model}} {{version}} accuracy, estimated",
            ),
            description="Measured in the last window with labels, or estimated from the model's own "
            "probabilities.",
        ),
        lines(
            "Sampled rows",
            (
                "sum by (deployment) (rate(tidegate_worker_sampled_rows_total[$__rate_interval]))",
                "{{deployment}}",
            ),
            (
                "sum by (deployment) (rate(tidegate_worker_sampled_rows_dropped_total[$__rate_interval]))",
                "{{deployment}} dropped",
            ),
        ),
        lines(
            "Feedback",
            ("sum by (outcome) (rate(tidegate_gateway_feedback_total[$__rate_interval]))", "{{outcome}}"),
        ),
    ),
    (Variable("model", "Model", "tidegate_drift_score"),),
)
