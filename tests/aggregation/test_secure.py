"""Every rule and option through the real secure aggregation, with dropouts, against loops over the formulas.

The tolerance is the bound that `appa_secure.aggregation.blind` states for the fixed point that the round used.
"""

import math
from dataclasses import fields

import numpy as np
import pytest

from appa_secure.aggregation import BUILT_IN, AggregationSpec, combine, combine_clear, contribution, segments
from appa_secure.secagg import Aggregate, EpochReady
from appa_secure.secagg.errors import Headroom
from appa_secure.secagg.fixedpoint import Layout, Segment
from tests.secagg.world import World

GROUPS, BATCH = 6, 3
# Who is away in which step; nobody in the others. Step 1 leaves a group that begins without a history.
AWAY = {1: {0}, 4: {2}, 5: {2, 3}, 9: {5}}
STEPS = 11
SPECS = {
    "average": AggregationSpec(kind="average"),
    "average, FI of the batch": AggregationSpec(kind="average", fi_scope="batch"),
    "min": AggregationSpec(kind="min"),
    "min, c = 8": AggregationSpec(kind="min", sharpness=8.0),
    "max": AggregationSpec(kind="max"),
    "max, c = 27": AggregationSpec(kind="max", sharpness=27.0),
    "lse, a = -16": AggregationSpec(kind="lse", a=-16.0),
    "lse, a = -4": AggregationSpec(kind="lse", a=-4.0),
    "lse, a = 0": AggregationSpec(kind="lse", a=0.0),
    "lse, a = 8": AggregationSpec(kind="lse", a=8.0),
    "appa": AggregationSpec(),
    "appa, tau = 1": AggregationSpec(tau=1.0),
    "appa, tau = 0": AggregationSpec(tau=0.0),
    "appa, CoV": AggregationSpec(fi="cov", tau=0.85),
    "appa, CoV of the batch": AggregationSpec(fi="cov", fi_scope="batch", tau=0.9),
    "appa, FI of the batch": AggregationSpec(fi_scope="batch", tau=0.985),
    "appa, T = 0.05": AggregationSpec(tau=1.0, temperature=0.05),
    "appa, lambda = 0": AggregationSpec(tau=1.0, decay=0.0),
    "appa, lambda = 0.95": AggregationSpec(tau=1.0, decay=0.95),
    "appa, h0 = 0.3": AggregationSpec(tau=1.0, h0=0.3),
    "appa, a = -4": AggregationSpec(tau=1.0, a=-4.0),
    "appa, a = 0": AggregationSpec(tau=1.0, a=0.0),
    "appa, a = 8": AggregationSpec(tau=1.0, a=8.0),
    "appa, band": AggregationSpec(tau=1.0, temperature=0.02, band=(0.55, 0.85)),
    "paper": AggregationSpec(variant="paper"),
    "paper, tau = 1": AggregationSpec(variant="paper", tau=1.0),
    "paper, T = 1": AggregationSpec(variant="paper", tau=1.0, temperature=1.0),
    "paper, CoV of the batch, h0": AggregationSpec(
        variant="paper", fi="cov", fi_scope="batch", tau=0.9, h0=0.5
    ),
    "maximin": AggregationSpec(kind="maximin", temperature=0.02, band=(0.55, 0.85), ramp=4),
    "maximin, dial 1": AggregationSpec(kind="maximin", dial=1.0, temperature=0.05, ramp=1),
    "maximin, dial 0": AggregationSpec(kind="maximin", dial=0.0, temperature=0.05),
}


def fairness(spec, r):
    """One loop per definition; r: {group: rewards}."""
    columns = [[x[i] for x in r.values()] for i in range(BATCH)]
    if spec.fi_scope == "batch":
        columns = [[sum(x) / BATCH for x in r.values()]]
    found = []
    for column in columns:
        mean = sum(column) / len(column)
        cov = math.sqrt(sum((x - mean) ** 2 for x in column) / len(column)) / mean
        found.append(1 / (1 + (cov**2 if spec.fi == "cov2" else cov)))
    return sum(found) / len(found)


