"""A coordinator that lies about who takes part: sites follow their own operators, and sums of other members tell nothing.

The coordinator here runs code of its own where the honest one would refuse.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from appa_secure.agreement import REWARD
from appa_secure.errors import ConfigError, RunError
from appa_secure.membership import FILE, Membership, Scored, membership_of, renewed
from appa_secure.messages import REQUESTS, pack_float
from appa_secure.secagg.keys import Directory, IdentityKey
from clients.client import Client
from clients.store import ClientStore
from coordinator.rounds import NotOpened, Rounds, Summed
from tests.clients.drive import refused
from tests.clients.operators import Operators, newcomer
from tests.clients.world import World
from tests.coordinator.test_membership import GROUPS, begin, restarted
from tests.coordinator.test_reward import federated, rollouts


def asked(world: World, rounds: Rounds, step: int, opened: int, of: int | None = None) -> Summed | NotOpened:
    """The sum for the rollouts of step `of`, asked for as step `step`, by a coordinator that leaves nothing out."""
    qids, texts = rollouts(world, step if of is None else of)
    payload = {"step": step, "opened": opened, "z": pack_float(None), "questions": qids, "answers": texts}
    return rounds.sum(REWARD, "score", payload, rounds.agreement.reward_layout(len(qids)))


def forged(world: World, **groups: IdentityKey | None) -> Membership:
    """What a lying coordinator would like: the founding members, with some added (a key) or taken out (None)."""
    now = membership_of(world.agreement)
    keys: dict[str, bytes] = {**now.directory}
    for name, key in groups.items():
        keys.pop(name, None)
        if key is not None:
            keys[name] = key.public_bytes()
    return Membership(now.run, 1, 1, {c: c for c in keys}, Directory(keys))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sybil": IdentityKey.from_seed(bytes(32))}, "'sybil', who is not in the provisioned directory"),
        ({"g3": None}, "proposal lists 6 of the 7 provisioned clients"),
        ({"g3": None, "sybil": IdentityKey.from_seed(bytes(32))}, "not in the provisioned directory"),
        ({"g3": IdentityKey.from_seed(bytes(32))}, "no bundles from g3"),
    ],
    ids=["joiner", "leaver", "exchanged", "other key"],
)
def test_members_that_no_operator_told_the_sites_of_open_nothing(
    tmp_path: Path, change: dict[str, IdentityKey | None], words: str
) -> None:
    """The coordinator's own operator helps: the file lies in the run directory, and at no site."""
    world, run = begin(tmp_path)
    with run:
        rounds = world.rounds(run)
        assert isinstance(asked(world, rounds, 1, 0), Summed)
        wanted = forged(world, **change)
        if "sybil" in change:  # a client that the coordinator runs, and gives whatever it needs
            newcomer(world, "sybil")
            world.identities["sybil"] = IdentityKey.from_seed(bytes(32))
            operators = Operators(world, run)
            operators.tell(wanted, ["sybil"], coordinator=False)
            world.start("sybil")
            theta = np.load(run.path("predictor") / "parameters.npy").tobytes()
            for kind, body in (
                ("setup", {"run": wanted.run, "agreement": world.agreement.digest()}), ("context", {}),
                ("freeze", {"parameters": theta}),
            ):  # fmt: skip
                assert world.ask("sybil", kind, **body).kind == kind
        rounds.change(renewed(rounds.agreement, wanted))
        found = asked(world, rounds, 2, 1)
        assert isinstance(found, NotOpened)
        reasons = found.reason
        assert words in reasons
        assert {world.members[c].agreement.version for c in GROUPS} == {0}
        honest = world.rounds(run)
        assert isinstance(asked(world, honest, 3, 1), Summed)  # the true members go on


def test_the_honest_coordinator_stops_with_the_sites_reason(tmp_path: Path) -> None:
    """Its operator gave it members that the sites were not told of: discarded steps, then the end, with the reason."""
    world, run = begin(tmp_path)
    with run:
        reward = federated(world, run)
        run.path(FILE).write_bytes(forged(world, g3=None).encode())
        for step in range(1, 5):
            assert reward.step(step, *rollouts(world, step)) == [None] * 6
        with pytest.raises(RunError, match=r"under release 'abort' it must list all|6 of the 7 provisioned"):
            reward.step(5, *rollouts(world, 5))


