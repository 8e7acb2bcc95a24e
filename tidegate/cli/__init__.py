"""The ``tidegate`` command. ``docs/cli.md`` lists its commands and exit codes."""

from tidegate.cli.app import main

__all__ = ["main"]
