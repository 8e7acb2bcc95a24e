"""What a gateway says of models at zero replicas, models that may not start, and unknown models."""

from __future__ import annotations

import grpc
import orjson
import pytest
from tritonclient.grpc import service_pb2 as pb

from tests.conftest import PATIENCE_S
from tidegate.kernel.protocol.presence import ReplicaReport
from tidegate.kernel.store.live import REPLICA, STATUSES

pytestmark = pytest.mark.integration

INDEX = "/v2/repository/index"


@pytest.mark.parametrize("version", ["", "/versions/1"])
async def test_metadata_that_is_not_known_yet_wakes_the_model(client, add_model, make_peer, until, version):
    model = await add_model(signature=None)
    async with make_peer(model) as peer:
        await peer.connection.wait_up(PATIENCE_S)
        answer = await client.get(f"/v2/models/{model}{version}")
        assert (answer.status_code, answer.json()["reason"]) == (503, "not_known_yet")
        assert answer.headers["retry-after"] == "1"
        await until(lambda: model in peer.demanded)


async def test_the_same_over_grpc(stub, add_model, make_peer, until):
    model = await add_model(signature=None)
    async with make_peer(model) as peer:
        await peer.connection.wait_up(PATIENCE_S)
        with pytest.raises(grpc.aio.AioRpcError, match="not known until the first replica") as caught:
            await stub.ModelMetadata(pb.ModelMetadataRequest(name=model))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        trailers = dict(caught.value.trailing_metadata())
        assert (trailers["reason"], trailers["retry-after"]) == ("not_known_yet", "1")
        await until(lambda: model in peer.demanded)


async def test_an_unknown_model_is_still_not_found(client, stub):
    answer = await client.get("/v2/models/letters")
    assert (answer.status_code, answer.json()["reason"]) == (404, "not_found")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelMetadata(pb.ModelMetadataRequest(name="letters"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_the_index_of_ready_models(gateway, client, stub, add_model, until):
    """A request would wake ``digits``. The other may not start; once it has a replica, it is ready too."""
    held = await add_model(wakeable=False)

    async def indexes(ready: bool) -> dict[str, str]:
        """Return the states of these two over HTTP; check that gRPC returns the same index."""
        shown = (await client.post(INDEX, json={"ready": ready})).json()
        told = (await stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=ready))).models
        over_grpc = [(each.name, each.version, each.state) for each in told]
        assert [(each["name"], each["version"], each["state"]) for each in shown] == over_grpc
        return {each["name"]: each["state"] for each in shown if each["name"] in {"digits", held}}

    assert await indexes(ready=True) == {"digits": "READY"}
    assert await indexes(ready=False) == {"digits": "READY", held: "UNAVAILABLE"}
    report = ReplicaReport("r", held, 1, "h", 1, "ready")
    gateway.redis.set(REPLICA + "r", report.to_json(), px=60_000)

    async def heard() -> bool:
        return (await client.get(f"/v2/models/{held}/ready")).status_code == 200

    await until(heard)
    assert await indexes(ready=True) == {"digits": "READY", held: "READY"}
    gateway.redis.delete(REPLICA + "r")


FAILED = {"type": "Loaded", "ok": False, "reason": "LoadFailed", "message": "no such file"}


@pytest.mark.parametrize(
    ("status", "state", "why", "shown_state"),
    [
        ({"conditions": [FAILED]}, None, "no such file", "UNAVAILABLE"),
        ({}, "starting", "Triton crashed; Triton is started again", "LOADING"),
    ],
)
async def test_a_model_that_failed_or_loads_again_is_not_ready(
    gateway, client, stub, add_model, until, status, state, why, shown_state
):
    """Each call would be refused, or wait for an unknown time."""
    model = await add_model()
    path = f"/v2/models/{model}/ready"
    assert (await client.get(path)).json() == {"name": model, "ready": True}, "a request would wake it"
    assert (await stub.ModelReady(pb.ModelReadyRequest(name=model))).ready
    gateway.redis.set(STATUSES, orjson.dumps({model: status}), px=60_000)
    if state is not None:
        report = ReplicaReport("r", model, 1, "h", 1, state, message=why, ready_at=1.0)
        gateway.redis.set(REPLICA + "r", report.to_json(), px=60_000)

    async def heard() -> bool:
        return (await client.get(path)).status_code == 503

    await until(heard)
    told = (await client.get(path)).json()
    assert (told["name"], told["ready"], told["reason"]) == (model, False, "not_ready")
    assert (told["error"], len(told["request_id"])) == (f"{model} is not ready: {why}", 16)
    assert not (await stub.ModelReady(pb.ModelReadyRequest(name=model))).ready
    shown = {each["name"]: each for each in (await client.post(INDEX)).json()}
    assert (shown[model]["state"], shown[model]["reason"]) == (shown_state, why)
    gateway.redis.delete(STATUSES, REPLICA + "r")


@pytest.mark.parametrize("content", [b"", b"{}", b'{"ready": false}', b'{"of_a_later_day": 1}'])
async def test_the_index_of_all(client, add_model, content):
    held = await add_model(wakeable=False)
    for kind in ("application/json", "application/x-www-form-urlencoded"):  # the latter is curl's -d
        answer = await client.post(INDEX, content=content, headers={"Content-Type": kind})
        assert {"digits", held} <= {each["name"] for each in answer.json()}


@pytest.mark.parametrize(
    ("content", "status", "told"),
    [
        (b'{"ready": tru', 400, "failed to parse the request JSON buffer"),
        (b"[true]", 400, "a JSON object"),
        (b'{"ready": "yes"}', 400, "'ready' must be true or false, got str"),
        (b'{"ready": 1}', 400, "'ready' must be true or false, got int"),
        (b" " * 65_537, 413, "larger than the 65536 bytes that this path accepts"),
    ],
)
async def test_a_bad_index_request(client, content, status, told):
    answer = await client.post(INDEX, content=content)
    assert answer.status_code == status
    assert told in answer.json()["error"]
