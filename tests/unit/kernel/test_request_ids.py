"""The ids of requests that callers gave none."""

from __future__ import annotations

import os
import re

import pytest

from tidegate.kernel.http.answers import new_request_id

pytestmark = pytest.mark.unit


def test_ids_are_random_and_unique():
    ids = [new_request_id() for _ in range(2_000)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[0-9a-f]{16}", each) for each in ids)


def test_a_process_and_its_fork_make_different_ids():
    new_request_id()  # so that ids are left for both
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, new_request_id().encode())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reader, 16).decode()
    os.close(reader)
    os.close(writer)
    assert theirs not in [new_request_id() for _ in range(300)]
