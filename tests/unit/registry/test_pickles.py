"""The releases that saved an estimator are read from its bytes, without executing them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from services.registry.adapters import pickle_file
from services.registry.domain.pickles import PickleReleases, releases_in, warnings
from tidegate.kernel.errors import BadRequest

NUMPY_2 = Path(__file__).parents[2] / "integration" / "worker" / "numpy_2"
HERE = {"scikit-learn": "1.9.1", "numpy": "1.26.4"}


class Estimator:
    """An object with the state of a scikit-learn estimator, after ``size`` other bytes."""

    def __init__(self, version: str, size: int = 0) -> None:
        self.weights = bytes(size)
        self._sklearn_version = version


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("version", ["1.3.2", "0.24.dev0", "1.9.1"])
def test_the_version_is_read_in_every_protocol(protocol, version):
    assert releases_in([pickle.dumps(Estimator(version), protocol)]) == PickleReleases(version)


def test_a_version_that_lies_across_two_pieces_is_found():
    data = pickle.dumps(Estimator("1.3.2", 100))
    assert {releases_in([data[:at], data[at:]]).sklearn for at in range(len(data))} == {"1.3.2"}


def test_a_text_that_only_looks_like_a_version_is_ignored():
    for text in (b"_sklearn_version", b"_sklearn_version\x94\x8c\xff1.2.3", b"_sklearn_version\x8c\x03a.b"):
        assert releases_in([text]) == PickleReleases()


@pytest.mark.parametrize("name", ["boosted.joblib", "network.pkl"])
def test_numpy_2_is_recognised_in_real_files(name):
    assert releases_in(pickle_file.pieces(NUMPY_2 / name)) == PickleReleases("1.9.1", True)


def pack_raw(data: bytes) -> bytes:
    return lzma.compress(data, lzma.FORMAT_ALONE)


@pytest.mark.parametrize("pack", [bytes, zlib.compress, gzip.compress, bz2.compress, lzma.compress, pack_raw])
def test_files_as_joblib_packs_them(tmp_path: Path, pack: Any):
    path = tmp_path / "m.joblib"
    # Zeros pack to a thousandth: what one piece of the file unpacks to comes in steps.
    path.write_bytes(pack(pickle.dumps(Estimator("1.3.2", 5 * pickle_file.STEP))))
    pieces = list(pickle_file.pieces(path))
    assert max(map(len, pieces)) <= pickle_file.STEP
    assert releases_in(pieces).sklearn == "1.3.2"


def test_a_bomb_ends_and_a_damaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "m.joblib"
    packed = zlib.compress(bytes(20 * pickle_file.STEP))
    path.write_bytes(packed)
    monkeypatch.setattr(pickle_file, "MAX_UNPACKED", 3 * pickle_file.STEP)
    assert sum(map(len, pickle_file.pieces(path))) <= 4 * pickle_file.STEP
    path.write_bytes(packed[:10] + b"damaged" + packed[17:])
    with pytest.raises(BadRequest, match="compressed joblib file is damaged"):
        list(pickle_file.pieces(path))


def test_other_releases_give_a_warning_with_the_remedy():
    (warning,) = warnings(PickleReleases("1.3.2"), HERE, [])
    assert "saved with scikit-learn 1.3.2, and models here run with 1.9.1" in warning
    assert "scikit-learn==1.3.2" in warning
    (warning,) = warnings(PickleReleases("1.9.1", numpy_2=True), HERE, [])
    assert "saved with numpy 2, and models here run with numpy 1.26.4" in warning


@pytest.mark.parametrize(
    ("saved", "here", "requirements"),
    [
        (PickleReleases("1.9.1"), HERE, []),
        (PickleReleases(), HERE, []),
        (PickleReleases("1.3.2"), {}, []),
        (PickleReleases("1.3.2"), HERE, ["numpy", "Scikit_Learn==1.3.2"]),
        (PickleReleases("1.9.1", numpy_2=True), HERE | {"numpy": "2.1.0"}, []),
    ],
)
def test_equal_or_unknown_releases_give_no_warning(saved, here, requirements):
    assert warnings(saved, here, requirements) == []


def test_the_packages_of_the_models_environment(tmp_path: Path):
    site = tmp_path / "model-env" / "lib" / "python3.11" / "site-packages"
    (site / "scikit_learn-1.9.1.dist-info").mkdir(parents=True)
    assert pickle_file.packages(tmp_path) == {"scikit-learn": "1.9.1"}
    assert pickle_file.packages(tmp_path / "none") == {}


def test_a_packed_file_cannot_take_gigabytes_of_memory(tmp_path):
    packed = bytearray(lzma.compress(bytes(2**20), format=lzma.FORMAT_ALONE, preset=0))
    packed[1:5] = (2**30).to_bytes(4, "little")  # the size of its dictionary
    (tmp_path / "bomb").write_bytes(packed)
    with pytest.raises(BadRequest, match=r"damaged \(Memory usage limit"):
        list(pickle_file.pieces(tmp_path / "bomb"))


def test_the_highest_preset_of_joblib_is_unpacked(tmp_path):
    (tmp_path / "m").write_bytes(lzma.compress(pickle.dumps(Estimator("1.3.2")), preset=9))
    assert releases_in(pickle_file.pieces(tmp_path / "m")) == PickleReleases("1.3.2")
