"""Allowed choices whose consequences a reader of a run's results should know."""

from __future__ import annotations

from appa_secure.config_sections import Config


def notes(config: Config) -> tuple[str, ...]:
    """Allowed choices whose consequences a reader of the results should know; printed when a run starts."""
    c = config
    found = []
    if not c.privacy.enabled:
        found.append("privacy=off: trained without noise; everything written is stamped 'not private'")
    if c.secagg.output_epsilon is not None and not c.privacy.secure_rng:
        found.append(
            "privacy.secure_rng=false: output noise, too, can be taken off by whoever knows the seed"
        )
    if c.privacy.enabled and not c.privacy.secure_rng:
        found.append(
            "privacy.secure_rng=false: whoever knows the seed can take the noise off; stamped 'not private'"
        )
    if c.predictor.kind == "truth":
        found.append("predictor=truth: rewards come from true answers; for measuring aggregation rules only")
    if c.secagg.mode == "clear":
        found.append("secagg=clear: the coordinator sees every group's rewards; stamped 'not private'")
    if c.evaluation.truth:
        found.append("evaluation.truth=true: measured against true distributions; stamped 'not private'")
    if c.predictor.training != "federated":
        found.append(
            f"predictor.training={c.predictor.training}: one trusted party reads all groups' answers; stamped 'not private'"
        )
    if c.secagg.mode == "blind" and c.secagg.release == "recover":
        found.append(
            "secagg.release=recover with secagg.mode=blind: a coordinator that sees or fakes a dropout can "
            "subtract two sums and read that group's rewards"
        )
    if c.aggregation.kind == "appa" and c.aggregation.variant == "paper" and _release(c) == "recover":
        found.append(
            "aggregation.variant=paper cannot be renormalised after a dropout: such a step takes the mean"
        )
    if c.system.kind != "appa":
        found.append(f"system={c.system.kind}: aggregation={c.aggregation.kind} plays no part")
    if c.system.kind == "maxmin" and c.secagg.mode == "blind":
        found.append(
            "system=maxmin: the reward model of a cluster with one member is that group's own, seen by the coordinator"
        )
    if c.privacy.enabled and c.privacy.delta > 1e-3:
        found.append(
            f"privacy.delta={c.privacy.delta}: far above one over the number of people; 1e-6 is usual"
        )
    if c.data.kind == "globalopinionqa" and c.privacy.enabled and c.privacy.unit == "response":
        found.append(
            f"privacy.unit=response on published distributions assumes {c.data.nominal_respondents} "
            "respondents per question and country (data.nominal_respondents)"
        )
    if c.ppo.checkpoint_every > c.ppo.steps:
        found.append("ppo.checkpoint_every exceeds ppo.steps: the only checkpoint is the final one")
    return tuple(found)


def _release(config: Config) -> str:
    if config.secagg.release != "auto":
        return config.secagg.release
    return "recover" if config.secagg.mode == "cohort" else "abort"
