"""The policies: the tiny model and its words, stories260K against its own arithmetic, the warm-up."""

import re
import struct
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from appa_secure.errors import ConfigError
from appa_secure.language import lora_config
from coordinator.policies import (
    END_MARKS,
    LETTERS,
    OPTION_MARKS,
    WEIGHTS,
    build_policy,
    build_tiny,
    build_tokenizer,
    warm_up,
)
from coordinator.sampling import sample

TEXTS = [
    "Do you drink tea? | Often | Don't know =",
    "A good day | A yes | B no =",
    "How safe is it | not at all | a little | very =",
]
TINY = {"kind": "tiny", "dim": 32, "layers": 2, "heads": 2, "vocab_size": 80, "path": None, "lora": None}


def test_answers_survive_the_tokenizer_of_the_tiny_policy():
    tokenizer = build_tokenizer(TEXTS, 80)
    for answer in ("3 7 0 1", "10 0 10", "B A C", "J"):
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(answer.split())
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == answer
    for word in (*WEIGHTS, *LETTERS):
        (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
        assert token != tokenizer.unk_token_id


def test_the_tiny_policy_reads_the_number_of_every_option_and_of_options():
    tokenizer = build_tokenizer(TEXTS, 100)

    def marks(text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [w for w in tokenizer.convert_ids_to_tokens(ids) if w in {*OPTION_MARKS, *END_MARKS, "|", "="}]

    assert marks("Do you drink tea? | Often | A little | Don't know =") == ["①", "②", "③", "⑶"]
    assert marks("is a = b | yes =") == ["=", "①", "⑴"]
    assert marks("tea =") == ["="]
    assert marks("q" + " | o" * 10 + " = 3 0 10") == [*OPTION_MARKS, "⑽"]
    assert marks("q" + " | o" * 12 + " =") == [*OPTION_MARKS, "|", "|", "⑽"]


def test_the_tiny_vocabulary_is_capped_lower_case_and_the_same_every_time():
    tokenizer = build_tokenizer(TEXTS, 55)
    assert len(tokenizer) == 55
    assert tokenizer.get_vocab() == build_tokenizer(TEXTS, 55).get_vocab()
    wide = build_tokenizer(TEXTS, 100)
    assert wide("OFTEN")["input_ids"] == wide("often")["input_ids"]
    assert wide("a b")["input_ids"] != wide("A B")["input_ids"]  # words are not answers
    assert wide("zebra")["input_ids"][1] == wide.unk_token_id
    assert wide(TEXTS[2])["input_ids"][0] == wide.bos_token_id
    with pytest.raises(ConfigError, match="vocab_size"):
        build_tokenizer(TEXTS, 10)


def test_the_tiny_policy_is_a_function_of_its_seed_and_loads_again(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = build_policy(SimpleNamespace(**TINY), TEXTS, seed=4)
    torch.rand(3)
    again, _ = build_policy(SimpleNamespace(**TINY), TEXTS, seed=4)
    other, _ = build_policy(SimpleNamespace(**TINY), TEXTS, seed=5)
    one, two, three = (m.state_dict()["model.embed_tokens.weight"] for m in (model, again, other))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(x, loaded[name]) for name, x in model.state_dict().items())
    words = AutoTokenizer.from_pretrained(tmp_path)
    assert words(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert words.padding_side == "left"
    policy = SimpleNamespace(kind="hf", path=str(tmp_path))
    hf, hf_tokenizer = build_policy(policy, [], seed=0)
    assert torch.equal(hf.state_dict()["model.embed_tokens.weight"], one)
    assert hf_tokenizer.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"kind": "gpt9", "path": "x"}, "gpt9"),
        ({"kind": "hf", "path": None}, "policy.path"),
        ({"kind": "stories260k", "path": None}, "stories260K.bin"),
        ({"kind": "stories260k", "path": "nowhere"}, "stories260K.bin"),
        ({**TINY, "dim": 30, "heads": 4}, "policy.dim"),
    ],
)
def test_impossible_policies_are_refused_by_name(policy, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_policy(SimpleNamespace(**policy), TEXTS, seed=0)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"policy\.path"):
        build_policy(SimpleNamespace(kind="hf", path=str(tmp_path)), [], seed=0)


