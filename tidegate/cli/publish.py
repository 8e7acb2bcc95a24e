"""Publish a file as a served model: upload, register, deploy, wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tidegate.cli import precheck
from tidegate.cli.api import REGISTER_TIMEOUT_S, Control, Doc, part
from tidegate.cli.deploy_request import DeployRequest
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import parsed
from tidegate.cli.package import Package, packed
from tidegate.cli.progress import Steps
from tidegate.cli.uploading import upload
from tidegate.cli.verification import wait_verified
from tidegate.kernel.errors import (
    BadRequest,
    Conflict,
    DeadlinePassed,
    ModelFailed,
    NotFound,
    TidegateError,
    Unavailable,
)

POLL_S = 0.5
# A status can be older than the deploy. So a failure counts only in two cases: it is newer than the deploy,
# or the autoscaler still reports it this many seconds after the deploy.
STALE_S = 3.0
HOPELESS = {"LoadFailed", "StartTimeout"}


def publish(control: Control, request: DeployRequest, steps: Steps) -> Doc:
    """Check, upload and register a file, wait for the verification, and deploy the version.

    Return the registry's ``{version, deployment, endpoint}``.
    """
    version = registered(control, request, steps)
    if not request.options.get("unverified"):
        version = wait_verified(control, version, request.timeout_s, steps)
    return place(control, version, request.options, steps)


def registered(control: Control, request: DeployRequest, steps: Steps) -> Doc:
    """Check, upload and register a file. Return the registry's Version."""
    precheck.check_here(request)
    bundle = read_bundle(request.signed) if request.signed is not None else None
    card = None if request.card is None else read_text(request.card)
    with packed(request.path, request.adapters) as package:
        warnings = precheck.check_there(control, package, request, _registration(package, request))
        upload(control, package, steps)
        if bundle is not None:
            stored = control.registry.post(
                f"/v1/artifacts/{package.sha256}/signatures", bundle, REGISTER_TIMEOUT_S
            )
            steps.change("signature", "done", f"by the key {stored['key'][:12]}")
        version = register(control, package, request)
    precheck.warn([*warnings, *version.get("warnings", ())])
    steps.change("register", "done", f"{request.name} version {version['number']} ({version['format']})")
    if card is not None:
        address = f"/v1/models/{part(version['model'])}/versions/{version['number']}/card"
        control.registry.put(address, {"text": card})
    if request.baseline is not None:
        set_baseline(control, version, request.baseline, steps)
    return version


def set_baseline(control: Control, version: Doc, path: Path, steps: Steps) -> None:
    """Set the baseline of a version from a file of training data. Send only the data's profile.

    Raise UsageError for data that cannot be used.
    """
    from tidegate.cli.training_data import baseline_of

    document = baseline_of(path, version["signature"])
    address = f"/v1/models/{part(version['model'])}/versions/{version['number']}/baseline"
    control.registry.put(address, document)
    steps.change("baseline", "done", f"{document['profile']['rows']:,} rows of {path.name}")


def place(control: Control, version: Doc, options: Doc, steps: Steps, *, traffic: bool = True) -> Doc:
    """Deploy a version; return ``{version, deployment, endpoint}``.

    If ``traffic`` is False, only create the Deployment. The endpoint then sends it no requests.
    """
    body: Doc = {
        "model": version["model"],
        "version": version["number"],
        "deployment": options,
        "endpoint": version["model"],
    }
    if not traffic:
        body["traffic"] = False
    placed: Doc = control.registry.post("/v1/deploy", body)
    steps.change("deploy", "done", str(placed["deployment"]["name"]))
    return {"version": version, **placed}


def register(control: Control, package: Package, request: DeployRequest) -> Doc:
    """Register the bytes. Return the new Version, or the existing Version with the same bytes."""
    path = f"/v1/models/{part(request.name)}/versions"
    body = _registration(package, request)
    verification = {"deployment": request.options, "samples": request.samples}
    # A registry of an earlier release refuses the field `verification`, so send it only if it has a value.
    body |= {"verification": verification} if any(verification.values()) else {}
    version: Doc = control.registry.post(path, body, REGISTER_TIMEOUT_S)
    if not _says(version["metadata"], request.metadata):
        # The registry returned an existing version with the same bytes: merge the new metadata into that
        # version.
        said = {"metadata": {**version["metadata"], **request.metadata}}
        version = control.registry.patch(f"{path}/{version['number']}", said)
    return version


