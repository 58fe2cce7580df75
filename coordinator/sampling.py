"""Sampling completions from a causal language model: one tight loop with a key/value cache, for PPO and
evaluation.

Each distinct prompt passes through the model once. Its completions grow side by side in one row, on one copy of the
prompt's cache, each with a mask that hides the others (`coordinator.packing`); where the model does not allow that, the
cache is repeated. A row whose completions are finished leaves the batch.
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
from coordinator.packing import packable

# At most so many completions share a row. Each step of it computes on the tokens of all, also those hidden from each other.
_BRANCHES = 8


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
    # Completions that share a row and its cache; W of them, in one row for each prompt if they are few.
    wide = packable(base)
    width = max(w for w in range(1, min(n, _BRANCHES if wide else 1) + 1) if n % w == 0)
    tokens = torch.full((count, max_new_tokens), pad_id, device=device)
    mask = torch.zeros((count, max_new_tokens), dtype=torch.bool, device=device)
    logps = torch.zeros((count, max_new_tokens), device=device)
    hidden: Tensor | None = None
    ends = torch.tensor(list(eos_ids), device=device)
    rows = torch.arange(count, device=device).view(
        -1, width
    )  # (A, W), the rows with completions that still grow
    growing = torch.ones_like(rows, dtype=torch.bool)
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
        if n > width:
            cache.batch_repeat_interleave(n // width)
        logits = out.logits[:, -1].repeat_interleave(n, dim=0)  # (A W, V)
        state = seen.pop()[:, -1].repeat_interleave(n, dim=0)  # (A W, d)
        position = positions[:, -1].repeat_interleave(n).view(-1, width)  # (A, W)
        # (A, W, S) which slots of the cache a completion sees
        sees = attention.bool().repeat_interleave(n, dim=0).view(*rows.shape, -1)
        itself = torch.eye(width, dtype=torch.bool, device=device)
        for t in range(max_new_tokens):
            logp = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)  # (A W, V)
            if temperature == 0:
                token = logp.argmax(dim=-1)
            else:
                token = torch.multinomial(logp.exp(), 1, generator=generator).squeeze(1)  # (A W,)
            now, new = rows[growing], growing.flatten()
            tokens[now, t], mask[now, t] = token[new], True
            logps[now, t] = logp.gather(1, token.unsqueeze(1)).squeeze(1)[new]
            if keep_hidden:
                if hidden is None:
                    hidden = state.new_zeros(count, max_new_tokens, state.size(-1))
                hidden[now, t] = state[new]
            token = token.view(rows.shape)
            growing = growing & ~torch.isin(token, ends)
            alive = growing.any(dim=1).nonzero().squeeze(1)
            if t + 1 == max_new_tokens or alive.numel() == 0:
                break
            if alive.numel() < rows.size(0):
                cache.batch_select_indices(alive)
                rows, growing, token, position, sees = (
                    x[alive] for x in (rows, growing, token, position, sees)
                )
            sees = torch.cat([sees, itself.expand(rows.size(0), -1, -1)], dim=2)
            position = position + 1
            out = base(
                input_ids=token,
                attention_mask=sees.unsqueeze(1) if wide else sees[:, 0].long(),
                past_key_values=cache,
                use_cache=True,
                **_positions(accepts, position),
            )
            logits, state = out.logits.flatten(0, 1), seen.pop().flatten(0, 1)
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
