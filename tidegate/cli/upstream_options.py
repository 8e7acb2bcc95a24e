"""Command-line options that say how a model of another server is called."""

from __future__ import annotations

from typing import Annotated

import typer

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
