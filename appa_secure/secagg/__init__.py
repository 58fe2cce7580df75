"""Secure aggregation: the coordinator learns the sum of the clients' vectors and nothing else.

Sans-IO: bytes in, bytes out; no clock, no file, no socket. numpy, cryptography and cbor2 only, so that an
auditor reads this package alone. Adversary: a coordinator that lies about rosters, keys, dropouts, contexts
and rounds, together with c clients where 2t > n + c (t = threshold, n = clients of the epoch; by default c
< n/3).

The protocol (double masking of Bonawitz et al., CCS 2017, set up once for many rounds)
---------------------------------------------------------------------------------------
Every client has, for each of the R rounds of an epoch, three secrets: the seed of its self-mask, a one-time X25519
mask key, and an answer key. It shares each t-of-m among m holders: all clients up to 100 of them, above that some
that it draws itself (`graph.py`). Its peers are its holders and the clients it holds for. Set-up, three exchanges:

    propose -> bundle   Each client checks the proposal against its own `ClientPolicy` and provisioned
                        `Directory` and signs: an X25519 encryption key, R mask keys, commitments of its 3 R secrets.
    roster  -> shares   Each client verifies all bundles, draws its holders and deals Shamir shares of its
                        secrets, one AEAD packet per holder, with signed digests of every share.
    start   -> ready    Each client verifies and decrypts its packets, does all key agreement of the epoch,
                        seals the pair seeds of each round under its own mask key of that round for the coordinator,
                        agrees with it on a reply key, forgets its private keys, and signs the transcript (digest of
                        proposal, bundles, final roster).

A round, two exchanges, and no public-key operation:

    round   -> upload   encode(vector) + self-mask + sum of +/- pairwise masks, every one an AES-256-CTR
                        keystream whose key is HKDF(secret; session, epoch, round, ids; salt = transcript),
                        expanded with (round, coding, context).
    unmask  -> answer   For each survivor a share of its answer key, for each dropped party a share of its mask
                        key and a hash of the pair seed. Shares of the survivors' self-mask seeds, sealed under
                        the sender's own answer key.

Uploads and answers carry a MAC under the reply key, over the request too, so that no forgery counts.

The coordinator rebuilds answer keys and mask keys, opens the sealed seed shares and the dropped parties' sealed pair
seeds, checks all against commitments and hashes, and subtracts the masks (`opening.py`).

Why a liar gains nothing
------------------------
Invented or swapped keys: bundles are signed by identities of a directory the coordinator cannot write; a
client counts the cohort in that directory. Different rosters, scales or contexts for different clients: all
of them are in the mask derivation (and rosters are acknowledged across clients), so masks do not cancel;
the sum is uniform noise and is reported as `SumOutOfRange`. False dropouts: a client answers one
partition per round, and with 2t > m + c no two partitions can both reach t of a party's holders, so never both
secrets of one party. Two partitions for different clients: a client's seed shares can be read only when t holders
called it a survivor, and then nobody gets its mask key; so every sum that comes out covers all honest parties that
were not given up, at least t - c (complete graph), or a large part of them except with probability 2^-40 (sparse).
Another round's secrets: every round has keys of its own, dealt as such; shares of earlier rounds are zeroed.
Replays: rounds only increase, on state that is persisted before a reply leaves. Sums over chosen subsets: the
release policy (`ClientPolicy.release`), and noise on the sum where the layout asks for it (`noise.py`). A wrong share,
seal or pair seed: pinned on its author and survived. A packet that does not open in set-up: named, alone or in a pair
(`Aborted.disputes`).

Members join, leave and rotate keys between epochs, by each site's own `ClientMachine.update_directory`; the
coordinator begins the next epoch of the session with a new machine.

The specification, byte by byte, with the security argument: threat_model/secure_aggregation.md. Why it is built like
this: decisions 4, 13, 14 and 15 in docs/decisions.

What it does not do: it does not check what a client puts in (a party can report any in-range vector), it
does not hide who took part, and a sum of few parties says much about each (keep `min_cohort` up). Python cannot wipe
memory reliably; secrets are zeroed where they live in arrays, dropped elsewhere.

Use `run_epoch_setup` and `run_round` on the coordinator's side, `respond` on the client's.
"""

from .client import ClientMachine, PayForNoise
from .coordinator import CoordinatorMachine
from .driver import (
    Contribute,
    Contribution,
    Exchange,
    Handler,
    close_epoch,
    in_process,
    respond,
    resume,
    run_epoch_setup,
    run_round,
)
from .errors import (
    BadEncoding,
    BadMac,
    BadParameters,
    BadShare,
    BadSignature,
    BelowThreshold,
    BothShareKinds,
    CohortTooSmall,
    ContextMismatch,
    CorruptState,
    Headroom,
    IllegalEvent,
    LayoutMismatch,
    LocalMisuse,
    OutOfOrder,
    OutOfRange,
    PolicyViolation,
    ProtocolError,
    ReleaseRefused,
    RemoteMisbehaviour,
    ReplayedRound,
    SumOutOfRange,
    UnknownParty,
    WrongEpoch,
    WrongRoster,
)
from .fixedpoint import Coding, Layout, OutputNoise, Segment
from .keys import Directory, IdentityKey, Rng
from .outcomes import Aborted, Aggregate, Continue, EpochReady, Fault, Outcome
from .policy import ClientPolicy, EpochParameters, fewest_honest, most_colluders, threshold_for
from .states import ClientState, CoordinatorState

__all__ = [
    "Aborted", "Aggregate", "BadEncoding", "BadMac", "BadParameters", "BadShare", "BadSignature",
    "BelowThreshold", "BothShareKinds", "ClientMachine", "ClientPolicy", "ClientState", "Coding",
    "CohortTooSmall", "ContextMismatch", "Continue", "Contribute", "Contribution", "CoordinatorMachine",
    "CoordinatorState", "CorruptState", "Directory", "EpochParameters", "EpochReady", "Exchange",
    "Fault", "Handler", "Headroom", "IdentityKey", "IllegalEvent", "Layout", "LayoutMismatch",
    "LocalMisuse", "OutOfOrder", "OutOfRange", "Outcome", "OutputNoise", "PayForNoise", "PolicyViolation",
    "ProtocolError", "ReleaseRefused", "RemoteMisbehaviour", "ReplayedRound", "Rng", "Segment", "SumOutOfRange",
    "UnknownParty", "WrongEpoch", "WrongRoster", "close_epoch", "fewest_honest", "in_process", "most_colluders",
    "respond", "resume", "run_epoch_setup", "run_round", "threshold_for",
]  # fmt: skip
