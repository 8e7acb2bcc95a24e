"""Upload a package to the registry: large files in parts, so that the upload can be continued."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from tidegate.cli.api import Control
from tidegate.cli.output import say, size_of
from tidegate.cli.package import Package
from tidegate.cli.progress import Steps, transfer
from tidegate.kernel.errors import Unavailable

# Upload files of at least this many bytes in parts, so that a lost connection loses at most one part.
RESUMABLE_BYTES = 32 * 2**20
# The number of progress messages during an upload in parts.
SHOWN = 10


def upload(control: Control, package: Package, steps: Steps) -> None:
    """Upload the bytes, unless the registry already has them."""
    shown = f"{package.filename}, {size_of(package.size)}"
    steps.change("upload", "starting", shown)
    if control.registry.exists(f"/v1/artifacts/{package.sha256}"):
        steps.change("upload", "done", f"{shown}, was there already")
        return
    with transfer(package.filename, package.size) as count:
        if package.size >= RESUMABLE_BYTES:
            upload_in_parts(control, package, steps, count)
        else:
            chunks = _counted(package.chunks(), count)
            control.registry.upload("/v1/artifacts", chunks, package.size, filename=package.filename)
    steps.change("upload", "done", shown)


def upload_in_parts(control: Control, package: Package, steps: Steps, count: Callable[[int], None]) -> None:
    """Upload the bytes in parts. Try again after a lost connection.

    If the command ends before all bytes are uploaded, run it again later: it then continues the upload.
    """
    from tidegate.client.uploads import Source, Uploading, with_remedy

    stored, total = -1, size_of(package.size)

    def progress(offset: int, problem: str) -> None:
        nonlocal stored
        if problem:
            steps.change("upload", "waiting", f"{problem} It continues at {size_of(offset)} of {total}.")
            return
        arrived = f"{size_of(offset)} of {total}"
        if stored < 0 and offset:
            steps.change("upload", "starting", f"{package.filename}, continues at {arrived}")
        elif offset * SHOWN // package.size > max(0, stored) * SHOWN // package.size:
            steps.change("upload", "sending", f"{package.filename}, {arrived}")
        count(offset - max(0, stored))
        stored = offset

    source = Source(package.file, package.sha256, package.size)
    try:
        control.registry.run(Uploading(source, "", progress).flow())
    except KeyboardInterrupt:
        say(
            f"The upload stopped at {size_of(max(0, stored))} of {total}. To continue, run the same command "
            "again. The registry keeps the uploaded bytes for a day (TIDEGATE_UPLOAD_IDLE_S)."
        )
        raise
    except Unavailable as lost:
        raise with_remedy(lost) from None


def _counted(chunks: Iterable[bytes], count: Callable[[int], None]) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        count(len(chunk))
