"""``python -m deploy.import_graph``: print how the rooms (folders) of each service import each other.

For each service, it prints the number of imports from each room to each other room. For the whole source, it
prints the import cycles.

It fails if there is a cycle, or if a room imports a room of a higher level. The levels, from high to low:
modules beside ``app.py``, ``api``, ``application``, ``adapters``, ``domain``. So no other room may import a
module that is beside ``app.py``. The only exception is ``settings``: all rooms may import it.

``--rev REVISION`` examines another Git revision. The rules are in ``.importlinter``.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import grimp

PACKAGES = ("tidegate", "services", "deploy")
SERVICES = ("gateway", "router", "worker", "registry", "autoscaler")
LEVEL = {"root": 4, "api": 3, "application": 2, "loose": 2, "adapters": 1, "domain": 0}
ROOT_MODULES = {"app", "__main__", "settings"}
Graph = Mapping[str, Iterable[str]]


def read(folder: Path) -> dict[str, set[str]]:
    """Return the imports of each module below ``folder``.

    Imports inside functions and imports only for types are included.
    """
    # If a package is loaded, grimp reads the folder from which Python loaded it, instead of ``folder``. So
    # unload the packages.
    for package in PACKAGES:
        sys.modules.pop(package, None)
    sys.path.insert(0, str(folder))
    try:
        graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    finally:
        sys.path.remove(str(folder))
    kept = {module for module in graph.modules if ".runtimes" not in module}
    return {module: graph.find_modules_directly_imported_by(module) & kept for module in kept}


def room(module: str, service: str) -> str | None:
    """Return the room of a module: the name of its folder, or "root" for a module beside ``app.py``.

    Return None for a module of another service.
    """
    below = module.removeprefix(f"services.{service}.")
    if below == module:
        return None
    first = below.partition(".")[0]
    return first if first in LEVEL else "root"


def rooms(graph: Graph, service: str) -> dict[str, str]:
    """Return the room of every module of a service.

    A module beside ``app.py`` has the room "root". Its room becomes "loose" if a module of another room
    imports it. The modules ``app``, ``__main__`` and ``settings`` always stay in "root".
    """
    found = {module: each for module in graph if (each := room(module, service)) is not None}
    while True:
        loose = {
            other
            for module, here in found.items()
            for other in graph[module]
            if here != "root" and found.get(other) == "root" and other.rpartition(".")[2] not in ROOT_MODULES
        }
        if not loose:
            break
        found |= dict.fromkeys(loose, "loose")
    return found


def circles(graph: Graph) -> list[list[str]]:
    """Return the groups of modules that import each other (strongly connected components, Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[-len(group) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def report_service(graph: Graph, service: str) -> int:
    """Print a service's rooms and the imports between them. Return the number of problems."""
    found = rooms(graph, service)
    arrows: Counter[tuple[str, str]] = Counter()
    upward = []
    for module, here in sorted(found.items()):
        for other in sorted(graph[module]):
            there = found.get(other, here)
            if here != there:
                arrows[here, there] += 1
            # ``app.py`` passes the settings to all rooms, so any room may import the settings class.
            if LEVEL[there] > LEVEL[here] and not other.endswith(".settings"):
                upward.append(f"{module} -> {other}")
    sizes = Counter(found.values())
    print(f"\n{service}: " + ", ".join(f"{name} {sizes[name]}" for name in LEVEL if sizes[name]))
    for (here, there), count in sorted(arrows.items(), key=lambda arrow: -LEVEL[arrow[0][0]]):
        print(f"  {here:>11} -> {there:<11} {count:4}")
    for arrow in upward:
        print(f"  UP  {arrow}")
    return len(upward) + sizes["loose"]


def report(folder: Path) -> int:
    """Print the report on the source in ``folder``. Return the number of problems."""
    graph = read(folder)
    wrong = sum(report_service(graph, service) for service in SERVICES)
    groups = circles(graph)
    imports = sum(len(set(each)) for each in graph.values())
    print(f"\n{len(graph)} modules, {imports} imports, {len(groups)} cycles")
    for group in groups:
        print("  CYCLE  " + " <-> ".join(group))
    return wrong + len(groups)


def main() -> int:
    """Print the report. Return 1 if it contains a problem, else 0.

    Problems are forbidden imports, import cycles and loose modules (see :func:`rooms`).
    """
    parser = argparse.ArgumentParser(
        prog="deploy.import_graph", description="Print how the folders of each service import each other."
    )
    parser.add_argument("--rev", help="revision of git to examine (default: the working tree)")
    rev = parser.parse_args().rev
    if rev is None:
        return min(report(Path.cwd()), 1)
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(["git", "archive", rev, *PACKAGES], stdout=subprocess.PIPE, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(folder)
        return min(report(Path(folder)), 1)


if __name__ == "__main__":
    sys.exit(main())
