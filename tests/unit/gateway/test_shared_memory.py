"""Tensors in shared memory: what callers may register, and what becomes of segments that change."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import Any

import orjson
import pytest
from tritonclient.grpc import service_pb2 as pb

from services.gateway.adapters import shared_regions, socket_peer
from services.gateway.adapters.shared_regions import SharedRegions
from services.gateway.api.grpc import codec
from services.gateway.domain import oip, shared_memory
from services.gateway.domain.contract import Beside, Contract
from services.gateway.domain.memory_budget import MemoryBudget
from services.gateway.domain.shared_memory import RegionPart, UsesRegions
from tidegate.kernel.errors import BadRequest, Conflict, Forbidden, NotFound, Overloaded, TooMany
from tidegate.kernel.protocol.models import Signature

pytestmark = pytest.mark.unit

ME = os.getuid()
ROW = struct.pack("<2f", 1, 2)
CONTRACT = Contract(
    Signature.model_validate(
        {
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [2]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [2]}],
            "max_batch_size": 8,
        }
    )
)


@pytest.fixture
def budget() -> MemoryBudget:
    return MemoryBudget(2**20)


@pytest.fixture
def regions(tmp_path: Path, budget: MemoryBudget) -> SharedRegions:
    """No regions yet; the segments are files of this test's folder."""
    (tmp_path / "input").write_bytes(ROW + bytes(8))
    (tmp_path / "output").write_bytes(bytes(16))
    return SharedRegions(budget, 2**16, folder=tmp_path)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("", "Unable to open shared memory region: ''"),
        ("/", "Unable to open"),
        ("/..", "Unable to open"),
        ("/../etc/passwd", "Unable to open"),
        ("//etc/passwd", "Unable to open"),
        ("a/b", "Unable to open"),
        ("a\0", "Unable to open"),
        ("/" + "a" * 255, "Unable to open"),
        ("/tidegate-5", "the reserved prefix 'tidegate'"),
        ("triton_python_backend_shm_region_1", "the reserved prefix 'triton_python_backend_shm_region'"),
        ("/nowhere", "Unable to open shared memory region: '/nowhere': No such file"),
        ("/link", "Unable to open"),
        ("/folder", "Unable to open"),
        ("/pipe", "it is not a shared memory segment"),
    ],
)
def test_a_key_names_one_segment(regions: SharedRegions, tmp_path: Path, key: str, told: str):
    (tmp_path / "link").symlink_to(tmp_path / "input")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadRequest, match=told.replace("(", r"\(")):
        regions.register("me", "r", key, 0, 8, ME)
    assert regions.status("me") == []


@pytest.mark.parametrize("user", [None, ME + 1])
def test_only_a_segment_of_ones_own_user(regions: SharedRegions, user: int | None):
    with pytest.raises(Forbidden, match="only a segment of its own user"):
        regions.register("me", "r", "/input", 0, 8, user)


@pytest.mark.parametrize(("offset", "size"), [(0, 17), (16, 1), (9, 8), (0, 0), (2**62, 2**62)])
def test_a_region_lies_within_its_segment(regions: SharedRegions, offset: int, size: int):
    with pytest.raises(BadRequest, match="failed to register shared memory region 'r': invalid args"):
        regions.register("me", "r", "/input", offset, size, ME)


def test_names_belong_to_their_caller(regions: SharedRegions):
    regions.register("me", "r", "/input", 0, 16, ME)
    with pytest.raises(Conflict, match="shared memory region 'r' already in manager"):
        regions.register("me", "r", "/input", 0, 8, ME)
    regions.register("you", "r", "/output", 8, 8, ME)
    assert regions.status("me") == [{"name": "r", "key": "/input", "offset": 0, "byte_size": 16}]
    assert regions.status("you", "r") == [{"name": "r", "key": "/output", "offset": 8, "byte_size": 8}]
    regions.unregister("you")
    regions.unregister("you", "r")  # as in Triton, not an error
    with pytest.raises(NotFound, match="Unable to find system shared memory region: 'r'"):
        regions.status("you", "r")
    with pytest.raises(NotFound, match="Unable to find shared memory region: 'r'"):
        regions.of("you").read(RegionPart("r", 0, 8))
    assert bytes(regions.of("me").read(RegionPart("r", 0, 8))) == ROW


