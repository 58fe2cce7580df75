"""What the opened sums of the other systems give away, carried out: votes on single pairs, and a cluster of one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from appa_secure.systems import SystemSpec, initial_mixture, preferences
from clients.tuning import ClusterTuner
from tests.clients.test_tuning import EMBEDDINGS, MIXED, pairs, rollouts, scorer, tuner

QIDS = [q for q in ("q0", "q1", "q2", "q3") for _ in range(2)]
TEXTS = ["1 9", "9 1", "0 1 9", "9 5 1", "1 2 3 4", "9 1 1 1", "2 8", "8 2"]


def test_a_sum_of_dpo_gradients_tells_how_many_voted_for_each_answer() -> None:
    """The policy is the coordinator's own, so it knows each pair's gradient and solves for the coefficients.

    A sum of P numbers hides no more than the B weighted votes it is made of: no more, and no less, than S1 of the main
    path shows. `threat_model/limitations.md` says so.
    """
    spec = SystemSpec(kind="grdpo", beta=0.3, eta=0.5, clip=1e6, generations=2)
    groups = [tuner(spec, flip=g >= 3) for g in range(5)]
    policy, seen = groups[0].reference, rollouts(QIDS, TEXTS)
    total = np.sum([g.contribution(policy, seen, None, 1)[0] for g in groups], axis=0)
    # At the reference every group has weight w and each pair the gradient of -σ(0)·β·margin / log 2 / B.
    columns = []
    for i in range(0, len(QIDS), 2):
        alone = rollouts(QIDS[i : i + 2], TEXTS[i : i + 2])
        label = preferences(groups[0].scorer.score(alone.qids, alone.answers))[0]
        columns.append(label * tuner(spec).contribution(policy, alone, None, 1)[0][:-3] / (len(TEXTS) // 2))
    votes = np.linalg.lstsq(np.stack(columns, axis=1), total[:-3], rcond=None)[0]
    labels = [preferences(g.scorer.score(seen.qids, seen.answers)) for g in groups]
    np.testing.assert_allclose(votes, np.sum(labels, axis=0), atol=0.02)


def test_the_reward_model_of_a_cluster_with_one_member_is_that_members() -> None:
    """Nobody's name stands on it, but the sum over one is the one: the coordinator sees its gradient and likelihood."""
    clients = [ClusterTuner(MIXED, scorer(flip=g == 4), EMBEDDINGS, drawn=0) for g in range(5)]
    theta, data = initial_mixture(2, 4, seed=1).astype(np.float64), pairs()
    for client in clients:
        client.spec = replace(MIXED, free_rounds=99)  # a start in which the lone group is alone
        client.drawn = int(client is clients[4])
    sent = [c.contribution(theta.ravel().astype(np.float32), data, None, 1)[0] for c in clients]
    update, members = np.split(np.sum(sent, axis=0)[:-1], [theta.size])
    assert members.tolist() == [4.0, 1.0]
    np.testing.assert_array_equal(
        update.reshape(theta.shape)[1], sent[4][: theta.size].reshape(theta.shape)[1]
    )
