"""The coordinator's state of one epoch and its encoding: bundles, signed messages, sealed tables, a sum of masked
vectors. Public data, but for the keys that clients' replies are authenticated with: whoever has them can forge replies to
this coordinator, and reads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from . import cbor
from .client_store import dump_parameters, load_parameters, load_roster
from .errors import CorruptState, ProtocolError
from .fixedpoint import Layout
from .graph import SharingGraph
from .keys import Directory
from .masks import RingVector, ring_dtype
from .outcomes import Fault
from .policy import EpochParameters
from .roster import Roster
from .states import CoordinatorState
from .wire import Envelope, parse

STATE_VERSION = 3
FAULTS_KEPT = 4  # of one kind and party in one phase
TEXT_KEPT = 1000  # characters of what a party says of itself


@dataclass
class CoordinatorEpoch:
    """What the coordinator remembers of an epoch and of its open round and phase."""

    parameters: EpochParameters
    private: bytes = field(default=b"", repr=False)  # X25519; emptied once the reply keys are made
    reply_keys: dict[str, bytes] = field(default_factory=dict, repr=False)  # dealer -> what authenticates it
    roster: Roster | None = None
    holders: dict[str, tuple[str, ...]] = field(default_factory=dict)  # dealer -> who holds its shares
    digests: dict[tuple[str, str], bytes] = field(
        default_factory=dict
    )  # (dealer, holder) -> signed share digests
    tables: dict[str, bytes] = field(default_factory=dict)  # client -> its sealed pair seeds
    acks: dict[str, bytes] = field(default_factory=dict)
    confirmed: set[str] = field(default_factory=set)  # clients that have seen the acknowledgements
    round: int = 0
    layout: Layout | None = None
    context: bytes = b""
    total: RingVector | None = None  # sum of the uploads so far: they are added as they arrive, never kept
    survivors: tuple[str, ...] = ()
    faults: list[Fault] = field(default_factory=list)
    outbound: dict[str, bytes] = field(default_factory=dict)  # of the current phase
    settled: dict[str, bytes] = field(default_factory=dict)  # sender -> proof of its reply in this phase
    inbox: dict[str, Envelope] = field(default_factory=dict)  # valid replies of this phase, but for uploads
    earlier_faults: int = 0  # how many of `faults` are from earlier phases

    @property
    def dealers(self) -> tuple[str, ...]:
        return tuple(sorted(self.holders))

    @cached_property
    def graph(self) -> SharingGraph:
        """Once the dealers are known."""
        return SharingGraph(self.holders)

    @cached_property
    def transcript(self) -> bytes:
        """Once the dealers are known."""
        return self.roster.transcript(self.dealers) if self.roster else b""

    @property
    def phase_faults(self) -> list[Fault]:
        return self.faults[self.earlier_faults :]

    def note(self, fault: Fault) -> None:
        """Remember what went wrong. Of one kind and party the first few of a phase are kept and the others counted in the
        last, so that nobody fills the coordinator's memory; all strangers count as one party."""
        known = fault.party if fault.party in self.parameters.clients else ""
        mine = [
            i
            for i in range(self.earlier_faults, len(self.faults))
            if self.faults[i].kind == fault.kind
            and (
                self.faults[i].party == known
                or not (known or self.faults[i].party in self.parameters.clients)
            )
        ]
        if len(mine) < FAULTS_KEPT:
            texts = {
                name: getattr(fault, name)[:TEXT_KEPT] for name in ("party", "code", "reason", "accused")
            }
            self.faults.append(replace(fault, **texts))
        else:
            self.faults[mine[-1]] = replace(self.faults[mine[-1]], more=self.faults[mine[-1]].more + 1)

    def begin_phase(self, outbound: dict[str, bytes]) -> None:
        self.outbound, self.settled, self.inbox = outbound, {}, {}
        self.earlier_faults = len(self.faults)


def dump(state: CoordinatorState, min_cohort: int, release: str, epoch: CoordinatorEpoch) -> bytes:
    return cbor.encode(
        {
            "version": STATE_VERSION,
            "state": state.value,
            "min_cohort": min_cohort,
            "release": release,
            "parameters": dump_parameters(epoch.parameters),
            "private": epoch.private,
            "reply_keys": epoch.reply_keys,
            "bundles": [bundle.raw for bundle in epoch.roster.bundles] if epoch.roster else [],
            "holders": {dealer: list(row) for dealer, row in epoch.holders.items()},
            "digests": [[dealer, holder, value] for (dealer, holder), value in epoch.digests.items()],
            "tables": epoch.tables,
            "acks": epoch.acks,
            "confirmed": sorted(epoch.confirmed),
            "round": epoch.round,
            "layout": _layout_fields(epoch.layout) if epoch.layout else [],
            "context": epoch.context,
            "total": [] if epoch.total is None else [epoch.total.tobytes()],
            "survivors": list(epoch.survivors),
            "faults": [[f.party, f.kind, f.code, f.reason, f.accused, f.more] for f in epoch.faults],
            "outbound": epoch.outbound,
            "settled": epoch.settled,
            "inbox": {name: envelope.raw for name, envelope in epoch.inbox.items()},
            "earlier_faults": epoch.earlier_faults,
        }
    )


def _layout_fields(layout: Layout) -> list[Any]:
    return [layout.ring_bits, layout.describe(), layout.describe_noise()]


def load(data: bytes, directory: Directory) -> tuple[CoordinatorState, int, Any, CoordinatorEpoch]:
    """(state, min_cohort, release, epoch); raises `CorruptState` for anything `dump` did not write."""
    try:
        fields = cbor.decode(data)
        if fields["version"] != STATE_VERSION:
            raise CorruptState(
                f"coordinator state is of version {fields['version']!r:.20}, this is {STATE_VERSION}"
            )
        return (
            CoordinatorState(fields["state"]),
            fields["min_cohort"],
            fields["release"],
            _load(fields, directory),
        )
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, ProtocolError) as error:
        if isinstance(error, CorruptState):
            raise
        raise CorruptState(f"coordinator state cannot be read: {type(error).__name__}") from None


def _load(fields: Mapping[str, Any], directory: Directory) -> CoordinatorEpoch:
    parameters = load_parameters(fields["parameters"])
    layout = fields["layout"]
    return CoordinatorEpoch(
        parameters=parameters,
        private=fields["private"],
        reply_keys=dict(fields["reply_keys"]),
        roster=load_roster(parameters, fields["bundles"], directory),
        holders={dealer: tuple(row) for dealer, row in fields["holders"].items()},
        digests={(dealer, holder): value for dealer, holder, value in fields["digests"]},
        tables=dict(fields["tables"]),
        acks=dict(fields["acks"]),
        confirmed=set(fields["confirmed"]),
        round=fields["round"],
        layout=Layout.from_description(layout[1], layout[0], layout[2]) if layout else None,
        context=fields["context"],
        total=np.frombuffer(fields["total"][0], ring_dtype(parameters.ring_bits)).copy()
        if fields["total"]
        else None,
        survivors=tuple(fields["survivors"]),
        faults=[Fault(*fault) for fault in fields["faults"]],
        outbound=dict(fields["outbound"]),
        settled=dict(fields["settled"]),
        inbox={name: parse(raw, name) for name, raw in fields["inbox"].items()},
        earlier_faults=fields["earlier_faults"],
    )
