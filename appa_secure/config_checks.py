"""What only a combination of fields shows: what cannot run, cannot be private, or needs a remark.

Every rule works on the configuration alone; none opens the data. A rule that needs the data (how many groups
a file holds, whether its options have an order) is checked again where the data are loaded.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from appa_secure.aggregation import AggregationSpec
from appa_secure.secagg.fixedpoint import FLOAT_BITS
from appa_secure.tasks import MAX_WEIGHT

if TYPE_CHECKING:
    from appa_secure.config_sections import AggregationConfig, Config

# Bits of relative precision that must be left of the smallest exponential a client adds to a fixed-point sum.
_EXP_PRECISION_BITS = 8
# Largest s for exponentials exp(-s) in sums with output noise: noise on what they give is at most e^4 times that on a mean.
_NOISY_EXPONENT = 4.0


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
    rules = (
        _task, _data, _shapes, _centralised, _origin, _privacy, _secagg, _output_noise, _aggregation, _system, _ppo, _evaluation,
    )  # fmt: skip
    return [problem for rule in rules for problem in rule(config)]


def environment_problems(config: Config) -> list[Problem]:
    """What this machine lacks: local paths that do not exist, extras that are not installed."""
    return [*_paths(config), *_extras(config)]


def _task(c: Config) -> Iterator[Problem]:
    if c.task.max_weight != MAX_WEIGHT and c.policy.kind != "tabular":
        yield Problem(
            "task.max_weight", c.task.max_weight, f"language models are taught the weights 0..{MAX_WEIGHT}",
            f"task.max_weight={MAX_WEIGHT}, or policy=tabular",
        )  # fmt: skip
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
            "data.path",
            None,
            f"data={data.kind} is read from a file",
            "data.path=<file, folder or hub id>"
            + (
                ""
                if data.kind == "table"
                else f", or the environment variable APPA_SHARED=<folder that holds data/{data.kind}>"
            ),
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
    if c.policy.kind not in ("tiny", "tabular") and c.policy.path is None:
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


def _centralised(c: Config) -> Iterator[Problem]:
    training, federated = c.predictor.training, "predictor.training=federated"
    if training == "federated":
        return
    if c.data.kind == "table":
        yield Problem(
            "predictor.training", training,
            "brings all groups' answers to one place, which is for simulated and published data only", federated,
        )  # fmt: skip
    if c.federation.kind != "local":
        yield Problem(
            "predictor.training", training, f"needs all groups in one process; federation={c.federation.kind} keeps "
            "them apart", f"federation=local, or {federated}",
        )  # fmt: skip
    if c.predictor.local_steps != 1:
        yield Problem(
            "predictor.local_steps", c.predictor.local_steps,
            f"predictor.training={training} takes one step per round", "predictor.local_steps=1",
        )  # fmt: skip


def _origin(c: Config) -> Iterator[Problem]:
    """Several runs on one predictor sum the same predictions in several ways, which can be solved for a single group's."""
    wrong = (
        (c.predictor.kind != "gpo", "predictor=truth trains none", "predictor=gpo"),
        (c.until == "predictor", "there is nothing left to do with until=predictor", "until=align"),
        (
            not c.evaluation.truth,
            "runs that share a predictor show their coordinator several sums of the same predictions, which can be solved "
            "for one group's; that is for simulations that measure against the truth anyway", "evaluation.truth=true",
        ),
        (
            c.secagg.output_epsilon is not None, "output noise promises that a run shows little about one client, and "
            "says nothing about several runs on the same predictions", "secagg.output_epsilon=null",
        ),
    )  # fmt: skip
    for found, why, fix in wrong:
        if found and c.predictor.origin is not None:
            yield Problem("predictor.origin", c.predictor.origin, why, f"{fix}, or predictor.origin=null")


def _privacy(c: Config) -> Iterator[Problem]:
    privacy, data = c.privacy, c.data
    if c.predictor.kind == "truth" and (privacy.enabled or not c.evaluation.truth):
        yield Problem(
            "predictor.kind", "truth", "rewards from true answers are for simulations without privacy",
            "predictor.kind=gpo, or privacy=off evaluation.truth=true",
        )  # fmt: skip
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
    if privacy.context_noise == 0 and privacy.mechanism == "dpsgd":
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


def _output_noise(c: Config) -> Iterator[Problem]:
    secagg, rule = c.secagg, c.aggregation
    if secagg.output_epsilon is None:
        if secagg.release == "noise":
            yield Problem(
                "secagg.release", "noise", "opens partial sums only with output noise, and there is none",
                "secagg.output_epsilon=8, or secagg.release=abort",
            )  # fmt: skip
        if secagg.colluders is not None:
            yield Problem(
                "secagg.colluders",
                secagg.colluders,
                "only output noise depends on it",
                "secagg.output_epsilon=8",
            )
        return
    if secagg.mode == "clear":
        yield Problem(
            "secagg.output_epsilon", secagg.output_epsilon,
            "secagg=clear shows every client's vector: noise on their sum protects nobody",
            "secagg.output_epsilon=null, or secagg=blind",
        )  # fmt: skip
    if secagg.mode != "blind":
        return
    if rule.kind in ("min", "max"):
        yield Problem(
            "secagg.output_epsilon", secagg.output_epsilon,
            f"aggregation={rule.kind} sums exponentials of which the smallest decides: any noise drowns it",
            "aggregation=appa or average, or secagg=cohort",
        )  # fmt: skip
    steep = {"lse": abs(rule.a), "maximin": exponents(rule)["temperature"]}.get(rule.kind, 0.0)
    if steep > _NOISY_EXPONENT:
        yield Problem(
            "secagg.output_epsilon", secagg.output_epsilon,
            f"aggregation={rule.kind} sums values that differ by up to e^{steep:.3g}: noise drowns the small ones",
            f"aggregation.a={math.copysign(_NOISY_EXPONENT, rule.a):g}" if rule.kind == "lse" else
            "a narrower aggregation.band or a higher aggregation.temperature, or secagg=cohort",
        )  # fmt: skip
    if rule.kind == "appa" and rule.variant == "paper":
        yield Problem(
            "aggregation.variant", "paper", "needs an exact normaliser, and output noise leaves none",
            "aggregation.variant=weighted",
        )  # fmt: skip


