"""Read the description of a model from an upstream with the Open Inference Protocol."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tidegate.cli.api import Doc
from tidegate.cli.deploy_request import DeployRequest
from tidegate.cli.exit_codes import UsageError

TIMEOUT_S = 10.0
# The default number of instances in a replica. Each instance sends one request at a time and mostly waits for
# the upstream, so several instances are useful.
INSTANCES = 4
_FIELDS = {
    "credential": "credential",
    "credential_header": "credential_header",
    "region": "region",
    "requests_per_minute": "requests_per_minute",
    "upstream_timeout_s": "timeout_s",
}
BINARY = "binary_tensor_data"


def is_oip(address: str) -> bool:
    """Return True if an address names a model of a server with the Open Inference Protocol."""
    return "/v2/models/" in urlsplit(address).path


def described(address: str, credential: str | None, header: str | None = None) -> tuple[dict[str, Any], bool]:
    """Return the signature of an upstream's model, and True if the server accepts binary tensors.

    ``credential``: where the secret is. Only ``env:NAME`` is read here, because ``file:PATH`` is a file on
    the worker's host. ``header``: the header that carries the secret; None: ``Authorization: Bearer``. Raise
    UsageError if the upstream does not describe its model.
    """
    address = address.rstrip("/")
    kind, _, name = (credential or "").partition(":")
    secret = os.environ.get(name, "").strip() if kind == "env" else ""
    if not secret.isascii() or not secret.isprintable():
        raise UsageError(f"The variable {name} must have one line of printable ASCII text.")
    headers = {} if not secret else {header: secret} if header else {"Authorization": f"Bearer {secret}"}
    try:
        model = _get(address, headers)
        server = _get(address.partition("/v2/models/")[0] + "/v2", headers)
    except (OSError, ValueError) as problem:
        raise UsageError(
            f"{address} does not describe its model ({problem}). Check the address, such as "
            "https://HOST/v2/models/NAME, or name the model's inputs and outputs with --signature FILE.json."
        ) from None
    try:
        most = int(_get(f"{address}/config", headers)["max_batch_size"])
    except (OSError, ValueError, KeyError, TypeError):
        most = 0  # only Triton has the path /config; for other servers, keep the first axis of each shape
    try:
        signature = signature_of(model, most)
    except (KeyError, TypeError) as problem:
        raise UsageError(
            f"{address} describes its model without {problem}. Add --signature FILE.json"
        ) from None
    return signature, BINARY in server.get("extensions", ())


def signature_of(model: dict[str, Any], max_batch: int) -> dict[str, Any]:
    """Build a signature from the metadata of a model. Raise KeyError or TypeError for wrong metadata.

    If ``max_batch`` is not 0, the first axis of each shape is the batch axis. Remove it, because a signature
    has no batch axis.
    """
    first = 1 if max_batch else 0
    tensors = {
        side: [
            {
                "name": each["name"],
                "datatype": each["datatype"],
                "shape": [int(size) for size in each["shape"]][first:],
            }
            for each in model[side]
        ]
        for side in ("inputs", "outputs")
    }
    return {**tensors, "max_batch_size": max_batch}


def oip_request(
    file: Path, name: str, address: str, options: Doc, signature: Doc | None, metadata: Doc
) -> DeployRequest:
    """Return the request that deploys an upstream.

    ``options``: the options of the command, with the upstream's options in ``options["llm"]``. Raise
    UsageError for an option that is only for language models, or if the upstream does not describe its model.
    """
    given = dict(options.pop("llm", None) or {})
    upstream = {field: given.pop(option) for option, field in _FIELDS.items() if option in given}
    for known in ("engine", "slots", "upstream"):
        given.pop(known, None)
    if given:
        raise UsageError(
            f"{', '.join(sorted(given))}: these options are only for a language model. Leave them out, or "
            f"name an address of OpenAI's API, instead of {address}"
        )
    if signature is None:
        signature, upstream["binary"] = described(
            address, upstream.get("credential"), upstream.get("credential_header")
        )
    options.setdefault("instances", INSTANCES)
    options["upstream"] = {**upstream, "address": address}
    return DeployRequest(file, name, "oip", options, signature, metadata=metadata)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A urllib handler that follows no redirect. For a redirect, urllib raises HTTPError."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Return None, so that the redirect is not followed."""


def _get(url: str, headers: dict[str, str]) -> dict[str, Any]:
    request = urllib.request.Request(url, headers=headers)
    # A redirect is not followed, because the credential would go to another address.
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_S) as answer:
        found = json.loads(answer.read())
    if not isinstance(found, dict):
        raise ValueError("the answer is not a JSON object")
    return found
