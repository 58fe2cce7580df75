"""Who holds whose shares, and how few holders are enough: the sharing graph and its failure probabilities.

Up to 100 clients the graph is complete: everybody holds shares of everybody. Above, every client draws k holders
of its own, uniformly and in secret, AFTER the roster of bundles is fixed (SecAgg+, Bell et al., CCS 2020, its
protocol against an active server). There is no public seed, so there is nothing to grind: whoever the adversary is,
the holders of an honest client are a uniform set of the roster. Masks run along all edges, in both directions of
choice.

Bounds, for n clients of which a fraction CORRUPT follows the adversary from the start and a fraction DROPOUT stays
away, in a roster of at least n - DROPOUT n. X below is hypergeometric: corrupt or missing ones among k drawn.

- Correctness: every party keeps t holders that answer. Fails with probability at most n P[X_missing > k - t].
- Never both secrets: 2t > (k + 1) + c_i for every honest i. Fails with at most n P[X_corrupt >= 2t - (k + 1)].
- No small sums: whatever partitions are shown to whom, the honest parties S of a sum that comes out have t - 1 or
  more of their k holders in S or among the corrupt (docs/decisions/0013). For a given S of s parties the choices are
  independent, so some S below `smallest_group` exists with probability at most

      sum over s of C(honest, s) P[X_(S or corrupt) >= t - 1]^s.

`sharing` takes the smallest k for which the first is below 2^-20 and the other two together below 2^-40.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .errors import BadParameters
from .keys import Rng

COMPLETE_UP_TO = 100
CORRUPT = 1 / 5
DROPOUT = 1 / 10
PRIVACY_BITS = 40
CORRECTNESS_BITS = 20


@dataclass(frozen=True)
class Sharing:
    """Every client has `degree` holders besides itself; `threshold` of the degree + 1 shares open a secret.

    A roster has at least `quorum` clients, and a client wants `acks` signatures under its own transcript: so many
    that no other transcript can have as many (2 acks > n + c), or the coordinator could give a client's holders
    another list of dealers than the client, who then masks with none of them. Except with probability 2^-40 no sum
    over fewer than `smallest_group` honest clients comes out. All this stands `corrupt` clients.
    """

    degree: int
    threshold: int
    quorum: int
    acks: int
    smallest_group: int
    corrupt: int


def complete(parties: int, threshold: int) -> Sharing:
    """Everybody holds shares of everybody, t of n. An opened sum has t - c honest parties or more, c < 2t - n."""
    corrupt = 2 * threshold - parties - 1
    return Sharing(parties - 1, threshold, threshold, threshold, parties - threshold + 1, corrupt)


@lru_cache(maxsize=64)
def sparse(parties: int, corrupt: float = CORRUPT, dropout: float = DROPOUT) -> Sharing:
    """The smallest degree whose failure probabilities are below 2^-40 and 2^-20; raises `BadParameters` when
    there is none."""
    adversary, missing = math.floor(corrupt * parties), math.floor(dropout * parties)
    quorum = parties - missing
    for degree in range(2, quorum - 1):
        # The largest threshold that dropouts allow is the safest one.
        allowed = [
            t
            for t in range(degree, degree // 2, -1)
            if correctness_failure(parties, missing, degree, t) <= -CORRECTNESS_BITS
        ]
        if not allowed:
            continue
        threshold = allowed[0]
        both = both_secrets_failure(parties, quorum, adversary, degree, threshold)
        if both > -PRIVACY_BITS - 1:
            continue
        group = smallest_group(parties, quorum, adversary, degree, threshold)
        if group > 1:
            return Sharing(degree, threshold, quorum, (parties + adversary) // 2 + 1, group, adversary)
    raise BadParameters(
        f"no sharing graph of {parties} clients stands {corrupt:.0%} corrupt and {dropout:.0%} missing"
    )


def correctness_failure(parties: int, missing: int, degree: int, threshold: int) -> float:
    """log2 of the probability that some party keeps fewer than `threshold` answering holders, at most."""
    return math.log2(parties) + log2_tail(parties - 1, missing, degree, degree - threshold + 1)


def both_secrets_failure(parties: int, quorum: int, corrupt: int, degree: int, threshold: int) -> float:
    """log2 of the probability that some honest party has 2t <= (k + 1) + c_i, at most."""
    return math.log2(parties) + log2_tail(quorum - 1, corrupt, degree, 2 * threshold - (degree + 1))


def smallest_group(parties: int, quorum: int, corrupt: int, degree: int, threshold: int) -> int:
    """The largest s so that sums over fewer than s honest parties come out with probability below 2^-41."""
    honest, total = parties - corrupt, 0.0
    for s in range(1, honest + 1):
        inside = min(s - 1 + corrupt, quorum - 1)  # where a member's holders must lie
        exponent = float(_log2_choose(honest, s)) + s * log2_tail(quorum - 1, inside, degree, threshold - 1)
        total += 2.0 ** min(exponent, 0.0)
        if total > 2.0 ** -(PRIVACY_BITS + 1):
            return s
    return honest


def log2_tail(population: int, marked: int, drawn: int, at_least: int) -> float:
    """log2 P[X >= at_least], X = marked ones among `drawn` of `population` without replacement; -inf for 0."""
    lowest = max(at_least, 0, drawn - (population - marked))
    x = np.arange(lowest, min(marked, drawn) + 1)
    if not x.size:
        return -math.inf
    logs = (
        _log2_choose(marked, x)
        + _log2_choose(population - marked, drawn - x)
        - _log2_choose(population, drawn)
    )
    top = float(logs.max())
    return min(0.0, top + math.log2(float(np.exp2(logs - top).sum())))


def _log2_choose(n: int, k: int | NDArray[np.int64]) -> NDArray[np.float64]:
    table = _log2_factorials(1 << max(n, 1).bit_length())
    return np.asarray(table[n] - table[k] - table[n - np.asarray(k)], dtype=np.float64)


@lru_cache(maxsize=16)
def _log2_factorials(size: int) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(np.log2(np.arange(1, size + 1)))])


def choose_holders(names: Sequence[str], own: str, degree: int, rng: Rng) -> tuple[str, ...]:
    """The holders of one dealer, itself included, in id order: a uniform set of `degree` others from `names`."""
    others = [name for name in names if name != own]
    if degree >= len(others):
        return tuple(sorted(names))
    order = np.argsort(np.frombuffer(rng(8 * len(others)), "<u8"), kind="stable")
    return tuple(sorted([own, *(others[i] for i in order[:degree])]))


class SharingGraph:
    """The edges as the coordinator sees them. Everything is by client id.

    `holders[d]`: who holds shares of dealer d, in id order, for all dealers as many; the i-th of them (from 1) has
    Shamir point i. `wards[h]`: the dealers whose shares h holds, in id order. `peers[a]`: with whom a exchanges masks.
    As arrays: `row[d]` is the row of dealer d in `places` and `slots`, both (dealers, holders): the row of each holder
    (-1 for one that is out of the epoch), and the place of d among its wards.
    """

    def __init__(self, holders: Mapping[str, tuple[str, ...]]) -> None:
        self.holders = dict(sorted(holders.items()))
        self.dealers = tuple(self.holders)
        self.row = {name: i for i, name in enumerate(self.dealers)}
        held: dict[str, list[str]] = {name: [] for name in self.dealers}
        slots: list[list[int]] = [[] for _ in self.dealers]
        for dealer, row in self.holders.items():
            for holder in row:
                of_holder = held.get(holder, [])  # who has not dealt is out of the epoch and never answers
                slots[self.row[dealer]].append(len(of_holder))
                of_holder.append(dealer)
        self.wards = {name: tuple(row) for name, row in held.items()}
        self.places = np.array([[self.row.get(name, -1) for name in row] for row in self.holders.values()])
        self.slots = np.array(slots)
        self.peers = {
            name: tuple(sorted((set(row) | set(self.holders[name]) & held.keys()) - {name}))
            for name, row in held.items()
        }
