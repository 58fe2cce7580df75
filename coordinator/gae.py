"""The arithmetic of PPO on token sequences: rewards, advantages, losses. Pure functions of torch tensors.

Every tensor is (B, T): B completions, T token positions, padded on the right. ``mask`` is 1 on the tokens
that were sampled (the end token included) and 0 on padding; whatever stands on padding never reaches a
result.

Sources: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation"
(GAE); Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (PPO); Ziegler et al. 2019,
"Fine-Tuning Language Models from Human Preferences" (KL in the reward).
"""

import torch
from torch import Tensor


def token_rewards(
    scores: Tensor, logps: Tensor, ref_logps: Tensor | None, mask: Tensor, kl_coef: float
) -> Tensor:
    """Per-token rewards: Ziegler 2019 eq. 2, R = r(x, y) - beta log(pi(y|x) / rho(y|x)), spread over the
    tokens.

    Args:
        scores: (B,) score of each completion; the last token of the completion receives it.
        logps: (B, T) log-probabilities of the sampled tokens under the policy that sampled them.
        ref_logps: (B, T) the same under the frozen reference rho; None leaves the KL term out.
        mask: (B, T).
        kl_coef: beta >= 0.

    Returns:
        (B, T) rewards, 0 on padding. A row without any token has no last token and gets zeros.
    """
    mask = mask.to(logps.dtype)
    rewards = torch.zeros_like(logps)
    if ref_logps is not None:
        rewards = -kl_coef * (logps - ref_logps)
    rewards = torch.where(mask > 0, rewards, torch.zeros_like(rewards))
    lengths = mask.sum(dim=1).long()  # (B,)
    last = (torch.arange(mask.size(1), device=mask.device) == (lengths - 1).unsqueeze(1)).to(
        logps.dtype
    )  # (B, T)
    return rewards + last * scores.to(logps.dtype).unsqueeze(1)


def leave_one_out(scores: Tensor, group: int) -> Tensor:
    """Scores less the mean score of the other completions of the same prompt (RLOO, Ahmadian et al. 2024, eq. 6).

    The baseline of a completion does not depend on that completion, so the policy gradient stays unbiased;
    what differs between prompts, which a critic would need many visits to learn, is gone.

    Args:
        scores: (B,), `group` completions of one prompt in a row; NaN where not scored.

    Returns:
        (B,) centred scores; NaN stays NaN, and a completion with no scored sibling gets 0.
    """
    rows = scores.view(-1, group)
    known = ~torch.isnan(rows)
    siblings = known.sum(dim=1, keepdim=True) - known.long()  # scored completions other than this one
    others = (rows.nansum(dim=1, keepdim=True) - rows.nan_to_num(0.0)) / siblings.clamp(min=1)
    centred = torch.where(siblings > 0, rows - others, rows * 0.0)
    return centred.view(-1)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the value targets that go with them.

    Schulman 2016 eq. 16: A_t = sum_l (gamma lam)^l delta_{t+l} with delta_t = r_t + gamma V(s_{t+1}) -
    V(s_t), as the recursion A_t = delta_t + gamma lam A_{t+1}. The state after the last token is terminal: V
    = 0 and A = 0 there.

    Args:
        rewards, values, mask: (B, T); values[t] is V of the state in which token t was chosen.
        gamma, lam: in [0, 1].

    Returns:
        (advantages, returns), both (B, T) and 0 on padding; returns = advantages + values.
    """
    mask = mask.to(rewards.dtype)
    rewards, values = rewards.masked_fill(mask == 0, 0.0), values.masked_fill(mask == 0, 0.0)
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])  # A_{t+1}, (B,)
    next_value = torch.zeros_like(following)  # V(s_{t+1}), (B,)
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = following
    return advantages, (advantages + values) * mask


def whiten(x: Tensor, mask: Tensor, moments: Tensor | None = None) -> Tensor:
    """Shift and scale x (B, T) to mean 0 and variance 1 over the mask; 0 on padding.

    ``moments`` are the sums (count, sum x, sum x^2) over all processes, see ``masked_moments``; by default
    over x.
    """
    count, total, squares = (masked_moments(x, mask) if moments is None else moments).unbind()
    mean = total / count.clamp(min=1.0)
    variance = (squares / count.clamp(min=1.0) - mean**2).clamp(min=0.0)
    return torch.where(mask > 0, (x - mean.to(x.dtype)) * torch.rsqrt(variance + 1e-8).to(x.dtype), 0.0)


def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """(3,) float64: count, sum and sum of squares of x over the mask; additive over processes."""
    kept = x[mask > 0].double()
    return torch.stack(
        [torch.tensor(float(kept.numel()), dtype=kept.dtype, device=x.device), kept.sum(), (kept**2).sum()]
    )


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the mask; 0 if the mask is empty, with a gradient that is 0 then."""
    mask = mask.to(x.dtype)
    return (x.masked_fill(mask == 0, 0.0) * mask).sum() / mask.sum().clamp(min=1.0)


def policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate, PPO 2017 eq. 7, as a loss: -E[min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t)].

    Args:
        logps, old_logps, advantages, mask: (B, T); r_t = exp(logps - old_logps).
        clip: eps > 0.

    Returns:
        (loss, share of tokens whose clipped branch is the one that counts), scalars; means over the mask.
    """
    ratio = torch.exp((logps - old_logps).masked_fill(mask == 0, 0.0))  # (B, T)
    plain, clipped = ratio * advantages, ratio.clamp(1.0 - clip, 1.0 + clip) * advantages
    return masked_mean(-torch.min(plain, clipped), mask), masked_mean(
        (clipped < plain).to(ratio.dtype).detach(), mask
    )


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Squared error of the critic, with the clipping of the PPO authors' code (openai/baselines ppo2).

    0.5 E[max((V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2)]; ``clip=None`` leaves the second branch
    out.

    Returns:
        (loss, share of tokens whose clipped branch is the larger one), scalars; means over the mask.
    """
    error = (values - returns) ** 2
    if clip is None:
        return 0.5 * masked_mean(error, mask), torch.zeros((), device=values.device)
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    clipped = (bounded - returns) ** 2
    return 0.5 * masked_mean(torch.max(error, clipped), mask), masked_mean((clipped > error).float(), mask)
