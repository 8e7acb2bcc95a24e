"""Command-line options that say how a model of another server is called, and a check of one of them."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from tidegate.cli.exit_codes import UsageError

PANEL = "Language models"

Upstream = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Serve a model of another server: OpenAI-compatible (https://HOST/v1), or with the Open "
        "Inference Protocol (https://HOST/v2/models/NAME).",
        rich_help_panel=PANEL,
    ),
]
UpstreamModel = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="Name of the model at the upstream; default: --name.", rich_help_panel=PANEL
    ),
]
Credential = Annotated[
    str | None,
    typer.Option(
        metavar="env:NAME|file:PATH",
        help="The upstream's API key: an environment variable, or a file on the worker's host.",
        rich_help_panel=PANEL,
    ),
]
CredentialHeader = Annotated[
    str | None,
    typer.Option(
        metavar="HEADER",
        help="Header that carries the key alone, such as api-key; default: Authorization, with Bearer.",
        rich_help_panel=PANEL,
    ),
]
Region = Annotated[
    str | None,
    typer.Option(
        help="Region in which the upstream processes data; endpoints can forbid regions.",
        rich_help_panel=PANEL,
    ),
]
RequestsPerMinute = Annotated[
    int | None,
    typer.Option(min=1, help="Upstream: most requests of a replica per minute.", rich_help_panel=PANEL),
]
TokensPerMinute = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Upstream: most tokens of a replica per minute, in prompts and answers together.",
        rich_help_panel=PANEL,
    ),
]
UpstreamTimeout = Annotated[
    str | None,
    typer.Option(
        metavar="TIME", help="Longest wait for the upstream's answer to begin.", rich_help_panel=PANEL
    ),
]


def check_header(header: str) -> None:
    """Raise UsageError if a header cannot carry a credential. The text does not repeat ``header``.

    The user may have typed the credential there by mistake.
    """
    from tidegate.kernel.protocol.models import HEADER_PATTERN, OWN_HEADERS

    if not re.fullmatch(HEADER_PATTERN, header) or header.lower() in OWN_HEADERS:
        raise UsageError(
            "--credential-header takes the name of the header from which the upstream reads its key, such as "
            "api-key. Host, Content-Type and other headers that each request has are not possible."
        )
