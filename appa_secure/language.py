"""Causal language models as both sides of the boundary use them: answers as tokens, and a policy as bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from appa_secure.predictor import flatten, unflatten


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (B, P) int64, padded on the left to the longest prompt."""
    width = max(len(ids) for ids in prompts)
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_ids: Sequence[int], answer: str
) -> list[int]:
    """Tokens of the answer as they follow the prompt after a space, and the end token."""
    both = tokenizer(f"{prompt} {answer}")["input_ids"]
    if both[: len(prompt_ids)] == list(prompt_ids):
        ids = both[len(prompt_ids) :]
    else:  # the tokenizer merges across the boundary
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def answer_logits(
    model: Any, pad_id: int, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Logits (N, T, V) that choose the answers' tokens, and these tokens (N, T), -100 after the end.

    answers: N token lists, the same number for each prompt, those of one prompt side by side; each prompt is read once.
    """
    each = len(answers) // len(prompts)
    ids, mask = left_pad(prompts, pad_id, model.device)  # (B, P)
    length = max(map(len, answers))
    labels = torch.tensor([[*a, *[-100] * (length - len(a))] for a in answers], device=model.device)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    head = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1)
    first = head.logits.repeat_interleave(each, 0)  # (N, 1, V)
    if length == 1:
        return first, labels
    kept = (labels >= 0).long()
    head.past_key_values.batch_repeat_interleave(each)
    mask, last = mask.repeat_interleave(each, 0), position[:, -1:].repeat_interleave(each, 0)
    tail = model(
        input_ids=labels[:, :-1].clamp(min=0),
        attention_mask=torch.cat([mask, kept[:, :-1]], dim=1),
        position_ids=last + torch.arange(1, length, device=model.device),
        past_key_values=head.past_key_values,
    )
    return torch.cat([first, tail.logits], dim=1), labels


def answer_logps(
    model: Any,
    pad_id: int,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, T) of the answers' tokens at a temperature, 0 after the end; and the mask (N, T) of tokens."""
    logits, labels = answer_logits(model, pad_id, prompts, answers)
    flat = nn.functional.cross_entropy(
        logits.float().flatten(0, 1) / temperature, labels.flatten(), ignore_index=-100, reduction="none"
    )
    return -flat.view(labels.shape), labels >= 0


def lora_config(lora: Any) -> Any:
    """The peft LoraConfig of ``policy.lora`` (a mapping of r, alpha, dropout, target_modules), None for None."""
    if lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=lora["target_modules"] or "all-linear",
        task_type="CAUSAL_LM",
    )


def adapted(model: PreTrainedModel, lora: Any) -> Any:
    """The model with a new adapter on top of frozen weights, or as it is for `lora` None; dropout off."""
    if lora is None:
        return model.eval()
    from peft import get_peft_model

    return get_peft_model(model, lora_config(lora)).eval()


def pack_policy(model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """The body of a `policy` message: configuration, tokenizer and weights, and nothing that could run as code."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)  # where this machine keeps it
    return {
        "config": json.dumps(config),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "pad": tokenizer.pad_token,
        "end": tokenizer.eos_token,
        "weights": flatten(model).astype("<f4").tobytes(),
    }


def unpack_policy(body: Any, vector: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Inverse of `pack_policy`; vector: (weights, size) -> float32 array, which checks them.

    Raises whatever the libraries raise for a configuration or tokenizer they cannot read.
    """
    fields = json.loads(body["config"])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    unflatten(model, vector(body["weights"], sum(p.numel() for p in model.parameters())))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(body["tokenizer"]), pad_token=body["pad"], eos_token=body["end"]
    )
    return model, tokenizer
