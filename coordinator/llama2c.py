"""Reading legacy llama2.c models (version 0, such as stories260K) into transformers.

Layout, from the llama2.c project (run.c, export.py and tokenizer.py): seven int32 (dim, hidden, layers,
heads, kv heads, vocab, context; a negative vocab means untied output weights), then float32 arrays:
embeddings; for all layers each of attention norm, wq, wk, wv, wo, ffn norm, w1, w2, w3; final norm; two
unused rotary tables. The vocabulary file: an int32 (longest token), then per token a float32 score, an int32
length and the bytes.
"""

import re
import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from appa_secure.errors import ConfigError

MODEL_FILE, TOKENIZER_FILE = "stories260K.bin", "tok512.bin"
_HEADER = struct.Struct("<7i")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def load_llama2c(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model and tokenizer of a folder with ``stories260K.bin`` and ``tok512.bin``.

    Raises:
        ConfigError: a missing file, or one whose length is not what its header says.
    """
    for name in (MODEL_FILE, TOKENIZER_FILE):
        if not (folder / name).is_file():
            raise ConfigError(f"policy.path={str(folder)!r} holds no {name}")
    model = convert_model(folder / MODEL_FILE)
    return model, convert_tokenizer(folder / TOKENIZER_FILE, model.config.vocab_size)


def convert_model(path: Path) -> LlamaForCausalLM:
    """A float32 LlamaForCausalLM with the weights of a legacy llama2.c file."""
    raw = path.read_bytes()
    if len(raw) < _HEADER.size:
        raise ConfigError(f"{path} is too short for a llama2.c header")
    dim, hidden, layers, heads, kv_heads, signed_vocab, context = _HEADER.unpack_from(raw)
    tied, vocab = signed_vocab > 0, abs(signed_vocab)
    if min(dim, hidden, layers, heads, kv_heads, vocab, context) < 1 or dim % heads or heads % kv_heads:
        raise ConfigError(f"{path} has an impossible llama2.c header: is it a version 0 file?")
    head = dim // heads
    kv_dim = head * kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (vocab, dim),
        "attention_norm": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv_dim, dim),
        "wv": (layers, kv_dim, dim),
        "wo": (layers, dim, dim),
        "ffn_norm": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "norm": (dim,),
        "rotary": (2, context, head // 2),
    }
    if not tied:
        shapes["output"] = (vocab, dim)
    expected = sum(int(np.prod(shape)) for shape in shapes.values())
    numbers = np.frombuffer(raw, dtype="<f4", offset=_HEADER.size, count=(len(raw) - _HEADER.size) // 4)
    if len(numbers) != expected:
        raise ConfigError(
            f"{path} holds {len(numbers)} weights, its header asks for {expected}: damaged file?"
        )
    weights: dict[str, np.ndarray] = {}
    offset = 0
    for name, shape in shapes.items():
        weights[name] = numbers[offset : offset + int(np.prod(shape))].reshape(shape)
        offset += int(np.prod(shape))

    state = {"model.embed_tokens.weight": weights["embed"], "model.norm.weight": weights["norm"]}
    state["lm_head.weight"] = weights["embed"] if tied else weights["output"]
    for i in range(layers):
        layer = f"model.layers.{i}."
        state |= {
            layer + "input_layernorm.weight": weights["attention_norm"][i],
            layer + "self_attn.q_proj.weight": _half_split(weights["wq"][i], heads),
            layer + "self_attn.k_proj.weight": _half_split(weights["wk"][i], kv_heads),
            layer + "self_attn.v_proj.weight": weights["wv"][i],
            layer + "self_attn.o_proj.weight": weights["wo"][i],
            layer + "post_attention_layernorm.weight": weights["ffn_norm"][i],
            layer + "mlp.gate_proj.weight": weights["w1"][i],
            layer + "mlp.down_proj.weight": weights["w2"][i],
            layer + "mlp.up_proj.weight": weights["w3"][i],
        }
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    model.load_state_dict({name: torch.tensor(x) for name, x in state.items()}, strict=True)
    model.eval()
    return model


def _half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of wq or wk: llama2.c rotates neighbours (2i, 2i+1), transformers rotates (i, i +
    half)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(0, 2, 1, 3).reshape(rows, columns)


def convert_tokenizer(path: Path, vocab: int) -> PreTrainedTokenizerFast:
    """The sentencepiece-type BPE of a llama2.c vocabulary file, with byte fallback.

    sentencepiece joins the pair whose result scores best; scores fall with the order in which tokens were
    learned, so the order of the scores is the order of the merges.
    """
    raw = path.read_bytes()
    scores: list[float] = []
    pieces: list[str] = []
    offset = 4
    try:
        for _ in range(vocab):
            score, size = struct.unpack_from("<fi", raw, offset)
            scores.append(score)
            pieces.append(raw[offset + 8 : offset + 8 + size].decode("utf-8"))
            offset += 8 + size
    except (struct.error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no llama2.c vocabulary of {vocab} tokens: {error}") from error
    names = ["<unk>", "<s>", "</s>"] + [piece.replace(" ", "\u2581") for piece in pieces[3:]]
    ids = {name: i for i, name in enumerate(names)}
    merges = []
    for name in sorted(names[3:], key=lambda name: (-scores[ids[name]], ids[name])):
        if len(name) > 1 and not _BYTE.fullmatch(name):
            cuts = [(name[:i], name[i:]) for i in range(1, len(name)) if name[:i] in ids and name[i:] in ids]
            merges.extend(cuts)
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
