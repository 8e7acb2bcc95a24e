"""The work that a process skips while it loads and when it ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

# What is registered first is called last at the end.
PROGRAM = """
import atexit, gc, sys
atexit.register(lambda: print("left out at the end:", gc.get_freeze_count() > 1000))
from tidegate.kernel import quick_start
quick_start.begin()
before = sum(each["collections"] for each in gc.get_stats())
import httpx
print("highlighter:", any(name.startswith(("pygments", "rich")) for name in sys.modules))
print("collections:", sum(each["collections"] for each in gc.get_stats()) - before)
print("client:", httpx.Client(verify=False).is_closed)
quick_start.loaded()
print("threshold:", gc.get_threshold(), gc.get_freeze_count() > 1000)
gc.unfreeze()  # so that only what is done at the end can leave anything out
"""


def test_nothing_is_loaded_or_collected_in_vain():
    done = subprocess.run([sys.executable, "-c", PROGRAM], text=True, capture_output=True, check=True)
    told = dict(line.split(": ") for line in done.stdout.splitlines())
    assert told == {
        "highlighter": "False",
        "collections": "0",
        "client": "False",
        "threshold": "(10000, 3, 60) True",
        "left out at the end": "True",
    }


# A worker starts for each replica, and the start decides how long a sleeping model takes to wake.
@pytest.mark.parametrize("service", ["worker", "autoscaler"])
def test_a_process_does_not_load_what_it_does_not_need(service):
    program = (
        "import sys; from tidegate.kernel import quick_start; quick_start.begin(); "
        f"import services.{service}.app; print(*[name for name in sys.modules if sys.modules[name]])"
    )
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, check=True)
    loaded = set(done.stdout.split())
    assert "redis.asyncio" in loaded
    assert not loaded & {"numpy", "psutil", "opentelemetry.sdk.metrics", "onnx", "onnxruntime"}
