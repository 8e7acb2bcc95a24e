"""The ``tidegate`` command. ``docs/cli.md`` lists its commands and exit codes."""

from tidegate.kernel import quick_start


def main() -> None:
    """Run the command, and exit with its exit code."""
    quick_start.begin()
    from tidegate.cli import app

    app.main()
