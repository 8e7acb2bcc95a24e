"""Environments of versions with requirements: real pip, real packages, no index."""

import asyncio
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from services.worker.adapters.environments import Environments
from services.worker.adapters.host_cache import HostCache
from services.worker.adapters.triton_install import TritonInstall
from tests.conftest import PATIENCE_S
from tidegate.kernel.errors import ModelFailed

pytestmark = pytest.mark.integration

Make = Callable[[str, str, str], Path]


def wheel(folder: Path, name: str, version: str, source: str) -> Path:
    """A wheel with one module, written by hand: it needs no build tool and no index."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", source)
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def links(tmp_path: Path) -> dict[str, str]:
    """The settings of pip: packages only from a folder of wheels."""
    wheel(tmp_path / "wheels", "tidepool", "1.0", "DEPTH = 1\n")
    wheel(tmp_path / "wheels", "tidepool", "2.0", "DEPTH = 2\n")
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels")}


def says(install: TritonInstall, code: str) -> str:
    done = subprocess.run([install.python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


async def test_what_a_version_brings_lies_above_the_models_own(
    install: TritonInstall, tmp_path: Path, links: dict[str, str]
) -> None:
    told: list[str] = []
    environments = Environments(HostCache(tmp_path), install, told.append)
    made = await environments.provide(["tidepool<2"], links, 600)
    assert says(made, "import tidepool; print(tidepool.DEPTH)") == "1"
    assert says(made, "import numpy, onnxruntime; print(numpy.__version__)").startswith("1.")
    assert made.has_module("onnxruntime")
    assert any(line.startswith("installing the requirements: ") for line in told)

    # It is there: no index is asked, no folder is looked into.
    again = Environments(HostCache(tmp_path), install, told.append)
    (tmp_path / "wheels").rename(tmp_path / "gone")
    assert await again.provide(["tidepool<2"], links, 600) == made
    with pytest.raises(ModelFailed, match="No matching distribution found for tidepool"):
        await again.provide(["tidepool>1"], links, 600)


async def test_replicas_that_start_together_build_once(
    install: TritonInstall, tmp_path: Path, links: dict[str, str]
) -> None:
    told: list[list[str]] = [[], [], []]
    made = await asyncio.gather(
        *(
            Environments(HostCache(tmp_path), install, t.append).provide(["tidepool"], links, 600)
            for t in told
        )
    )
    assert made[0] == made[1] == made[2]
    assert sum("installing the requirements" in told_by for told_by in told) == 1
    assert sum("waiting for another replica to install the requirements" in t for t in told) == 2
    assert len(list((tmp_path / "envs").glob("*.ok"))) == 1


async def test_a_build_that_broke_off_is_begun_anew(
    install: TritonInstall, tmp_path: Path, links: dict[str, str]
) -> None:
    environments = Environments(HostCache(tmp_path), install, lambda _: None)
    made = await environments.provide(["tidepool"], links, 600)
    (ok,) = (tmp_path / "envs").glob("*.ok")
    ok.unlink()
    (left,) = (ok.with_suffix("") / "lib").glob("python3*/site-packages/tidepool.py")
    left.write_text("broken")
    assert await environments.provide(["tidepool"], links, 600) == made
    assert says(made, "import tidepool; print(tidepool.DEPTH)") == "2"


@pytest.mark.parametrize(
    ("requirement", "words"),
    [
        ("numpy>=2", "numpy"),
        ("no-such-package-anywhere", "No matching distribution found for no-such-package-anywhere"),
        ("tidepool==3", "No matching distribution found for tidepool==3"),
    ],
)
async def test_pips_own_words(
    install: TritonInstall, tmp_path: Path, links: dict[str, str], requirement: str, words: str
) -> None:
    with pytest.raises(ModelFailed, match="The requirements cannot be installed") as caught:
        await Environments(HostCache(tmp_path), install, lambda _: None).provide([requirement], links, 600)
    assert words in caught.value.message


async def test_other_settings_are_another_environment(
    install: TritonInstall, tmp_path: Path, links: dict[str, str]
) -> None:
    wheel(tmp_path / "other", "tidepool", "2.0", "DEPTH = 'other'\n")
    environments = Environments(HostCache(tmp_path), install, lambda _: None)
    made = await environments.provide(["tidepool"], links, 600)
    other = await environments.provide(["tidepool"], links | {"PIP_FIND_LINKS": str(tmp_path / "other")}, 600)
    assert says(made, "import tidepool; print(tidepool.DEPTH)") == "2"
    assert says(other, "import tidepool; print(tidepool.DEPTH)") == "other"


async def test_a_build_sees_no_secret(
    install: TritonInstall, tmp_path: Path, links: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building a source package runs its author's code."""
    monkeypatch.setenv("TIDEGATE_SERVICE_TOKEN", "hush")
    source = tmp_path / "spy"
    source.mkdir()
    seen = tmp_path / "seen"
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "spy"\nbackend-path = ["."]\n'
    )
    (source / "spy.py").write_text(
        "import os\n"
        f"open({str(seen)!r}, 'w').write(repr(dict(os.environ)))\n"
        "def build_wheel(*a, **k): raise SystemExit('spied')\n"
    )
    with pytest.raises(ModelFailed):
        await Environments(HostCache(tmp_path), install, lambda _: None).provide([str(source)], links, 600)
    assert "PIP_NO_INDEX" in seen.read_text()
    assert "hush" not in seen.read_text()


async def test_the_time_limit_ends_all_that_was_started(
    install: TritonInstall, tmp_path: Path, links: dict[str, str]
) -> None:
    source = tmp_path / "slow"
    source.mkdir()
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "slow"\nbackend-path = ["."]\n'
    )
    mark = tmp_path / "pid"
    (source / "slow.py").write_text(
        f"import os, time\nopen({str(mark)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    )
    # On a busy machine pip may need longer until it builds.
    for limit_s in (4, 16, 64):
        with pytest.raises(ModelFailed, match=f"not installed within {limit_s} s"):
            await Environments(HostCache(tmp_path), install, lambda _: None).provide(
                [str(source)], links, limit_s
            )
        if mark.exists():
            break
    # It is killed, and nobody's child here: how soon the kernel takes it away is the kernel's affair.
    async with asyncio.timeout(PATIENCE_S):
        while _runs(mark.read_text()):
            await asyncio.sleep(0.01)


def _runs(pid: str) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
