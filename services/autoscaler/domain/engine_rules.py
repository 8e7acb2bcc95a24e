"""Allow only those calls to the container engine that the launcher needs.

A caller that may create any container controls the whole machine: one call can mount the disk. So only a
proxy can reach the engine's socket, and it forwards only what these rules allow. It forwards the creation of
a container only if the container meets these conditions:

- It belongs to this stack by its name and its label.
- It uses the images and the network of workers.
- It mounts only named volumes.
- It gains no privileges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

Doc = dict[str, Any]
Query = Mapping[str, Sequence[str]]

_VERSION = re.compile(r"^/v1\.\d+(?=/)")
_ON_CONTAINER = re.compile(r"/containers/(?P<name>[^/]+)(?P<verb>/(json|logs|start|kill|wait|archive))?")
_ON_IMAGE = re.compile(r"/images/(?P<image>.+)/json")
_CALLS: Mapping[str, set[str | None]] = {
    "GET": {"/json", "/logs"},
    "POST": {"/start", "/kill", "/wait"},
    "PUT": {"/archive"},
    "DELETE": {None},
}
# The only capabilities of a worker that runs as root. They let the worker run its model as another user, and
# end the model.
ROOT = "0:0"
CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "SETGID", "SETUID")
_TOP = {"Image", "Env", "Cmd", "Entrypoint", "Labels", "StopSignal", "StopTimeout", "HostConfig", "User"}
_HOST = {
    "NetworkMode", "RestartPolicy", "Init", "CapDrop", "CapAdd", "SecurityOpt", "PidsLimit", "ShmSize",
    "Memory", "MemorySwap", "NanoCpus", "LogConfig", "Mounts", "DeviceRequests",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StackBounds:
    """The limits for this stack's containers.

    ``images``: patterns of the allowed images, with ``*``. ``home``: the state folder in a container.
    """

    stack: str
    images: tuple[str, ...]
    network: str
    volumes: frozenset[str] = frozenset()
    log_drivers: frozenset[str] = field(default_factory=lambda: frozenset({"json-file"}))
    home: str = "/var/lib/tidegate"


def refusal(method: str, path: str, query: Query, body: bytes, bounds: StackBounds) -> str | None:
    """Return why a call is not allowed; None if it is allowed. ``path``: the decoded URL path."""
    path = _VERSION.sub("", path)
    # Reject repeated parameters and parameters in a form body. The engine could read them differently from
    # this check.
    if any(len(values) > 1 or ";" in values[0] for values in query.values()):
        return "a parameter may occur only once"
    if body and content_type(path) is None:
        return f"{method} {path} may not have a body"
    if path in {"/_ping", "/version", "/info"} and method in {"GET", "HEAD"}:
        return None
    if path == "/containers/json" and method == "GET":
        return _listing(query, bounds)
    if path == "/containers/create" and method == "POST":
        return _creation(query, body, bounds)
    if path == "/images/create" and method == "POST":
        return _pull(query, bounds)
    if method == "GET" and (found := _ON_IMAGE.fullmatch(path)):
        return _image(found["image"], bounds)
    if found := _ON_CONTAINER.fullmatch(path):
        return _container(method, found["name"], found["verb"], query, bounds)
    return f"workers do not need the call {method} {path}"


def content_type(path: str) -> str | None:
    """Return the content type of the body of a call to this path; None if the call has no body."""
    path = _VERSION.sub("", path)
    if path == "/containers/create":
        return "application/json"
    return "application/x-tar" if path.endswith("/archive") else None


def _listing(query: Query, bounds: StackBounds) -> str | None:
    try:
        labels = _read(_one(query, "filters") or "{}").get("label", [])
    except (ValueError, AttributeError):
        return "the filters of a listing must be JSON"
    mine = f"tidegate.stack={bounds.stack}"
    return None if mine in labels else f"only containers with the label {mine} can be listed"


def _container(method: str, name: str, verb: str | None, query: Query, bounds: StackBounds) -> str | None:
    if verb not in _CALLS.get(method, set()):
        return f"workers do not need {method} on a container{verb or ''}"
    if verb == "/archive" and _one(query, "path") != bounds.home:
        return f"files may be written only into {bounds.home}"
    return _name(name, bounds)


def _name(name: str, bounds: StackBounds) -> str | None:
    own = re.fullmatch(re.escape(bounds.stack) + r"\.[A-Za-z0-9._-]+", name)
    return None if own else f"{name!r} is not a container of the stack {bounds.stack}"


def _image(reference: str, bounds: StackBounds) -> str | None:
    if ".." in reference or not any(fnmatchcase(reference, pattern) for pattern in bounds.images):
        return f"{reference!r} is not an allowed image of workers ({', '.join(bounds.images)})"
    return None


def _pull(query: Query, bounds: StackBounds) -> str | None:
    if set(query) - {"fromImage", "tag", "platform"}:
        return "an image may be pulled, but not imported"
    repository, tag = _one(query, "fromImage"), _one(query, "tag")
    joined = f"{repository}@{tag}" if ":" in tag else f"{repository}:{tag}"
    return _image(repository, bounds) if tag in {"", "latest"} else _image(joined, bounds)


def _creation(query: Query, raw: bytes, bounds: StackBounds) -> str | None:
    try:
        body = _read(raw)
        host = body.get("HostConfig") or {}
        strange = _strange(body, _TOP) | _strange(host, _HOST)
    except (ValueError, AttributeError):
        return "the container to create must be JSON, with each key once"
    if strange:
        return f"a worker's container may not set {', '.join(sorted(strange))}"
    if body.get("User", ROOT) != ROOT:
        return f"a worker's container must run as its image's user, or as {ROOT}"
    if (body.get("Labels") or {}).get("tidegate.stack") != bounds.stack:
        return f"a worker's container must have the label tidegate.stack={bounds.stack}"
    return (
        _name(_one(query, "name"), bounds) or _image(str(body.get("Image")), bounds) or _bounded(host, bounds)
    )


def _read(text: str | bytes) -> Any:
    """Return the JSON value. Raise ValueError also for a repeated key.

    The container engine merges a repeated key, such as a second `HostConfig`, into the first one. Python's
    parser keeps only the last one, so the first one would not be checked.
    """
    return json.loads(text, object_pairs_hook=_each_once)


def _each_once(pairs: Sequence[tuple[str, Any]]) -> Doc:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is repeated")
    return found


def _strange(fields: Doc, known: set[str]) -> set[str]:
    # Reject unknown keys even if their values are empty. The engine ignores case: if a body has `CapDrop` and
    # `capdrop`, the engine uses the last one. Here, `capdrop` is an unknown key.
    return set(fields) - known


def _bounded(host: Doc, bounds: StackBounds) -> str | None:
    """Return why a container's `HostConfig` is not allowed; None if it is."""
    if host.get("NetworkMode") not in {bounds.network, "none"}:
        return f"a worker's network must be {bounds.network}"
    if host.get("CapDrop") != ["ALL"] or host.get("SecurityOpt") != ["no-new-privileges"]:
        return "a worker's container must drop all capabilities and gain no privileges"
    if not set(host.get("CapAdd") or ()) <= set(CAPABILITIES):
        return f"a worker's container may have only the capabilities {', '.join(CAPABILITIES)}"
    restart, logs = host.get("RestartPolicy") or {}, host.get("LogConfig") or {}
    if _strange(restart, {"Name", "MaximumRetryCount"}) or restart.get("Name", "no") != "no":
        return "the engine may not restart a worker's container"
    if _strange(logs, {"Type", "Config"}) or logs.get("Type", "json-file") not in bounds.log_drivers:
        return f"a worker's log driver must be one of {', '.join(sorted(bounds.log_drivers))}"
    if not all(_is_own_volume(mount, bounds) for mount in host.get("Mounts") or []):
        return f"a worker may mount only the volumes {', '.join(sorted(bounds.volumes)) or '(none)'}"
    if not all(_is_gpu(request) for request in host.get("DeviceRequests") or []):
        return "a worker may have GPUs, but no other devices"
    return None


def _is_own_volume(mount: Doc, bounds: StackBounds) -> bool:
    # No other keys are allowed, because a volume's driver options can name any folder of the machine.
    return (
        set(mount) == {"Type", "Source", "Target"}
        and mount["Type"] == "volume"
        and mount["Source"] in bounds.volumes
    )


def _is_gpu(request: Doc) -> bool:
    if _strange(request, {"Driver", "Count", "DeviceIDs", "Capabilities"}):
        return False
    words = {word for group in request.get("Capabilities") or [] for word in group}
    return request.get("Driver") == "nvidia" and words <= {"gpu", "utility", "compute"} and "gpu" in words


def _one(query: Query, key: str) -> str:
    return next(iter(query.get(key, ())), "")