def _registration(package: Package, request: DeployRequest) -> Doc:
    body: Doc = {
        "artifact": package.sha256,
        "filename": package.filename,
        "metadata": request.metadata,
        "allow_pickle": request.allow_pickle,
    }
    if request.format or package.format:
        body["format"] = request.format or package.format
    if request.signature:
        body["signature"] = request.signature
    if request.requirements is not None:
        body["requirements"] = request.requirements
    if request.trust:
        body["trust"] = request.trust
    if request.breaking:
        body["breaking"] = True
    return body


def _says(held: Doc, given: Doc) -> bool:
    return all(_is_same(key, held.get(key), value) for key, value in given.items())


def _is_same(key: str, held: Any, given: Any) -> bool:
    if key == "parent" and held is not None:
        # The registry stores `digits@champion` with a number, such as `digits@3`. The alias may point to
        # another version now, so compare only the model.
        model, at, version = str(given).rpartition("@")
        if at and not version.isdigit():
            return bool(str(held).startswith(f"{model}@"))
    return _moment(held) == _moment(given) if key == "trained_at" else bool(held == given)


def _moment(text: Any) -> Any:
    # Compare times instead of texts, because the same time can be written in several ways.
    return parsed(text) if isinstance(text, str) else text


@dataclass(frozen=True, slots=True)
class Look:
    """A deployment's state, and the reason in words."""

    state: Literal["waiting", "starting", "ready", "failed"]
    text: str


def judge(revision: int, status: Doc | None, endpoint: Doc, fresh: Callable[[float], bool]) -> Look:
    """Return the state of a deployment. Ignore a status of an earlier ``revision``.

    ``fresh`` returns True if a failure at the given time counts for this deploy.
    """
    if status is None or (status.get("revision") or revision) < revision:
        return Look("waiting", "the autoscaler has not seen the deployment yet")
    conditions = {condition["type"]: condition for condition in status["conditions"]}
    loaded, ready = conditions.get("Loaded"), conditions.get("Ready")
    failing = loaded is not None and not loaded["ok"]
    if loaded is not None and failing and loaded["reason"] in HOPELESS and fresh(loaded["at"]):
        return Look("failed", loaded["message"])
    asleep = ready is not None and ready["ok"] and ready["reason"] in {"Asleep", "Paused"}
    placeable = conditions.get("Placeable")
    if (
        placeable is not None
        and not placeable["ok"]
        and not status["ready"]
        and (placeable["reason"] == "HostFull" or not asleep)
    ):
        return Look("starting", placeable["message"])
    if asleep and endpoint["previous"] and ready is not None and ready["reason"] == "Asleep":
        # A deploy always starts a replica, so this status is older than the deploy.
        return Look("starting", "the Deployment was asleep; it gets traffic when a replica is ready")
    if asleep:
        return Look("ready", "asleep; the first request starts it")
    if not status["ready"]:
        trouble = loaded["message"] if loaded is not None and failing else ""
        return Look("starting", trouble or (ready or {}).get("message") or "no replica yet")
    if endpoint["previous"]:
        return Look("starting", "a replica is ready; traffic moves to it now")
    if (current := conditions.get("Current")) is not None and not current["ok"]:
        # The options of this version have changed, so its replicas are replaced one by one.
        return Look("starting", (loaded["message"] if loaded and failing else "") or current["message"])
    return Look("ready", f"{status['ready']} ready")


