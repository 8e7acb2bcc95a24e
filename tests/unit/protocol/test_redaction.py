"""What callers are told of a model's failure."""

from __future__ import annotations

import pytest

from tidegate.kernel.errors import BadRequest, TidegateError, Unavailable
from tidegate.kernel.protocol.redaction import for_caller, told, without_paths

AT = "\n\nAt:\n  /srv/state/replicas/m-v1-0-1/triton/models/m/1/model.py(18): execute\n"
LOADING = (
    "load failed for model 'm': version 1 is at UNAVAILABLE state: Internal: ModuleNotFoundError: "
    "No module named 'xgboost'\n\nAt:\n  /srv/state/models/m/1/model.py(3): <module>\n  "
    "<frozen importlib._bootstrap>(241): _call_with_frames_removed\n;\n"
)


def test_the_type_and_the_text_of_an_exception_stay_and_its_traceback_goes() -> None:
    shown = told(f"Failed to process the request(s) for model 'm_0_0', message: ValueError: no 13{AT}")
    assert shown.message == "ValueError: no 13"
    assert shown.traceback.startswith("At:\n  /srv/state/")


def test_a_failed_load_keeps_its_reason() -> None:
    shown = told(LOADING)
    assert shown.message.endswith("Internal: ModuleNotFoundError: No module named 'xgboost'")
    assert "<module>" in shown.traceback


def test_a_traceback_that_a_model_put_into_its_message_goes() -> None:
    trace = (
        'Traceback (most recent call last):\n  File "/a/b/model.py", line 3, in execute\n    f()\nKeyError: 1'
    )
    shown = told(f"it broke\n{trace}")
    assert shown.message == "it broke\n\nKeyError: 1"
    assert "line 3" in shown.traceback


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "No such file or directory: '/srv/state/models/m/1/w.bin'",
            "No such file or directory: '.../w.bin'",
        ),
        ("see /usr/lib/python3.11/json/__init__.py.", "see .../__init__.py."),
        ("/a/b/c.py:12 failed", ".../c.py:12 failed"),
        ("cannot open=/a/b/", "cannot open=.../"),
        ("POST /v2/models/m/infer says no", "POST /v2/models/m/infer says no"),
        ("https://example.org/a/b says no", "https://example.org/a/b says no"),
        ("and/or, 3 m/s/s, a/b/c, /tmp", "and/or, 3 m/s/s, a/b/c, /tmp"),
    ],
)
def test_only_the_end_of_an_absolute_path_stays(text: str, shown: str) -> None:
    assert without_paths(text) == shown


def test_a_failure_without_a_message_says_so() -> None:
    assert told("").message == "the model failed without a message"


def test_only_what_is_the_server_s_fault_hides_its_paths() -> None:
    text = "the blob store cannot be read: [Errno 13] Permission denied: '/srv/state/data/blobs/1'"
    assert for_caller(Unavailable(text)).endswith("'.../1'")
    assert for_caller(TidegateError(text)).endswith("'.../1'")
    assert for_caller(BadRequest("send it to /v9/models/x")) == "send it to /v9/models/x"
