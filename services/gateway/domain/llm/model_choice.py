"""Choose the language model of a request, even if the request does not name one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tidegate.kernel.errors import BadRequest, NotFound


def chosen(named: Iterable[str | None], models: Sequence[str], how: str) -> str:
    """Return the model that a request names, or else the only language model.

    ``named``: the names to try, in order; empty ones are skipped. ``models``: the models that the caller may
    use. ``how``: how a request names a model, for the error message.

    Two errors are possible for a request that names no model. If there is no language model, raise NotFound.
    If there are several, raise BadRequest.
    """
    for name in named:
        if name:
            return name
    endpoints = [model for model in models if ":" not in model]
    if not endpoints:
        raise NotFound(
            "there is no language model that you may use: deploy one with "
            "`tidegate deploy MODEL.gguf --name NAME`, or use a key with access to one"
        )
    if len(endpoints) > 1:
        raise BadRequest(
            f"the request names no model, but there are several: {', '.join(endpoints)}; name one with {how}",
            reason="model_not_named",
        )
    return endpoints[0]
