"""Test that the proxy of the engine forwards all calls of the launcher, and no harmful ones."""

from __future__ import annotations

import copy
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from services.autoscaler.adapters.docker.container_spec import DockerPlan, body
from services.autoscaler.adapters.docker.gpu_inventory import probe_body
from services.autoscaler.adapters.docker.launcher import finished_at
from services.autoscaler.domain.engine_rules import StackBounds, refusal
from services.autoscaler.domain.launcher import LaunchSpec
from tidegate.kernel.protocol.models import Assignment, Deployment, Version

BOUNDS = StackBounds("stack", ("tidegate/worker", "ours/*"), "net", frozenset({"stack_cache"}))
BORN = datetime(2024, 1, 1, tzinfo=UTC)


def made(*, model_users: bool = True, **given) -> dict:
    """Return the request for a worker, as the launcher makes it."""
    plan = DockerPlan(
        stack="stack",
        image="tidegate/worker",
        network="net",
        state_dir=Path("/nowhere"),
        token="t",
        volumes={"stack_cache": "/var/lib/tidegate/cache"},
        compose_project="stack",
        memory_mb=512,
        model_users=model_users,
    )
    deployment = Deployment.model_validate(
        {"name": "m-v1", "model": "m", "version": 1, "revision": 1, "created_at": BORN, **given}
    )
    version = Version(
        model="m", number=1, format="onnx", artifact_sha256="0" * 64, artifact_size=1, filename="m.onnx",
        created_at=BORN,
    )  # fmt: skip
    work = Assignment(
        replica="m-v1-0-1", generation=1, deployment=deployment, version=version,
        launched_at=1.0,
    )  # fmt: skip
    return body(plan, LaunchSpec.of(work), "tidegate/worker", "sha256:1", {"GPU-a": 1} if given else {})


def create(request: dict, name: str = "stack.m-v1-0-1") -> str | None:
    return refusal("POST", "/v1.41/containers/create", {"name": [name]}, json.dumps(request).encode(), BOUNDS)


def ask(method: str, path: str, query: dict[str, str] | None = None, body: bytes = b"") -> str | None:
    return refusal(method, path, {key: [value] for key, value in (query or {}).items()}, body, BOUNDS)


def test_what_the_launcher_creates_may_pass():
    assert create(made()) is None
    assert create(made(resources={"gpus": 1})) is None
    plan = DockerPlan("stack", "tidegate/worker", "net", Path("/nowhere"), "t")
    assert create(dict(probe_body(plan)), "stack.gpu-probe") is None


def broken(path: str, value) -> dict:
    """Return a worker's request with one change."""
    request = copy.deepcopy(made())
    at = request
    *folders, last = path.split("/")
    for folder in folders:
        at = at[folder]
    at[last] = value
    return request


OUT_OF_THE_BOX = {
    "HostConfig/Binds": ["/:/host"],
    "HostConfig/Privileged": True,
    "HostConfig/PidMode": "host",
    "HostConfig/IpcMode": "host",
    "HostConfig/UsernsMode": "host",
    "HostConfig/CapAdd": ["SYS_ADMIN"],
    "HostConfig/CapDrop": [],
    "HostConfig/SecurityOpt": ["seccomp=unconfined"],
    "HostConfig/Devices": [{"PathOnHost": "/dev/sda"}],
    "HostConfig/VolumesFrom": ["postgres"],
    "HostConfig/NetworkMode": "host",
    "HostConfig/PortBindings": {"22/tcp": [{"HostPort": "22"}]},
    "HostConfig/CgroupParent": "/",
    "HostConfig/Runtime": "other",
    "HostConfig/RestartPolicy": {"Name": "always"},
    "HostConfig/LogConfig": {"Type": "syslog", "Config": {}},
    "HostConfig/DeviceRequests": [{"Driver": "cdi", "DeviceIDs": ["vendor.com/disk=0"]}],
    "HostConfig/Mounts": [{"Type": "bind", "Source": "/", "Target": "/host"}],
    # The engine reads keys in any case, and the last one counts.
    "HostConfig/capdrop": [],
    "HostConfig/privileged": False,
    "hostconfig": {},
    "HostConfig/RestartPolicy/name": "always",
    "HostConfig/LogConfig/type": "syslog",
    "Image": "alpine",
    "User": "root",
    "User ": "0:0",
    "Volumes": {"/x": {}},
    "NetworkingConfig": {"EndpointsConfig": {"database": {}}},
    "Labels": {"tidegate.stack": "another"},
}


