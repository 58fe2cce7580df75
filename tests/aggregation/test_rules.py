"""Every rule: blind equals clear at every step; log-sum-exp by its formula; a rule of the user's own."""

import math
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appa_secure.aggregation import BUILT_IN, AggregationSpec, combine, combine_clear, contribution, segments
from appa_secure.secagg.fixedpoint import Layout, Segment

NASH = """
    from math import log
    import numpy as np
    from appa_secure.aggregation import Rule, Sum

    nash = Rule(
        sums=lambda spec: (Sum("L", log(1e-3), 0.0, lambda g: np.log(np.maximum(g.rewards, 1e-3))),),
        rewards=lambda spec, sums: (np.exp(sums["L"] / sums.groups), "nash"),
    )
    not_a_rule = 3
"""
# Kinds whose sums give the rule itself; `min` and `max` are approached, see test_blind.
EXACT = sorted(name for name, rule in BUILT_IN.items() if rule.exact is None)


@pytest.fixture(scope="module", autouse=True)
def own_rules(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rules")
    (folder / "my_rules.py").write_text(textwrap.dedent(NASH))
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("my_rules", None)


def test_the_documented_example_is_the_one_tested():
    import appa_secure.aggregation.rules as rules

    code = "\n".join(line.strip() for line in textwrap.dedent(NASH).splitlines() if "not_a_rule" not in line)
    documented = "\n".join(line.strip() for line in (rules.__doc__ or "").splitlines())
    assert "".join(code.split()) in "".join(documented.split())


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([*EXACT, "my_rules:nash"]), st.integers(0, 2**32), st.data())
def test_blind_equals_clear_at_every_step(kind, seed, data):
    """Through the real fixed-point coding of a secure sum."""
    rng = np.random.default_rng(seed)
    band = data.draw(st.sampled_from([(0.0, 1.0), (0.6, 0.9)]))
    spec = AggregationSpec(
        kind=kind,
        tau=data.draw(st.sampled_from([0.95, 1.0])),
        temperature=data.draw(st.sampled_from([0.05, 0.2])),
        band=band,
        a=data.draw(st.sampled_from([-4.0, 0.0, 1.0, 8.0])),
        dial=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        ramp=data.draw(st.sampled_from([1, 3])),
        fi_scope=data.draw(st.sampled_from(["question", "batch"])),
        h0=data.draw(st.sampled_from([None, 0.7])),
    )
    groups, batch = data.draw(st.integers(2, 8)), data.draw(st.integers(1, 5))
    coding = Layout(tuple(Segment(*s) for s in segments(spec, batch))).preflight(groups)
    own, clear, z, z_clear = [None] * groups, None, None, None
    for step in range(1, 6):
        r = np.clip(0.75 + 0.15 * rng.standard_normal((groups, batch)), 0, 1)
        codes = []
        for g in range(groups):
            vector, own[g] = contribution(spec, r[g], own[g], z, groups, step)
            codes.append(coding.encode(vector))
        result = combine(spec, coding.decode(coding.add(codes), groups), batch, groups)
        expected, clear, _ = combine_clear(spec, r, clear, z_clear, step=step)
        if abs(expected.fi - spec.tau) < 1e-6:
            return  # either branch is right here
        # z only says whether there was a step before.
        z, z_clear = result.z_next if result.z_next is not None else 1.0, expected.z_next
        contrast = math.exp((band[1] - band[0]) / spec.temperature)
        rounding = 2.0 ** (1 - min(coding.bits)) * max(contrast, math.exp(max(-spec.a, 0.0)))
        np.testing.assert_allclose(result.rewards, expected.rewards, atol=1e-12 + rounding)
        assert result.branch == expected.branch
        assert result.fi == pytest.approx(expected.fi, abs=1e-6)
        assert result.h_mean == pytest.approx(expected.h_mean, abs=1e-9)
        np.testing.assert_allclose(own, clear, rtol=0, atol=1e-15)


@given(
    st.integers(1, 7),
    st.integers(1, 5),
    st.sampled_from([-16.0, -2.0, 1e-9, 0.5, 16.0]),
    st.integers(0, 2**32),
)
def test_log_sum_exp_equals_its_formula(groups, batch, a, seed):
    r = np.random.default_rng(seed).random((groups, batch))
    result, _, _ = combine_clear(AggregationSpec(kind="lse", a=a), r, None)
    for i in range(batch):
        if a == 1e-9:
            expected = sum(r[:, i]) / groups
        else:
            expected = math.log(sum(math.exp(a * x) for x in r[:, i]) / groups) / a
        assert result.rewards[i] == pytest.approx(expected, abs=1e-8)
    # Park et al. 2405.00254: between min and max, within log(G)/|a| of the one it leans to.
    lean = r.min(axis=0) if a < 0 else r.max(axis=0)
    if abs(a) > 1:
        assert (np.abs(result.rewards - lean) <= math.log(groups) / abs(a) + 1e-9).all()


def test_a_users_rule_is_its_formula_in_both_forms():
    r = np.array([[0.2, 0.9, 0.0], [0.8, 0.4, 1.0]])
    spec = AggregationSpec(kind="my_rules:nash")
    assert [name for name, *_ in segments(spec, 3)] == ["S1", "S2", "L", "H1", "H2"]
    vectors = [contribution(spec, row, None, None, 2)[0] for row in r]
    blind, (clear, _, _) = combine(spec, sum(vectors), 3, 2), combine_clear(spec, r, None)
    expected = np.sqrt([0.2 * 0.8, 0.9 * 0.4, 1e-3])
    np.testing.assert_allclose(blind.rewards, expected)
    np.testing.assert_allclose(clear.rewards, expected)
    assert blind.branch == "nash"
    assert blind.fi == pytest.approx(clear.fi)


@pytest.mark.parametrize("kind", ["my_rules:nothing", "my_rules:not_a_rule", "nowhere:nash"])
def test_what_is_no_rule_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=rf"aggregation\.kind='{kind}'"):
        AggregationSpec(kind=kind)


def test_secure_sums_refuse_a_contrast_they_cannot_hold():
    spec = AggregationSpec(kind="maximin", temperature=0.01)
    combine_clear(spec, np.full((2, 1), 0.5), None)  # in one place nothing drowns
    with pytest.raises(ValueError, match=r"narrower aggregation\.band"):
        segments(spec, 1)
    segments(AggregationSpec(kind="maximin", temperature=0.01, band=(0.7, 0.9)), 1)


def test_every_rule_has_an_option_file():
    folder = Path(__file__).parent.parent.parent / "configs" / "aggregation"
    kinds = {
        line.split()[1]
        for path in folder.glob("*.yaml")
        for line in path.read_text().splitlines()
        if "kind:" in line
    }
    assert kinds == set(BUILT_IN)