def wait_serving(control: Control, placed: Doc, timeout_s: float, steps: Steps) -> Doc:
    """Wait until the endpoint serves the deployment. Return the deployment's status.

    Raise ModelFailed if the model does not load, DeadlinePassed after ``timeout_s`` seconds, and Conflict if
    another deploy has replaced the endpoint's targets.
    """
    path, endpoint = f"/v1/endpoints/{part(placed['endpoint']['name'])}", placed["endpoint"]["name"]

    def confirmed(look: Look) -> Look:
        if look.state == "ready" and not answers(control, endpoint):
            return Look("starting", f"the gateway does not accept calls for {endpoint} yet")
        return look

    def ours() -> Doc:
        found: Doc = control.registry.get(path)
        _check_still_ours(placed["deployment"]["name"], found)
        return found

    return _wait(control, placed, ours, confirmed, timeout_s, steps)


def wait_ready(control: Control, placed: Doc, timeout_s: float, steps: Steps) -> Doc:
    """Wait until a Deployment without traffic is ready. Return the Deployment's status.

    Raise ModelFailed if the model does not load, and DeadlinePassed after ``timeout_s`` seconds.
    """
    return _wait(control, placed, lambda: {"previous": []}, lambda look: look, timeout_s, steps)


def _wait(
    control: Control,
    placed: Doc,
    endpoint: Callable[[], Doc],
    confirmed: Callable[[Look], Look],
    timeout_s: float,
    steps: Steps,
) -> Doc:
    wanted: Doc = placed["deployment"]
    deployment = wanted["name"]
    began, wall = time.monotonic(), time.time()

    def fresh(at: float) -> bool:
        return at >= wall or time.monotonic() - began > STALE_S

    while True:
        status = status_of(control, deployment)
        look = confirmed(judge(wanted.get("revision", 0), status, endpoint(), fresh))
        steps.change(deployment, look.state, look.text)
        if look.state == "failed":
            raise ModelFailed(f"{deployment} did not load: {look.text}")
        if look.state == "ready" and status is not None:
            return status
        if time.monotonic() - began > timeout_s:
            raise DeadlinePassed(
                f"{deployment} is not ready after {timeout_s:g} s: {look.text}. "
                f"See: tidegate why {deployment}"
            )
        time.sleep(POLL_S)


def _check_still_ours(deployment: str, endpoint: Doc) -> None:
    """Raise Conflict if the endpoint no longer sends traffic to the deployment."""
    targets = [target["deployment"] for target in endpoint["targets"]]
    if deployment in targets:
        return
    raise Conflict(
        f"{deployment} is registered but gets no traffic, because another deploy has pointed endpoint "
        f"{endpoint['name']} to {', '.join(targets)}. To serve {deployment}, deploy it again."
    )


def status_of(control: Control, deployment: str) -> Doc | None:
    """Return the autoscaler's status of a deployment; None if the autoscaler does not know it yet."""
    try:
        status: Doc = control.autoscaler.get(f"/v1/deployments/{part(deployment)}")
    except NotFound:
        return None
    return status


def answers(control: Control, endpoint: str) -> bool:
    """Return True if the gateway accepts calls for the endpoint."""
    try:
        control.gateway.get(f"/v2/models/{part(endpoint)}/ready")
    except (NotFound, Unavailable) as error:
        if error.reason == "unreachable":
            raise
        return False
    except TidegateError as error:
        if error.reason == "no_routes":
            return False
        raise
    return True


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file. Raise UsageError for a file that cannot be read."""
    return read_text(path).splitlines()


def read_text(path: Path) -> str:
    """Return the content of a text file. Raise UsageError for a file that cannot be read."""
    try:
        return path.read_text()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not a text file.") from None


def read_json(path: Path) -> Any:
    """Return the parsed content of a JSON file.

    Raise UsageError if the file cannot be read, or if it is not JSON.
    """
    import orjson

    try:
        return orjson.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.") from None
    except orjson.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON: {error}.") from None


def read_bundle(path: Path) -> Any:
    """Return the Sigstore bundle in a file.

    Raise UsageError if the file cannot be read, or if the bundle has no readable signature.
    """
    from tidegate.kernel.protocol import model_signature

    bundle = read_json(path)
    try:
        model_signature.read_bundle(bundle)
    except BadRequest as error:
        raise UsageError(f"{path}: {error.message}") from None
    return bundle
