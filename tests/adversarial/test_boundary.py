"""Nothing private crosses a client's boundary: canaries in a whole run, and every byte searched for them.

Searched are all messages in both directions, everything printed and logged, and every file of the run
directory. The same search finds the numbers where they may be: codes without masks in clear mode, and true
distributions where the sites allow them to be measured.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import pytest

from appa_secure import launch
from appa_secure.config import compose
from clients.client import Client
from tests.adversarial.canaries import Canaries

GROUPS = ("North", "South", "East", "West", "Centre")
PRIVATE = {"count", "true distribution", "context", "prediction", "reward", "update", "key"}


class FakeEmbedder:
    """Unit vectors by the text's hash."""

    dim = 12

    def embed(self, texts: Sequence[str], progress: Any = None) -> np.ndarray:
        seeds = [int.from_bytes(hashlib.sha256(t.encode()).digest()[:8], "little") for t in texts]
        rows = np.stack([np.random.default_rng(seed).standard_normal(self.dim) for seed in seeds])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@dataclass
class Capture:
    """A finished run: where bytes were seen, and what must not be among them."""

    canaries: Canaries = field(default_factory=Canaries)
    blobs: dict[str, bytes] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    vectors: int = 0

    def found(self, *where: str) -> set[str]:
        """Names found in the blobs whose label starts with one of `where` (default: anywhere)."""
        chosen = [blob for label, blob in self.blobs.items() if not where or label.startswith(where)]
        assert chosen
        return set().union(*(self.canaries.scan(blob) for blob in chosen))


def write_survey(path: Path) -> None:
    """Counts that no other number looks like: nine or ten digits, drawn at random."""
    rng = np.random.default_rng(7919)
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["qid", "question", "option", "group", "count", "ordinal"])
        for number in range(14):
            for group in GROUPS:
                for option in range(3):
                    count = int(rng.integers(104_729_000, 2**31 - 1))
                    row = [
                        f"question{number}",
                        f"What about number {number}?",
                        f"choice {option}",
                        group,
                        count,
                        option,
                    ]
                    out.writerow(row)


def captured(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    *overrides: str,
) -> Capture:
    """A whole run through the front door, with ears at every wall."""
    result = Capture()
    write_survey(root / "survey.csv")
    config = compose(
        [
            "experiment=smoke", "name=run", f"output_root={root / 'runs'}",
            f"federation.client_root={root / 'clients'}", "data=table", "data.ordinal_only=true",
            f"data.path={root / 'survey.csv'}", "data.context=4", "embedder.cache_dir=null",
            # The counts are huge: noise that tells the private context from the truth also in short decimals.
            "privacy.accountant=rdp", "privacy.context_noise=1000000.0",
            "policy.warmup_steps=80", "policy.warmup_lr=0.01", "ppo.steps=2", *overrides,
        ]
    )  # fmt: skip
    caplog.set_level(logging.DEBUG)
    _listen(result, monkeypatch)
    run = launch.run(config)
    printed = capfd.readouterr()
    result.blobs["log"] = "\n".join(r.getMessage() + str(r.exc_text) for r in caplog.records).encode()
    result.blobs["stdout"], result.blobs["stderr"] = printed.out.encode(), printed.err.encode()
    for path in sorted(run.rglob("*")):
        if path.is_file():
            result.blobs[f"file/{path.relative_to(run)}"] = path.read_bytes() + path.name.encode()
    result.summary = json.loads((run / "summary.json").read_text())
    return result


