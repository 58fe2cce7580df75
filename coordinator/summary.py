"""What a finished run says about itself: summary.json, fairness.json and the privacy statement."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from appa_secure.agreement import Agreement
from appa_secure.ceilings import share_of_gain
from appa_secure.config import Config
from appa_secure.journal import atomic_write
from appa_secure.privacy.output import output_markdown, output_statement
from appa_secure.privacy.statement import markdown, statement
from appa_secure.records import STATEMENT_JSON, STATEMENT_MD, RunDir, environment

_STAGES = ("setup", "context", "predictor", "warmup", "before", "align", "after")


def summarise(
    config: Config,
    agreement: Agreement,
    run: RunDir,
    stamp: str,
    nominal: bool,
    heldout: int,
    ceilings: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Write the three files and return the summary.

    Args:
        nominal: whether the data count respondents that are only assumed (`privacy.statement`).
        heldout: number of questions that nobody trained on.
        ceilings: the best attainable scores of the splits `train` and `heldout`; None where nothing was measured.
    """
    c = config
    stages = {name: run.stage_done(name) or {} for name in _STAGES}
    alignment = closed = gained = None
    if ceilings is not None:
        names = ("train", "heldout")
        alignment = {s: {"before": stages["before"][s], "after": stages["after"][s]} for s in names}
        closed = {s: _gap_closed(alignment[s], ceilings[s]) for s in names}
        gained = {
            s: share_of_gain(alignment[s]["after"]["min"], ceilings[s]["min_at_avg"], ceilings[s]["min"])
            for s in names
        }
    rows = list(run.ledger)
    origin = next(iter(run.transcript)).get("origin")
    private = statement(c, rows, agreement.plan.noise_multiplier, nominal, origin)
    output = _output(c, agreement, run)
    run.write_json(STATEMENT_JSON, {**private, "output_noise": output})
    words = markdown(private) + ("" if output is None else "\n" + output_markdown(output))
    atomic_write(run.path(STATEMENT_MD), words)
    last: dict[str, Any] = next((row for row in reversed(list(run.metrics)) if "step" in row), {})
    summary = {
        "experiment": c.experiment,
        "seed": c.seed,
        "stamp": stamp,
        "until": c.until,
        "groups": sorted(set(agreement.groups.values())),
        "questions": {
            "context": len(agreement.plan.context), "train": len(agreement.plan.train), "heldout": heldout,
        },
        "aggregation": c.aggregation.model_dump(mode="json"),
        "system": {"kind": c.system.kind, "mixture": stages["align"].get("mixture")},
        "reward": c.task.reward,
        "alignment": alignment,
        "ceiling": {"avg": None, "min": None} if ceilings is None else {**ceilings["train"], **ceilings},
        "gap_closed": closed,
        "share_of_gain": gained,
        "predictor": stages["predictor"].get("alignment"),
        "privacy": {
            "enabled": c.privacy.enabled, "unit": c.privacy.unit, "delta": c.privacy.delta,
            "accountant": c.privacy.accountant, "epsilon": private["epsilon"], "budget": c.privacy.epsilon,
        },
        "output_noise": output,
        "origin": origin,
        "secagg": _traffic(agreement, run),
        "stopped": stages["align"].get("stopped"),
        "last_step": {k: last.get(k) for k in ("step", "reward", "fi", "h_mean", "soft_min")},
        "seconds": {name: stage["seconds"] for name, stage in stages.items() if "seconds" in stage},
        "packages": environment(),
        "transcript_head": run.transcript.head,
    }  # fmt: skip
    run.write_fairness(
        {
            "stamp": summary["stamp"],
            "fairness_index": last.get("fi"),
            "mean_history": last.get("h_mean"),
            "soft_min_history": last.get("soft_min"),
            "alignment": None if alignment is None else {s: a["after"] for s, a in alignment.items()},
        }
    )
    run.write_summary(summary)
    return summary


def _output(config: Config, agreement: Agreement, run: RunDir) -> dict[str, Any] | None:
    """What output noise guarantees about one client; None without it."""
    a, ppo = agreement, config.ppo
    if a.output is None:
        return None
    clients = a.summed_together
    coding = a.reward_layout(ppo.prompts_per_step * ppo.generations).preflight(clients)
    return output_statement(a.output, list(run.output_ledger), coding, clients, a.secure_rng)


def _traffic(agreement: Agreement, run: RunDir) -> dict[str, Any]:
    """Rounds, dropouts and bytes per client and round, counted in the transcript."""
    rows = [row for row in run.transcript if row["event"] == "round"]
    sent: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        sent[row["kind"]].append(row["bytes_per_client"])
    return {
        "mode": agreement.mode,
        "release": agreement.release,
        "rounds": len(rows),
        "membership_changes": sum(row["event"] == "membership" for row in run.transcript),
        "dropouts": sum(len(row["dropouts"]) for row in rows),
        "aborts": sum(row["event"] == "abort" for row in run.transcript),
        "bytes_per_client_and_round": {kind: float(np.mean(b)) for kind, b in sorted(sent.items())},
    }


def _gap_closed(alignment: dict[str, Any], ceilings: Mapping[str, Any]) -> dict[str, float | None]:
    """Share of the way from the warmed-up policy to the ceiling that alignment went, for average and worst group."""
    out: dict[str, float | None] = {}
    for name in ("avg", "min"):
        top, before, after = ceilings[name], alignment["before"][name], alignment["after"][name]
        out[name] = None if top <= before else (after - before) / (top - before)
    return out