def _aggregation(c: Config) -> Iterator[Problem]:
    found = list(_drowned(c))
    yield from found
    if found:
        return
    try:
        _ = c.aggregation.spec
    except ValueError as error:
        name = re.findall(r"aggregation\.(\w+)", str(error))[0]
        yield Problem(f"aggregation.{name}", getattr(c.aggregation, name), str(error), "a value as said")


def _drowned(c: Config) -> Iterator[Problem]:
    """Exponentials that a sum in fixed point cannot hold."""
    if c.secagg.mode == "cohort":
        return  # the coordinator computes on means in float64; no exponential is ever summed in fixed point
    aggregation = c.aggregation
    limit = largest_exponent(c.secagg.ring_bits, max(c.data.known_groups or 0, c.secagg.min_cohort))
    wider = "" if c.secagg.ring_bits == 64 else " or secagg.ring_bits=64"
    drowns = f"drowns in the rounding of secagg.ring_bits={c.secagg.ring_bits}"
    needed = exponents(aggregation)
    if aggregation.kind == "appa" and aggregation.variant == "paper":
        # Rounding of Z moves Σα by up to 2^-(f+1)·exp(1/T), and beyond the tolerance every step would take the mean.
        steepest = limit + (_EXP_PRECISION_BITS + 1) * math.log(2) + math.log(AggregationSpec.alpha_tolerance)
        if needed["temperature"] > steepest:
            yield Problem(
                "aggregation.temperature", aggregation.temperature, "variant=paper needs an exact sum of weights, which "
                f"{drowns}", f"aggregation.temperature={math.ceil(1e3 / steepest) / 1e3} or aggregation.variant=weighted{wider}",
            )  # fmt: skip
            return
    if needed.get("sharpness", 0.0) > limit:
        yield Problem(
            "aggregation.sharpness", aggregation.sharpness, f"exp(-sharpness) {drowns}",
            f"aggregation.sharpness={math.floor(limit)}{wider}",
        )  # fmt: skip
    if needed["temperature"] > limit:
        least = math.ceil(1e4 * needed["temperature"] * aggregation.temperature / limit) / 1e4
        yield Problem(
            "aggregation.temperature", aggregation.temperature, f"exp(-(width of the band)/temperature) {drowns}",
            f"aggregation.temperature={least} or a narrower aggregation.band{wider}",
        )  # fmt: skip


def _system(c: Config) -> Iterator[Problem]:
    system, members = c.system, c.federation.members_per_group
    if system.kind == "appa":
        return
    for name, wrong, field, value, other in (
        ("answers of a language model", c.policy.kind == "tabular", "policy.kind", "tabular", "policy=tiny"),
        ("predicted preferences", c.predictor.kind == "truth", "predictor.kind", "truth", "predictor=gpo"),
        (
            "sums without output noise", c.secagg.output_epsilon is not None, "secagg.output_epsilon",
            c.secagg.output_epsilon, "secagg.output_epsilon=null",
        ),
    ):  # fmt: skip
        if wrong:
            yield Problem(field, value, f"system={system.kind} takes {name}", f"{other}, or system=appa")
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


def _evaluation(c: Config) -> Iterator[Problem]:
    if c.evaluation.predictor_every and not c.evaluation.truth:
        yield Problem(
            "evaluation.predictor_every", c.evaluation.predictor_every,
            "compares predictions with true answers, and evaluation.truth is off",
            "evaluation.predictor_every=0",
        )  # fmt: skip


def exponents(rule: AggregationConfig | AggregationSpec) -> dict[str, float]:
    """The s of the smallest exponentials exp(-s) that a rule sums, by the option they come from."""
    lo, hi = rule.band
    found = {"temperature": (hi - lo) / rule.temperature}
    return {**found, "sharpness": rule.sharpness} if rule.kind in ("min", "max") else found


def largest_exponent(ring_bits: int, groups: int) -> float:
    """Largest s for which exp(-s), in a sum over all groups, keeps _EXP_PRECISION_BITS bits in the ring."""
    # Sums are read as float64.
    fraction_bits = min(ring_bits - 1, FLOAT_BITS) - math.ceil(math.log2(groups))
    return (fraction_bits - _EXP_PRECISION_BITS) * math.log(2)


def _ppo(c: Config) -> Iterator[Problem]:
    rollouts = c.ppo.prompts_per_step * c.ppo.generations
    if rollouts % c.ppo.minibatch_size and c.policy.kind != "tabular":
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
        if field == "policy.path" and c.policy.kind in ("tiny", "tabular"):
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
