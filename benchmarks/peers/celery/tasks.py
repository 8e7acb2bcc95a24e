"""The Celery tasks. Each process of the pool loads the model."""

from __future__ import annotations

import os
from typing import Any

import models
import numpy as np
from celery import Celery
from celery.signals import worker_process_init

app = Celery("tasks", broker=os.environ["BENCH_AMQP_URL"], backend=os.environ["BENCH_REDIS_URL"])
# Pickle carries the 600 KB image as bytes; the default, JSON, would carry it as base64.
app.conf.update(
    task_serializer="pickle", result_serializer="pickle", accept_content=["json", "pickle"], result_expires=60
)
if "BENCH_QUEUE" in os.environ:
    app.conf.task_default_queue = os.environ["BENCH_QUEUE"]
if os.environ.get("BENCH_DURABLE"):
    # As durable as a job: a quorum queue with confirms, and a task is acked after its result is stored.
    app.conf.update(
        task_default_queue_type="quorum",
        worker_detect_quorum_queues=True,
        broker_transport_options={"confirm_publish": True},
        task_acks_late=True,
        result_expires=3600,
    )
held: dict[str, Any] = {}


@worker_process_init.connect
def load(**_: Any) -> None:
    """Load the model once per process of the pool."""
    held["digits"] = models.digits_session()


@app.task
def ping() -> bool:
    """Return a constant, to check that the pool works."""
    return True


@app.task
def identity(x: list[list[float]]) -> list[list[float]]:
    """Return ``x`` unchanged."""
    rows: list[list[float]] = np.asarray(x, np.float32).tolist()
    return rows


@app.task
def digits(image: list[list[float]]) -> dict[str, Any]:
    """Return ``label`` and ``probabilities`` of images."""
    label, probabilities = models.run_digits(held["digits"], np.asarray(image, np.float32))
    return {"label": label.tolist(), "probabilities": probabilities.tolist()}


@app.task
def mean(body: bytes) -> float:
    """Return the mean of a raw image."""
    return models.mean_of(models.image_of(body))