def test_lora_is_none_unless_asked_for():
    assert lora_config(None) is None
    made = lora_config({"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": None})
    assert (made.r, made.lora_alpha, made.target_modules) == (4, 8, "all-linear")


def test_the_warm_up_teaches_the_form_and_nothing_else():
    """Two numbers after either prompt: valid nearly always, and still close to uniform over the weights."""
    prompts = ["left | right =", "tea | milk ="]
    tokenizer = build_tokenizer(prompts, 80)
    losses = []

    model = build_tiny(tokenizer, 32, 2, 2, seed=0)
    outcome = warm_up(
        model,
        tokenizer,
        prompts,
        lambda rng, i: f"{rng.randrange(11)} {rng.randrange(11)}",
        steps=150,
        lr=1e-2,
        valid=lambda text, i: len(text.split()) == 2 and all(word in WEIGHTS for word in text.split()),
        max_new_tokens=4,
        progress=lambda step, loss: losses.append(loss),
    )
    assert outcome.valid >= 0.96
    assert outcome.steps == len(losses) < 150
    texts = sample(model, tokenizer, prompts, 500, max_new_tokens=4, seed=3)
    first = [text.split()[0] for row in texts for text in row if text.split()]
    shares = np.array([first.count(w) for w in WEIGHTS]) / len(first)
    assert -(shares * np.log(shares.clip(1e-9))).sum() > 0.85 * np.log(11)


