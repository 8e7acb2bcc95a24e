"""The embedded Valkey gives the memory of deleted records back."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest
from redis import Redis
from redis.exceptions import ConnectionError

from tidegate.stack import valkey
from tidegate.stack.ports import free_ports

pytestmark = pytest.mark.integration

MIB = 2**20
ROUNDS, RECORDS = 3, 40_000


async def test_records_that_come_and_go_leave_no_memory_behind(tmp_path: Path, until) -> None:
    """glibc kept up to 4,000 pieces of each size: 80 MiB after these rounds, for no data at all."""
    (port,) = free_ports(1)
    child = valkey.child(tmp_path, port=port, environ=os.environ)
    for path, text in child.files.items():
        path.write_text(text)
    server = await asyncio.create_subprocess_exec(
        *child.argv, env=child.env, stdout=asyncio.subprocess.DEVNULL
    )
    try:
        redis = Redis(port=port)
        await until(lambda: _answers(redis))
        for _ in range(ROUNDS):
            with redis.pipeline(transaction=False) as pipe:
                for number in range(RECORDS):
                    pipe.set(f"record:{number}", bytes(200 + number * 16 % 800))
                pipe.execute()
            redis.flushall()
        assert psutil.Process(server.pid).memory_info().rss < 55 * MIB
    finally:
        server.kill()
        await server.wait()


def _answers(redis: Redis) -> bool:
    try:
        return bool(redis.ping())
    except ConnectionError:
        return False
