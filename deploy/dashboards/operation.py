"""The dashboards of the whole system: the overview, and one for queues and the autoscaler."""

from __future__ import annotations

from deploy.dashboards.panels import DEPLOYMENT, Dashboard, Row, lines, number

_D = 'deployment=~"$deployment"'

OVERVIEW = Dashboard(
    "overview",
    "overview",
    "Traffic, failures and latency of all endpoints, and the state of Tidegate's services.",
    (
        number("Requests per second", "sum(endpoint:tidegate_requests:rate1m)", unit="reqps"),
        number(
            "Failures",
            "sum(endpoint:tidegate_failures:rate1m) / (sum(endpoint:tidegate_requests:rate1m) > 0)",
            unit="percentunit",
            description="The share of requests that failed because of the service, in the last minute.",
            red_above=0.01,
        ),
        number("Slowest p99", "max(deployment:tidegate_request_seconds:p99_5m > 0)", unit="s"),
        number("Ready replicas", 'sum(deployment:tidegate_replicas:count{state="ready"})'),
        number(
            "Alerts that fire",
            'max(tidegate_alerts{state="firing"})',
            description="`tidegate alerts` shows these alerts.",
            red_above=1,
        ),
        number(
            "In no worker",
            "sum(deployment:tidegate_queued:count)",
            description="Requests and jobs that no worker has received yet.",
        ),
        number(
            "Silent targets",
            "count(up == 0) or vector(0)",
            description="Processes from which Prometheus cannot read metrics.",
            red_above=1,
        ),
        number(
            "Lost jobs",
            "max(tidegate_jobs_unaccounted)",
            description="Jobs that the ledger cannot find. docs/ledger.md explains the ledger.",
            red_above=1,
        ),
        Row("Traffic"),
        lines(
            "Requests by endpoint",
            ("endpoint:tidegate_requests:rate1m", "{{endpoint}}"),
            unit="reqps",
        ),
        lines(
            "Failures by endpoint",
            ("endpoint:tidegate_failure_ratio:5m", "{{endpoint}}"),
            unit="percentunit",
            description="The share of requests that failed in the last five minutes. Errors of callers and "
            "rejections by limits do not count.",
        ),
        lines(
            "Requests by outcome",
            ("sum by (outcome) (rate(tidegate_gateway_requests_total[$__rate_interval]))", "{{outcome}}"),
            unit="reqps",
            stacked=True,
        ),
        lines(
            "p99 by Deployment",
            ("deployment:tidegate_request_seconds:p99_5m > 0", "{{deployment}}"),
            unit="s",
        ),
        Row("Work"),
        lines("In flight", ("sum by (deployment) (tidegate_gateway_outstanding)", "{{deployment}}")),
        lines(
            "Replicas",
            ('deployment:tidegate_replicas:count{state="ready"}', "{{deployment}} ready"),
            ("deployment:tidegate_replicas_missing:count > 0", "{{deployment}} missing"),
        ),
        lines("Jobs by state", ("tidegate_jobs:by_state:count", "{{state}}")),
        lines(
            "Lost jobs, and dead letters",
            ("max(tidegate_jobs_unaccounted)", "jobs unaccounted for"),
            ("sum(cause:tidegate_dead_letters:new15m) or vector(0)", "dead letters in 15 minutes"),
            description="Both must be 0. docs/ledger.md and docs/dead-letters.md say what to do.",
        ),
        Row("Parts"),
        lines(
            "CPU",
            ("sum by (job) (rate(process_cpu_seconds_total[$__rate_interval]))", "{{job}}"),
            description="Used cores. Gateway processes that share a port do not report this metric.",
        ),
        lines("Memory", ("sum by (job) (process_resident_memory_bytes)", "{{job}}"), unit="bytes"),
        lines(
            "Disk",
            ("tidegate_autoscaler_disk_free_bytes", "{{instance}} free"),
            ("tidegate_autoscaler_disk_bytes", "{{instance}} size"),
            description="The disk of the state folder. docs/models.md says how the models' cache is limited.",
            unit="bytes",
        ),
        lines(
            "Calls of the registry",
            (
                "sum by (status) (rate(tidegate_registry_requests_total[$__rate_interval]))",
                "{{status}}",
            ),
            unit="reqps",
        ),
        lines(
            "Leader and shared limits",
            ("sum(tidegate_router_leads)", "routers that lead"),
            ("max(tidegate_gateway_limits_local)", "limits are not shared"),
            description="Exactly one router must lead. While the live store (Valkey) is down, gateways do "
            "not share limits.",
        ),
        lines(
            "Versions, Deployments, endpoints",
            ("max(tidegate_registry_versions)", "versions"),
            ("max(tidegate_registry_deployments)", "Deployments"),
            ("max(tidegate_registry_endpoints)", "endpoints"),
        ),
        lines("Stored artifacts", ("max(tidegate_registry_artifact_bytes)", "bytes"), unit="bytes"),
        lines(
            "Connections that a server closed early",
            (
                "sum by (job, reason) (rate(tidegate_http_closed_total[$__rate_interval]))",
                "{{job}} {{reason}}",
            ),
        ),
    ),
)

