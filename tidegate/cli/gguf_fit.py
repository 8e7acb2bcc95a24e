"""``deploy FOLDER --quantization auto --memory 2GiB``: choose a GGUF file that fits into the memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidegate.cli.exit_codes import UsageError
from tidegate.cli.output import padded, say, widths_of
from tidegate.kernel.protocol import gguf
from tidegate.kernel.protocol.models import LlmSpec
from tidegate.quantize.gguf_choice import Candidate, Fit, candidate, choose

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
HEADER_BYTES = 64 * 2**20
_PART = re.compile(r".*-\d{5}-of-\d{5}\.gguf", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class FitOfFolder:
    """The choice of a GGUF file that fits into ``memory`` bytes.

    ``path``: the chosen file. ``candidates``: the GGUF files to choose from. ``fit``: the choice, and for
    each file the reason why it was chosen or not. ``stated``: True if the user gave ``--memory``.
    """

    path: Path
    memory: int
    candidates: tuple[Candidate, ...]
    fit: Fit
    stated: bool

    def options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the Deployment's options, with a memory limit if the user gave ``--memory``.

        A memory limit that is already in ``options`` stays.
        """
        resources = dict(options.get("resources") or {})
        if self.stated:
            resources.setdefault("memory_mb", self.memory // 2**20)
        return {**options, "resources": resources} if resources else options

    def show(self) -> None:
        """Print on stderr how much memory each file needs, because stdout gets the command's result."""
        for line in lines(self.candidates, self.fit, self.memory):
            say(line)


def best_fit(
    path: Path, quantization: str | None, memory: str | None, slots: int | None, context: int | None
) -> FitOfFolder | None:
    """Return the file to serve; None if neither --quantization nor --memory is given.

    Raise UsageError for a wrong option, or if no file fits into the memory.
    """
    if quantization is None and memory is None:
        return None
    if quantization not in (None, "auto"):
        raise UsageError(
            f"--quantization {quantization}: write auto. To choose the file yourself, deploy it by its name."
        )
    limit = size_of(memory) if memory else free_memory()
    found = candidates_of(path, slots or LlmSpec().slots, context)
    fit = choose(found, limit)
    if fit.chosen is None:
        table = "\n".join(lines(found, fit, limit))
        raise UsageError(
            f"No GGUF file fits into {limit / 2**20:.0f} MiB.\n{table}\nUse a smaller quantisation, fewer "
            "--slots, a smaller --context, or more --memory."
        )
    chosen = path / fit.chosen.name if path.is_dir() else path
    return FitOfFolder(chosen, limit, tuple(found), fit, memory is not None)


def candidates_of(path: Path, slots: int, context: int | None) -> list[Candidate]:
    """Return the GGUF files to choose from, the smallest first. Raise UsageError if there are none.

    The parts of a split file, and files whose name begins with ``mmproj``, are not choices.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.gguf")) if path.is_dir() else []
    models = [f for f in files if not _PART.fullmatch(f.name) and not f.name.lower().startswith("mmproj")]
    if not models:
        raise UsageError(
            f"{path} has no GGUF file to choose. --memory and --quantization need a folder with GGUF files "
            "of one model. For a split file (-00001-of-00002.gguf), deploy its folder without these options."
        )
    found = [candidate(f.name, f.stat().st_size, header_of(f), slots, context) for f in models]
    return sorted(found, key=lambda each: (each.weights, each.name))


def header_of(path: Path) -> gguf.GgufHeader:
    """Return the header of a GGUF file. Raise UsageError for a file that cannot be read as GGUF."""
    try:
        # The header is at the beginning of the file, and all weights follow it. So read only the first
        # HEADER_BYTES. The header is shorter than that, because its largest part, the vocabulary, has a few
        # megabytes at most.
        with path.open("rb") as file:
            return gguf.read(file.read(HEADER_BYTES))
    except (OSError, gguf.NotGguf) as problem:
        raise UsageError(f"{path} cannot be read as GGUF: {problem}. Download it again.") from None


def lines(candidates: list[Candidate] | tuple[Candidate, ...], fit: Fit, memory: int) -> list[str]:
    """Return a table as lines: the memory that each file needs, and why it was chosen or not.

    The last line states ``memory``: the bytes that a replica may use, shown in MiB.
    """
    rows = [["FILE", "WEIGHTS", "KV CACHE", "IN ALL", "WHY"]]
    for each in candidates:
        sizes = [f"{part / 2**20:.0f} MiB" for part in (each.weights, each.kv, each.total)]
        rows.append([each.name, *sizes, fit.reasons[each.name]])
    widths = widths_of(rows)
    table = ["  ".join(padded(row, widths)).rstrip() for row in rows]
    return [*table, f"Memory of a replica: {memory / 2**20:.0f} MiB."]


def size_of(text: str) -> int:
    """Parse ``2GiB``, ``1500MB`` or a number of bytes. Return bytes. Raise UsageError for other texts."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"--memory {text!r} is not a size: write 2GiB or 1500MB.")
    power = "KMGT".index(found[2].upper()) + 1 if found[2] else 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def free_memory() -> int:
    """Return this machine's available memory in bytes. Raise UsageError if it is unknown."""
    try:
        text = Path("/proc/meminfo").read_text()
        return int(re.findall(r"MemAvailable:\s+(\d+) kB", text)[0]) * 1024
    except (OSError, IndexError):
        raise UsageError(
            "The free memory of this machine is unknown. State the memory to use: --memory 2GiB"
        ) from None