def test_a_retired_key_takes_part_in_no_epoch(tmp_path: Path) -> None:
    """Whoever has the old key and state, and a coordinator that goes back to the old directory, get no sum."""
    world, run = begin(tmp_path)
    with run:
        operators, reward = Operators(world, run), federated(world, run)
        reward.step(1, *rollouts(world, 1))
        shutil.copytree(tmp_path / "clients" / "g2", tmp_path / "stolen")
        thief = Client(
            "g2", world.groups["g2"], world.agreement, world.embeddings, ClientStore(tmp_path / "stolen"),
            world.identities["g2"],
        )  # fmt: skip
        operators.change(rotate=["g2"])
        assert None not in reward.step(2, *rollouts(world, 2))
        rightful, world.members["g2"] = world.members["g2"], thief
        old = world.rounds(run)
        old.agreement = world.agreement
        assert isinstance(asked(world, old, 3, 2), NotOpened)
        others = [row for row in run.transcript if row["event"] == "abort"][-1]
        assert "g2" in str(others)
        world.members["g2"] = rightful
        assert isinstance(asked(world, old, 4, 2), NotOpened)  # the old directory does not know the new key
        reward.rounds.change(reward.rounds.agreement)  # the liar's epochs replaced the honest one
        assert None not in reward.step(5, *rollouts(world, 5))


def test_a_site_that_leaves_stops_at_once_and_opens_no_round_it_is_in(tmp_path: Path) -> None:
    world, run = begin(tmp_path)
    with run:
        operators, rounds = Operators(world, run), world.rounds(run)
        assert isinstance(asked(world, rounds, 1, 0), Summed)
        news = operators.agree(leave=["g4"])

        def between(client: str, request: object) -> bool:
            if client == "g6":  # the last to upload: then the operator of g4 acts
                operators.tell(news, ["g4"], coordinator=False)
            return client in ("g5", "g6") and getattr(request, "kind", "") == "secagg"

        world.lose = between  # two more say nothing, so that the answer of g4 would be the fifth
        assert isinstance(asked(world, rounds, 2, 1), NotOpened)
        world.lose = None
        refused(world.ask("g4", "secagg", session=REWARD, message=b""), "Withdrawn", "membership 1")
        assert world.members["g4"]._machine(REWARD)._epoch is None
        world.start("g4")
        assert (
            world.members["g4"]._machine(REWARD)._epoch is None
        )  # its secrets are gone from the disk as well
        assert isinstance(asked(world, rounds, 3, 1), NotOpened)


def test_the_same_rollouts_are_not_summed_with_and_without_a_member(tmp_path: Path) -> None:
    world, run = begin(tmp_path)
    with run:
        operators, reward = Operators(world, run), federated(world, run)
        assert None not in reward.step(1, *rollouts(world, 1))  # with everybody
        operators.change(leave=["g3"])
        reward.step(2, *rollouts(world, 2))
        without = asked(world, reward.rounds, 3, 2, of=1)
        assert isinstance(without, NotOpened)
        assert "6 of these answers were scored with other members" in without.reason
        run, reward = restarted(world, tmp_path, reward, run)  # nor after everybody restarted
        qids, texts = rollouts(world, 1)
        one = {
            "questions": qids[:1],
            "answers": ["  ".join(texts[0].split())],
        }  # nor one of them, written otherwise
        payload = {"step": 4, "opened": 2, "z": b"", **one}
        single = reward.rounds.sum(REWARD, "score", payload, reward.agreement.reward_layout(1))
        assert isinstance(single, NotOpened)
        assert "1 of these answers" in single.reason
        mixed = [*qids, *rollouts(world, 5)[0]], [*texts, *rollouts(world, 5)[1]]
        found = reward.step(5, *mixed)
        assert reward.rows[5]["opened"], reward.rows[5]["reason"]
        assert found[:6] == [None] * 6  # the honest coordinator leaves them out and goes on with the rest
        assert None not in found[6:]
        assert reward.rows[5]["repeated"] == 6
        assert reward.step(6, *rollouts(world, 1)) == [None] * 6
        assert "scored with other members" in reward.rows[6]["reason"]
        run.close()