AUTOSCALER = Dashboard(
    "autoscaler",
    "queues and autoscaler",
    "Waiting work, replicas, and the reasons for their number.",
    (
        lines(
            "Replicas",
            (f"sum by (state) (deployment:tidegate_replicas:count{{{_D}}})", "{{state}}"),
        ),
        lines(
            "Demand",
            (f"max by (deployment) (tidegate_autoscaler_demand{{{_D}}})", "{{deployment}}"),
            description="Requests in flight, and unfinished jobs. Gaps: the autoscaler does not know the "
            "demand.",
        ),
        lines(
            "In no worker",
            (f"deployment:tidegate_queued:count{{{_D}}}", "{{deployment}}"),
            description="Requests and jobs that no worker has received.",
        ),
        lines(
            "Age of the queue",
            (f"deployment:tidegate_queue_age_seconds:predicted{{{_D}}}", "{{deployment}}"),
            unit="s",
            description="The predicted time until a new request gets its answer. Streams are left out.",
        ),
        lines(
            "Utilisation",
            (f"deployment:tidegate_replica_utilisation:ratio5m{{{_D}}}", "{{deployment}}"),
            unit="percentunit",
            description="The share of time in which replicas run their model. Streams are left out.",
        ),
        lines("Missing replicas", (f"deployment:tidegate_replicas_missing:count{{{_D}}}", "{{deployment}}")),
        Row("Autoscaler"),
        lines(
            "Decisions by rule",
            (
                f"sum by (rule) (rate(tidegate_autoscaler_decisions_total{{{_D}}}[$__rate_interval]))",
                "{{rule}}",
            ),
            stacked=True,
            description="`tidegate decisions NAME` shows each decision with its reason.",
        ),
        lines(
            "Ended replicas by cause",
            (
                f"deployment_cause:tidegate_replacements:new15m{{{_D}}}",
                "{{deployment}} {{cause}}",
            ),
            description="Counts of the last 15 minutes. Every cause except `drained` is a failure.",
        ),
        lines(
            "From launch to ready",
            *(
                (
                    f"histogram_quantile({q}, sum by (deployment, le) "
                    f"(tidegate_autoscaler_launch_to_ready_seconds_bucket{{{_D}}}))",
                    f"{{{{deployment}}}} p{q * 100:.0f}",
                )
                for q in (0.5, 0.95)
            ),
            unit="s",
            description="Times of all replicas that started since the start of the autoscaler.",
        ),
        lines(
            "A round of the autoscaler",
            (
                "histogram_quantile(0.99, sum by (le) "
                "(rate(tidegate_autoscaler_round_seconds_bucket[$__rate_interval])))",
                "p99",
            ),
            unit="s",
        ),
        lines(
            "Warm pool",
            ("sum by (flavour) (tidegate_autoscaler_warm_workers)", "{{flavour}} waiting"),
            (
                "sum by (flavour, outcome) (increase(tidegate_autoscaler_warm_given_total[15m]))",
                "{{flavour}} {{outcome}}",
            ),
        ),
        lines(
            "Restarts of Triton, deaths of models",
            (
                f"sum by (deployment) (increase(tidegate_worker_triton_restarts_total{{{_D}}}[15m]))",
                "{{deployment}} restarts",
            ),
            (
                f"sum by (deployment) (increase(tidegate_worker_model_deaths_total{{{_D}}}[15m]))",
                "{{deployment}} deaths",
            ),
        ),
        Row("Jobs"),
        lines("Jobs by state", ("tidegate_jobs:by_state:count", "{{state}}")),
        lines(
            "Ended jobs",
            (
                f"sum by (outcome) (rate(tidegate_worker_jobs_total{{{_D}}}[$__rate_interval]))",
                "{{outcome}}",
            ),
        ),
        lines(
            "Published again, expired",
            ("sum by (state) (increase(tidegate_jobs_republished_total[15m]))", "published again: {{state}}"),
            ("sum(increase(tidegate_jobs_expired_total[15m]))", "expired"),
        ),
        lines(
            "Webhooks",
            ("max(tidegate_webhooks_pending)", "waiting"),
            (
                "sum by (outcome) (rate(tidegate_webhook_tries_total[$__rate_interval]))",
                "{{outcome}} per second",
            ),
        ),
        lines("Memory of the jobs' store", ("max(tidegate_jobs_store_bytes)", "bytes"), unit="bytes"),
        lines(
            "Dead letters by cause",
            ("cause:tidegate_dead_letters:new15m", "{{cause}}"),
            description="Counts of the last 15 minutes.",
        ),
        Row("RabbitMQ"),
        lines(
            "Messages in queues",
            ("sum(rabbitmq_queue_messages_ready)", "ready"),
            ("sum(rabbitmq_queue_messages_unacked)", "delivered, not acknowledged"),
            description="From RabbitMQ's Prometheus plugin. Only the compose stack, or your own RabbitMQ, "
            "has it.",
        ),
        lines("Memory of RabbitMQ", ("sum(rabbitmq_process_resident_memory_bytes)", "bytes"), unit="bytes"),
    ),
    (DEPLOYMENT,),
)
