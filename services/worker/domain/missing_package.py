"""A model that fails to load because its Python lacks a package."""

from __future__ import annotations

import re

_MISSING = re.compile(r"No module named '([A-Za-z_][\w.]*)'")
# Packages that are installed under another name than they are imported by.
_PACKAGES = {
    "PIL": "pillow", "bs4": "beautifulsoup4", "cv2": "opencv-python-headless", "dateutil": "python-dateutil",
    "dotenv": "python-dotenv", "skimage": "scikit-image", "sklearn": "scikit-learn", "yaml": "pyyaml",
}  # fmt: skip


def with_remedy(message: str) -> str:
    """Return Triton's message about a failed load; if a package is missing, with the command that adds it."""
    found = _MISSING.search(message)
    if found is None:
        return message
    module = found.group(1).partition(".")[0]
    package = _PACKAGES.get(module, module)
    return (
        f"No module named {found.group(1)!r}: the models' Python does not have it. Write a line `{package}` "
        "into a file and add it: tidegate deploy ... --requirements requirements.txt. If it is a module of "
        f"your own, put it beside model.py and deploy the folder. Triton says: {message.strip()}"
    )
