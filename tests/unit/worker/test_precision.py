"""Judging a model of a lower precision on another CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from services.worker.domain.precision import loss_here, problem, report
from tidegate.kernel.precision.cpu import Cpu
from tidegate.kernel.precision.embedded import Precision

pytestmark = pytest.mark.unit

CHOSEN = Precision("qdq-reduced", "agreement", "y", 0.0, 0.005, 400, "EPYC", ("avx2", "avx512_vnni"))
SAME, OLD = Cpu("EPYC", ("avx2", "avx512_vnni")), Cpu("Atom", ("avx2",))


def test_the_same_cpu_is_reported_without_a_warning():
    text = report(CHOSEN, SAME, 0.0, 16, 0.31)
    assert text == "int8 (qdq-reduced); measured here: loss 0.00% on 16 rows, 0.31 ms a call"
    assert report(CHOSEN, SAME, None, 0, None) == "int8 (qdq-reduced)"


def test_missing_flags_are_named_and_saturation_is_a_warning():
    assert problem(CHOSEN, OLD, 0.0, 16).startswith("this CPU lacks avx512_vnni, which EPYC had")
    full = replace(CHOSEN, full_range=True)
    assert problem(full, OLD, 0.0, 16).startswith("WARNING: Atom has no VNNI, so sums")
    assert "`tidegate quantize --portable`" in problem(full, OLD, 0.0, 16), "`deploy` has no such option"
    assert problem(full, SAME, 0.0, 16) == ""


def test_a_loss_above_the_limit_is_a_warning_unless_it_is_one_row():
    assert "above the accepted loss" in problem(CHOSEN, SAME, 0.25, 16)
    assert problem(CHOSEN, SAME, 1 / 16, 16) == ""


def test_answers_are_compared_with_those_of_the_original():
    labels = np.array([1, 2, 3, 4])
    assert loss_here(CHOSEN, {"y": labels}, {"y": np.array([1, 2, 3, 0])}) == 0.25
    assert loss_here(CHOSEN, {"y": labels}, {}) is None
    assert loss_here(CHOSEN, {}, {"y": labels}) is None
