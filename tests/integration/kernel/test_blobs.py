"""The blob store in a folder and in fsspec's stores: complete blobs, read by key, swept by time."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Iterator

import pytest

from tests.integration.kernel.s3 import SERVERS
from tidegate.kernel.blobs.claims import MARGIN_S, Claims
from tidegate.kernel.blobs.store import BUCKET_S, Blobs, new_key
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.claim import read_claim, write_claim

pytestmark = pytest.mark.integration


@pytest.fixture(params=["file", "path", "memory", *SERVERS])
def blobs(request, tmp_path, fresh, s3_at) -> Iterator[Blobs]:
    """A store by a local URL, by a path, through fsspec, and on real S3 servers."""
    url = (
        s3_at(request.param).url
        if request.param in SERVERS
        else {
            "file": f"file://{tmp_path}/with%20space/blobs",
            "path": str(tmp_path / "blobs"),
            "memory": f"memory://{fresh('blobs')}",
        }[request.param]
    )
    found = Blobs(url)
    yield found
    found.close()


@pytest.fixture
def local(tmp_path) -> Iterator[Blobs]:
    found = Blobs(f"file://{tmp_path}/blobs")
    yield found
    found.close()


async def test_what_was_put_is_there_and_stays(blobs):
    data = os.urandom(3_000_000)
    began = time.time()
    key = await blobs.put([data[:10], memoryview(data)[10:]], 10)
    assert re.fullmatch(r"\d{10}/[0-9a-f]{32}", key)
    assert began + 10 <= int(key[:10]) <= time.time() + 10 + BUCKET_S
    for _ in range(2):
        assert await blobs.get(key) == data
    parts = await blobs.get_parts(key, [10, 0, 2_999_990])
    assert [bytes(part) for part in parts] == [data[:10], b"", data[10:]]


async def test_nothing_and_one_buffer(blobs):
    assert await blobs.get(await blobs.put(b"", 1)) == b""
    assert await blobs.get(await blobs.put(memoryview(b"one"), 1)) == b"one"


async def test_sizes_that_do_not_add_up(blobs):
    key = await blobs.put(b"12345", 1)
    with pytest.raises(Unavailable, match="a blob has 5 bytes, but its claim says 6"):
        await blobs.get_parts(key, [2, 4])


async def test_what_is_not_there(blobs):
    with pytest.raises(Unavailable, match="not in the blob store any more"):
        await blobs.get(new_key(time.time()))


@pytest.mark.parametrize(
    "key", ["", "x", "/etc/passwd", "1700000000/../../x", "1700000000/" + "g" * 32, "1/" + "0" * 32]
)
async def test_a_key_names_a_blob_and_nothing_else(blobs, key):
    with pytest.raises(Unavailable, match="is not the key of a blob"):
        await blobs.get(key)


async def test_the_sweep_takes_what_has_expired(blobs):
    now = time.time()
    old, new = await blobs.put(b"old", 1), await blobs.put(b"new", 1000)
    assert await blobs.sweep(now) == 0
    assert await blobs.sweep(time.time() + 1 + BUCKET_S) == 1
    assert await blobs.get(new) == b"new"
    with pytest.raises(Unavailable):
        await blobs.get(old)


async def test_a_sweep_of_nothing(blobs):
    assert await blobs.sweep(time.time()) == 0


async def test_deleted(blobs):
    key = await blobs.put(b"x", 10)
    await blobs.delete(key)
    await blobs.delete(key)
    with pytest.raises(Unavailable):
        await blobs.get(key)


async def test_a_blob_has_its_name_when_it_is_whole(local, tmp_path):
    """A listing during many writes shows only complete blobs."""
    data, seen = os.urandom(5_000_000), set()
    writing = asyncio.gather(*(local.put(data, 10) for _ in range(8)))
    while not writing.done():
        seen |= {p.stat().st_size for p in (tmp_path / "blobs").glob("*/*") if p.suffix != ".part"}
        await asyncio.sleep(0)
    await writing
    assert seen <= {len(data)}
    assert list((tmp_path / "blobs").glob("*/*.part")) == []
    folders = (tmp_path / "blobs").iterdir()
    assert all(folder.stat().st_mode & 0o077 == 0 for folder in folders), "callers sent this to nobody else"


async def test_a_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    blobs = Blobs(f"file://{tmp_path}/file/blobs")
    with pytest.raises(Unavailable, match=r"the blob store cannot be written: .*Not a directory") as caught:
        await blobs.put(b"x", 1)
    assert caught.value.retry_after_s == 5.0


async def test_the_event_loop_goes_on_meanwhile(local):
    gaps, last, loop = [], time.monotonic(), asyncio.get_running_loop()
    writing = loop.create_task(local.put(bytes(200_000_000), 10))
    while not writing.done():
        await asyncio.sleep(0.001)
        gaps.append(time.monotonic() - last)
        last = time.monotonic()
    assert max(gaps[1:], default=0) < 0.5 * sum(gaps) + 0.05


async def test_a_claim_is_good_for_its_time_and_a_margin(blobs):
    claims = Claims(blobs, 4)
    assert (claims.needed(4), claims.needed(5)) == (False, True)
    began = time.time()
    claim = await claims.give([b"abc", b"de"], 5)
    assert int(read_claim([claim]).key[:10]) >= began + 5 + MARGIN_S
    assert claims.size([claim]) == 5
    for _ in range(2):
        assert [bytes(part) for part in await claims.redeem([claim])] == [b"abc", b"de"]
    await claims.drop(claim)
    with pytest.raises(Unavailable):
        await claims.redeem([claim])


@pytest.mark.parametrize("data", [[b"nonsense"], [b"a", b"b"], [write_claim("../../etc/passwd", [b"x"])]])
async def test_what_is_no_claim_is_unavailable(local, data):
    with pytest.raises(Unavailable):
        await Claims(local, 4).redeem(data)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files for others")
async def test_what_root_writes_belongs_to_the_owner_of_the_store(tmp_path):
    """A worker in a container is root, and gateway and router are other users."""
    root = tmp_path / "blobs"
    root.mkdir()
    os.chown(root, 10001, 10001)
    found = Blobs(f"file://{root}")
    key = await found.put(b"data", 60)
    found.close()
    blob = root / key
    assert {(each.stat().st_uid, each.stat().st_gid) for each in (blob, blob.parent)} == {(10001, 10001)}
    assert blob.parent.stat().st_mode & 0o777 == 0o700
