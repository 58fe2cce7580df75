"""Federated training of the preference predictor: rounds of masked updates, averaged, applied by Adam.

Every client sends a pseudo-gradient that is already differentially private; the coordinator sees only their mean.
Adam on the averaged pseudo-gradient is FedAdam (Reddi et al., ICLR 2021, algorithm 2); with one local step per round
it is DP-FedSGD, where the noise of all clients averages before anything non-linear touches it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from appa_secure.agreement import PREDICTOR, Agreement
from appa_secure.errors import RunError
from appa_secure.journal import Journal, atomic_write, read_journal
from appa_secure.messages import unpack_rows
from appa_secure.predictor import PreferencePredictor, flatten
from appa_secure.privacy.ledger import ROW_FIELDS
from appa_secure.records import RunDir
from appa_secure.secagg.errors import BadEncoding
from appa_secure.secagg.fixedpoint import Layout
from coordinator.rounds import NotOpened, Summed

_BETA1, _BETA2, _EPS = 0.9, 0.99, 1e-8
_PATIENCE = 5


class Sums(Protocol):
    """Where sums of updates come from: `Rounds`, or the curator of a centralised simulation."""

    def sum(self, session: str, kind: str, payload: Mapping[str, Any], layout: Layout) -> Summed | NotOpened:
        """See `Rounds.sum`."""
        ...


def initial_predictor(agreement: Agreement, seed: int) -> np.ndarray:
    """Initial parameters (P,) float32; a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return flatten(PreferencePredictor(agreement.predictor))


def train_predictor(
    agreement: Agreement,
    rounds: Sums,
    run: RunDir,
    seed: int,
    server_lr: float,
    progress: Callable[[int, float | None], None],
    measure: Callable[[int, np.ndarray], None] = lambda done, theta: None,
) -> np.ndarray:
    """Run (or go on with) all rounds of the plan; returns the parameters (P,) float32.

    The state after each round is on disk before the next begins. progress: called with (rounds done, highest epsilon);
    measure: called with (rounds done, parameters (P,)).
    """
    path = run.path("predictor") / "state.npz"
    path.parent.mkdir(exist_ok=True)
    total = agreement.plan.rounds
    if path.exists():
        with np.load(path) as stored:
            done, theta, m, v = int(stored["round"]), stored["theta"], stored["m"], stored["v"]
    else:
        done, theta = 0, initial_predictor(agreement, seed).astype(np.float64)
        m, v = np.zeros_like(theta), np.zeros_like(theta)
    failed = 0
    while done < total:
        payload = {"round": done, "parameters": theta.astype("<f4").tobytes()}
        summed = rounds.sum(PREDICTOR, "train", payload, agreement.predictor_layout)
        if isinstance(summed, NotOpened):
            failed += 1
            if failed >= _PATIENCE:
                raise RunError(f"predictor round {done + 1} failed {_PATIENCE} times: {summed.reason}")
            continue
        failed = 0
        spent = [
            record_ledger(run.ledger, client, fields["ledger"]) for client, fields in summed.replies.items()
        ]
        gradient = summed.sum / len(summed.contributors)
        done += 1
        theta, m, v = adam(theta, m, v, gradient, done, server_lr * decay(done, total))
        # Reported first: a kill between the two repeats the round and reports it once more, and none is left out.
        progress(done, max((s for s in spent if s is not None), default=None))
        measure(done, theta)
        save_state(path, {"round": np.array(done), "theta": theta, "m": m, "v": v})
    return theta.astype(np.float32)


def adam(
    theta: np.ndarray, m: np.ndarray, v: np.ndarray, gradient: np.ndarray, done: int, lr: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step of Adam on an averaged update (FedAdam): parameters and both moments after step number `done`, from 1."""
    m = _BETA1 * m + (1 - _BETA1) * gradient
    v = _BETA2 * v + (1 - _BETA2) * gradient**2
    step = (m / (1 - _BETA1**done)) / (np.sqrt(v / (1 - _BETA2**done)) + _EPS)
    return theta - lr * step, m, v


def decay(done: int, total: int) -> float:
    """Constant, then linear to (almost) 0 over the last third: late rounds average their noise instead of following it."""
    return min(1.0, (total - done + 1) / max(1.0, total / 3))


def save_state(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Replace a file of named arrays atomically."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    atomic_write(path, buffer.getvalue())


def copy_rows(source: Path, target: Journal, key: Sequence[str]) -> None:
    """Append the rows of another run's journal that have `key` and are not there yet."""
    known = {tuple(row.get(k) for k in key) for row in target}
    for row in read_journal(source):
        name = tuple(row.get(k) for k in key)
        if None not in name and name not in known:
            target.append(row)


def record_ledger(ledger: Journal, client: str, raw: bytes) -> float | None:
    """Copy a client's new ledger rows into a ledger of the run, before its release is used; returns its epsilon.

    Raises BadEncoding naming the client for rows that are not its own, or not complete.
    """
    known = {(row["client"], row["release"]) for row in ledger}
    rows: list[dict[str, Any]] = unpack_rows(raw, client, "ledger")
    for row in rows:
        if row.get("client") != client:
            raise BadEncoding(client, f"sent a ledger row of {row.get('client')!r:.80}")
        if set(row) != set(ROW_FIELDS) or not all(isinstance(row[k], form) for k, form in ROW_FIELDS.items()):
            raise BadEncoding(client, f"ledger row with other fields than {sorted(ROW_FIELDS)}")
        if not all(math.isfinite(v) for v in row.values() if isinstance(v, float)):
            raise BadEncoding(client, "ledger row with numbers that are not finite")
        if (client, row["release"]) not in known:
            ledger.append(row)
    return float(rows[-1]["epsilon"]) if rows else None
