"""The operators of a test world's sites: they agree on members and leave the files where machines look."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from appa_secure.membership import FILE, Membership, membership_of, next_membership
from appa_secure.records import RunDir
from appa_secure.secagg.keys import IdentityKey
from clients.store import IDENTITY, ClientStore
from tests.clients.world import World, make_group


class Operators:
    """`change` is what they all do; `agree` and `tell` are its halves, for sites that are told late or never."""

    def __init__(self, world: World, run: RunDir) -> None:
        self.world, self.run = world, run
        self.current = membership_of(world.agreement)
        self.seeds: dict[str, bytes] = {}

    def agree(
        self, leave: Sequence[str] = (), join: Sequence[str] = (), rotate: Sequence[str] = ()
    ) -> Membership:
        version = self.current.version + 1
        for client in rotate:
            self.seeds[client] = hashlib.sha256(f"{client}/{version}".encode()).digest()
        keys = {
            c: (
                IdentityKey.from_seed(self.seeds[c]) if c in self.seeds else self.world.identities[c]
            ).public_bytes()
            for c in (*join, *rotate)
        }
        return next_membership(
            self.current, version - 1, leave=leave, join={c: (c.split(" ")[0], keys[c]) for c in join},
            rotate={c: keys[c] for c in rotate if c not in join},
        )  # fmt: skip

    def tell(self, news: Membership, sites: Sequence[str] | None = None, coordinator: bool = True) -> None:
        for client in self.world.members if sites is None else sites:
            root = ClientStore(self.world.root / "clients" / client).root
            if client in self.seeds:
                (root / IDENTITY).write_bytes(self.seeds[client])
            (root / FILE).write_bytes(news.encode())
        if coordinator:
            self.run.path(FILE).write_bytes(news.encode())
        self.current = news

    def change(
        self, leave: Sequence[str] = (), join: Sequence[str] = (), rotate: Sequence[str] = ()
    ) -> Membership:
        news = self.agree(leave, join, rotate)
        self.tell(news)
        return news


def newcomer(world: World, client: str) -> None:
    """A site with data and a key that founded nothing: its agreement is the founding one, which does not list it."""
    world.groups[client] = make_group(client, tuple(world.agreement.questions.values()))
    world.identities[client] = IdentityKey.from_seed(hashlib.sha256(client.encode()).digest())
    world.start(client)
