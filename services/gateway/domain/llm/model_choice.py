"""Choose the language model of a request that may name none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tidegate.kernel.errors import BadRequest, NotFound


def chosen(named: Iterable[str | None], models: Sequence[str], how: str) -> str:
    """Return the first name that is given, or else the only language model.

    ``models``: those that the caller may use. ``how``: the way to name a model, for the message. Raises
    NotFound if there is no model, BadRequest if there are several.
    """
    for name in named:
        if name:
            return name
    endpoints = [model for model in models if ":" not in model]
    if not endpoints:
        raise NotFound(
            "there is no language model that you may use: deploy one with "
            "`tidegate deploy MODEL.gguf --name NAME`, or use a key that may use one"
        )
    if len(endpoints) > 1:
        raise BadRequest(
            f"the request names no model, and there are several: {', '.join(endpoints)}; name one with {how}",
            reason="model_not_named",
        )
    return endpoints[0]
