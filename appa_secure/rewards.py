"""How well an answer matches a group: similarities in [0, 1], vectorised over a batch of rollouts.

Shapes: B rollouts, K options padded to a common width; `mask` marks the real ones. Targets are distributions.
Answers are distributions for the `dpa` kinds, one-hot for `choice`, and scores for the `opa` kinds, of which
only the order counts (larger = preferred); `appa_secure.tasks.parse` returns exactly these.

| kind          | task   | reward                                                                          |
|---------------|--------|---------------------------------------------------------------------------------|
| `js`          | dpa    | 1 - JSD(p, q), base 2                                                           |
| `wasserstein` | dpa    | 1 - W1(p, q) / (largest - smallest ordinal); needs ordinals                     |
| `cosine`      | dpa    | p·q / (|p|·|q|)                                                                 |
| `kl`          | dpa    | exp(-KL(q̃ ‖ p̃)) in nats, both smoothed to (1-s)·x + s/K, s = `KL_SMOOTHING`     |
| `borda`       | opa    | Σ_k b_k·q_k over its largest value, b = the answer's Borda points               |
| `kendall`     | opa    | (1 + τ_b) / 2; 1/2 where the target is flat and no order can be right or wrong  |
| `binary`      | opa    | 1 when the answer's first option is one of the target's most frequent, else 0   |
| `choice`      | choice | the target's probability of the chosen option                                   |

The list follows APPA (arXiv 2604.04261) and PluralLLM (arXiv 2503.09925). They do not fix the formulas of
`borda` and `kl` as far as we know; those above are this project's: `borda` is 1 exactly when the order agrees
with the target, and changes little between nearly equal options; `kl` is 1 exactly when p = q.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

KL_SMOOTHING = 0.01

_TASK_OF = {
    "js": "dpa",
    "wasserstein": "dpa",
    "cosine": "dpa",
    "kl": "dpa",
    "borda": "opa",
    "kendall": "opa",
    "binary": "opa",
    "choice": "choice",
}
KINDS = tuple(_TASK_OF)
# Training reward of an answer that cannot be read: below what a random readable answer earns on surveys, so that none is
# never the better choice, and not far below, where a few of them would set the scale of all advantages.
FORMAT_PENALTY = dict.fromkeys(KINDS, 0.5) | {"kl": 0.25, "kendall": 0.25, "binary": 0.0, "choice": 0.0}


def task_of(kind: str) -> str:
    """The task whose answers a reward kind scores: `dpa`, `opa` or `choice`."""
    try:
        return _TASK_OF[kind]
    except KeyError:
        raise ValueError(f"task.reward {kind!r} is unknown; choose one of {', '.join(KINDS)}") from None


def score(
    kind: str,
    answers: ArrayLike,
    targets: ArrayLike,
    ordinals: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Floats:
    """Reward of each answer against its target.

    Args:
        kind: one of `KINDS`.
        answers: (B, K), see the module's head.
        targets: (B, K) distributions.
        ordinals: (B, K) ascending positions of the options; only `wasserstein` uses them.
        mask: (B, K) True where an option exists, real options first; default all True.

    Returns:
        float64 (B,) in [0, 1].

    Raises:
        ValueError: wrong shapes, values that are not finite or no distributions, missing or constant
            ordinals.
    """
    task = task_of(kind)
    answers = np.asarray(answers, dtype=np.float64)
    targets = np.asarray(targets, dtype=np.float64)
    if answers.ndim != 2 or answers.shape != targets.shape:
        raise ValueError(f"answers {answers.shape} and targets {targets.shape} must both be (B, K)")
    real = np.ones(answers.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    if real.shape != answers.shape or (real[:, 1:] > real[:, :-1]).any() or (real.sum(axis=1) < 2).any():
        raise ValueError("mask must be (B, K), real options first, at least two of them in each row")
    _check_distributions("targets", targets, real)
    if task == "opa":
        _check_finite("answers", answers, real)
    else:
        _check_distributions("answers", answers, real)
    gaps = None
    if kind == "wasserstein":
        if ordinals is None:
            raise ValueError("reward 'wasserstein' needs ordinals; use js, cosine or kl for nominal options")
        positions = np.asarray(ordinals, dtype=np.float64)
        if positions.shape != answers.shape:
            raise ValueError(f"ordinals {positions.shape} must have the shape of the answers {answers.shape}")
        gaps = np.zeros((len(positions), max(positions.shape[1] - 1, 0)))
        for row, (values, keep) in enumerate(zip(positions, real, strict=True)):
            gaps[row, : keep.sum() - 1] = _relative_gaps(values[keep], f"row {row}")
    return _score(kind, np.where(real, answers, 0.0), np.where(real, targets, 0.0), gaps, real)


class Scorer:
    """Rewards of one party's targets, with everything that does not depend on the answers prepared.

    Args:
        kind: one of `KINDS`.
        targets: question id -> (K,) distribution.
        ordinals: question id -> (K,) ascending positions or None; `wasserstein` needs them for every
            question.

    Raises:
        ValueError: names the question whose target or ordinals cannot be used.
    """

    def __init__(
        self,
        kind: str,
        targets: Mapping[str, ArrayLike],
        ordinals: Mapping[str, Sequence[float] | Floats | None] | None = None,
    ) -> None:
        self.kind = kind
        self.task = task_of(kind)
        rows = {qid: np.asarray(target, dtype=np.float64) for qid, target in targets.items()}
        self.targets: Mapping[str, Floats] = rows
        width = max((len(row) for row in rows.values()), default=0)
        self._row = {qid: index for index, qid in enumerate(rows)}
        self._size = np.array([len(row) for row in rows.values()], dtype=np.int64)  # (Q,)
        self._mask = np.arange(width) < self._size[:, None]  # (Q, K)
        self._targets = np.zeros((len(rows), width))
        self._gaps = np.zeros((len(rows), max(width - 1, 0))) if kind == "wasserstein" else None
        for index, (qid, row) in enumerate(rows.items()):
            if row.ndim != 1 or len(row) < 2:
                raise ValueError(f"target of question {qid!r} must be a vector of at least two options")
            _check_distributions(f"target of question {qid!r}", row[None], np.ones((1, len(row)), dtype=bool))
            self._targets[index, : len(row)] = row
            if self._gaps is not None:
                positions = None if ordinals is None else ordinals.get(qid)
                if positions is None:
                    raise ValueError(
                        f"reward 'wasserstein' needs ordinals and question {qid!r} has none; "
                        "use js, cosine or kl, or keep ordinal questions only (data.ordinal_only=true)"
                    )
                if len(positions) != len(row):
                    raise ValueError(f"question {qid!r}: {len(positions)} ordinals for {len(row)} options")
                gaps = _relative_gaps(np.asarray(positions, dtype=np.float64), f"question {qid!r}")
                self._gaps[index, : len(gaps)] = gaps

    def knows(self, qid: str) -> bool:
        """Whether there is a target for the question."""
        return qid in self._row

    def score(self, qids: Sequence[str], answers: Sequence[Floats | None]) -> Floats:
        """Rewards of parsed answers, float64 (B,) in [0, 1]; NaN where the answer is None (malformed).

        Raises:
            ValueError: lengths differ, a question is unknown, or an answer has the wrong number of options.
        """
        if len(qids) != len(answers):
            raise ValueError(f"{len(qids)} question ids for {len(answers)} answers")
        rewards = np.full(len(qids), np.nan)
        given = [index for index, answer in enumerate(answers) if answer is not None]
        if not given:
            return rewards
        try:
            rows = np.array([self._row[qids[index]] for index in given])  # (V,)
        except KeyError as missing:
            raise ValueError(f"question {missing.args[0]!r} has no target here") from None
        values = [answer for answer in answers if answer is not None]
        lengths = np.array([len(answer) for answer in values])
        if (lengths != self._size[rows]).any():
            at = int(np.flatnonzero(lengths != self._size[rows])[0])
            raise ValueError(
                f"answer {given[at]} has {lengths[at]} values, but question {qids[given[at]]!r} has "
                f"{self._size[rows[at]]} options"
            )
        mask = self._mask[rows]  # (V, K)
        padded = np.zeros(mask.shape)
        padded[mask] = np.concatenate(values)
        if not np.isfinite(padded).all():
            raise ValueError("answers must be finite")
        gaps = None if self._gaps is None else self._gaps[rows]
        rewards[given] = _score(self.kind, padded, self._targets[rows], gaps, mask)
        return rewards


def fairness_index(per_group: ArrayLike, fi: str = "cov2") -> float:
    """Fairness index of the groups' alignment scores, in (0, 1]; 1 = all equal.

    CoV is the coefficient of variation with the population standard deviation. `cov2`: 1/(1 + CoV²), which is
    Jain's index and the form that fits APPA's published numbers; `cov`: 1/(1 + CoV). All-zero scores are
    equal scores, so they give 1.

    Args:
        per_group: (G,) non-negative scores.

    Raises:
        ValueError: no groups, negative or non-finite scores, unknown `fi`.
    """
    values = np.asarray(per_group, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"per_group must be a non-empty vector of finite scores >= 0, got {values!r}")
    mean = values.mean()
    if fi not in ("cov2", "cov"):
        raise ValueError(f"aggregation.fi {fi!r} is unknown; choose cov2 or cov")
    if mean == 0:
        return 1.0
    cov = float(np.std(values / mean))
    return 1.0 / (1.0 + (cov * cov if fi == "cov2" else cov))


# Kernels: padded with zeros, inputs checked.


def _score(kind: str, answers: Floats, targets: Floats, gaps: Floats | None, mask: Mask) -> Floats:
    if kind == "wasserstein":
        assert gaps is not None
        difference = np.cumsum(answers - targets, axis=1)[:, :-1]  # (B, K-1) difference of CDFs
        reward = 1.0 - (np.abs(difference) * gaps).sum(axis=1)
    else:
        reward = _KERNELS[kind](answers, targets, mask)
    clipped: Floats = np.clip(reward, 0.0, 1.0)  # against rounding
    return clipped


def _js(answers: Floats, targets: Floats, mask: Mask) -> Floats:
    return 1.0 - _divergence_bits(answers, targets)


def _cosine(answers: Floats, targets: Floats, mask: Mask) -> Floats:
    lengths = np.linalg.norm(answers, axis=1) * np.linalg.norm(targets, axis=1)
    reward: Floats = (answers * targets).sum(axis=1) / lengths
    return reward


def _kl(answers: Floats, targets: Floats, mask: Mask) -> Floats:
    floor = KL_SMOOTHING / mask.sum(axis=1, keepdims=True)
    p = np.where(mask, (1 - KL_SMOOTHING) * answers + floor, 1.0)
    q = np.where(mask, (1 - KL_SMOOTHING) * targets + floor, 1.0)
    reward: Floats = np.exp(-np.sum(q * np.log(q / p), axis=1))
    return reward


def _borda(answers: Floats, targets: Floats, mask: Mask) -> Floats:
    count = mask.sum(axis=1)  # (B,)
    ahead = np.sign(answers[:, :, None] - answers[:, None, :]) * mask[:, None, :]  # (B, K, K)
    # Ties share their points.
    points = ((count - 1)[:, None] + ahead.sum(axis=2)) / (2.0 * (count - 1))[:, None]  # (B, K) in [0, 1]
    descending = -np.sort(-targets, axis=1)
    best = (descending * np.maximum((count - 1)[:, None] - np.arange(targets.shape[1]), 0)).sum(axis=1)
    reward: Floats = (points * targets * mask).sum(axis=1) * (count - 1) / best  # best/(count-1) >= 1/2
    return reward


def _kendall(answers: Floats, targets: Floats, mask: Mask) -> Floats:
    pairs = mask[:, :, None] & mask[:, None, :]
    a = np.sign(answers[:, :, None] - answers[:, None, :]) * pairs
    t = np.sign(targets[:, :, None] - targets[:, None, :]) * pairs
    scale = np.sqrt((a * a).sum(axis=(1, 2)) * (t * t).sum(axis=(1, 2)))
    tau = np.divide((a * t).sum(axis=(1, 2)), scale, out=np.zeros(len(scale)), where=scale > 0)
    reward: Floats = 0.5 * (1.0 + tau)
    return reward


def _binary(answers: Floats, targets: Floats, mask: Mask) -> Floats:
    first = np.where(mask, answers, -np.inf).argmax(axis=1)
    reward: Floats = (targets[np.arange(len(targets)), first] == targets.max(axis=1)).astype(np.float64)
    return reward


def _choice(answers: Floats, targets: Floats, mask: Mask) -> Floats:
    reward: Floats = (answers * targets).sum(axis=1)
    return reward


_KERNELS: dict[str, Callable[[Floats, Floats, Mask], Floats]] = {
    "js": _js,
    "cosine": _cosine,
    "kl": _kl,
    "borda": _borda,
    "kendall": _kendall,
    "binary": _binary,
    "choice": _choice,
}


def _divergence_bits(p: Floats, q: Floats) -> Floats:
    """Jensen-Shannon divergence in bits, (B, K), (B, K) -> (B,), with 0·log 0 = 0."""
    middle = 0.5 * (p + q)
    safe = np.where(middle > 0, middle, 1.0)
    terms = p * np.log2(np.where(p > 0, p / safe, 1.0)) + q * np.log2(np.where(q > 0, q / safe, 1.0))
    divergence: Floats = np.clip(0.5 * terms.sum(axis=1), 0.0, 1.0)
    return divergence


def _relative_gaps(positions: Floats, where: str) -> Floats:
    """Distances between neighbouring options over the whole range: (K,) ascending -> (K-1,), summing to 1."""
    gaps = np.diff(positions)
    if not np.isfinite(positions).all() or (gaps < 0).any() or not gaps.sum() > 0:
        raise ValueError(
            f"ordinals of {where} must be finite, ascending and not all equal: {positions.tolist()}"
        )
    relative: Floats = gaps / gaps.sum()
    return relative


def _check_finite(name: str, values: Floats, mask: Mask) -> None:
    if not np.isfinite(values[mask]).all():
        raise ValueError(f"{name} must be finite")


def _check_distributions(name: str, values: Floats, mask: Mask) -> None:
    _check_finite(name, values, mask)
    kept = np.where(mask, values, 0.0)
    if (kept < 0).any() or (np.abs(kept.sum(axis=1) - 1.0) > 1e-5).any():
        raise ValueError(f"{name} must be distributions: non-negative and summing to 1 (within 1e-5)")
