"""Hostile files for the registry, made by code. Each has the words that its refusal must have."""

from __future__ import annotations

from benchmarks.hostile_corpus import archives, codes, models, numbers
from benchmarks.hostile_corpus.case import Case

CASES: tuple[Case, ...] = (*archives.CASES, *models.CASES, *numbers.CASES, *codes.CASES)
