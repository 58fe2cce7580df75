"""Domain separation, identities and the directory."""

from __future__ import annotations

import pickle

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from appa_secure.secagg import BadParameters, Directory, IdentityKey
from appa_secure.secagg.keys import LOW_ORDER, agree, bind, x25519_public

fields = st.lists(st.binary(max_size=6) | st.text(max_size=4) | st.integers(0, 2**63), max_size=4)


@given(st.text(max_size=5), fields, st.text(max_size=5), fields)
def test_bind_is_injective(purpose, one, other_purpose, other) -> None:
    same = purpose == other_purpose and [(type(x), x) for x in one] == [(type(x), x) for x in other]
    assert (bind(purpose, *one) == bind(other_purpose, *other)) == same


def test_low_order_keys_are_those_that_agree_on_nothing() -> None:
    """Neighbours of the listed ones, among them other encodings of small numbers, are keys like any other."""
    private = X25519PrivateKey.from_private_bytes(bytes(range(32)))
    for key in LOW_ORDER:
        with pytest.raises(ValueError, match="shared key"):
            agree(private, key)
        for step in (-3, -2, -1, 1, 2, 3):
            near = ((int.from_bytes(key, "little") + step) % 2**256).to_bytes(32, "little")
            if near not in LOW_ORDER:
                agree(private, near)
    assert x25519_public(bytes(32)) not in LOW_ORDER


def test_identity_shows_no_secret() -> None:
    seed = bytes(range(32))
    key = IdentityKey.from_seed(seed)
    assert seed.hex() not in repr(key) + repr(vars(key))
    with pytest.raises(BadParameters, match="not pickled"):
        pickle.dumps(key)
    assert (
        key.public_bytes()
        == IdentityKey.from_seed(seed).public_bytes()
        != IdentityKey.generate().public_bytes()
    )


def test_directory_refuses_what_cannot_identify() -> None:
    one, two = (IdentityKey.generate().public_bytes() for _ in range(2))
    for bad in ({"a": one, "b": one}, {"coordinator": one}, {"": one}, {"a": one[:31]}, {"x" * 65: one}):
        with pytest.raises(BadParameters):
            Directory(bad)
    assert Directory({"a": one, "b": two}).digest() == Directory({"b": two, "a": one}).digest()
    assert Directory({"a": one, "b": two}).digest() != Directory({"a": two, "b": one}).digest()
