"""The context of a handler."""


class Context:
    """The context that a handler gets: the manifest, the model's folder and its device."""

    def __init__(self, model_name, model_dir, manifest, batch_size, gpu, mms_version, **more):
        self.model_name, self.manifest = model_name, manifest
        self.system_properties = {"model_dir": model_dir, "gpu_id": gpu, "batch_size": batch_size}
        self.request_ids, self.explain, self.model_yaml_config = (
            {0: "0"},
            False,
            more.get("model_yaml_config", {}),
        )
        self.metrics = Metrics()

    def get_request_id(self, idx=0):
        """Return the id of a request."""
        return self.request_ids.get(idx)

    def get_request_header(self, idx, key):
        """Return None, because headers do not reach the model."""

    def set_response_content_type(self, idx, value):
        """Do nothing, because Tidegate derives the content type from the handler's result."""

    def set_response_header(self, idx, key, value):
        """Do nothing."""

    def set_response_status(self, code=200, phrase="", idx=0):
        """Raise ValueError if ``code`` is the status of an error (400 or more). Otherwise do nothing."""
        if code >= 400:
            raise ValueError(f"the handler answered {code} {phrase}")

    def get_all_request_header(self, idx):
        """Return no headers."""
        return {}


class Metrics:
    """The metrics of a handler. All calls are accepted and ignored."""

    def __getattr__(self, name):
        return lambda *_, **__: Metrics()
