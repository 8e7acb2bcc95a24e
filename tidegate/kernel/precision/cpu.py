"""The features of this machine's CPU that decide how fast and how exact a quantised model is."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# Instructions that onnxruntime's int8 kernels use.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
# CPUs with one of these instruction sets add up products of 8-bit values in 32 bits. CPUs with only AVX2 or
# AVX512 add pairs of products in 16 bits. These sums may saturate, which makes answers wrong.
EXACT = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})


@dataclass(frozen=True, slots=True)
class Cpu:
    """The name of a CPU, and those of :data:`FLAGS` that it has."""

    name: str
    flags: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Return True if sums of products of 8-bit values do not saturate on this CPU.

        This is about values that use all 8 bits.
        """
        return bool(EXACT & set(self.flags))


def parse(text: str, fallback: str = "") -> Cpu:
    """Return the CPU that the text of ``/proc/cpuinfo`` describes."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    there = set((fields.get("flags") or fields.get("features") or "").split())
    return Cpu(fields.get("model name") or fallback or "unknown", tuple(f for f in FLAGS if f in there))


def read() -> Cpu:
    """Return this machine's CPU."""
    try:
        text = CPUINFO.read_text()
    except OSError:
        text = ""
    return parse(text, platform.processor() or platform.machine())
