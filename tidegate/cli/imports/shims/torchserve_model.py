"""Run the handler of a TorchServe archive.

`tidegate import torchserve` wrote this file. The archive is in the folder `artifact`. The folder `torchserve`
has the modules of TorchServe's package `ts` that handlers import. The model's inputs and outputs are HTTP
bodies with their content types.
"""

import importlib
import json
import sys
from pathlib import Path

FACTS = json.loads((Path(__file__).parent / "tidegate_import.json").read_text())


class Model:
    """The handler of the archive."""

    def load(self, folder, device):
        """Import the handler and initialize it."""
        home = folder / "artifact"
        # Add the replacement of the package `ts` at the end of Python's search path. If the model's
        # requirements contain the complete TorchServe, Python finds the complete package first.
        sys.path.append(str(folder / "torchserve"))
        sys.path.insert(0, str(home))
        from ts.context import Context

        gpu = int(device.partition(":")[2] or 0) if device.startswith("cuda") else None
        properties = {
            "model_dir": str(home), "gpu_id": gpu, "batch_size": 1, "server_name": "Tidegate",
            "server_version": "0", "limit_max_image_pixels": True,
        }  # fmt: skip
        self._context = Context(FACTS["name"], str(home), FACTS["manifest"], 1, gpu, None)
        self._context.system_properties = properties
        self._handle = entry_point(FACTS["module"], FACTS["function"], self._context)

    def predict(
        self, body: bytes, content_type: str = "application/octet-stream"
    ) -> {"body": bytes, "content_type": str}:
        """Return the body and the content type of the answer."""
        self._context.request_ids = {0: "0"}
        results = self._handle([{"body": received(body, content_type)}], self._context)
        if results is None or len(results) != 1:
            raise ValueError(
                f"the handler got one request and returned {results!r:.80}; expected a list with one result"
            )
        (found,) = results
        if isinstance(found, (bytes, bytearray)):
            return {"body": bytes(found), "content_type": "application/octet-stream"}
        if isinstance(found, str):
            return {"body": found.encode(), "content_type": "text/plain"}
        return {"body": json.dumps(found, default=_plain).encode(), "content_type": "application/json"}


def entry_point(module_name, function, context):
    """Initialize the handler, and return its function that answers requests.

    ``function``: the name of a function or a class of the module, or an empty text.

    - A function: it is returned, and nothing is initialized.
    - A class: the handler is an object of this class.
    - An empty text: the handler is the module itself, if it has a function ``handle``. Otherwise the handler
      is an object of the module's only class with a method ``handle``.
    """
    module = importlib.import_module(module_name)
    if function and not isinstance(getattr(module, function, None), type):
        return getattr(module, function)
    if hasattr(module, "handle") and not function:
        if hasattr(module, "initialize"):
            module.initialize(context)
        return module.handle
    own = [
        each
        for each in vars(module).values()
        if isinstance(each, type) and each.__module__ == module.__name__ and hasattr(each, "handle")
    ]
    kinds = [getattr(module, function)] if function else own
    if len(kinds) != 1:
        raise ValueError(f"{module_name} has {len(kinds)} classes with `handle`; expected one")
    handler = kinds[0]()
    handler.context = context
    handler.initialize(context)
    return handler.handle


def received(body, content_type):
    """Return a body as TorchServe passes it to handlers: parsed JSON, or bytes."""
    if content_type.partition(";")[0].strip() == "application/json":
        return json.loads(body)
    return bytearray(body)


def _plain(value):
    return value.tolist() if hasattr(value, "tolist") else str(value)