def test_the_number_of_regions_is_bounded(regions: SharedRegions, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shared_regions, "MOST_OF_ONE", 2)
    monkeypatch.setattr(shared_regions, "MOST", 3)
    for owner, name in (("me", "a"), ("me", "b"), ("you", "c")):
        regions.register(owner, name, "/input", 0, 8, ME)
    for owner in ("me", "other"):
        with pytest.raises(TooMany, match="unregister some"):
            regions.register(owner, "d", "/input", 0, 8, ME)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (RegionPart("r", 16, 0), "Invalid offset for shared memory region: 'r'"),
        (RegionPart("r", 8, 9), r"Invalid offset \+ byte size for shared memory region: 'r'"),
    ],
)
def test_a_part_lies_within_its_region(regions: SharedRegions, part: RegionPart, told: str):
    regions.register("me", "r", "/input", 0, 16, ME)
    for use in (regions.of("me").read, regions.of("me").sink):
        with pytest.raises(BadRequest, match=told):
            use(part)


def test_a_segment_that_became_shorter_is_an_error_and_not_the_end(regions: SharedRegions, tmp_path: Path):
    regions.register("me", "r", "/input", 0, 16, ME)
    sink = regions.of("me").sink(RegionPart("r", 8, 8))
    os.truncate(tmp_path / "input", 12)
    with pytest.raises(BadRequest, match="is shorter than when it was registered"):
        regions.of("me").read(RegionPart("r", 8, 8))
    with pytest.raises(BadRequest, match="is shorter than when it was registered"):
        sink.write("y", ROW)
    assert (tmp_path / "input").stat().st_size == 12, "it is not made longer"


def test_an_output_may_be_written_after_its_region_is_gone(regions: SharedRegions, tmp_path: Path):
    regions.register("me", "r", "/output", 4, 12, ME)
    sink = regions.of("me").sink(RegionPart("r", 4, 8))
    regions.unregister("me", "r")
    sink.write("y", ROW)
    assert (tmp_path / "output").read_bytes() == bytes(8) + ROW
    with pytest.raises(BadRequest, match=r"for output 'y' \(8 bytes\) should be at least 9 bytes"):
        sink.write("y", ROW + b"1")


def test_copies_count_until_they_are_freed(regions: SharedRegions, budget: MemoryBudget):
    regions.register("me", "r", "/input", 0, 16, ME)
    copy = regions.of("me").read(RegionPart("r", 0, 16))
    assert budget.used == 16
    budget.used += budget.limit
    with pytest.raises(Overloaded):
        regions.of("me").read(RegionPart("r", 0, 16))
    budget.used -= budget.limit
    del copy
    assert budget.used == 0
    with pytest.raises(BadRequest, match="TIDEGATE_MAX_BODY_BYTES"):
        regions.room(2**16 + 1)


def test_gateway_processes_share_registrations(tmp_path: Path, budget: MemoryBudget):
    (tmp_path / "input").write_bytes(ROW)
    (tmp_path / "gone").write_bytes(ROW)
    one, two = (SharedRegions(budget, 2**16, tmp_path / "run" / "t.json", tmp_path) for _ in range(2))
    one.register("me", "r", "/input", 0, 8, ME)
    one.register("me", "gone", "/gone", 0, 8, ME)
    (tmp_path / "gone").rename(tmp_path / "old")
    (tmp_path / "gone").write_bytes(b"not this")
    assert bytes(two.of("me").read(RegionPart("r", 0, 8))) == ROW
    with pytest.raises(NotFound):  # another segment has its name now
        two.of("me").read(RegionPart("gone", 0, 8))
    with pytest.raises(Conflict):
        two.register("me", "r", "/input", 0, 8, ME)
    two.unregister("me")
    assert one.status("me") == two.status("me") == []


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_user_of_a_connection(host: str):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.create_server((host, 0), family=family) as server,
        socket.create_connection(server.getsockname()[:2]) as client,
    ):
        mine, its = client.getsockname()[:2], client.getpeername()[:2]
        assert socket_peer.user_of(mine, its) == ME
        assert socket_peer.user_of((host, 1), its) is None
    assert socket_peer.user_of(("10.0.0.1", 5), ("10.0.0.2", 6)) is None
    assert socket_peer.user_of(("example", 5), ("127.0.0.1", 6)) is None


