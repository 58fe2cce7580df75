"""Replays the JSON vectors. A change of any byte is a change of the protocol and needs a new version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appa_secure.secagg import ClientMachine, CoordinatorMachine, Layout, ProtocolError, RemoteMisbehaviour
from appa_secure.secagg.keys import bind, derive
from appa_secure.secagg.masks import apply_masks, mask_key
from appa_secure.secagg.shamir import combine, unpack
from tests.secagg.world import World
from tests.vectors.make_secagg import attempt, epoch, key_schedule, parties

VECTORS = Path(__file__).parent.parent / "vectors" / "secagg"
KNOWN: dict[str, Any] = json.loads((VECTORS / "known_answers.json").read_text(encoding="utf-8"))
FAILURES: dict[str, Any] = json.loads((VECTORS / "failures.json").read_text(encoding="utf-8"))

EXPECTED = {
    "threshold of one": "PolicyViolation",
    "low-order coordinator key": "PolicyViolation",
    "unknown party": "UnknownParty",
    "cohort too small": "CohortTooSmall",
    "trailing byte": "BadEncoding",
    "unknown field": "BadEncoding",
    "round before set-up": "WrongEpoch",
    "bad signature": "BadSignature",
    "wrong roster": "WrongRoster",
    "no acknowledgements": "WrongRoster",
    "replayed round": "ReplayedRound",
    "replayed epoch": "ReplayedRound",
    "another scale": "LayoutMismatch",
    "another context": "ContextMismatch",
    "rounds used up": "OutOfOrder",
    "asked again for other shares": "ReplayedRound",
    "both share kinds asked": "BothShareKinds",
    "below threshold": "BelowThreshold",
    "party not mentioned": "WrongRoster",
}


def test_primitives() -> None:
    case = KNOWN["bind"]
    fields = [bytes.fromhex(f[6:]) if str(f).startswith("bytes:") else f for f in case["fields"]]
    assert bind(case["purpose"], *fields).hex() == case["out"]
    case = KNOWN["derive"]
    assert derive(*(bytes.fromhex(case[k]) for k in ("secret", "salt", "info"))).hex() == case["out"]
    case = KNOWN["mask"]
    key = mask_key(
        bytes.fromhex(case["seed"]), case["round"], *(bytes.fromhex(case[k]) for k in ("coding", "context"))
    )
    assert key.hex() == case["key"]
    vector = np.array(case["start"], dtype="<u8")
    apply_masks(vector, [key], [])
    assert vector.tobytes().hex() == case["out"]


def test_shares() -> None:
    case = KNOWN["shamir"]
    rows = np.stack([unpack(bytes.fromhex(row), 1) for row in case["shares"]])
    for points in ([1, 2, 3], [5, 1, 4]):
        assert combine(np.array([points]), rows[[x - 1 for x in points]].transpose(1, 0, 2)) == [
            bytes.fromhex(case["secret"])
        ]


def test_coding() -> None:
    case = KNOWN["coding"]
    coding = Layout.from_description(case["layout"], case["ring_bits"]).preflight(case["parties"])
    assert (list(coding.bits), coding.digest.hex()) == (case["bits"], case["digest"])
    assert coding.encode(np.array([float.fromhex(v) for v in case["vector"]])).tobytes().hex() == case["out"]


def test_key_schedule() -> None:
    assert key_schedule() == KNOWN["schedule"]


def test_a_whole_epoch_replays_byte_for_byte() -> None:
    assert epoch() == KNOWN["epoch"]


def test_all_failure_classes_are_there() -> None:
    assert {case["name"]: case["expect"] for case in FAILURES["cases"]} == EXPECTED


@pytest.mark.parametrize("case", FAILURES["cases"], ids=lambda case: case["name"])
def test_failures(case: dict[str, str]) -> None:
    world = World(3, min_cohort=3 if case["name"] in list(EXPECTED)[:9] else 2)
    client = ClientMachine.restore(bytes.fromhex(case["state"]), *parties(world))
    with pytest.raises(ProtocolError) as caught:
        attempt(client, case["method"], bytes.fromhex(case["message"]))
    assert caught.value.code == case["expect"]
    assert client.export_state().hex() == case["state"]


@pytest.mark.parametrize("case", FAILURES["replies"], ids=lambda case: case["name"])
def test_reply_failures(case: dict[str, str]) -> None:
    world = World(3)
    coordinator = CoordinatorMachine.restore(bytes.fromhex(case["state"]), world.directory)
    if case["expect"] == "accepted":
        coordinator.receive(case["sender"], bytes.fromhex(case["message"]))
        return
    with pytest.raises(RemoteMisbehaviour) as caught:
        coordinator.receive(case["sender"], bytes.fromhex(case["message"]))
    assert (caught.value.code, caught.value.sender) == (case["expect"], case["sender"])


def test_both_kinds_of_reply_have_all_failures() -> None:
    found = {kind: [c["name"].split(": ")[1] for c in FAILURES["replies"] if c["name"].startswith(kind)]
             for kind in ("upload", "answer")}  # fmt: skip
    assert found["upload"] == found["answer"]
    assert "bad mac" in found["upload"]


@pytest.mark.parametrize("case", FAILURES["coding"], ids=lambda case: case["name"])
def test_coding_failures(case: dict[str, Any]) -> None:
    def run() -> None:
        layout = Layout.from_description(case["layout"], case["ring_bits"])
        layout.preflight(case["parties"]).encode(np.array([float.fromhex(v) for v in case["vector"]]))

    with pytest.raises(ProtocolError) as caught:
        run()
    assert caught.value.code == case["expect"]
