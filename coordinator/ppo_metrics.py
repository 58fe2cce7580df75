"""What a PPO step reports about its rollouts: sums that add up over processes, and the figures made from
them."""

import torch
from torch import Tensor

from coordinator.gae import masked_moments


def rollout_sums(
    scores: Tensor, mask: Tensor, drift: Tensor | None, values: Tensor, returns: Tensor
) -> Tensor:
    """(11,) float64, additive over processes; the input of `rollout_metrics`.

    Args:
        scores: (B,), NaN where unscored.
        mask: (B, T), 0 on padding and on unscored completions.
        drift: (B, T) log pi/reference of the sampled tokens; None without a reference.
        values, returns: (B, T).
    """
    scored = ~torch.isnan(scores)
    kl = torch.zeros_like(scores) if drift is None else (drift * mask).sum(dim=1)
    counts = [scored.sum(), (~scored).sum(), scores.nansum(), kl[scored].sum(), mask.sum()]
    moments = [masked_moments(returns - values, mask), masked_moments(returns, mask)]
    return torch.cat([torch.stack([count.double() for count in counts]), *moments])


def rollout_metrics(sums: list[float], has_reference: bool) -> dict[str, float | None]:
    """reward, kl (per completion), length (tokens), unscored (share), value_explained (1 - Var[R - V] /
    Var[R]).

    None where there is nothing to measure.
    """
    count, unscored, reward, drift, tokens = sums[:5]
    residual, total = (
        squares / max(n, 1.0) - (sum_ / max(n, 1.0)) ** 2 for n, sum_, squares in (sums[5:8], sums[8:11])
    )
    return {
        "reward": reward / count if count else None,
        "kl": drift / count if count and has_reference else None,
        "length": tokens / count if count else None,
        "unscored": unscored / (count + unscored),
        "value_explained": 1.0 - residual / total if total > 1e-12 else None,
    }
