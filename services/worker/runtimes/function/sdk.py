"""Provide the names that a model's file imports from Tidegate, if Tidegate is not installed."""

from tidegate.model import Tensor, batched

__all__ = ["Tensor", "batched"]


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    raise ImportError(
        f"The models' Python does not have tidegate.{name}, but only {', '.join(__all__)}. Add the line "
        "`tidegate` to the model's requirements file."
    )
