"""Ray Serve: one deployment per model, behind its HTTP proxy."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import models
import numpy as np
import orjson
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

OPTIONS: dict[str, Any] = {"max_ongoing_requests": 1000, "ray_actor_options": {"num_cpus": 0.1}}


def answer(document: object) -> Response:
    """Return a JSON answer."""
    return Response(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


@serve.deployment(**OPTIONS)
class Identity:
    """``x`` to ``y``."""

    async def __call__(self, request: Request) -> Response:
        return answer({"y": np.asarray(orjson.loads(await request.body())["x"], np.float32)})


@serve.deployment(**OPTIONS)
class Digits:
    """``image`` to ``label`` and ``probabilities``."""

    def __init__(self) -> None:
        self.session = models.digits_session()

    async def __call__(self, request: Request) -> Response:
        image = np.asarray(orjson.loads(await request.body())["image"], np.float32)
        label, probabilities = models.run_digits(self.session, image)
        return answer({"label": label, "probabilities": probabilities})


@serve.deployment(**OPTIONS)
class Image:
    """Raw bytes to ``mean``."""

    async def __call__(self, request: Request) -> Response:
        return answer({"mean": models.mean_of(models.image_of(await request.body()))})


def main() -> None:
    """Serve until SIGTERM."""
    done = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        _node_ip_address="127.0.0.1",
        _temp_dir=os.environ["BENCH_TMP"],
    )
    serve.start(http_options={"host": "127.0.0.1", "port": models.port(), "access_log": False})
    for name, deployment in (("identity", Identity), ("digits", Digits), ("image", Image)):
        serve.run(deployment.bind(), name=name, route_prefix=f"/{name}")
    done.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
