"""What an epoch may look like: its parameters, and the policy each client checks them against.

A client takes none of its safety parameters from the coordinator: a proposal weaker than the client's own
policy is refused.

Threshold. Unmasking needs t of the n clients of the proposal. For a coordinator to learn both secrets of one
client in one round it must show two survivor sets, each to t clients; honest clients answer once per round,
so with c colluding clients that needs 2t <= n + c. t = ceil(2n/3) makes it impossible for c < n/3, and t >
n/2 for c = 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal, get_args

from .errors import BadParameters, CohortTooSmall, PolicyViolation, UnknownParty
from .fixedpoint import Layout
from .graph import COMPLETE_UP_TO, CORRUPT, Sharing, complete, sparse
from .keys import COORDINATOR, KEY_BYTES, LOW_ORDER, Directory, check_id, digest
from .wire import Envelope, check_session

Release = Literal["abort", "noise", "recover"]
RELEASES = get_args(Release)
MAX_ROUNDS = 4096
DEFAULT_ROUNDS = 64


def threshold_for(parties: int, fraction: float = 2 / 3) -> int:
    """ceil(fraction * parties), and more than half in any case. 0.667 is read as two thirds."""
    if not 0.5 <= fraction <= 1:
        raise BadParameters(f"threshold fraction {fraction}: must lie in [0.5, 1]")
    return max(math.ceil(Fraction(fraction).limit_denominator(100) * parties), parties // 2 + 1)


def sharing_of(parties: int, threshold: int) -> Sharing:
    """The sharing graph of an epoch of so many clients."""
    return complete(parties, threshold) if parties <= COMPLETE_UP_TO else sparse(parties)


def most_colluders(parties: int, threshold: int) -> int:
    """How many of the clients may work with the coordinator: c with 2t > n + c, or a fifth on a sparse graph."""
    if parties <= COMPLETE_UP_TO:
        return 2 * threshold - parties - 1
    return math.floor(CORRUPT * parties)


def fewest_honest(parties: int, threshold: int, release: Release, colluders: int) -> int:
    """The least number of honest clients in any sum that opens: all under `abort`; else t - c on the complete graph and
    `Sharing.smallest_group` on a sparse one (docs/decisions/0013). Output noise is calibrated to it."""
    if not 0 <= colluders <= most_colluders(parties, threshold):
        raise BadParameters(
            f"{colluders} colluders among {parties} clients: threshold {threshold} stands 0.."
            f"{most_colluders(parties, threshold)}"
        )
    if release == "abort":
        return parties - colluders
    if parties <= COMPLETE_UP_TO:
        return threshold - colluders
    return sharing_of(parties, threshold).smallest_group


@dataclass(frozen=True)
class EpochParameters:
    """One epoch as proposed. `clients` is sorted; `threshold` shares open a secret; ring of 32 or 64 bits.
    `coordinator_key`: X25519 public key of the coordinator for this epoch, which uploads and answers are authenticated
    with."""

    session: bytes
    epoch: int
    clients: tuple[str, ...]
    threshold: int
    coordinator_key: bytes
    rounds: int = DEFAULT_ROUNDS
    ring_bits: int = 64

    def __post_init__(self) -> None:
        check_session(self.session)
        n = len(self.clients)
        for client in self.clients:
            check_id(client)
        if list(self.clients) != sorted(set(self.clients)):
            raise BadParameters("clients must be sorted and distinct")
        if n < 2:
            raise BadParameters(f"{n} client(s): secure aggregation needs at least 2")
        if not n < 2 * self.threshold <= 2 * n:
            raise BadParameters(f"threshold {self.threshold} of {n} clients: needs n/2 < t <= n")
        if self.epoch < 1:
            raise BadParameters("epochs are numbered from 1")
        if not 1 <= self.rounds <= MAX_ROUNDS:
            raise BadParameters(f"{self.rounds} rounds per epoch: needs 1..{MAX_ROUNDS}")
        if self.ring_bits not in (32, 64):
            raise BadParameters(f"ring_bits {self.ring_bits}: use 32 or 64")
        if len(self.coordinator_key) != KEY_BYTES:
            raise BadParameters(f"coordinator_key has {len(self.coordinator_key)} bytes, needs {KEY_BYTES}")
        if self.coordinator_key in LOW_ORDER:
            raise BadParameters("coordinator_key is a low-order point: everybody would know the reply keys")

    @cached_property
    def sharing(self) -> Sharing:
        """Who shares with how many, and how many shares open a secret. Public, the same for everyone."""
        return sharing_of(len(self.clients), self.threshold)

    @property
    def quorum(self) -> int:
        """The fewest clients a roster of bundles may have: holders are drawn from it."""
        return max(self.threshold, self.sharing.quorum)

    def digest(self) -> bytes:
        return self._digest

    @cached_property
    def _digest(self) -> bytes:  # every bundle is compared with it
        head = digest(
            "proposal",
            self.session,
            self.epoch,
            self.threshold,
            self.rounds,
            self.ring_bits,
            self.coordinator_key,
        )
        return digest("proposal-clients", head, *self.clients)


@dataclass(frozen=True)
class ClientPolicy:
    """One client's own limits.

    `release` decides when a sum may be opened (participation differencing):

    - `abort`: only for the whole roster, and only for a roster that is the whole directory. Nobody can be
      left out of a sum, so there are no two sums to subtract. A party that stays away for good needs new
      directories at every site.
    - `noise`: any survivors >= max(threshold, min_cohort), and only sums that carry output noise: two sums that differ
      in one party say no more of it than their noise allows, and the caller pays for each.
    - `recover`: any survivors >= max(threshold, min_cohort). The coordinator may obtain two sums that differ
      in one party (same inputs, with and without it) and subtract: only for members whose single input may
      be learnt.

    `colluders`: how many clients may work with the coordinator, or leave out their noise; None: `most_colluders`.
    """

    min_cohort: int = 5
    threshold_fraction: float = 2 / 3
    ring_bits: int = 64
    max_rounds: int = 256
    release: Release = "abort"
    colluders: int | None = None

    def __post_init__(self) -> None:
        if self.min_cohort < 2:
            raise BadParameters(f"min_cohort {self.min_cohort}: a sum of fewer than 2 hides nothing")
        if self.ring_bits not in (32, 64):
            raise BadParameters(f"ring_bits {self.ring_bits}: use 32 or 64")
        if self.release not in RELEASES:
            raise BadParameters(f"release {self.release!r}: use one of {', '.join(RELEASES)}")
        if self.max_rounds < 1:
            raise BadParameters(f"max_rounds {self.max_rounds}: must be at least 1")
        threshold_for(2, self.threshold_fraction)

    def accept(self, proposal: Envelope, client_id: str, directory: Directory) -> EpochParameters:
        """The proposal's parameters; raises a `RemoteMisbehaviour` naming the coordinator when this policy
        refuses them.
        """
        body = proposal.body
        try:
            parameters = EpochParameters(
                proposal.session,
                proposal.epoch,
                tuple(body["clients"]),
                body["threshold"],
                body["coordinator_key"],
                body["rounds"],
                body["ring_bits"],
            )
        except BadParameters as error:
            raise PolicyViolation(COORDINATOR, f"proposal: {error}") from None
        n = len(parameters.clients)
        for client in parameters.clients:
            if client not in directory:
                raise UnknownParty(
                    COORDINATOR, f"proposal lists '{client}', who is not in the provisioned directory"
                )
        if client_id not in parameters.clients:
            raise PolicyViolation(COORDINATOR, f"proposal does not list '{client_id}', to whom it was sent")
        self.check_cohort(parameters.clients, "proposal")
        needed = threshold_for(n, self.threshold_fraction)
        if parameters.threshold < needed:
            raise PolicyViolation(
                COORDINATOR, f"threshold {parameters.threshold} of {n}, this client requires {needed} or more"
            )
        if parameters.rounds > self.max_rounds:
            raise PolicyViolation(
                COORDINATOR, f"{parameters.rounds} rounds, this client allows {self.max_rounds}"
            )
        if parameters.ring_bits != self.ring_bits:
            raise PolicyViolation(
                COORDINATOR, f"ring of {parameters.ring_bits} bits, this client uses {self.ring_bits}"
            )
        if self.release == "abort" and set(parameters.clients) != set(directory):
            raise PolicyViolation(
                COORDINATOR,
                f"proposal lists {n} of the {len(directory)} provisioned clients; "
                "under release 'abort' it must list all",
            )
        return parameters

    def check_noise(self, layout: Layout, parameters: EpochParameters) -> None:
        """Raise `BadParameters` unless `layout` has the noise that this policy needs, calibrated to no more honest
        clients than a sum of this epoch may be left with."""
        if layout.noise is None:
            if self.release == "noise":
                raise BadParameters("under release 'noise' only vectors with output noise are summed")
            return
        n = len(parameters.clients)
        # From this client's own threshold: a proposal with a higher one does not make more colluders likely.
        own = most_colluders(n, threshold_for(n, self.threshold_fraction))
        colluders = own if self.colluders is None else self.colluders
        honest = fewest_honest(n, parameters.threshold, self.release, colluders)
        if layout.noise.honest > honest:
            raise BadParameters(
                f"output noise is calibrated to {layout.noise.honest} honest clients; a sum of this epoch may have {honest}"
            )

    def check_cohort(self, parties: Sequence[str], where: str) -> None:
        """Raise `CohortTooSmall` below the minimum cohort."""
        if len(parties) < self.min_cohort:
            raise CohortTooSmall(
                COORDINATOR,
                f"{where} has {len(parties)} parties, this client requires {self.min_cohort} or more",
            )
