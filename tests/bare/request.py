"""One inference with the standard library alone: zeros of the shape that the model's metadata tells."""

from __future__ import annotations

import json
import os
import urllib.request
from math import prod
from typing import Any

GATEWAY = os.environ.get("GATEWAY", "http://127.0.0.1:8000")
MODEL = f"{GATEWAY}/v2/models/digits"


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """GET, or POST of a JSON body; the parsed answer."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def main() -> None:
    """Ask, and print the answer."""
    inputs = []
    for tensor in ask(MODEL)["inputs"]:
        shape = [1 if size < 0 else size for size in tensor["shape"]]
        inputs.append(
            {
                "name": tensor["name"],
                "shape": shape,
                "datatype": tensor["datatype"],
                "data": [0] * prod(shape),
            }
        )
    answer = ask(f"{MODEL}/infer", {"inputs": inputs})
    print(json.dumps(answer)[:400])
    assert answer["outputs"], "no outputs"


if __name__ == "__main__":
    main()
