"""The scaling rules of language models, in addition to the rules in ``rules.py``.

The rule *wait* counts requests; one request runs in each slot. The rules here count tokens, because one
request may have a thousand times the tokens of another. The need is the number of replicas that a rule
demands.

*tokens*. Q prompt tokens wait, all slots are busy, and R replicas together read T prompt tokens per second.
So the engines read these Q tokens in Q/T seconds. ``limit`` is the target wait or the time that a start
takes, whichever is longer, because a new replica cannot help before it has started. If ``Tuning.impatient``
is set, ``limit`` is always the target wait. The need is R * (Q/T) / limit.

*kv*. The KV caches of R replicas have room for K tokens. U tokens are in them now, and Q prompt tokens wait.
The need is R * (U + Q) / (u * K), where u is the utilization that the Deployment allows.
"""

from __future__ import annotations

import math

from services.autoscaler.domain.memory import LlmLoad, RuleNeed
from services.autoscaler.domain.tuning import Tuning

TINY = 1e-9


def words(load: LlmLoad) -> str:
    """Return the load as text: "12 requests with 9,600 tokens wait; 4 of 4 slots are busy"."""
    if load.waiting == 1:
        queue = f"1 request with {load.waiting_tokens:,} tokens waits"
    else:
        queue = f"{load.waiting:,} requests with {load.waiting_tokens:,} tokens wait"
    engine = f", {load.engine_waiting:,} more in the engine's own queue" if load.engine_waiting else ""
    return f"{queue}{engine}; {load.running:,} of {load.slots:,} slots are busy"


def llm_needs(load: LlmLoad, tuning: Tuning, ready: int, start_s: float) -> list[RuleNeed]:
    """Return the number of replicas that each rule demands. Skip rules whose inputs are not known.

    ``start_s``: the seconds that the start of a replica takes.
    """
    found = [_tokens(load, tuning, ready, start_s), _kv(load, tuning, ready)]
    return [need for need in found if need is not None]


def _tokens(load: LlmLoad, tuning: Tuning, ready: int, start_s: float) -> RuleNeed | None:
    if not ready or not load.tokens_per_s or not load.waiting_tokens or load.running < load.slots:
        return None
    takes_s = load.waiting_tokens / load.tokens_per_s
    limit_s = max(tuning.wait_ms / 1e3, 0.0 if tuning.impatient else start_s)
    why = f"{words(load)}; at {load.tokens_per_s:,.0f} prompt tokens/s the queue takes {takes_s:.0f} s"
    if takes_s <= limit_s:
        return RuleNeed("tokens", ready, why)
    return RuleNeed("tokens", math.ceil(ready * takes_s / limit_s - TINY), why)


def _kv(load: LlmLoad, tuning: Tuning, ready: int) -> RuleNeed | None:
    if not ready or not load.kv_total:
        return None
    wanted = load.kv_used + load.waiting_tokens
    replicas = math.ceil(ready * wanted / (tuning.utilization * load.kv_total) - TINY)
    why = (
        f"the KV caches hold {load.kv_used:,} of {load.kv_total:,} tokens, and "
        f"{load.waiting_tokens:,} tokens wait; the caches should be at most {tuning.utilization:.0%} full"
    )
    # A full cache alone needs no new replica: each request that ends frees its part of the cache.
    return RuleNeed("kv", replicas if load.waiting else min(replicas, ready), why)
