"""The small databases of services."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.kernel.errors import Unavailable
from tidegate.kernel.sqlite_file import Database

pytestmark = pytest.mark.unit


def test_a_number_of_more_than_64_bits_is_a_failed_call(tmp_path: Path) -> None:
    """Callers handle a failed call. Any other exception would end their loops."""
    database = Database(tmp_path / "a.db", "CREATE TABLE IF NOT EXISTS t (n INTEGER);")
    with pytest.raises(Unavailable, match="cannot be written"):
        database.write(("INSERT INTO t VALUES (?)", [(1,), (2**64,)]))
    assert database.read("SELECT n FROM t") == [], "nothing was written"
    database.close()


@pytest.mark.parametrize("at", [0, 4096], ids=["its head", "its second page"])
def test_a_damaged_file_is_set_aside(tmp_path: Path, at: int) -> None:
    path = tmp_path / "x.db"
    db = Database(path, "CREATE TABLE IF NOT EXISTS t (n INTEGER);")
    db.write(("INSERT INTO t VALUES (?)", [(n,) for n in range(5000)]))
    db.close()
    body = bytearray(path.read_bytes())
    body[at : at + 200] = b"x" * 200
    path.write_bytes(body)
    db = Database(path, "CREATE TABLE IF NOT EXISTS t (n INTEGER);")
    assert db.read("SELECT * FROM t") == []
    db.write(("INSERT INTO t VALUES (?)", [(1,)]))
    db.close()
    (aside,) = tmp_path.glob("x.db.damaged-*")
    assert aside.read_bytes() == bytes(body)
