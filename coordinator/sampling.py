"""Sampling completions from a causal language model: one tight loop with a key/value cache, for PPO and
evaluation.

Each distinct prompt passes through the model once and its cache is repeated over its completions; a finished
completion leaves the batch. At the sizes of the built-in policy this is several times faster than
``generate``.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from appa_secure.language import left_pad


@dataclass(frozen=True)
class Rollout:
    """N = prompts x n completions, those of one prompt next to each other; T is the longest that occurs."""

    tokens: Tensor  # (N, T) int64, the padding token after the end
    mask: Tensor  # (N, T) bool, True on sampled tokens, the end token included
    logps: Tensor  # (N, T) float32, log-probability of each sampled token at that temperature; 0 on padding
    hidden: Tensor | None  # (N, T, d) last hidden state of the position that chose the token; 0 on padding


def base_of(model: nn.Module) -> PreTrainedModel:
    """The language model itself, without a peft wrapper (whose adapters live inside its layers)."""
    base: Any = model
    inner: PreTrainedModel = base.get_base_model() if hasattr(model, "get_base_model") else base
    return inner


@contextmanager
def last_hidden_states(base: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the backbone's final hidden states (B, L, d) of every forward pass made inside the block."""
    seen: list[Tensor] = []
    hook = base.base_model.register_forward_hook(lambda _module, _args, output: seen.append(output[0]))
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients inside the block; the model's mode is put back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def rollout(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    n: int,
    max_new_tokens: int,
    temperature: float,
    eos_ids: Sequence[int],
    pad_id: int,
    generator: torch.Generator | None = None,
    keep_hidden: bool = False,
) -> Rollout:
    """Sample n completions of every prompt.

    Args:
        model: a causal LM, bare or with peft adapters; its mode (dropout) is the caller's business.
        prompts: token ids, at least one each.
        temperature: > 0 divides the logits; 0 takes the most probable token.
        eos_ids: any of these ends a completion; it stays in it.
        generator: source of randomness; the global generator of the model's device if None.
        keep_hidden: also return the hidden states a critic reads.
    """
    base = base_of(model)
    accepts = inspect.signature(base.forward).parameters
    device = base.device
    ids, attention = left_pad(prompts, pad_id, device)  # (B, P)
    count = len(prompts) * n
    tokens = torch.full((count, max_new_tokens), pad_id, device=device)
    mask = torch.zeros((count, max_new_tokens), dtype=torch.bool, device=device)
    logps = torch.zeros((count, max_new_tokens), device=device)
    hidden: Tensor | None = None
    ends = torch.tensor(list(eos_ids), device=device)
    rows = torch.arange(count, device=device)  # the completions still growing, (A,)
    keep_last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}

    with torch.no_grad(), last_hidden_states(base) as seen:
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        out = base(
            input_ids=ids,
            attention_mask=attention,
            use_cache=True,
            **_positions(accepts, positions),
            **keep_last,
        )
        cache = out.past_key_values
        cache.batch_repeat_interleave(n)
        logits = out.logits[:, -1].repeat_interleave(n, dim=0)  # (A, V)
        state = seen.pop()[:, -1].repeat_interleave(n, dim=0)  # (A, d)
        attention = attention.repeat_interleave(n, dim=0)
        position = positions[:, -1:].repeat_interleave(n, dim=0)  # (A, 1)
        for t in range(max_new_tokens):
            logp = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)  # (A, V)
            if temperature == 0:
                token = logp.argmax(dim=-1)
            else:
                token = torch.multinomial(logp.exp(), 1, generator=generator).squeeze(1)  # (A,)
            tokens[rows, t], mask[rows, t] = token, True
            logps[rows, t] = logp.gather(1, token.unsqueeze(1)).squeeze(1)
            if keep_hidden:
                if hidden is None:
                    hidden = state.new_zeros(count, max_new_tokens, state.size(-1))
                hidden[rows, t] = state
            alive = (~torch.isin(token, ends)).nonzero().squeeze(1)
            if t + 1 == max_new_tokens or alive.numel() == 0:
                break
            if alive.numel() < rows.numel():
                cache.batch_select_indices(alive)
                rows, token, attention, position = (
                    rows[alive],
                    token[alive],
                    attention[alive],
                    position[alive],
                )
            attention = torch.cat([attention, attention.new_ones(rows.numel(), 1)], dim=1)
            position = position + 1
            out = base(
                input_ids=token.unsqueeze(1),
                attention_mask=attention,
                past_key_values=cache,
                use_cache=True,
                **_positions(accepts, position),
            )
            logits, state = out.logits[:, -1], seen.pop()[:, -1]
    length = int(mask.sum(dim=1).max())
    return Rollout(
        tokens[:, :length],
        mask[:, :length],
        logps[:, :length],
        None if hidden is None else hidden[:, :length],
    )


def _positions(accepts: Any, positions: Tensor) -> dict[str, Tensor]:
    """Position ids that ignore the left padding, for the models that take them."""
    return {"position_ids": positions} if "position_ids" in accepts else {}


def eos_ids_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's and those the model declares."""
    declared = base_of(model).generation_config.eos_token_id
    declared = [declared] if isinstance(declared, int) else list(declared or [])
    return sorted({*declared, tokenizer.eos_token_id} - {None})


def sample(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    n: int,
    temperature: float = 1.0,
    max_new_tokens: int = 16,
    seed: int = 0,
    batch_size: int = 64,
) -> list[list[str]]:
    """n completions of every prompt as text, [prompt][completion]; a function of the weights and the seed
    alone.

    The global random state is neither read nor changed, so measuring a policy does not alter its training.
    ``batch_size`` counts prompts per pass and is part of what determines the samples.
    """
    generator = torch.Generator(device=base_of(model).device).manual_seed(seed)
    ends = eos_ids_of(model, tokenizer)
    answers: list[list[str]] = []
    with evaluating(model):
        for start in range(0, len(prompts), batch_size):
            ids = tokenizer(list(prompts[start : start + batch_size]))["input_ids"]
            drawn = rollout(
                model, ids, n, max_new_tokens, temperature, ends, tokenizer.pad_token_id, generator
            )
            kept = [row[m].tolist() for row, m in zip(drawn.tokens.cpu(), drawn.mask.cpu(), strict=True)]
            texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
            answers.extend(texts[i : i + n] for i in range(0, len(texts), n))
    return answers
