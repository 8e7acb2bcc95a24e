"""The part of Tidegate that a model's file may import where the whole is not installed."""

from tidegate.model import Tensor, batched

__all__ = ["Tensor", "batched"]


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    raise ImportError(
        f"tidegate.{name} is not in the models' Python, which has only {', '.join(__all__)} of Tidegate: add "
        "a line `tidegate` to the model's requirements"
    )
