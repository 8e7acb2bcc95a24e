"""Make Triton's message about a failed load readable, and add the remedy if one is known."""

from __future__ import annotations

import re

_MISSING = re.compile(r"No module named '([A-Za-z_][\w.]*)'")
# The package of a module, if the package has another name than the module.
_PACKAGES = {
    "PIL": "pillow", "bs4": "beautifulsoup4", "cv2": "opencv-python-headless", "dateutil": "python-dateutil",
    "dotenv": "python-dotenv", "skimage": "scikit-image", "sklearn": "scikit-learn", "yaml": "pyyaml",
    "xgboost": "xgboost-cpu", "tensorflow": "tensorflow-cpu",
}  # fmt: skip
_STACK = re.compile(r"\n\nAt:\n((?:  .*(?:\n|$))+)")
_FRAME = re.compile(r"  (?P<path>.*)\((?P<line>\d+)\): (?P<function>.*)")
_OURS = re.compile(r"<frozen |/tidegate_runtime\.py|/tidegate_rows\.py|/tidegate_values\.py")
# Lines of Triton, and of libraries that look for a GPU. They say nothing about the model, so they are left
# out.
_TRITONS = re.compile(r"[IWEF]\d{4} \d\d:\d\d:|.*evhtp\.c:|Error: Failed to initialize NVML")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LONGEST_LOG = 2000
DIED = "The model's process ended while it loaded"
_FOLDER = re.compile(r"/\S*?/triton/models/[^/\s]+/\d+/")


def explain(message: str) -> str:
    """Return Triton's message in a shorter form, with the remedy if one is known.

    Only one line of the stack is kept, and paths are relative to the model's folder. Triton's log has the
    whole stack.
    """
    readable = _FOLDER.sub("", _STACK.sub(_place, message)).strip()
    missing = _MISSING.search(readable)
    if missing is None:
        return readable
    module = missing.group(1).partition(".")[0]
    package = _PACKAGES.get(module, module)
    return (
        f"No module named {missing.group(1)!r}: the models' Python does not have it. Write the line "
        f"`{package}` into requirements.txt and deploy with it: tidegate deploy ... --requirements "
        "requirements.txt. If you wrote the module, put it beside model.py and deploy the folder. "
        f"Triton says: {readable}"
    )


def explain_death(deployment: str, log: str) -> str:
    """Return the message for a model whose process ended while it loaded. ``log``: the end of Triton's log.

    The message lists possible causes, because Triton does not report the cause.
    """
    lines = [line.expandtabs() for line in _COLOUR.sub("", log).splitlines() if not _TRITONS.match(line)]
    # Leave out lines with escape sequences other than colours, because they would change the reader's
    # terminal.
    own = "\n".join(line for line in lines if line.isprintable())[-_LONGEST_LOG:].strip()
    last = f" The end of its log:\n{own}" if own else f" Its log: tidegate logs {deployment}"
    return f"{DIED}: it was killed (out of memory?), it exited, or a library crashed.{last}"


def _place(stack: re.Match[str]) -> str:
    """Return the place of the exception: the innermost stack line that is not in Tidegate's runtime.

    If there is no such line, return an empty text.
    """
    for line in stack.group(1).splitlines():
        frame = _FRAME.fullmatch(line)
        if frame and not _OURS.search(line):
            path = _FOLDER.sub("", frame["path"]).rpartition("-packages/")[2]
            path = path if path[:1] != "/" else path.rpartition("/")[2]
            return f" (at {path} line {frame['line']}, in {frame['function']})"
    return ""
