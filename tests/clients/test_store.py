"""What a client keeps on disk: private modes, atomic replacement, damage that is named."""

import stat
from pathlib import Path

import pytest

from appa_secure.errors import RunError
from clients.store import ClientStore


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir(mode=0o755)
    store = ClientStore(tmp_path / "c")
    store.save({"secret": b"x"})
    assert mode(tmp_path / "c") == 0o700
    assert mode(tmp_path / "c" / "state.cbor") == 0o600
    store.save({"secret": b"y"})
    assert mode(tmp_path / "c" / "state.cbor") == 0o600
    assert ClientStore(tmp_path / "c").load() == {"secret": b"y"}


def test_a_new_client_has_no_state_and_shows_no_path(tmp_path: Path) -> None:
    store = ClientStore(tmp_path / "deep" / "clinic")
    assert store.load() == {}
    assert repr(store) == "ClientStore('clinic')"


@pytest.mark.parametrize("damage", [b"", b"\x01", b"\xa0\x00", b"\xff"])
def test_damage_is_an_error_that_names_the_file(tmp_path: Path, damage: bytes) -> None:
    store = ClientStore(tmp_path / "clinic")
    (tmp_path / "clinic" / "state.cbor").write_bytes(damage)
    with pytest.raises(RunError, match=r"clinic/state\.cbor"):
        store.load()


def test_what_a_killed_save_left_behind_is_destroyed(tmp_path: Path) -> None:
    ClientStore(tmp_path / "c").save({"a": 1})
    leftover = tmp_path / "c" / ".state.cbor.123.tmp"
    leftover.write_bytes(b"secrets of an epoch that is over")
    assert ClientStore(tmp_path / "c").load() == {"a": 1}
    assert not leftover.exists()
