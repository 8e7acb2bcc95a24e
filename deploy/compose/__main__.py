"""``python3 -m deploy.compose up|down|missing``: start or stop the stack in containers, or print
what this machine lacks for it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from deploy.compose import stack, tool
from deploy.compose.tool import ROOT, ComposeFailed, Tool


def main() -> int:
    """Run a command. Return the exit code: 0 done, 1 failed, 2 cannot run on this machine."""
    parser = argparse.ArgumentParser(prog="deploy.compose", description="Tidegate in containers.")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="build the images, start everything, serve the example")
    up.add_argument("--no-build", action="store_true", help="do not build the images; use the existing ones")
    up.add_argument("--no-example", action="store_true", help="start without a model")
    down = commands.add_parser("down", help="stop everything")
    down.add_argument("--volumes", action="store_true", help="also delete the data")
    commands.add_parser("missing", help="print the reason if the stack cannot run here")
    arguments = parser.parse_args()
    if arguments.command == "missing":
        print(tool.missing())
        return 0
    try:
        found = tool.find()
    except ComposeFailed as error:
        print(error, file=sys.stderr)
        return 2
    try:
        if arguments.command == "up":
            _up(found, build=not arguments.no_build, example=not arguments.no_example)
        else:
            stack.down(found, volumes=arguments.volumes)
    except ComposeFailed as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _up(found: Tool, *, build: bool, example: bool) -> None:
    began = time.monotonic()
    stack.up(found, build=build)
    state = Path(os.environ.get("TIDEGATE_STATE_DIR") or ROOT / ".tidegate")
    path = stack.write_environment(found, state.absolute() / "compose")
    if example:
        stack.example(found)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    print(f"Tidegate runs in containers (started in {time.monotonic() - began:.0f} s). To call it from here:")
    print(f"  . {shown}      # the gateway's address, and a key with all rights: keep it secret")
    print("  .venv/bin/tidegate status        # the command line comes with `make bootstrap`")


if __name__ == "__main__":
    sys.exit(main())