def test_a_warm_up_is_a_function_of_its_seed_alone():
    tokenizer = build_tokenizer(TEXTS, 80)
    weights = []
    for noise, seed in ((1, 7), (2, 7), (3, 8)):
        torch.manual_seed(noise)
        model = build_tiny(tokenizer, 16, 1, 2, seed=0)
        warm_up(model, tokenizer, TEXTS, lambda rng, i: str(rng.randrange(11)), steps=3, lr=1e-2, seed=seed)
        weights.append(model.state_dict()["lm_head.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_no_warm_up_steps_leave_the_weights_alone():
    tokenizer = build_tokenizer(TEXTS, 80)
    model = build_tiny(tokenizer, 16, 1, 2, seed=0)
    before = model.state_dict()["lm_head.weight"].clone()
    outcome = warm_up(model, tokenizer, TEXTS, lambda rng, i: "1 2", steps=0, lr=1.0)
    assert outcome.steps == 0
    assert torch.equal(before, model.state_dict()["lm_head.weight"])


# ---- stories260K -----------------------------------------------------------------------------------------


def llama2c_logits(path, tokens):
    """The forward pass of llama2.c, read from its run.c, for all positions: (L, vocab) float64."""
    raw = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, _ = struct.unpack_from("<7i", raw)
    numbers = np.frombuffer(raw, "<f4", offset=28).astype(np.float64)
    at = 0

    def take(*shape):
        nonlocal at
        at += int(np.prod(shape))
        return numbers[at - int(np.prod(shape)) : at].reshape(shape)

    size = dim // heads
    embed, norm1 = take(vocab, dim), take(layers, dim)
    wq, wk, wv = (
        take(layers, dim, dim),
        take(layers, size * kv_heads, dim),
        take(layers, size * kv_heads, dim),
    )
    wo, norm2, w1 = take(layers, dim, dim), take(layers, dim), take(layers, hidden, dim)
    w2, w3, last = take(layers, dim, hidden), take(layers, hidden, dim), take(dim)

    def rms(x, weight):
        return weight * x / np.sqrt((x * x).mean() + 1e-5)

    def rotate(vector, position):
        out = vector.copy()
        for i in range(0, len(vector), 2):  # neighbours turn together
            angle = position * 10000.0 ** (-(i % size) / size)
            a, b = vector[i], vector[i + 1]
            out[i], out[i + 1] = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
        return out

    keys, values, logits = [[] for _ in range(layers)], [[] for _ in range(layers)], []
    for position, token in enumerate(tokens):
        x = embed[token].copy()
        for layer in range(layers):
            h = rms(x, norm1[layer])
            query = rotate(wq[layer] @ h, position)
            keys[layer].append(rotate(wk[layer] @ h, position))
            values[layer].append(wv[layer] @ h)
            seen = np.zeros(dim)
            for head in range(heads):
                q, kv = slice(head * size, (head + 1) * size), head // (heads // kv_heads)
                k = slice(kv * size, (kv + 1) * size)
                scores = np.array([query[q] @ past[k] for past in keys[layer]]) / np.sqrt(size)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                seen[q] = sum(w * past[k] for w, past in zip(weights, values[layer], strict=True))
            x = x + wo[layer] @ seen
            h = rms(x, norm2[layer])
            gate = w1[layer] @ h
            x = x + w2[layer] @ (gate / (1 + np.exp(-gate)) * (w3[layer] @ h))
        logits.append(embed @ rms(x, last))
    return np.array(logits)


def llama2c_encode(path, vocab, text):
    """The tokenizer of run.c: characters (or bytes), then the best-scoring neighbours until none is left."""
    raw, at, pieces, scores = path.read_bytes(), 4, [], []
    for _ in range(vocab):
        score, size = struct.unpack_from("<fi", raw, at)
        pieces.append(raw[at + 8 : at + 8 + size])
        scores.append(score)
        at += 8 + size
    ids = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
    tokens = [ids[b" "]] if text else []
    for character in text:
        piece = character.encode()
        tokens += [ids[piece]] if piece in ids else [byte + 3 for byte in piece]
    while True:
        pairs = [pieces[a] + pieces[b] for a, b in pairwise(tokens)]
        merged = [(-scores[ids[pair]], i) for i, pair in enumerate(pairs) if pair in ids]
        if not merged:
            return [1, *tokens]
        _, i = min(merged)
        tokens[i : i + 2] = [ids[pairs[i]]]


@pytest.fixture(scope="module")
def stories(shared):
    folder = shared / "models" / "stories260K"
    return folder, *build_policy(SimpleNamespace(kind="stories260k", path=str(folder)), [], seed=0)


def test_stories260k_has_the_logits_of_llama2c(stories):
    folder, model, tokenizer = stories
    ids = tokenizer("Once upon a time, Lily saw a big dog.")["input_ids"]
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([ids])).logits[0].double().numpy()
    theirs = llama2c_logits(folder / "stories260K.bin", ids)
    assert np.abs(ours - theirs).max() < 1e-4
    assert (ours.argmax(1) == theirs.argmax(1)).all()


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time",
        "How much? | 3 7 0 10 =",
        "  two spaces\nline",
        "naïve €5 — 日本",
        "x",
        "THE zoo's 'end'",
    ],
)
def test_stories260k_has_the_tokens_of_llama2c(stories, text):
    folder, model, tokenizer = stories
    ids = tokenizer(text)["input_ids"]
    assert ids == llama2c_encode(folder / "tok512.bin", model.config.vocab_size, text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_stories260k_tells_a_story(stories):
    _, model, tokenizer = stories
    text = sample(model, tokenizer, ["Once upon a time"], 1, temperature=0.0, max_new_tokens=60)[0][0]
    words = text.lower().replace(",", " ").replace(".", " ").split()
    common = {
        "there",
        "was",
        "a",
        "girl",
        "boy",
        "named",
        "she",
        "he",
        "the",
        "to",
        "and",
        "lily",
        "her",
        "with",
    }
    assert text.startswith(", there was a little girl named Lily")
    assert sum(word in common for word in words) > 0.4 * len(words)


def test_damaged_model_files_are_refused(tmp_path):
    (tmp_path / "tok512.bin").write_bytes(b"")
    (tmp_path / "stories260K.bin").write_bytes(struct.pack("<7i", 8, 16, 1, 2, 1, 32, 16) + bytes(40))
    with pytest.raises(ConfigError, match="its header asks for"):
        build_policy(SimpleNamespace(kind="stories260k", path=str(tmp_path)), [], seed=0)
    (tmp_path / "stories260K.bin").write_bytes(b"abc")
    with pytest.raises(ConfigError, match="too short"):
        build_policy(SimpleNamespace(kind="stories260k", path=str(tmp_path)), [], seed=0)
