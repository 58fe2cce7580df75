"""The policies a run can train: the built-in tiny model, stories260K, or any causal LM; and their warm-up.

The warm-up teaches only the form of an answer, on public text with random valid answers, so that the policy
starts out well-formed and undecided.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from appa_secure.errors import ConfigError
from appa_secure.language import answer_ids, answer_logits
from coordinator.llama2c import load_llama2c
from coordinator.sampling import sample

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
WEIGHTS = tuple(str(weight) for weight in range(11))  # the words of a distribution
LETTERS = tuple("ABCDEFGHIJ")  # the words of a ranking or choice
OPTION_MARKS = tuple("①②③④⑤⑥⑦⑧⑨⑩")  # the n-th "|" of a prompt
END_MARKS = tuple("⑴⑵⑶⑷⑸⑹⑺⑻⑼⑽")  # the last "=" of a prompt with n of them
# Inside the tokenizer an answer "A" is another word than the article "a": a letter without lower case.
_CODES = {letter: chr(ord("𝐀") + i) for i, letter in enumerate(LETTERS)}
MAX_POSITIONS = 1024
ANSWERS = 4  # random answers to each prompt of a warm-up batch


def build_policy(
    policy: Any, texts: Sequence[str], seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The untrained (``tiny``) or pretrained policy of the ``policy`` section of the configuration, in
    float32.

    Args:
        policy: has kind ("tiny", "stories260k" or "hf"); path for the last two; dim, layers, heads and
            vocab_size for ``tiny``.
        texts: public text (prompts, questions, options) from which ``tiny`` makes its vocabulary.
        seed: of the initial weights of ``tiny``.

    Raises:
        ConfigError: an unknown kind, or a path without a model; names the field.
    """
    if policy.kind == "tiny":
        tokenizer = build_tokenizer(texts, policy.vocab_size)
        return build_tiny(tokenizer, policy.dim, policy.layers, policy.heads, seed), tokenizer
    if policy.path is None:
        raise ConfigError(
            f"policy.kind={policy.kind} needs policy.path: a local folder" + _or_hub(policy.kind)
        )
    if policy.kind == "stories260k":
        return load_llama2c(Path(policy.path))
    if policy.kind == "hf":
        return load_pretrained(str(policy.path))
    raise ConfigError(f"policy.kind={policy.kind!r} is unknown; choose tiny, stories260k or hf")


def _or_hub(kind: str) -> str:
    return " or a hub id" if kind == "hf" else " with stories260K.bin and tok512.bin"


