"""``python -m tidegate.cli``: the same as ``tidegate``."""

from tidegate.cli import main

main()
