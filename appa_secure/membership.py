"""Who takes part in a run from its next epoch on: what the operators of all sites give their own machines.

An agreement founds a run with its first members. Later the operators agree, outside the system, on a `Membership` and
each puts the same `membership.json` where its own machine looks: a site beside its client's state, the coordinator's
operator into the run directory. No message carries one, so a coordinator can only propose what a site was told by its
own operator (docs/decisions/0016-membership-by-operators.md).

A *period* is the time in which the same parties take part; it is named by the version of the membership that began it.
New keys alone begin none. Histories begin again with a period, and no answer to a question is summed in two periods:
the difference of the sums would be the reward of whoever left or joined.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from appa_secure.agreement import Agreement
from appa_secure.config_checks import exponents, largest_exponent
from appa_secure.errors import ConfigError
from appa_secure.journal import canonical_json
from appa_secure.secagg.errors import BadParameters, Headroom
from appa_secure.secagg.keys import Directory
from appa_secure.secagg.policy import fewest_honest

FILE = "membership.json"


@dataclass(frozen=True)
class Membership:
    """version: from 1, the founding members being 0. period: the version since which these parties take part."""

    run: str
    version: int
    period: int
    groups: Mapping[str, str]  # client id -> group
    directory: Directory

    def encode(self) -> bytes:
        """The content of `membership.json`: canonical JSON, keys in hex. Public."""
        clients = {c: {"group": g, "key": self.directory[c].hex()} for c, g in self.groups.items()}
        return canonical_json(
            {"run": self.run, "version": self.version, "period": self.period, "clients": clients}
        )

    @classmethod
    def decode(cls, raw: bytes) -> Membership:
        """Inverse of `encode`. Raises ConfigError for anything else."""
        try:
            fields = json.loads(raw)
            clients, version, period = fields["clients"], fields["version"], fields["period"]
            if set(fields) != {"run", "version", "period", "clients"} or not isinstance(fields["run"], str):
                raise ValueError("fields are not run, version, period, clients")
            if (
                type(version) is not int
                or type(period) is not int
                or not 0 <= period <= version
                or not version
            ):
                raise ValueError("needs 0 <= period <= version, and 1 <= version")
            if any(set(c) != {"group", "key"} or not isinstance(c["group"], str) for c in clients.values()):
                raise ValueError("a client is not {group, key}")
            directory = Directory({c: bytes.fromhex(facts["key"]) for c, facts in clients.items()})
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, BadParameters) as error:
            raise ConfigError(f"{FILE}: {error}. Fix: write it again") from None
        return cls(fields["run"], version, period, {c: f["group"] for c, f in clients.items()}, directory)


def membership_of(agreement: Agreement) -> Membership:
    """The membership in force."""
    a = agreement
    return Membership(a.plan.run, a.version, a.period, dict(a.groups), a.directory)


def renewed(agreement: Agreement, news: Membership) -> Agreement:
    """The agreement with the members of `news` in force; everything else stays.

    Raises ConfigError for what no site should follow: a system whose members are fixed, another run, a version that is not
    newer, fewer parties in a sum than secagg.min_cohort, a client in another group, a sum that could overflow or drown in
    rounding, output noise of too few.
    """
    a = agreement
    new = replace(
        a, groups=dict(news.groups), directory=news.directory, version=news.version, period=news.period
    )
    if a.system.kind != "appa":
        raise ConfigError(
            f"{FILE}: members of system={a.system.kind} stay the same. Fix: take it away, or system=appa in a new run"
        )
    if news.run != a.plan.run:
        raise ConfigError(f"{FILE} is for run {news.run!r}, this is {a.plan.run!r}. Fix: take the right file")
    if news.version <= a.version:
        raise ConfigError(f"{FILE}: version {news.version} is not newer than {a.version}, which is in force")
    if moved := sorted(c for c in new.groups if a.groups.get(c, new.groups[c]) != new.groups[c]):
        raise ConfigError(f"{FILE}: {', '.join(moved)} would change group. Fix: a new client id")
    if news.period == a.period and set(new.groups) != set(a.groups):
        raise ConfigError(f"{FILE}: other parties begin a new period. Fix: period={news.version}")
    groups = sorted(set(new.groups.values()))
    if not a.cohort and len(groups) < len(new.groups):
        raise ConfigError(f"{FILE}: two clients share a group. Fix: one client per group, or secagg=cohort")
    for where in groups if a.cohort else [None]:
        parties = len(new.groups if where is None else new.members(where))
        if not a.clear and parties < a.min_cohort:
            raise ConfigError(
                f"{FILE}: {parties} parties{f' in group {where}' if where else ''} would be left, "
                f"secagg.min_cohort={a.min_cohort}: sums over so few reveal them. Fix: keep more, or end the run"
            )
        try:
            a.reward_layout(1).preflight(parties)
        except (BadParameters, Headroom) as error:
            raise ConfigError(f"{FILE}: {error}") from None
        needed = max(exponents(a.aggregation).values())
        if not a.cohort and needed > largest_exponent(a.ring_bits, parties):
            raise ConfigError(
                f"{FILE}: with {parties} parties exp(-{needed:g}) drowns in the rounding of the ring"
            )
    if a.output is not None:
        parties = new.summed_together
        try:
            honest = fewest_honest(parties, new.threshold_of(parties), a.release, a.output.colluders)
        except BadParameters as error:
            raise ConfigError(f"{FILE}: {error}") from None
        if honest < a.output.honest:
            raise ConfigError(
                f"{FILE}: {honest} honest parties may be left in a sum, secagg.output_epsilon was planned for "
                f"{a.output.honest}: their noise would not be enough. Fix: keep more, or begin a new run"
            )
    return new


def next_membership(
    current: Membership,
    latest: int,
    *,
    leave: Iterable[str] = (),
    join: Mapping[str, tuple[str, bytes]] | None = None,
    rotate: Mapping[str, bytes] | None = None,
) -> Membership:
    """What comes after `current`. latest: the newest version any site has been given. join: (group, public key).

    Raises ConfigError when a name is, or is not, a member as the change supposes.
    """
    join, rotate, leave = dict(join or {}), dict(rotate or {}), set(leave)
    for names, inside, what in ((leave, True, "leave"), (rotate, True, "rotate"), (join, False, "join")):
        wrong = sorted(n for n in names if (n in current.groups) != inside)
        if wrong:
            raise ConfigError(
                f"{what} {', '.join(wrong)}: {'not a member' if inside else 'a member already'}"
            )
    if not (leave or join or rotate) or leave & set(rotate):
        raise ConfigError("nothing to change. Fix: name clients that leave, join or rotate, each once")
    groups = {c: g for c, g in current.groups.items() if c not in leave} | {
        c: g for c, (g, _) in join.items()
    }
    keys = {**current.directory, **rotate, **{c: k for c, (_, k) in join.items()}}
    version = latest + 1
    # Where a site has a version that never came into force, nobody knows what it has begun: begin again.
    same = not leave and not join and latest == current.version
    return Membership(
        current.run,
        version,
        current.period if same else version,
        groups,
        Directory({c: keys[c] for c in groups}),
    )


class Scored:
    """Which answers to which questions were summed in which period; a file that only grows, 20 bytes each."""

    _RECORD = np.dtype([("answer", "V16"), ("period", "<u4")])

    def __init__(self, path: Path) -> None:
        self._path = path
        self._period: dict[bytes, int] = {}
        if path.exists():
            raw = path.read_bytes()
            if len(raw) % self._RECORD.itemsize:  # killed while writing, before anything was answered
                raw = raw[: len(raw) - len(raw) % self._RECORD.itemsize]
                os.truncate(path, len(raw))
            rows = np.frombuffer(raw, self._RECORD)
            self._period = {bytes(r["answer"]): int(r["period"]) for r in rows}
        self._periods = set(self._period.values())

    def barred(self, questions: Sequence[str], answers: Sequence[Any], period: int) -> list[int]:
        """Positions of the answers that were summed in another period. answers: as parsed, float64 (K,)."""
        if self._periods <= {period}:
            return []
        keys = map(_key, questions, answers)
        return [i for i, key in enumerate(keys) if self._period.get(key, period) != period]

    def add(self, questions: Sequence[str], answers: Sequence[Any], period: int) -> None:
        """Remember them, on disk when this returns."""
        new = {key: period for key in map(_key, questions, answers) if key not in self._period}
        if not new:
            return
        with self._path.open("ab") as file:
            file.write(b"".join(key + period.to_bytes(4, "little") for key in new))
            file.flush()
            os.fsync(file.fileno())
        self._period |= new
        self._periods.add(period)


def _key(question: str, answer: Any) -> bytes:
    name = question.encode()
    return hashlib.sha256(len(name).to_bytes(4, "little") + name + answer.tobytes()).digest()[:16]