def build_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A lower-case word-level tokenizer of the most frequent words of ``texts``; ties go to the smaller word.

    The weights 0..10, the letters A..J and the marks of the prompt are always whole tokens. The n-th "|" and
    the final "=" become tokens that say n, so that a model too small to learn counting can tell the options
    apart and knows when to stop. Decoding joins words with single spaces.
    """
    split, normal = pre_tokenizers.BertPreTokenizer(), _normalizer()
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(normal.normalize_str(text)))
    always = [PAD, BOS, EOS, UNKNOWN, *WEIGHTS, *_CODES.values(), *OPTION_MARKS, *END_MARKS, "=", "|"]
    if vocab_size <= len(always):
        raise ConfigError(
            f"policy.vocab_size={vocab_size} must exceed {len(always)}, the tokens every answer needs"
        )
    common = sorted((word for word in counts if word not in set(always)), key=lambda w: (-counts[w], w))
    vocabulary = {word: i for i, word in enumerate([*always, *common][:vocab_size])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normal, split
    join = decoders.WordPiece(prefix="##", cleanup=False)  # puts the spaces between words
    letters = [decoders.Replace(code, letter) for letter, code in _CODES.items()]
    tokenizer.decoder = decoders.Sequence([join, *letters])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _normalizer() -> normalizers.Normalizer:
    """Letters to their codes, the marks of the prompt to numbered ones, everything else to lower case."""
    letters = [
        normalizers.Replace(Regex(rf"(?<![A-Za-z]){letter}(?![A-Za-z'])"), code)
        for letter, code in _CODES.items()
    ]
    # Each step takes the first "|" that is left; what stands before the \K is only looked at.
    number = [normalizers.Replace(Regex(r"\A[^|]*\K\|"), f" {mark} ") for mark in OPTION_MARKS]
    count = [
        normalizers.Replace(Regex(rf"\A[\s\S]*{option}[\s\S]*\K=(?=[^=]*\z)"), f" {end} ")
        for option, end in reversed(list(zip(OPTION_MARKS, END_MARKS, strict=True)))
    ]
    return normalizers.Sequence([*letters, *number, *count, normalizers.Lowercase()])


def build_tiny(
    tokenizer: PreTrainedTokenizerBase, dim: int, layers: int, heads: int, seed: int
) -> LlamaForCausalLM:
    """A Llama-type model of random weights (``dim`` 128, 4 layers, 2000 words: 1.1 M parameters)."""
    if dim % (2 * heads):
        raise ConfigError(f"policy.dim={dim} must be a multiple of 2 * policy.heads = {2 * heads}")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=3 * dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=MAX_POSITIONS,
        # The library's 0.02 suits wide models; at this width it hides the prompt's content from the policy gradient,
        # which then settles on one answer for all questions.
        initializer_range=dim**-0.5,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def load_pretrained(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Any causal LM by local folder or hub id, padded on the left; the end token pads where no other does."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        where = (
            "a local folder" if Path(path).exists() else "neither a local folder nor a model the hub gave us"
        )
        raise ConfigError(f"policy.path={path!r} is {where} that holds no causal LM: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


@dataclass(frozen=True)
class WarmUp:
    """What a warm-up did: steps taken, mean loss of the last 20 (nats per token), share of valid samples."""

    steps: int
    loss: float
    valid: float | None


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answer: Callable[[random.Random, int], str],
    steps: int,
    lr: float,
    batch_size: int = 16,
    seed: int = 0,
    valid: Callable[[str, int], bool] | None = None,
    target: float = 0.96,
    max_new_tokens: int = 16,
    progress: Callable[[int, float], None] | None = None,
) -> WarmUp:
    """Supervised training on random valid answers until samples have the right form, in place.

    Args:
        prompts: public prompts.
        answer: draws a random valid answer text to prompt number i; the loss is on it and the end token
            alone.
        steps: at most so many optimiser steps of ``batch_size`` prompts with ANSWERS answers each.
        lr: peak learning rate of AdamW, 20 steps linear warm-up, then constant.
        valid: whether a sampled text is an answer to prompt number i; asked about 64 samples every 25 steps.
            The warm-up ends when ``target`` of them are valid. None uses up all steps.
        max_new_tokens: length of these samples.
        progress: called after each step with (step, loss).
    """
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr, weight_decay=0.0)
    losses: list[float] = []
    share: float | None = None
    training = model.training
    model.train()
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for step in range(1, steps + 1):
        rows = draw.choices(range(len(prompts)), k=batch_size)
        answers = [
            answer_ids(tokenizer, prompts[i], encoded[i], answer(draw, i))
            for i in rows
            for _ in range(ANSWERS)
        ]
        loss = _answer_loss(model, tokenizer.pad_token_id, [encoded[i] for i in rows], answers)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 20)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if progress is not None:
            progress(step, losses[-1])
        if valid is not None and (step % 25 == 0 or step == steps):
            rows = draw.choices(range(len(prompts)), k=128)
            texts = sample(
                model, tokenizer, [prompts[i] for i in rows], 1, 1.0, max_new_tokens, seed=seed + step
            )
            share = sum(valid(text[0], i) for text, i in zip(texts, rows, strict=True)) / len(rows)
            if share >= target:
                break
    model.train(training)
    return WarmUp(len(losses), sum(losses[-20:]) / max(1, len(losses[-20:])), share)


def _answer_loss(
    model: PreTrainedModel, pad_id: int, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> Tensor:
    """Mean negative log-likelihood of the answer tokens; each prompt is read once for its ANSWERS answers."""
    logits, labels = answer_logits(model, pad_id, prompts, answers)  # (B A, T, V), (B A, T)
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
