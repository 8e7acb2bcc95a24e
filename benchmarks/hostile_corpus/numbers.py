"""Hostile files of decision trees: XGBoost, LightGBM, CatBoost."""

from __future__ import annotations

import struct

from benchmarks.hostile_corpus.case import Case, raw

MIB = 2**20


def xgboost(features: str = '"4"', trees: str = "[]", names: str = "[]", more: str = "") -> bytes:
    """Return an XGBoost file as JSON."""
    return (
        f'{{"learner":{{"feature_names":{names},"gradient_booster":{{"model":{trees},"name":"gbtree"}},'
        f'"learner_model_param":{{"num_feature":{features},"num_class":"0"}},"objective":{{"name":"reg:x"}}}},'
        f'"version":[3,2,0]{more}}}'
    ).encode()


def ubj(rest: bytes) -> bytes:
    """Return the beginning of an XGBoost file as UBJSON."""
    return b"{L" + struct.pack(">q", 7) + b"learner{" + rest


def key(name: bytes) -> bytes:
    """Return a key of UBJSON."""
    return b"L" + struct.pack(">q", len(name)) + name


def lightgbm(*lines: str, end: str = "\nend of trees\n") -> bytes:
    """Return a LightGBM file with this header."""
    return ("tree\nversion=v4\n" + "\n".join(lines) + "\n\nTree=0\n" + end).encode()


def catboost(core: bytes, length: int | None = None) -> bytes:
    """Return a CatBoost file with this core."""
    return b"CBM1" + struct.pack("<I", len(core) if length is None else length) + core


HUGE = struct.pack(">q", 2**62)
CASES: tuple[Case, ...] = (
    Case(
        "XGBoost JSON nested 100,000 levels deep",
        "m.json",
        lambda: xgboost(trees="[" * 100_000),
        "levels deep",
    ),
    Case("XGBoost JSON with brackets that do not match", "m.json", lambda: xgboost(trees="[}"), "brackets"),
    Case("XGBoost JSON that is cut off", "m.json", lambda: xgboost()[:-40], "may be broken"),
    Case(
        "XGBoost JSON with a text without an end",
        "m.json",
        lambda: xgboost()[:20] + b'"' + b'\\"' * (8 * MIB),
        "inside a text",
    ),
    Case("XGBoost JSON with 10^9 features", "m.json", lambda: xgboost('"999999999"'), "999999999 features"),
    Case("XGBoost JSON with -1 features", "m.json", lambda: xgboost('"-1"'), "num_feature is '-1'"),
    Case("XGBoost JSON with no features", "m.json", lambda: xgboost('"0"'), "0 features"),
    Case(
        "XGBoost JSON with a number of 10,000 digits",
        "m.json",
        lambda: xgboost("9" * 10_000),
        "num_feature|not JSON",
    ),
    Case(
        "XGBoost JSON with names of 8 MB",
        "m.json",
        lambda: xgboost(names='["' + "a" * 8 * MIB + '"]'),
        "more than",
    ),
    Case("XGBoost JSON without trees", "m.json", raw(b'{"learner":{},"version":[3,2,0]}'), "not a model"),
    Case("XGBoost JSON with data behind it", "m.json", lambda: xgboost() + b"rm -rf", "after the end"),
    Case("XGBoost UBJSON with a length of 2^62", "m.ubj", lambda: ubj(b"L" + HUGE), "beyond its end"),
    Case(
        "XGBoost UBJSON with an array of 2^62 numbers",
        "m.ubj",
        lambda: ubj(key(b"a") + b"[$d#L" + HUGE),
        "beyond",
    ),
    Case(
        "XGBoost UBJSON with 2^62 values of no bytes",
        "m.ubj",
        lambda: ubj(key(b"a") + b"[#L" + HUGE),
        "cannot be",
    ),
    Case(
        "XGBoost UBJSON with a kept array of 2^62 nothings",
        "m.ubj",
        lambda: ubj(key(b"objective") + b"[$Z#L" + HUGE),
        "cannot be read|not a model",
    ),
    Case(
        "XGBoost UBJSON with a negative length",
        "m.ubj",
        lambda: ubj(key(b"a") + b"SL" + b"\xff" * 8),
        "beyond",
    ),
    Case(
        "XGBoost UBJSON nested 100,000 levels deep",
        "m.ubj",
        lambda: ubj(key(b"a") + b"[" * 100_000),
        "levels",
    ),
    Case("XGBoost in the old binary form", "m.model", raw(b"binf" + bytes(200)), "old binary form"),
    Case(
        "LightGBM with a line of 8 MB and no end",
        "m.txt",
        lambda: lightgbm("feature_names=" + "a" * 8 * MIB, end=""),
        "no line `end of trees`",
    ),
    Case(
        "LightGBM with 10^9 features",
        "m.txt",
        lambda: lightgbm("num_class=1", "max_feature_idx=999999998"),
        "features",
    ),
    Case(
        "LightGBM with 10^9 classes",
        "m.txt",
        lambda: lightgbm("num_class=999999999", "max_feature_idx=3", "objective=multiclass"),
        "outputs",
    ),
    Case("LightGBM without features", "m.txt", lambda: lightgbm("num_class=1"), "max_feature_idx"),
    Case(
        "LightGBM with -1 classes",
        "m.txt",
        lambda: lightgbm("num_class=-1", "max_feature_idx=3"),
        "num_class",
    ),
    Case(
        "LightGBM with 2,000 fields",
        "m.txt",
        lambda: lightgbm(*(f"field{number}=1" for number in range(2000))),
        "1,000 fields",
    ),
    Case("CatBoost with a length beyond its end", "m.cbm", lambda: catboost(bytes(16), 2**31), "too early"),
    Case(
        "CatBoost with an offset outside",
        "m.cbm",
        lambda: catboost(b"\xf0\xff\xff\x7f" + bytes(60)),
        "outside",
    ),
    Case("CatBoost of zeros", "m.cbm", lambda: catboost(bytes(64)), "cannot be read"),
    Case("CatBoost of nothing", "m.cbm", raw(b"CBM1"), "too early"),
)
