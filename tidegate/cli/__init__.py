"""The ``tidegate`` command. ``docs/cli.md`` lists its commands and exit codes."""

from tidegate.kernel import quick_start


def main() -> None:
    """Run the command line that was typed, and exit."""
    quick_start.begin()
    from tidegate.cli import app

    app.main()
