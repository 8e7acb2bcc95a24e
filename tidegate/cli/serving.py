"""Register and serve a version: with traffic, with traffic after a check, or without traffic."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.cli import output
from tidegate.cli.api import Control, Doc, control, part
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.progress import Steps
from tidegate.kernel.errors import ModelFailed

if TYPE_CHECKING:
    from tidegate.cli.deploy_request import DeployRequest
    from tidegate.cli.precision import Quantised, Wish


@dataclass(frozen=True, slots=True)
class Way:
    """The options for serving a version: traffic, the check before it, and the wait for a ready replica.

    ``check``: a file of samples that the version must answer before it gets traffic. ``only_register``: if
    True, the version is registered and not served.
    """

    timeout_s: float
    wait: bool = True
    traffic: bool = True
    check: Path | None = None
    only_register: bool = False


def publish_and_serve(request: DeployRequest, way: Way, json: bool, wish: Wish | None = None) -> None:
    """Upload and register a file, and serve it (``deploy FILE``).

    ``wish``: the wanted precision and the largest loss to accept. If it is None, the file is served as it is.
    """
    from tidegate.cli.precision import registered_smaller
    from tidegate.cli.publish import registered

    studies: list[Quantised] = []

    def smaller(plane: Control, steps: Steps) -> Doc:
        assert wish is not None
        version, study = registered_smaller(plane, request, wish, steps)
        studies.append(study)
        return version

    if wish is not None:
        _serve(smaller, request.options, way, json, studies)
        return
    _serve(lambda plane, steps: registered(plane, request, steps), request.options, way, json)


def referenced(path: Path | None, version: str | None) -> tuple[Path | None, str | None]:
    """Split a reference such as ``digits@champion`` into name and version.

    Return the arguments unchanged if there is no ``@``, if ``version`` is given, or if ``path`` exists.
    """
    if path is None or version is not None or "@" not in path.name or path.exists():
        return path, version
    name, _, stated = str(path).partition("@")
    return Path(name), stated


def serve_imported(request: DeployRequest, way: Way, json: bool, report: Doc) -> None:
    """Upload, register and serve a file from another system.

    ``report``: fields to add to the JSON that the command prints.
    """
    from tidegate.cli.publish import registered

    _serve(lambda plane, steps: registered(plane, request, steps), request.options, way, json, report=report)


def register_only(request: DeployRequest, json: bool, more: Doc) -> None:
    """Upload and register a file, without serving it.

    ``more``: fields to add to the JSON that the command prints.
    """
    from tidegate.cli.publish import registered

    with Steps().shown() as steps:
        version = registered(control(), request, steps)
    name, number = version["model"], version["number"]
    said = f"{name} version {number} is registered. Serve it: tidegate deploy {name} --version {number}"
    output.show({**more, "version": version}, json, lambda: output.line(said))


def serve_version(name: str, version: str, options: Doc, way: Way, json: bool) -> None:
    """Serve a version that is registered already (``deploy NAME@N``). ``version``: a number or an alias."""
    from tidegate.cli.smoke import samples_of
    from tidegate.cli.verification import again

    path = f"/v1/models/{part(name)}/versions/{part(version)}"

    def version_of(plane: Control, _: Steps) -> Doc:
        found: Doc = plane.registry.get(path)
        state = (found.get("verification") or {}).get("state", "unchecked")
        if way.check is None or options.get("unverified") or state in ("unchecked", "skipped"):
            return found
        return again(plane, found, options, samples_of(way.check))

    _serve(version_of, options, way, json)


def registered_name(path: Path | None, name: str | None, *, said: bool) -> str:
    """Return the model's name for ``deploy --version``.

    ``said``: True if the user gave an option that only a new version can have. In this case raise UsageError.
    Also raise UsageError if the name is missing or unclear.
    """
    if said:
        raise UsageError(
            "A registered version cannot change. With --version, leave out options that describe a version."
        )
    if path is not None and (path.exists() or (name and str(path) != name)):
        raise UsageError("Give either a FILE or --version: `tidegate deploy NAME --version N`.")
    found = name or (str(path) if path is not None else "")
    if not found:
        raise UsageError("--version needs the name of a model: `tidegate deploy NAME --version N`.")
    return found


def still_trying(placed: Doc) -> str:
    """Return the message after a failed load.

    It says that Tidegate retries the load, and names the command that stops the retries.
    """
    endpoint = placed.get("endpoint")
    if not endpoint:
        return f"Tidegate keeps trying. Stop it: tidegate delete {placed['deployment']['name']} --deployment"
    name = endpoint["name"]
    if endpoint.get("previous"):
        return (
            "The earlier version serves. Tidegate keeps trying to load the new version. "
            f"To stop these tries: tidegate rollback {name}"
        )
    return f"Tidegate keeps trying. Stop it: tidegate delete {name}"


def _show_registered(version: Doc, json: bool) -> None:
    named = f"{version['model']}@{version['number']}"
    said = f"{named} is registered, and does not serve. To serve it: tidegate deploy {named}"
    output.show({"version": version}, json, lambda: output.line(said))


def _serve(
    version_of: Callable[[Control, Steps], Doc],
    options: Doc,
    way: Way,
    json: bool,
    studies: Sequence[Quantised] = (),
    report: Doc | None = None,
) -> None:
    from tidegate.cli.publish import place, wait_ready, wait_serving
    from tidegate.cli.smoke import checked, read_samples
    from tidegate.cli.verification import wait_verified

    samples = read_samples(way.check) if way.check else []
    plane, began = control(), time.monotonic()
    with Steps().shown() as steps:
        version = version_of(plane, steps)
        forced, state = options.get("unverified"), (version.get("verification") or {}).get("state")
        if not forced:
            version = wait_verified(plane, version, way.timeout_s, steps)
        if samples and (forced or state in (None, "unchecked", "skipped")):
            checked(plane, version, options, samples, way.timeout_s, steps)
        if way.only_register:
            _show_registered(version, json)
            return
        placed = place(plane, version, options, steps, traffic=way.traffic)
        waiting = wait_serving if way.traffic else wait_ready
        try:
            status = waiting(plane, placed, way.timeout_s, steps) if way.wait else None
        except ModelFailed as error:
            error.message = f"{error.message.rstrip()}\n{still_trying(placed)}"
            raise
    document = {**(report or {}), **placed, "status": status, "seconds": time.monotonic() - began}
    for study in studies:
        document["precision"] = study.document()

    def human() -> None:
        for study in studies:
            study.show()
        if not way.traffic:
            _show_idle(document)
            return
        name = version["model"]
        show(name, document)
        if status is not None and version["format"] == "llm":
            body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hi"}}]}}'
            output.line(f"  tidegate chat {name}")
            url = f"{plane.settings.gateway_url}/v1/chat/completions"
            output.line(f"  curl {url} -H 'Content-Type: application/json' -d '{body}'")
        elif status is not None:
            output.line(f"  tidegate infer {name} --data '{example_data(version)}'")
            output.line(f"  curl {plane.settings.gateway_url}/v2/models/{name}")

    output.show(document, json, human)


def show(name: str, document: Doc) -> None:
    """Print that a version serves, or is starting."""
    number, deployment = document["deployment"]["version"], document["deployment"]["name"]
    if document["status"] is None:
        output.line(f"{name} version {number} is starting as {deployment}. Follow it: tidegate status")
        return
    took = document["seconds"]
    output.line(f"{name} serves version {number} ({deployment}), {took:.1f} s after the command.")


def _show_idle(document: Doc) -> None:
    deployment, endpoint = document["deployment"], document["endpoint"]
    state = "is ready" if document["status"] else "is starting"
    output.line(f"{deployment['model']} version {deployment['version']} {state} as {deployment['name']}.")
    if endpoint is None:
        output.line(
            f"It gets no traffic. To serve it: tidegate deploy {deployment['model']} --version "
            f"{deployment['version']}"
        )
        return
    others = " ".join(f"{each['deployment']}=90" for each in endpoint["targets"][:1])
    output.line(
        f"It gets no traffic yet. To share the traffic: tidegate split {endpoint['name']} {others} "
        f"{deployment['name']}=10"
    )


def example_data(version: Doc) -> str:
    """Return an example of ``--data`` with the names of this version's inputs and ``...`` as values."""
    inputs = (version.get("signature") or {}).get("inputs") or []
    return "{" + ", ".join(f'"{spec["name"]}": ...' for spec in inputs) + "}" if inputs else "{...}"
