"""Environments with other tools, for the tests of `make test-formats`. They are kept between runs."""

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import places
from services.worker.adapters.environments import Environments
from services.worker.adapters.host_cache import HostCache
from services.worker.adapters.triton_install import TritonInstall

TIMEOUT_S = 1800.0


def only_for(tool: str) -> pytest.MarkDecorator:
    """Skip a test unless `make test-formats` runs all tests, or those of this tool."""
    return pytest.mark.skipif(
        os.environ.get("TIDEGATE_TEST_FORMATS", "") not in ("1", tool),
        reason=f"downloads other tools: make test-formats FORMATS={tool}",
    )


@dataclass(frozen=True)
class OtherTools:
    """Environments above the models' own, as workers build them."""

    install: TritonInstall
    folder: Path

    async def provide(self, requirements: list[str]) -> TritonInstall:
        """Return Triton with a Python that has these packages."""
        if not requirements:
            return self.install
        made = Environments(HostCache(self.folder), self.install, lambda text: print(text, flush=True))
        return await made.provide(requirements, {}, TIMEOUT_S)

    def built(self, requirements: list[str]) -> Path:
        """Return a Python that has these packages."""
        return asyncio.run(self.provide(requirements)).python


def environments(install: TritonInstall) -> OtherTools:
    """Return the environments of the benchmarks' folder."""
    return OtherTools(install, places.bench_dir() / "formats")
