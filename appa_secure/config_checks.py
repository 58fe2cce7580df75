"""What only a combination of fields shows: what cannot run, cannot be private, or needs a remark.

Every rule works on the configuration alone; none opens the data. A rule that needs the data (how many groups
a file holds, whether its options have an order) is checked again where the data are loaded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from appa_secure.config import Config

# Bits of relative precision that must be left of the smallest exponential a client adds to a fixed-point sum.
_EXP_PRECISION_BITS = 8


@dataclass(frozen=True)
class Problem:
    """One reason not to start: the dotted field, its value, why it cannot be, and what to write instead."""

    field: str
    value: object
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.field}={as_yaml(self.value)}: {self.why}. Fix: {self.fix}"


def as_yaml(value: object) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)


def problems(config: Config) -> list[Problem]:
    """Impossible combinations, in the order of the sections."""
    rules = (_task, _data, _shapes, _privacy, _secagg, _aggregation, _system, _ppo)
    return [problem for rule in rules for problem in rule(config)]


def environment_problems(config: Config) -> list[Problem]:
    """What this machine lacks: local paths that do not exist, extras that are not installed."""
    return [*_paths(config), *_extras(config)]


def notes(config: Config) -> tuple[str, ...]:
    """Allowed choices whose consequences a reader of the results should know; printed when a run starts."""
    c = config
    found = []
    if not c.privacy.enabled:
        found.append("privacy=off: trained without noise; everything written is stamped 'not private'")
    if c.privacy.enabled and not c.privacy.secure_rng:
        found.append(
            "privacy.secure_rng=false: whoever knows the seed can take the noise off; stamped 'not private'"
        )
    if c.secagg.mode == "clear":
        found.append("secagg=clear: the coordinator sees every group's rewards; stamped 'not private'")
    if c.evaluation.truth:
        found.append("evaluation.truth=true: measured against true distributions; stamped 'not private'")
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


def _task(c: Config) -> Iterator[Problem]:
    if c.task.reward != "wasserstein":
        return
    if c.data.kind == "globalopinionqa":
        yield Problem(
            "task.reward", "wasserstein", "needs ordered options, and data=globalopinionqa has no order",
            "task.reward=js (or cosine, kl)",
        )  # fmt: skip
    elif c.data.kind in ("opinionqa", "table") and not c.data.ordinal_only:
        yield Problem(
            "task.reward", "wasserstein", "needs ordered options; data.ordinal_only=false admits others",
            "data.ordinal_only=true, or task.reward=js",
        )  # fmt: skip


def _data(c: Config) -> Iterator[Problem]:
    data = c.data
    if data.kind != "synthetic" and data.path is None:
        yield Problem(
            "data.path", None, f"data={data.kind} is read from a file", "data.path=<file, folder or hub id>"
        )
    if data.kind == "synthetic" and data.path is not None:
        yield Problem(
            "data.path", data.path, "data=synthetic reads no file", "data=opinionqa, globalopinionqa or table"
        )
    if data.groups is not None and len(set(data.groups)) != len(data.groups):
        yield Problem("data.groups", list(data.groups), "names a group twice", "name each group once")
    if data.groups is not None and len(data.groups) < 2:
        yield Problem(
            "data.groups", list(data.groups), "one group has nobody to disagree with", "name at least two"
        )
    if data.kind == "globalopinionqa" and data.ordinal_only:
        yield Problem(
            "data.ordinal_only", True, "GlobalOpinionQA's options have no order", "data.ordinal_only=false"
        )
    if data.kind != "globalopinionqa" and data.nominal_respondents is not None:
        yield Problem(
            "data.nominal_respondents", data.nominal_respondents, f"data={data.kind} knows its respondents",
            "leave it out",
        )  # fmt: skip
    if data.kind == "synthetic":
        left = data.questions - data.context - math.ceil(data.heldout_fraction * data.questions)
        if left < 1:
            yield Problem(
                "data.context", data.context,
                f"with data.heldout_fraction={data.heldout_fraction} leaves none of {data.questions} "
                "questions to train on",
                "fewer context questions, or data.questions=" + str(data.questions - left + 20),
            )  # fmt: skip
        if data.answers_per_respondent > data.questions:
            yield Problem(
                "data.answers_per_respondent", data.answers_per_respondent,
                f"nobody can answer more than data.questions={data.questions}",
                f"data.answers_per_respondent={data.questions}",
            )  # fmt: skip


def _shapes(c: Config) -> Iterator[Problem]:
    for name, dim, heads in (
        ("predictor", c.predictor.dim, c.predictor.heads),
        ("policy", c.policy.dim, c.policy.heads),
    ):
        if dim % heads:
            yield Problem(
                f"{name}.dim", dim, f"must be a multiple of {name}.heads={heads}", f"{name}.dim={heads * 16}"
            )
    if c.policy.kind != "tiny" and c.policy.path is None:
        yield Problem(
            "policy.path",
            None,
            f"policy={c.policy.kind} is read from files",
            "policy.path=<folder or hub id>",
        )
    if c.embedder.kind == "hf" and c.embedder.path is None:
        yield Problem(
            "embedder.path", None, "embedder=hf is read from files", "embedder.path=<folder or hub id>"
        )


def _privacy(c: Config) -> Iterator[Problem]:
    privacy, data = c.privacy, c.data
    if not privacy.enabled:
        return
    if privacy.unit == "respondent" and data.kind in ("opinionqa", "globalopinionqa"):
        yield Problem(
            "privacy.unit", "respondent", f"data={data.kind} does not say which answers are one person's",
            "privacy.unit=response, or data=synthetic or table",
        )  # fmt: skip
    if privacy.unit == "response" and data.kind == "globalopinionqa" and data.nominal_respondents is None:
        yield Problem(
            "privacy.unit", "response", "data=globalopinionqa holds distributions, not answers",
            "data.nominal_respondents=1000, or privacy.unit=record",
        )  # fmt: skip
    if privacy.unit == "response" and privacy.answers_per_unit != 1:
        yield Problem(
            "privacy.answers_per_unit", privacy.answers_per_unit, "privacy.unit=response is one answer",
            "privacy.answers_per_unit=1, or privacy.unit=respondent",
        )  # fmt: skip
    if privacy.context_noise == 0:
        yield Problem(
            "privacy.context_noise", privacy.context_noise, "a context without noise has no privacy",
            "privacy.context_noise=4, or privacy=off",
        )  # fmt: skip


def _secagg(c: Config) -> Iterator[Problem]:
    secagg, members, groups = c.secagg, c.federation.members_per_group, c.data.known_groups
    if secagg.mode == "blind":
        if members != 1:
            yield Problem(
                "federation.members_per_group", members, "secagg=blind masks across groups, one client each",
                "federation.members_per_group=1, or secagg=cohort",
            )  # fmt: skip
        if groups is not None and groups < secagg.min_cohort:
            yield Problem(
                "secagg.min_cohort", secagg.min_cohort,
                f"{groups} groups are fewer; sums over so few can be solved for single groups",
                f"at least {secagg.min_cohort} groups, or secagg=cohort with federation.members_per_group="
                f"{secagg.min_cohort}",
            )  # fmt: skip
    if secagg.mode == "cohort" and members < secagg.min_cohort:
        yield Problem(
            "federation.members_per_group", members,
            f"secagg=cohort sums members inside a group, at least secagg.min_cohort={secagg.min_cohort}",
            f"federation.members_per_group={secagg.min_cohort}",
        )  # fmt: skip


def _aggregation(c: Config) -> Iterator[Problem]:
    if c.secagg.mode == "cohort":
        return  # the coordinator computes on means in float64; no exponential is ever summed in fixed point
    aggregation = c.aggregation
    limit = _largest_exponent(c)
    wider = "" if c.secagg.ring_bits == 64 else " or secagg.ring_bits=64"
    drowns = f"drowns in the rounding of secagg.ring_bits={c.secagg.ring_bits}"
    if aggregation.kind in ("min", "max") and aggregation.sharpness > limit:
        yield Problem(
            "aggregation.sharpness", aggregation.sharpness, f"exp(-sharpness) {drowns}",
            f"aggregation.sharpness={math.floor(limit)}{wider}",
        )  # fmt: skip
    if aggregation.kind == "appa" and 1 / aggregation.temperature > limit:
        yield Problem(
            "aggregation.temperature", aggregation.temperature, f"exp(-1/temperature) {drowns}",
            f"aggregation.temperature={math.ceil(1000 / limit) / 1000}{wider}",
        )  # fmt: skip


def _system(c: Config) -> Iterator[Problem]:
    system, members = c.system, c.federation.members_per_group
    if system.kind == "appa":
        return
    if c.secagg.mode == "cohort" or members != 1:
        field, value = (
            ("secagg.mode", "cohort")
            if c.secagg.mode == "cohort"
            else ("federation.members_per_group", members)
        )
        yield Problem(
            field, value, f"system={system.kind} takes one client for a group, and sums over all of them",
            "secagg=blind with federation.members_per_group=1, or system=appa",
        )  # fmt: skip
    if c.secagg.ring_bits != 64:
        yield Problem(
            "secagg.ring_bits", c.secagg.ring_bits, f"system={system.kind} sums weighted gradients, too small for it",
            "secagg.ring_bits=64",
        )  # fmt: skip
    if system.kind in ("grdpo", "gripo", "maxmin") and c.ppo.generations % 2:
        yield Problem(
            "ppo.generations", c.ppo.generations, f"system={system.kind} learns from pairs of answers to a question",
            f"ppo.generations={c.ppo.generations + 1}",
        )  # fmt: skip
    if system.labels == "raw" and (system.kind != "sft" or c.privacy.enabled):
        why = (
            "imitating raw answers is a release that nothing pays for"
            if system.kind == "sft"
            else f"system={system.kind} labels answers with predicted preferences"
        )
        fix = "system.labels=predicted, or system=sft with privacy=off"
        yield Problem("system.labels", "raw", why, fix)
    if system.kind == "maxmin" and system.free_rounds >= system.rounds:
        yield Problem(
            "system.free_rounds", system.free_rounds, f"leaves no round of system.rounds={system.rounds} to choose in",
            f"system.free_rounds={max(0, system.rounds // 4)}",
        )  # fmt: skip


def _largest_exponent(c: Config) -> float:
    """Largest s for which exp(-s), in a sum over all groups, keeps _EXP_PRECISION_BITS bits in the ring."""
    groups = max(c.data.known_groups or 0, c.secagg.min_cohort)
    fraction_bits = c.secagg.ring_bits - 1 - math.ceil(math.log2(groups))
    return (fraction_bits - _EXP_PRECISION_BITS) * math.log(2)


def _ppo(c: Config) -> Iterator[Problem]:
    rollouts = c.ppo.prompts_per_step * c.ppo.generations
    if rollouts % c.ppo.minibatch_size:
        divisors = [size for size in range(1, rollouts + 1) if rollouts % size == 0]
        nearest = min(divisors, key=lambda size: abs(size - c.ppo.minibatch_size))
        yield Problem(
            "ppo.minibatch_size", c.ppo.minibatch_size,
            f"must divide ppo.prompts_per_step x ppo.generations = {rollouts}",
            f"ppo.minibatch_size={nearest}",
        )  # fmt: skip
    if c.name is not None and (Path(c.name).name != c.name or c.name in (".", "..")):
        yield Problem("name", c.name, "must be one folder name", "put the folder above it into output_root")


def _paths(c: Config) -> Iterator[Problem]:
    for field, path, hub in (
        ("data.path", c.data.path, c.data.kind != "table"),
        ("policy.path", c.policy.path, c.policy.kind == "hf"),
        ("embedder.path", c.embedder.path, True),
    ):
        if path is None or Path(path).expanduser().exists() or (hub and _could_be_hub_id(path)):
            continue
        if (field, c.policy.kind) == ("policy.path", "tiny"):
            continue
        yield Problem(field, path, f"does not exist, seen from {os.getcwd()}", "an existing path")


def _could_be_hub_id(path: str) -> bool:
    """`owner/name` and nothing that only a file system has."""
    owner, _, name = path.partition("/")
    return bool(owner and name) and "/" not in name and owner[0] not in ".~"


def _extras(c: Config) -> Iterator[Problem]:
    if c.federation.kind == "simulation" and find_spec("ray") is None:
        yield Problem(
            "federation.kind", "simulation", "runs on Ray, which is not installed",
            "pip install 'appa-secure[simulation]', or federation=local",
        )  # fmt: skip
