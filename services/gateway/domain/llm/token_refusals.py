"""The errors for callers at a token limit, and for requests that are larger than a limit."""

from __future__ import annotations

from collections.abc import Sequence

from services.gateway.domain.llm.token_headers import Left, TokenAccount, openai, rate_limit
from services.gateway.domain.llm.token_window import TokenBalance
from tidegate.kernel.errors import BadRequest, TooMany
from tidegate.kernel.protocol.access import JWT_PREFIX, KEY_PREFIX

_OPTIONS = {"minute": "--tokens-per-minute", "day": "--tokens-per-day"}


def check_fits(accounts: Sequence[TokenAccount], prompt: int, tokens: int) -> None:
    """Raise BadRequest if a request needs more tokens than one of the limits allows.

    ``tokens``: all tokens of the request. ``prompt``: how many of them are in the prompt.
    """
    for account in accounts:
        for most, period in ((account.limit.minute, "minute"), (account.limit.day, "day")):
            if most is None or tokens <= most:
                continue
            shorter = (
                f"lower max_tokens to {most - prompt} or less"
                if prompt < most
                else f"shorten the prompt below {most:,} tokens"
            )
            raise BadRequest(
                f"this request may use about {tokens:,} tokens ({prompt:,} of them in the prompt), but "
                f"{_whose(account)} has a limit of {most:,} tokens per {period}, so it can never run: "
                f"{shorter}, or ask an admin to raise the limit with {_setting(account, period)}",
                reason="request_above_token_limit",
            )


def too_many(account: TokenAccount, balance: TokenBalance, states: Sequence[Left]) -> TooMany:
    """Return the error for a request that exceeds an account's limit.

    ``balance``: the account's state before the request. ``states``: what remains of all limits, for the
    headers.
    """
    period = balance.refused
    if period == "day":
        most, used, wait_ms, reason = account.limit.day, balance.day_used, balance.day_ms, "quota_exhausted"
    else:
        most, used, wait_ms, reason = account.limit.minute, balance.used, balance.wait_ms, "rate_limited"
    headers = [*rate_limit(states), *openai(None, states)]
    return TooMany(
        f"{_whose(account)} has used {used:,} of {most:,} tokens per {period}, and this request does not "
        "fit: send it again after the time in Retry-After",
        reason=f"token_{reason}",
        retry_after_s=wait_ms / 1e3,
        headers={name.decode(): value.decode() for name, value in headers},
    )


def _setting(account: TokenAccount, period: str) -> str:
    if account.principal.startswith(JWT_PREFIX):
        return "the setting TIDEGATE_JWT_LIMITS"
    return f"`tidegate keys change {account.principal} {_OPTIONS[period]} N`"


def _whose(account: TokenAccount) -> str:
    if account.principal.startswith(JWT_PREFIX):
        return f"the caller {account.principal}"
    key = f"the key {KEY_PREFIX}{account.principal}"
    return f"{key} at {account.endpoint!r}" if account.endpoint else key
