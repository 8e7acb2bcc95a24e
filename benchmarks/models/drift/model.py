"""Returns the probabilities of two classes. They depend on the first of 64 features."""

import numpy as np

from tidegate import batched


@batched(max_size=256)
def predict(x: np.ndarray) -> np.ndarray:
    """Return the probabilities of rows of 64 features, FP32[2]."""
    positive = 1 / (1 + np.exp(-2 * x[:, 0]))
    return np.stack([1 - positive, positive], axis=1).astype(np.float32)
