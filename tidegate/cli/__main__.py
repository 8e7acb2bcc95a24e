"""Run the command line: ``python -m tidegate.cli`` is the same as ``tidegate``."""

from tidegate.cli import main

main()
