"""The base class of handlers."""

import importlib.util
import sys
from pathlib import Path

import torch
from ts.utils.util import load_label_mapping


class BaseHandler:
    """The base of all handlers. It loads the model, and runs preprocess, inference and postprocess."""

    def __init__(self):
        self.model = self.mapping = self.device = self.context = self.manifest = None
        self.initialized = False
        self.explain = False
        self.target = 0

    def initialize(self, context):
        """Load the model: TorchScript, a torch.export program, or a module class with its state dict."""
        properties = context.system_properties
        gpu = properties.get("gpu_id")
        use_gpu = torch.cuda.is_available() and gpu is not None
        self.map_location = "cuda" if use_gpu else "cpu"
        self.device = torch.device(f"cuda:{gpu}" if use_gpu else "cpu")
        self.manifest = context.manifest
        home, model = Path(properties["model_dir"]), self.manifest["model"]
        path = home / model["serializedFile"] if model.get("serializedFile") else None
        self.model_yaml_config = getattr(context, "model_yaml_config", {})
        if model.get("modelFile"):
            self.model = self._load_pickled_model(str(home), model["modelFile"], path and str(path))
        elif path is not None:
            self.model = self._load_torchscript_model(str(path))
        if self.model is not None and hasattr(self.model, "eval") and path.suffix != ".pt2":
            self.model.eval()
        self.mapping = load_label_mapping(home / "index_to_name.json")
        self.initialized = True

    def _load_torchscript_model(self, model_pt_path):
        if model_pt_path.endswith(".pt2"):
            return torch.export.load(model_pt_path).module()
        return torch.jit.load(model_pt_path, map_location=self.device)

    def _load_pickled_model(self, model_dir, model_file, model_pt_path):
        path = Path(model_dir, model_file)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        kinds = [
            each
            for each in vars(module).values()
            if isinstance(each, type) and each.__module__ == path.stem and issubclass(each, torch.nn.Module)
        ]
        if len(kinds) != 1:
            raise ValueError(f"{model_file} has {len(kinds)} classes of torch modules; expected one")
        model = kinds[0]()
        if model_pt_path:
            model.load_state_dict(torch.load(model_pt_path, map_location=self.device, weights_only=True))
        return model.to(self.device)

    def preprocess(self, data):
        """Return the requests' data as one tensor."""
        rows = [row.get("data") if row.get("data") is not None else row.get("body") for row in data]
        return torch.as_tensor(rows, device=self.device)

    def inference(self, data, *args, **kwargs):
        """Return the model's output."""
        with torch.inference_mode():
            return self.model(data.to(self.device), *args, **kwargs)

    def postprocess(self, data):
        """Return the output as a list with an element for each request."""
        return data.tolist()

    def handle(self, data, context):
        """Return the answers to the requests in ``data``."""
        self.context = context
        return self.postprocess(self.inference(self.preprocess(data)))
