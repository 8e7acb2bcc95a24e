"""The ``tidegate`` command. ``docs/cli.md`` lists its commands and exit codes."""

from tidegate.kernel import quick_start


def main() -> None:
    """The command: what was typed is run, and the process ends."""
    quick_start.begin()
    from tidegate.cli import app

    app.main()
