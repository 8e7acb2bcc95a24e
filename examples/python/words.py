"""A stream: each ``yield`` is a chunk that the caller gets at once."""

import time
from collections.abc import Iterator


def predict(text: str, pause_s: float = 0.0) -> Iterator[str]:
    """Yield the words of the text one by one."""
    for word in text.split():
        time.sleep(pause_s)
        yield word