def test_a_closed_connection_has_no_user():
    # The kernel lists it with user 0, to whom every segment would belong.
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        mine, its = client.getsockname(), client.getpeername()
        with server.accept()[0]:
            assert socket_peer.user_of(mine, its) == ME
            client.close()
            assert socket_peer.user_of(mine, its) is None


def rest(tensor: dict[str, Any], output: dict[str, Any], beside: Beside | None) -> Any:
    x = {"name": "x", "datatype": "FP32", "shape": [1, 2], **tensor}
    body = {"inputs": [x], "outputs": [{"name": "y", **output}]}
    return oip.decode(orjson.dumps(body), None, CONTRACT, beside)


IN = {"shared_memory_region": "r", "shared_memory_byte_size": 8}
OUT = IN | {"shared_memory_offset": 8}


@pytest.mark.parametrize("over", ["rest", "grpc"])
def test_a_request_with_all_tensors_in_memory(regions: SharedRegions, tmp_path: Path, over: str):
    regions.register("me", "r", "/input", 0, 16, ME)
    beside = Beside(regions.of("me"), {"x-user": "7"})
    message = pb.ModelInferRequest()
    tensor = message.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    for field, values in ((tensor.parameters, IN), (message.outputs.add(name="y").parameters, OUT)):
        codec.set_parameters(field, values)
    with pytest.raises(UsesRegions):
        rest({"parameters": IN}, {"parameters": OUT}, None)
    with pytest.raises(UsesRegions):
        codec.decode(message, CONTRACT)
    got = (
        rest({"parameters": IN}, {"parameters": OUT}, beside)
        if over == "rest"
        else codec.decode(message, CONTRACT, beside)
    )
    assert (got.rows, [bytes(each) for each in got.data]) == (1, [ROW])
    assert b"x-user" in got.key
    outputs = (CONTRACT.inputs["x"][1]._replace(name="y"),)
    head, tail = oip.encode("m", "1", got, 1, outputs, {}, [struct.pack("<2f", 3, 4)])
    assert orjson.loads(head)["outputs"] == [
        {"name": "y", "datatype": "FP32", "shape": [1, 2], "parameters": OUT}
    ]
    assert tail == []
    assert (tmp_path / "input").read_bytes() == ROW + struct.pack("<2f", 3, 4)


@pytest.mark.parametrize(
    ("tensor", "output", "told"),
    [
        ({"parameters": {"shared_memory_region": "r"}}, {}, "'shared_memory_byte_size' must be specified"),
        ({"parameters": {"shared_memory_offset": 1}}, {}, "'shared_memory_offset' can not be specified"),
        ({"parameters": IN | {"shared_memory_region": 5}}, {}, "must be a string"),
        ({"parameters": IN | {"shared_memory_byte_size": -1}}, {}, "must be a number of bytes"),
        ({"parameters": IN | {"shared_memory_byte_size": 7}}, {}, "7"),
        ({"parameters": IN, "data": [1, 2]}, {}, "Input must set only one of the following fields"),
        ({"data": [1, 2]}, {"parameters": OUT | {"classification": 1}}, "can't set both"),
    ],
)
def test_wrong_parameters(regions: SharedRegions, tensor: dict[str, Any], output: dict[str, Any], told: str):
    regions.register("me", "r", "/input", 0, 16, ME)
    with pytest.raises(BadRequest, match=told):
        rest(tensor, output, Beside(regions.of("me")))


def test_names_have_a_length():
    for name in ("", "n" * 256):
        with pytest.raises(BadRequest, match="must have 1 to 255 characters"):
            shared_memory.check_name(name)
