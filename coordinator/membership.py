"""How the coordinator follows a change of members between two alignment steps.

Its operator puts `membership.json` into the run directory once every site has the same file from its own operator. The
coordinator cannot make a site follow: it only proposes an epoch, which a site that was told otherwise refuses.
"""

from __future__ import annotations

import json

import numpy as np

from appa_secure.membership import FILE, Membership, membership_of, renewed
from coordinator.predictor import record_ledger
from coordinator.rounds import Rounds, ask


def follow(rounds: Rounds) -> None:
    """Take over the membership in the run directory, if it is news; ends the epochs in progress.

    Who was not a member makes and pays for a private context, and gets the final predictor, before anything changes.
    A newcomer keeps what it did then, so repeating this after a kill comes to the same. Raises ConfigError for a
    membership that no site should follow, Refused and RunError for a newcomer that does not take part.
    """
    path, run = rounds.run.path(FILE), rounds.run
    news = Membership.decode(path.read_bytes()) if path.exists() else None
    was = membership_of(rounds.agreement)
    if news is None or (news.run == was.run and news.version <= was.version):
        return
    agreement = renewed(rounds.agreement, news)
    joined = sorted(set(news.groups) - set(was.groups))
    if joined:
        ask(rounds.federation, "setup", joined, run=was.run, agreement=rounds.founding.digest())
    if joined and not agreement.true_rewards:
        for client, reply in ask(rounds.federation, "context", joined).items():
            record_ledger(run.ledger, client, reply.body["ledger"])
        theta = np.load(run.path("predictor") / "parameters.npy").astype("<f4").tobytes()
        ask(rounds.federation, "freeze", joined, parameters=theta)
    run.transcript.membership(
        news.version, news.period, json.loads(news.encode())["clients"], directory=news.directory.digest().hex(),
        joined=joined, left=sorted(set(was.groups) - set(news.groups)),
        rotated=sorted(c for c, key in was.directory.items() if news.directory.get(c, key) != key),
    )  # fmt: skip
    rounds.change(agreement)
