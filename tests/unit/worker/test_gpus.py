"""Reading the GPUs' load from Triton's metrics."""

from __future__ import annotations

from services.worker.adapters.gpu_load import read

PAGE = """\
# HELP nv_gpu_utilization GPU utilization rate [0.0 - 1.0)
# TYPE nv_gpu_utilization gauge
nv_gpu_utilization{gpu_uuid="GPU-1111"} 0.5
nv_gpu_utilization{gpu_uuid="GPU-2222"} 0.9
# TYPE nv_gpu_memory_used_bytes gauge
nv_gpu_memory_used_bytes{gpu_uuid="GPU-1111"} 1000000000
nv_gpu_memory_used_bytes{gpu_uuid="GPU-2222"} 2e+09
nv_inference_count{model="digits",version="1"} 12
"""


def test_the_mean_of_their_use_and_the_sum_of_their_memory():
    assert read(PAGE) == (0.7, 3_000_000_000)


def test_a_machine_without_one_says_nothing():
    assert read('nv_inference_count{model="digits",version="1"} 12\n') is None
    assert read("") is None