@pytest.mark.parametrize(("path", "value"), OUT_OF_THE_BOX.items())
def test_no_way_out_of_the_box(path, value):
    assert create(broken(path, value)) is not None


def test_a_worker_is_root_only_with_what_its_model_needs():
    """It can become the model's user, end its processes and read its files, but it cannot mount anything."""
    stated = made()
    assert stated["User"] == "0:0"
    assert stated["HostConfig"]["CapDrop"] == ["ALL"]
    assert stated["HostConfig"]["CapAdd"] == ["CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "SETGID", "SETUID"]
    assert create(broken("HostConfig/CapAdd", ["SETUID"])) is None
    for more in ("SYS_ADMIN", "ALL", "CAP_SYS_PTRACE", "setuid"):
        assert create(broken("HostConfig/CapAdd", ["SETUID", more])) is not None
    for user in ("10001:0", "0", "root", "0:0 "):
        assert create(broken("User", user)) is not None


def test_without_a_sandbox_a_worker_is_its_images_user():
    stated = made(model_users=False)
    assert "User" not in stated
    assert stated["HostConfig"]["CapAdd"] == []
    assert create(stated) is None
    assert stated["Labels"]["tidegate.defaults"] != made()["Labels"]["tidegate.defaults"]


def test_a_named_volume_is_one_of_ours_and_nothing_more():
    mount = {"Type": "volume", "Source": "stack_cache", "Target": "/c"}
    assert create(broken("HostConfig/Mounts", [mount])) is None
    assert create(broken("HostConfig/Mounts", [mount | {"Source": "stack_postgres"}])) is not None
    driver = {"VolumeOptions": {"DriverConfig": {"Options": {"type": "none", "o": "bind", "device": "/"}}}}
    assert create(broken("HostConfig/Mounts", [mount | driver])) is not None


@pytest.mark.parametrize(
    "name", ["stack-registry-1", "other.m-v1-0-1", "stack.", "", "stack.a/b", "stack.a b"]
)
def test_names_are_of_the_stack(name):
    assert create(made(), name) is not None
    assert ask("DELETE", f"/v1.41/containers/{name}") is not None


@pytest.mark.parametrize(
    ("method", "path", "query"),
    [
        ("GET", "/version", {}),
        ("GET", "/v1.41/info", {}),
        ("GET", "/v1.41/containers/json", {"filters": '{"label": ["tidegate.stack=stack", "x"]}'}),
        ("GET", "/v1.41/containers/stack.m-v1-0-1/json", {}),
        ("GET", "/v1.41/containers/stack.m-v1-0-1/logs", {"tail": "20"}),
        ("PUT", "/v1.41/containers/stack.m-v1-0-1/archive", {"path": "/var/lib/tidegate"}),
        ("POST", "/v1.41/containers/stack.m-v1-0-1/start", {}),
        ("POST", "/v1.41/containers/stack.m-v1-0-1/kill", {"signal": "SIGTERM"}),
        ("DELETE", "/v1.41/containers/stack.m-v1-0-1", {"force": "1"}),
        ("GET", "/v1.41/images/tidegate/worker/json", {}),
        ("GET", "/v1.41/images/ours/special:1/json", {}),
        ("POST", "/v1.41/images/create", {"fromImage": "tidegate/worker", "tag": "latest"}),
        ("POST", "/v1.41/images/create", {"fromImage": "ours/special", "tag": "1"}),
    ],
)
def test_the_other_calls_of_the_launcher(method, path, query):
    assert ask(method, path, query) is None


@pytest.mark.parametrize(
    ("method", "path", "query"),
    [
        ("GET", "/v1.41/containers/json", {}),
        ("GET", "/v1.41/containers/json", {"filters": '{"label": ["tidegate.stack=other"]}'}),
        ("GET", "/v1.41/containers/json", {"filters": "[]"}),
        ("POST", "/v1.41/containers/stack.m-v1-0-1/exec", {}),
        ("POST", "/v1.41/containers/stack.m-v1-0-1/update", {}),
        ("GET", "/v1.41/containers/stack.m-v1-0-1/archive", {"path": "/var/lib/tidegate"}),
        ("PUT", "/v1.41/containers/stack.m-v1-0-1/archive", {"path": "/"}),
        ("GET", "/v1.41/containers/other/../stack.m-v1-0-1/json", {}),
        ("GET", "/v1.41/images/ours/../alpine/json", {}),
        ("POST", "/v1.41/images/create", {"fromImage": "alpine", "tag": "3"}),
        ("POST", "/v1.41/images/create", {"fromSrc": "-", "fromImage": "ours/x"}),
        ("DELETE", "/v1.41/images/tidegate/worker", {}),
        ("POST", "/v1.41/info", {}),
        ("POST", "/v1.41/volumes/create", {}),
        ("POST", "/v1.41/networks/net/connect", {}),
        ("POST", "/v1.41/build", {}),
        ("GET", "/v1.41/secrets", {}),
        ("POST", "/v1.41/plugins/pull", {}),
    ],
)
def test_calls_that_workers_do_not_need(method, path, query):
    assert ask(method, path, query) is not None


def test_what_is_not_json_is_refused():
    assert refusal("POST", "/containers/create", {"name": ["stack.a-0-1"]}, b"\xff", BOUNDS) is not None
    assert refusal("POST", "/containers/create", {"name": ["stack.a-0-1"]}, b"[]", BOUNDS) is not None


def test_a_key_that_is_said_twice_is_refused():
    """The engine merges both, so fields of the first would be used without a check."""
    sound = json.dumps(made())
    name = {"name": ["stack.m-v1-0-1"]}
    assert refusal("POST", "/containers/create", name, sound.encode(), BOUNDS) is None
    hidden = '{"HostConfig": {"Privileged": true, "Binds": ["/:/host"]}, ' + sound[1:]
    assert "each key once" in (refusal("POST", "/containers/create", name, hidden.encode(), BOUNDS) or "")
    deeper = sound.replace('"LogConfig": {', '"LogConfig": {"Type": "syslog", ')
    assert deeper != sound
    assert refusal("POST", "/containers/create", name, deeper.encode(), BOUNDS) is not None
    labels = '{"label": ["tidegate.stack=other"], "label": ["tidegate.stack=stack"]}'
    assert ask("GET", "/v1.41/containers/json", {"filters": labels}) is not None


def test_what_the_engine_could_read_otherwise_is_refused():
    gpu = {"Driver": "nvidia", "Capabilities": [["gpu"]]}
    assert create(broken("HostConfig/DeviceRequests", [gpu])) is None
    assert create(broken("HostConfig/DeviceRequests", [gpu | {"driver": "cdi"}])) is not None
    twice = {"name": ["stack.m-v1-0-1", "registry"]}
    assert refusal("POST", "/containers/create", twice, json.dumps(made()).encode(), BOUNDS) is not None
    pull = {"fromImage": "ours/x", "tag": "1"}
    assert ask("POST", "/images/create", pull) is None
    assert ask("POST", "/images/create", pull, b"fromImage=alpine") is not None
    assert ask("POST", "/images/create", {"fromImage": "ours/x;fromImage=alpine"}) is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2023-11-14T22:13:20.250000123Z", 1_700_000_000.25),
        ("2023-11-14T23:13:20.25+01:00", 1_700_000_000.25),
        ("0001-01-01T00:00:00Z", None),
        ("", None),
    ],
)
def test_the_end_of_a_container(text, expected):
    """The engine writes the year 1 for a container that has not ended."""
    assert finished_at({"FinishedAt": text}) == expected