class Oracle:
    """The rules of APPA section 1, Park et al. and decision 21 in plain loops, with everything in one place."""

    def __init__(self, spec):
        self.spec = spec
        self.h, self.steps, self.z = [None] * GROUPS, [0] * GROUPS, None

    def weight(self, g, mean):
        s, (lo, hi) = self.spec, self.spec.band
        if s.variant == "paper":
            if self.h[g] is None or self.z is None:
                return 1 / GROUPS
            return min(1.0, math.exp(-self.h[g] / s.temperature) / self.z)
        if self.h[g] is None and self.z is None:
            return 1.0
        h = mean if self.h[g] is None else self.h[g]
        gain = min(1.0, self.steps[g] / s.ramp) if s.kind == "maximin" else 1.0
        return math.exp(-gain * (min(max(h, lo), hi) - lo) / s.temperature)

    def step(self, r):
        """r: {group: rewards}. Returns rewards, branch, fairness index."""
        s, n = self.spec, len(r)
        w = {g: self.weight(g, sum(x) / BATCH) for g, x in r.items()}
        fi, total = fairness(s, r), sum(w.values())
        rewards, branch = [], "lse"
        for i in range(BATCH):
            x = {g: row[i] for g, row in r.items()}
            mean = sum(x.values()) / n
            if s.kind == "average" or (s.kind == "appa" and fi >= s.tau):
                value, branch = mean, "mean"
            elif s.kind in ("min", "max"):
                c = s.sharpness * (1 if s.kind == "max" else -1)
                value = math.log(sum(math.exp(c * v) for v in x.values()) / n) / c
            elif s.kind == "maximin":
                value, branch = (
                    (1 - s.dial) * mean + s.dial * sum(w[g] * v for g, v in x.items()) / total,
                    "weighted",
                )
            elif s.variant == "paper" and s.kind == "appa":
                if abs(total - 1) > s.alpha_tolerance:
                    value, branch = mean, "mean"
                else:
                    value = math.log(sum(math.exp(w[g] * v) for g, v in x.items()) / n)
            else:
                share = dict.fromkeys(x, 1 / n) if s.kind == "lse" else {g: w[g] / total for g in x}
                value = sum(share[g] * v for g, v in x.items())
                if s.a:
                    value = math.log(sum(share[g] * math.exp(s.a * v) for g, v in x.items())) / s.a
            rewards.append(value)
        for g, row in r.items():
            mean, before = sum(row) / BATCH, self.h[g] if self.h[g] is not None else s.h0
            self.steps[g] += 1
            decay = 1 - 2 / (self.steps[g] + 1) if s.kind == "maximin" else s.decay
            self.h[g] = mean if before is None else decay * before + (1 - decay) * mean
        lo, hi = s.band
        self.z = sum(math.exp((lo - min(max(self.h[g], lo), hi)) / s.temperature) for g in r)
        return rewards, branch, fi


def bound(spec, coding, parties):
    """The largest error of a reward, and of a normaliser relative to itself, as blind.py states them."""
    bits = dict(zip((s.name for s in coding.layout.segments), coding.bits, strict=True))
    epsilon = {name: parties * 2.0 ** -(b + 1) for name, b in bits.items()}
    mean = epsilon["S1"] / parties
    if spec.kind in ("min", "max"):
        return -math.log1p(-(2.0 ** -(bits["E"] + 1))) / spec.sharpness, 0.0
    if spec.kind == "lse":
        return epsilon["E"] / parties * math.exp(max(-spec.a, 0.0)), 0.0
    if spec.kind == "average":
        return mean, 0.0
    least = parties * math.exp(-spec.contrast)
    z = epsilon["Z"] / least if "Z" in epsilon else 0.0
    if spec.variant == "paper" and spec.kind == "appa":
        return max(mean, epsilon["E"] / parties + z), z
    worst = max(epsilon["E"], epsilon["A"])
    return max(mean, 2 * worst / least * math.exp(max(-spec.a, 0.0) if spec.kind == "appa" else 0.0)), z


def fairness_bound(spec, coding, r):
    """Of Jain's index, relative, 2ε/S1 + ε/S2; the index from CoV moves at most with the root of that."""
    s1, s2 = (len(r) * 2.0 ** -(b + 1) for b in coding.bits[:2])
    values = r if spec.fi_scope == "question" else r.mean(axis=1, keepdims=True)
    off = (2 * s1 / values.sum(axis=0) + s2 / (values**2).sum(axis=0)).max()
    return float(off if spec.fi == "cov2" else math.sqrt(2 * off))


def test_the_options_are_all_here():
    assert {spec.kind for spec in SPECS.values()} == set(BUILT_IN)
    options = {f.name for f in fields(AggregationSpec)} - {
        "alpha_tolerance"
    }  # of `paper`, and 1e-6 is as good as any
    for name in options:
        assert len({getattr(spec, name) for spec in SPECS.values()}) > 1, name


