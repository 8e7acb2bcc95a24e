"""``tidegate keys``: API keys."""

from __future__ import annotations

from typing import Annotated

import typer

from tidegate.cli import output
from tidegate.cli.api import Doc, Service, control
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json, seconds
from tidegate.kernel.errors import NotFound

keys = typer.Typer(
    name="keys",
    help="API keys: the endpoints that each caller may use, and the limits.",
    invoke_without_command=True,
)

_LIMITS = (
    "rate", "burst", "concurrency", "day", "month", "budget_per_day", "budget_per_month", "max_versions",
    "max_artifact_bytes",
)  # fmt: skip
_USUAL_WEIGHT = 1
_TOKENS = ("tokens_per_minute", "tokens_per_day")
_LIFTED = (
    *(name.replace("_", "-") for name in (*_LIMITS, *_TOKENS)),
    "endpoint-tokens",
    "endpoints",
    "owner",
    "expires",
)
Which = Annotated[
    str, typer.Argument(metavar="KEY", help=("The id of a key, or its name if no other key has this name."))
]
Scopes = Annotated[
    list[str] | None,
    typer.Option("--scope", metavar="SCOPE", help="A scope: infer, publish, operate or admin; repeatable."),
]
Endpoints = Annotated[
    list[str] | None,
    typer.Option(
        "--endpoint", metavar="NAME", help="An endpoint that the key may use; repeatable; default: all."
    ),
]
Owner = Annotated[
    str | None,
    typer.Option(
        metavar="WHO", help="The person who holds the key. Approvals by keys of one owner count once."
    ),
]
Expires = Annotated[str | None, typer.Option(metavar="TIME", help="Expires after this time, such as 90d.")]
Rate = Annotated[float | None, typer.Option(metavar="N", help="Requests per second.")]
Burst = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Largest burst, in requests; default: as many as the rate allows in a second."
    ),
]
Concurrency = Annotated[int | None, typer.Option(metavar="N", help="Maximum requests in flight.")]
Day = Annotated[int | None, typer.Option("--day", metavar="N", help="Maximum requests in a day (UTC).")]
Month = Annotated[int | None, typer.Option("--month", metavar="N", help="Maximum requests in a month (UTC).")]
BudgetPerDay = Annotated[
    float | None,
    typer.Option("--budget-per-day", metavar="MONEY", help="Maximum cost of the key's requests in a day."),
]
BudgetPerMonth = Annotated[
    float | None,
    typer.Option(
        "--budget-per-month", metavar="MONEY", help=("Maximum cost of the key's requests in a month.")
    ),
]
MaxVersions = Annotated[
    int | None,
    typer.Option(
        "--max-versions",
        metavar="N",
        min=0,
        help=("Largest number of versions that the key may register and keep."),
    ),
]
MaxArtifactBytes = Annotated[
    int | None,
    typer.Option(
        "--max-artifact-bytes",
        metavar="N",
        min=0,
        help=("Largest sum of the bytes of all versions that the key has registered."),
    ),
]
Weight = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Weight at a busy Deployment, relative to other keys: 1 to 100. Default: 1."
    ),
]
PerMinute = Annotated[
    list[str] | None,
    typer.Option(
        "--tokens-per-minute",
        metavar="[ENDPOINT=]N",
        help="Maximum tokens of language models in any 60 seconds, at all endpoints or at one; repeatable.",
    ),
]
PerDay = Annotated[
    list[str] | None,
    typer.Option(
        "--tokens-per-day",
        metavar="[ENDPOINT=]N",
        help="Maximum tokens of language models in a day (UTC), at all endpoints or at one; repeatable.",
    ),
]


@keys.callback()
def listed(
    context: typer.Context,
    all: Annotated[bool, typer.Option("--all", help="Also list revoked and expired keys.")] = False,
    json: Json = False,
) -> None:
    """List the keys. The commands below create and change them."""
    if context.invoked_subcommand is not None:
        return

    items = control().registry.items("/v1/keys", all=str(all).lower())
    rows = [
        (
            item["prefix"],
            item["name"],
            item["scopes"],
            item["endpoints"] or "all",
            _shown_limits(item),
            item["state"],
            output.moment(item["expires_at"]),
            item.get("owner") or "-",
        )
        for item in items
    ]
    columns = ("key", "name", "scopes", "endpoints", "limits", "state", "expires", "owner")
    empty = "No key exists. Create one: tidegate keys create NAME"
    output.show({"items": items}, json, lambda: output.table(rows, columns, empty))


@keys.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A note on the purpose of the key.")],
    scope: Scopes = None,
    owner: Owner = None,
    endpoint: Endpoints = None,
    expires: Expires = None,
    rate: Rate = None,
    burst: Burst = None,
    concurrency: Concurrency = None,
    day: Day = None,
    month: Month = None,
    tokens_per_minute: PerMinute = None,
    tokens_per_day: PerDay = None,
    budget_per_day: BudgetPerDay = None,
    budget_per_month: BudgetPerMonth = None,
    max_versions: MaxVersions = None,
    max_artifact_bytes: MaxArtifactBytes = None,
    weight: Weight = None,
    json: Json = False,
) -> None:
    """Create a key. It is shown only once, because the stack stores only its digest.

    Example: tidegate keys create robot --scope infer --endpoint digits --rate 50
    """
    money = (budget_per_day, budget_per_month)
    limits = (rate, burst, concurrency, day, month, *money, max_versions, max_artifact_bytes)
    body = _fields(name, owner, scope, endpoint, expires, weight, limits)
    body |= _token_fields(tokens_per_minute, tokens_per_day)

    _show_key(control().registry.post("/v1/keys", body), json)