def _listen(result: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record every message, and plant canaries: what each client holds, computes and codes."""
    canaries = result.canaries
    exchange, send, start = launch.LocalFederation.exchange, Client._send, launch.Parts.client

    def listening(self: launch.LocalFederation, requests: Mapping[str, bytes]) -> dict[str, bytes]:
        replies = exchange(self, requests)
        number = len(result.blobs)
        result.blobs[f"request/{number}"] = b"".join(requests.values())
        result.blobs[f"reply/{number}"] = b"".join(replies.values())
        for client in clients.values():
            _plant_state(canaries, client, planted)
        return replies

    def sending(
        self: Client, kind: str, body: Mapping[str, Any], vector: np.ndarray, layout: Any, noise: Any = None
    ) -> bytes:
        name = {"train": "update", "score": "reward", "tune": "update"}[kind]
        # The same places for every client
        at = np.random.default_rng(len(vector)).permutation(len(vector))[:200]
        near = np.unique(np.concatenate([at, np.minimum(at + 1, len(vector) - 1)]))
        code = layout.preflight(len(self.agreement.clients)).encode(np.asarray(vector))
        chosen = np.arange(len(vector)) if kind == "score" else near
        canaries.numbers(name, self.client_id, np.asarray(vector)[chosen])
        canaries.ring(name, self.client_id, code[chosen])
        result.vectors += 1
        return send(self, kind, body, vector, layout, noise)

    clients: dict[str, Client] = {}
    planted: set[tuple[str, bytes]] = set()

    def starting(self: launch.Parts, client_id: str) -> Client:
        client = clients[client_id] = start(self, client_id)
        canaries.secret("key", self.seeds[client_id])
        canaries.secret("key", client._state["noise_key"])
        data = self.holdings[client_id]
        for qid, counts in data.counts.items():
            canaries.integers("count", client_id, counts.astype(int))
            canaries.numbers("true distribution", client_id, data.distribution(qid))
        return client

    monkeypatch.setattr(launch, "build_embedder", lambda config: FakeEmbedder())
    monkeypatch.setattr(launch.LocalFederation, "exchange", listening)
    monkeypatch.setattr(launch.Parts, "client", starting)
    monkeypatch.setattr(Client, "_send", sending)


def _plant_state(canaries: Canaries, client: Client, planted: set[tuple[str, bytes]]) -> None:
    """What a client has come to hold by now: private context, predicted preferences, alignment history."""
    state = client._state
    held = [("context", raw) for raw in state["context"].values()]
    held += [("prediction", raw) for raw in state.get("predicted", {}).values()]
    held += [("reward", state["history"][key]) for key in ("pending", "current") if state["history"].get(key)]
    for name, raw in held:
        if (client.client_id, raw) not in planted:
            planted.add((client.client_id, raw))
            canaries.numbers(name, client.client_id, np.frombuffer(raw))


@pytest.fixture
def ears(tmp_path: Path, monkeypatch, capfd, caplog):
    return lambda *overrides: captured(tmp_path, monkeypatch, capfd, caplog, *overrides)


def check_it_was_a_real_run(capture: Capture) -> None:
    """Every stage happened, so there was everything to be searched, and everything to be searched for."""
    assert capture.canaries.names == PRIVATE
    requests = b"".join(blob for label, blob in capture.blobs.items() if label.startswith("request"))
    for kind in ("setup", "context", "train", "freeze", "score"):
        assert cbor2.dumps({"kind": kind})[1:] in requests, kind
    assert capture.vectors == len(GROUPS) * (2 + 2)  # two predictor rounds and two steps, each by everyone
    assert {
        "log",
        "stdout",
        "stderr",
        "file/report.html",
        "file/transcript.jsonl",
        "file/rewards.jsonl",
    } <= set(capture.blobs)
    assert capture.blobs["stderr"].count(b"align step") == 2
    opened = [json.loads(line)["opened"] for line in capture.blobs["file/rewards.jsonl"].splitlines()[:2]]
    assert opened == [True, True]


def test_a_blind_run_lets_nothing_private_out(ears) -> None:
    capture = ears("evaluation.truth=false")
    check_it_was_a_real_run(capture)
    assert capture.summary["stamp"] == "private"
    for label in capture.blobs:
        assert not capture.found(label), label
    assert not any(label.startswith("file/measurement") for label in capture.blobs)


def test_the_search_finds_unmasked_rewards_and_updates_in_clear_mode_and_nothing_else(ears) -> None:
    capture = ears("evaluation.truth=false", "secagg=clear")
    check_it_was_a_real_run(capture)
    assert capture.summary["stamp"] == "not private"
    assert capture.found("reply/") == {"reward", "update"}
    assert not capture.found("request/")
    assert not capture.found("log", "stdout", "stderr", "file/")


def test_the_search_finds_true_distributions_where_sites_allow_measuring(ears) -> None:
    capture = ears("evaluation.truth=true")
    check_it_was_a_real_run(capture)
    assert capture.summary["stamp"] == "not private"
    # A client also tells its weight, which is one of the numbers of its vector.
    assert capture.found("reply/") == {"true distribution", "prediction", "reward"}
    assert not capture.found("request/", "log", "stdout", "stderr", "file/")


SMALL = (
    "policy.dim=32", "policy.layers=1", "system.rounds=2", "system.free_rounds=1", "evaluation.truth=false",
    "ppo.generations=8", "ppo.minibatch_size=32",  # enough pairs for groups to differ in
)  # fmt: skip


@pytest.mark.parametrize("system", ["grdpo", "maxmin"])
def test_a_blind_run_of_another_system_lets_nothing_private_out(ears, system: str) -> None:
    capture = ears(f"system={system}", *SMALL)
    # Instead of rewards a client remembers its log-weight, which groups of one mind share, or the model it took.
    assert capture.canaries.names >= PRIVATE - {"reward"}
    assert capture.vectors == len(GROUPS) * (2 + 2)
    assert capture.summary["stamp"] == "private"
    for label in capture.blobs:
        assert not capture.found(label), label


def test_the_search_finds_unmasked_updates_of_a_policy_in_clear_mode(ears) -> None:
    capture = ears("system=grdpo", "secagg=clear", *SMALL)
    tunes = [
        label.replace("request", "reply")
        for label, blob in capture.blobs.items()
        if label.startswith("request/") and cbor2.dumps({"kind": "tune"})[1:] in blob
    ]
    assert len(tunes) == 2
    for label in tunes:
        assert capture.found(label) == {"update"}
    assert not capture.found("request/", "log", "stdout", "stderr", "file/")


# -- the search itself ---------------------------------------------------------------------------------------


@pytest.fixture
def planted() -> tuple[Canaries, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    shares, counts = rng.dirichlet(np.ones(4)), rng.integers(10**9, 2**31 - 1, 4)
    canaries = Canaries()
    canaries.numbers("share", "a", shares)
    canaries.integers("count", "a", counts)
    canaries.ring("code", "a", (shares * 2**50).astype("<u8"))
    canaries.secret("key", bytes(range(100, 132)))
    return canaries, shares, counts


@pytest.mark.parametrize("order", "<>")
def test_short_codes_are_found_next_to_another_only(order: str) -> None:
    """A float32's code alone is no proof: a float64 made of a float32 looks like one in the other byte order."""
    codes = (
        (np.random.default_rng(3).normal(size=4).astype("<f4").astype("<f8") * 2**40)
        .astype("<i8")
        .view("<u8")
    )
    canaries, noise = Canaries(), np.random.default_rng(4).bytes(999)
    canaries.ring("code", "a", codes)
    raw = codes.astype(f"{order}u8")
    assert canaries.scan(noise + raw[1:3].tobytes() + noise) == {"code"}
    assert not canaries.scan(noise + raw[1:2].tobytes() + noise)


def test_every_encoding_is_found_at_every_offset(planted) -> None:
    canaries, shares, counts = planted
    noise = np.random.default_rng(2).bytes(4000)
    encodings: list[tuple[str, bytes]] = [("key", bytes(range(100, 132)))]
    for order in "<>":
        encodings += [("share", shares[1:2].astype(f"{order}f8").tobytes())]
        encodings += [("share", shares.astype(f"{order}f4").tobytes())]
        encodings += [
            ("count", counts[2:3].astype(f"{order}{kind}").tobytes()) for kind in ("i8", "u8", "f8")
        ]
        encodings += [("count", counts.astype(f"{order}{kind}").tobytes()) for kind in ("i4", "u4", "f4")]
        encodings += [("code", (shares[:1] * 2**50).astype(f"{order}u8").tobytes())]
    encodings += [("count", cbor2.dumps({"n": int(counts[0])}))]
    for text in (
        f"{shares[0]!r}",
        f"{shares[0]:.10f}",
        f"{shares[2]:.9e}",
        json.dumps(shares.tolist()),
        str(shares.tolist()),
    ):
        encodings.append(("share", text.encode()))
    encodings += [("share", ", ".join(f"{s:.6f}" for s in shares).encode())]
    for text in (f"{counts[0]}", f"{counts[1]}.0", f"{counts[3]:.5e}", json.dumps({"a": counts.tolist()})):
        encodings.append(("count", text.encode()))
    for number, (name, raw) in enumerate(encodings):
        blob = noise[: 1000 + number] + b" " + raw + b" " + noise[1000:]
        assert canaries.scan(blob) == {name}, (name, raw)
        hidden = b" " + raw.hex().encode() + b" ", b" " + base64.b64encode(b"?" * (number % 3) + raw) + b" "
        if len(raw) >= 16:
            for wrapped in hidden:
                assert name in canaries.scan(noise[:1000] + wrapped + noise[1000:]), (name, raw, wrapped)


def test_the_search_raises_no_false_alarms(planted) -> None:
    canaries, _, _ = planted
    rng = np.random.default_rng(3)
    text = " ".join(repr(x) for x in rng.random(10_000)).encode()
    for blob in (
        rng.bytes(1_000_000),
        bytes(1_000_000),
        rng.bytes(50_000).hex().encode(),
        text,
        b"",
        b"\0" * 7,
    ):
        assert canaries.scan(blob) == set()


def test_what_two_owners_share_is_nobodys_secret() -> None:
    canaries = Canaries()
    canaries.numbers("share", "a", [0.123456789123, 0.25])
    canaries.numbers("share", "b", [0.123456789123])
    blob = np.array([0.123456789123, 0.25]).tobytes() + b" 0.123456789123 "
    assert canaries.scan(blob) == set()