@pytest.mark.parametrize("ring_bits", [64, 32])
@pytest.mark.parametrize("name", SPECS)
def test_secure_sums_give_every_rule_at_every_step(name, ring_bits):
    spec = SPECS[name]
    layout = Layout(tuple(Segment(*s) for s in segments(spec, BATCH)), ring_bits)
    if ring_bits == 32 and spec.kind in ("min", "max") and spec.sharpness > 8:
        with pytest.raises(Headroom):
            layout.preflight(GROUPS)
        return
    world = World(GROUPS, layout=layout, rounds=STEPS, min_cohort=3, seed=name)
    assert isinstance(world.setup(), EpochReady)
    coding = layout.preflight(GROUPS)
    rng = np.random.default_rng(7)
    level = np.linspace(0.55, 0.9, GROUPS)[:, None]
    oracle, histories, steps, z, branches = Oracle(spec), [None] * GROUPS, [0] * GROUPS, None, set()
    for step in range(1, STEPS + 1):
        r = np.clip(level + 0.08 * rng.standard_normal((GROUPS, BATCH)), 0, 1)
        if step % 3 == 0:
            r = 0.75 + 0.2 * (r - 0.75)  # fair enough for the mean branch
        away, after = AWAY.get(step, set()), list(histories)
        for g in range(GROUPS):
            vector, after[g] = contribution(spec, r[g], histories[g], z, GROUPS, steps[g] + 1)
            world.vectors[world.names[g]] = vector
        world.silent = {"round": {world.names[g] for g in away}}
        opened = world.round(step)
        assert isinstance(opened, Aggregate)
        here = [g for g in range(GROUPS) if g not in away]
        assert sorted(opened.contributors) == [world.names[g] for g in here]
        result = combine(spec, opened.sum, BATCH, len(here))
        for g in here:
            histories[g], steps[g] = after[g], steps[g] + 1

        rewards, branch, fi = oracle.step({g: r[g].tolist() for g in here})
        assert abs(fi - spec.tau) > 1e-4  # else either branch would be right
        error, relative = bound(spec, coding, len(here))
        np.testing.assert_allclose(result.rewards, rewards, rtol=0, atol=error + 1e-12)
        assert result.branch == branch
        assert result.fi == pytest.approx(fi, abs=fairness_bound(spec, coding, r[here]) + 1e-12)
        assert [histories[g] for g in here] == pytest.approx([oracle.h[g] for g in here], abs=1e-14)
        mean = sum(oracle.h[g] for g in here) / len(here)
        assert result.h_mean == pytest.approx(mean, abs=2.0 ** -(coding.bits[-2] + 1) + 1e-12)
        if spec.kind == "appa":
            assert result.z_next == pytest.approx(oracle.z, rel=relative + 1e-12)
            z = result.z_next
        else:
            z = 1.0  # says that there was a step before
        if spec.kind in ("min", "max"):
            exact, _, _ = combine_clear(spec, r[here], None)
            bias = math.log(len(here)) / spec.sharpness
            off = (result.rewards - exact.rewards) * (1 if spec.kind == "min" else -1)
            assert (off >= -error).all()
            assert (off <= bias + error).all()
            branch = "lse"
        branches.add(branch)
    if spec.kind == "appa" and spec.tau not in (0.0, 1.0):
        assert branches == {"mean", "lse"}  # the step decides


@pytest.mark.parametrize("kind", ["min", "max"])
def test_the_bias_of_a_smooth_extreme_is_reached_and_never_passed(kind):
    """log(G)/c where one group stands apart... and nothing where all are equal."""
    spec = AggregationSpec(kind=kind)
    layout = Layout(tuple(Segment(*s) for s in segments(spec, 2)))
    coding = layout.preflight(GROUPS)
    apart = np.full((GROUPS, 2), 0.5)
    apart[0, 1] = 0.0 if kind == "min" else 1.0
    codes = [coding.encode(contribution(spec, row, None, None, GROUPS)[0]) for row in apart]
    found = combine(spec, coding.decode(coding.add(codes), GROUPS), 2, GROUPS).rewards
    assert found[0] == pytest.approx(0.5, abs=1e-4)
    bias = abs(found[1] - apart[0, 1])
    assert bias <= math.log(GROUPS) / spec.sharpness + 1e-4
    assert bias == pytest.approx(math.log(GROUPS) / spec.sharpness, rel=1e-3)