@keys.command("update", hidden=True)
@keys.command()
def change(
    key: Which,
    name: Annotated[str | None, typer.Option(metavar="NAME")] = None,
    scope: Scopes = None,
    owner: Owner = None,
    endpoint: Endpoints = None,
    expires: Expires = None,
    rate: Rate = None,
    burst: Burst = None,
    concurrency: Concurrency = None,
    day: Day = None,
    month: Month = None,
    tokens_per_minute: PerMinute = None,
    tokens_per_day: PerDay = None,
    budget_per_day: BudgetPerDay = None,
    budget_per_month: BudgetPerMonth = None,
    max_versions: MaxVersions = None,
    max_artifact_bytes: MaxArtifactBytes = None,
    weight: Weight = None,
    lift: Annotated[
        list[str] | None,
        typer.Option(metavar="WHAT", help=f"Remove a limit: {', '.join(_LIFTED[:-1])} or {_LIFTED[-1]}."),
    ] = None,
    json: Json = False,
) -> None:
    """Change a key's scopes, endpoints, limits or expiry. Its secret stays the same."""
    money = (budget_per_day, budget_per_month)
    limits = (rate, burst, concurrency, day, month, *money, max_versions, max_artifact_bytes)
    body = _fields(name, owner, scope, endpoint, expires, weight, limits)
    body |= _token_fields(tokens_per_minute, tokens_per_day)
    for what in lift or ():
        if what not in _LIFTED:
            raise UsageError(f"--lift {what} is not a limit. The limits are: {', '.join(_LIFTED)}.")
        body["expires_at" if what == "expires" else what.replace("-", "_")] = None
    if not body:
        raise UsageError("Name at least one change, such as --rate 50.")

    registry = control().registry
    changed = registry.patch(f"/v1/keys/{_id_of(registry, key)}", body)
    output.show(changed, json, lambda: output.line(f"{changed['prefix']} ({changed['name']}) is changed"))


@keys.command()
def rotate(
    key: Which,
    grace: Annotated[
        str, typer.Option(metavar="TIME", help="Time for which the old secret stays valid.")
    ] = "0s",
    json: Json = False,
) -> None:
    """Replace a key's secret by a new one. The key's name, limits and usage stay."""
    registry = control().registry
    body = {"grace_s": seconds(grace)}
    _show_key(registry.post(f"/v1/keys/{_id_of(registry, key)}/rotate", body), json)


@keys.command()
def revoke(
    key: Which,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    json: Json = False,
) -> None:
    """Revoke a key. This cannot be undone."""
    from tidegate.cli.manage import confirm

    registry = control().registry
    id_ = _id_of(registry, key)
    if not yes:
        confirm(f"This revokes {key}")
    gone = registry.delete(f"/v1/keys/{id_}")
    output.show(gone, json, lambda: output.line(f"{gone['prefix']} ({gone['name']}) is revoked"))


def _fields(
    name: str | None,
    owner: str | None,
    scopes: list[str] | None,
    endpoints: list[str] | None,
    expires: str | None,
    weight: int | None,
    limits: tuple[float | None, ...],
) -> Doc:
    """Return a key's fields for the registry, without fields that are None.

    ``limits``: the values of the fields in ``_LIMITS``, in the same order.
    """
    fields = {
        "name": name,
        "owner": owner,
        "scopes": scopes,
        "endpoints": endpoints,
        "ttl_s": None if expires is None else seconds(expires),
        "weight": weight,
        **dict(zip(_LIMITS, limits, strict=True)),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _token_fields(per_minute: list[str] | None, per_day: list[str] | None) -> Doc:
    """Return the token limits in the registry's format. Raise UsageError for a wrong value."""
    fields: Doc = {}
    for field, values in zip(_TOKENS, (per_minute, per_day), strict=True):
        for value in values or ():
            endpoint, _, count = value.rpartition("=")
            number = count.replace("_", "").replace(",", "")
            if not number.isdecimal() or ("=" in value and not endpoint):
                option = field.replace("_", "-")
                raise UsageError(
                    f"--{option} {value}: expected a number of tokens, such as 100000, or an endpoint and a "
                    "number, such as chat=100000."
                )
            limits = fields.setdefault("endpoint_tokens", {}).setdefault(endpoint, {}) if endpoint else fields
            limits[field] = int(number)
    return fields


def _shown_limits(key: Doc) -> Doc:
    """Return the limits that a key has, as a cell of the table."""
    shown = {name: key[name] for name in (*_LIMITS, *_TOKENS) if key.get(name) is not None}
    if key.get("weight", _USUAL_WEIGHT) != _USUAL_WEIGHT:
        shown["weight"] = key["weight"]
    for endpoint, limits in (key.get("endpoint_tokens") or {}).items():
        shown |= {f"{name}[{endpoint}]": limits[name] for name in _TOKENS if limits.get(name) is not None}
    return shown


def _id_of(registry: Service, key: str) -> str:
    """Return the id of the key with this id or name.

    Raise NotFound if there is no such key. Raise UsageError if several keys that are not revoked have this
    name.
    """
    items = registry.items("/v1/keys", all="true")
    if any(item["id"] == key.removeprefix("tg_") for item in items):
        return key.removeprefix("tg_")
    named = [item["id"] for item in items if item["name"] == key and item["state"] != "revoked"]
    if not named:
        raise NotFound(f"There is no key {key!r}. List the keys: tidegate keys")
    if len(named) > 1:
        raise UsageError(f"Several keys are called {key!r}. Name one by its id: {', '.join(named)}.")
    return str(named[0])


def _show_key(made: Doc, json: bool) -> None:
    def shown() -> None:
        output.line(made["key"])
        output.say(f"This is the key of {made['name']}. It is not shown again.")

    output.show(made, json, shown)