def test_histories_of_before_a_change_are_in_no_sum_after_it(tmp_path: Path) -> None:
    """Otherwise the sums of histories would give the leaver's: the others' are known up to rewards that are summed too."""
    after = []
    for past in (1, 7):
        world, run = begin(tmp_path / str(past))
        with run:
            operators, reward = Operators(world, run), federated(world, run)
            for step in range(1, 3):
                reward.step(step, *rollouts(world, step + past))
            operators.change(leave=["g3"])
            reward.step(3, *rollouts(world, 93))
            assert reward.rows[3]["repeated"] == 0
            after.append(reward.rows[3]["result"])
    assert after[0] == after[1]


def test_below_the_minimum_cohort_nobody_follows_and_nothing_changes(tmp_path: Path) -> None:
    world, run = begin(tmp_path)
    with run:
        operators, reward = Operators(world, run), federated(world, run)
        reward.step(1, *rollouts(world, 1))
        operators.change(
            leave=["g0", "g1", "g2"]
        )  # the operators agree on it, against the agreement of the run
        with pytest.raises(
            ConfigError, match=r"4 parties would be left, secagg.min_cohort=5.*keep more, or end the run"
        ):
            reward.step(2, *rollouts(world, 2))
        # A coordinator without that check is refused by every site that stays, with the reason.
        liar = world.rounds(run)
        liar.agreement = replace(
            liar.agreement,
            groups=operators.current.groups,
            directory=operators.current.directory,
            min_cohort=3,
        )
        found = asked(world, liar, 2, 1)
        assert isinstance(found, NotOpened)
        for client in GROUPS[3:]:
            assert f"client '{client}' refused: membership.json: 4 parties would be left" in found.reason
        assert {world.members[c].agreement.version for c in GROUPS} == {0}
        assert not [row for row in run.transcript if row["event"] == "membership"]


def test_a_site_whose_key_is_not_the_one_listed_says_so(tmp_path: Path) -> None:
    world, run = begin(tmp_path)
    with run:
        operators, reward = Operators(world, run), federated(world, run)
        operators.change(rotate=["g2"])
        seed = tmp_path / "clients" / "g2" / "identity.seed"
        for wrong, words in ((bytes(32), "not its own"), (b"short", "no identity.seed")):
            right = seed.read_bytes()
            seed.write_bytes(wrong)
            step = 1 if wrong == bytes(32) else 2
            assert reward.step(step, *rollouts(world, step)) == [None] * 6
            assert words in reward.rows[step]["reason"]
            seed.write_bytes(right)
        assert None not in reward.step(3, *rollouts(world, 3))


def test_a_site_that_no_operator_made_a_member_takes_no_part(tmp_path: Path) -> None:
    world, run = begin(tmp_path)
    run.close()
    newcomer(world, "g7")
    digest = world.agreement.digest()
    refused(world.ask("g7", "setup", run="test-run", agreement=digest), "NotAMember")
    refused(world.ask("g7", "context"), "OutOfOrder", "context before setup")
    assert (tmp_path / "clients" / "g7" / "ledger.jsonl").read_bytes() == b""


def test_no_message_has_room_for_members() -> None:
    fields = {name for body in REQUESTS.values() for name in body}
    assert fields == {
        "run", "agreement", "session", "message", "round", "parameters", "step", "opened", "z", "questions", "answers",
        "config", "tokenizer", "pad", "end", "weights",  # of the warmed-up policy, where clients train it
    }  # fmt: skip
    assert set(REQUESTS["policy"]) == {"config", "tokenizer", "pad", "end", "weights"}


def test_what_was_scored_survives_a_torn_write(tmp_path: Path) -> None:
    path = tmp_path / "scored.bin"
    answers = [np.array([0.25, 0.75]), np.array([1.0, 0.0])]
    Scored(path).add(["q1", "q2"], answers, 0)
    path.write_bytes(path.read_bytes()[:-3])
    torn = Scored(path)
    assert torn.barred(["q1", "q2", "q1"], [*answers, answers[1]], 1) == [0]
    torn.add(["q2"], answers[1:], 1)
    assert Scored(path).barred(["q1", "q2"], answers, 1) == [0]
    assert Scored(path).barred(["q1", "q2"], answers, 0) == [1]
