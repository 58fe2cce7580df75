"""Every choice composes, every impossible one is refused by field and fix, a written one reads back equal."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from appa_secure import config_checks
from appa_secure.aggregation import BUILT_IN
from appa_secure.config import GROUPS, Config, compose, fields, load, option_summary, options
from appa_secure.config_notes import notes
from appa_secure.errors import ConfigError
from appa_secure.rewards import KINDS, score, task_of
from tests.test_docs import tables

# What an option needs besides its name to be a runnable configuration; HERE stands for a path that exists.
HERE = str(Path(__file__).parent)
NEEDS = {
    "data=opinionqa": [f"data.path={HERE}"],
    "data=globalopinionqa": [f"data.path={HERE}", "task.reward=js"],
    "data=table": [f"data.path={HERE}", "data.ordinal_only=true"],
    "embedder=hf": [f"embedder.path={HERE}"],
    "policy=stories260k": [f"policy.path={HERE}"],
    "policy=hf": [f"policy.path={HERE}"],
    "secagg=cohort": ["federation.members_per_group=5"],
    "predictor=truth": ["privacy=off"],
    "experiment=tabular_opinionqa": [f"data.path={HERE}"],
    "experiment=tabular_globalopinionqa": [f"data.path={HERE}"],
    "experiment=opinionqa_dense": [f"data.path={HERE}"],
    "experiment=globalopinionqa_8": [f"data.path={HERE}"],
    "experiment=predictor_opinionqa": [f"data.path={HERE}"],
    "experiment=predictor_central_opinionqa": [f"data.path={HERE}"],
    "experiment=predictor_central_globalopinionqa": [f"data.path={HERE}"],
}
STUDIES = {
    "seeds_table",
    "seeds_table_quick",
    "frontier",
    "frontier_quick",
    "claims",
    "claims_quick",
}  # of several experiments: no run of their own
CHOICES = [f"{group}={option}" for group in GROUPS for option in options(group) if option not in STUDIES]


@pytest.fixture(autouse=True)
def no_surveys(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a path is taken from where none is given."""
    monkeypatch.delenv("APPA_SHARED", raising=False)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_option_composes(choice: str) -> None:
    if choice == "federation=simulation":
        pytest.importorskip("ray", reason="Flower's simulation engine is not installed")
    config = compose([choice, *NEEDS.get(choice, [])])
    assert load_text(config.to_yaml()) == config
    group, _, option = choice.partition("=")
    assert option_summary(group, option), f"{choice} does not say what it is for"


def load_text(text: str, folder: Path | None = None) -> Config:
    import tempfile

    with tempfile.TemporaryDirectory(dir=folder) as directory:
        path = Path(directory) / "config.resolved.yaml"
        path.write_text(text, encoding="utf-8")
        return load(path)


def test_groups_are_the_folders_of_configs() -> None:
    folders = {path.parent.name for path in Path(__file__).parent.parent.glob("configs/*/*.yaml")}
    assert folders == set(GROUPS)


def test_the_demo_is_the_default_and_private() -> None:
    config = compose([])
    assert config.experiment == "demo"
    assert (config.data.kind, config.data.group_count) == ("synthetic", 8)
    assert (config.secagg.mode, config.aggregation.kind, config.privacy.enabled) == ("blind", "appa", True)
    assert config == compose(["experiment=demo"])


def test_the_command_line_wins_over_the_experiment_and_that_over_the_option_file() -> None:
    dense = ["experiment=opinionqa_dense", f"data.path={HERE}"]
    assert compose(dense).aggregation.kind == "appa"
    for order in ([*dense, "aggregation=average"], ["aggregation=average", *dense]):
        assert compose(order).aggregation.kind == "average"
    assert compose(["experiment=smoke"]).predictor.dim == 16  # option file `small` says 64
    assert compose(["experiment=smoke", "predictor.dim=32"]).predictor.dim == 32


def test_a_field_absent_from_the_option_file_can_be_set() -> None:
    assert compose(["aggregation=average", "aggregation.tau=0.9"]).aggregation.tau == 0.9
    lora = compose(["policy.lora.r=8"]).policy.lora
    assert lora is not None
    assert lora.r == 8


def test_numbers_are_names_where_names_are_asked_for() -> None:
    config = compose(["name=2024", "data.groups=[1,2,3,4,5]"])
    assert config.name == "2024"
    assert config.data.groups == ("1", "2", "3", "4", "5")


def test_an_unreadable_answer_earns_less_than_a_random_one() -> None:
    """Else the policy would learn to write nothing that can be read."""
    rng = np.random.default_rng(1)
    targets = rng.dirichlet(np.ones(4), 400)
    for kind in KINDS:
        penalty = compose([f"task.reward={kind}"]).task.format_penalty
        answers = {"dpa": rng.dirichlet(np.ones(4), 400), "opa": rng.random((400, 4))}.get(task_of(kind))
        answers = np.eye(4)[rng.integers(4, size=400)] if answers is None else answers
        assert penalty < score(kind, answers, targets, np.tile(np.arange(4.0), (400, 1))).mean() - 0.1
    assert compose(["task.reward=choice", "task.format_penalty=0.25"]).task.format_penalty == 0.25


def test_truth_is_measured_except_on_an_institutions_own_data() -> None:
    table = ["data=table", f"data.path={HERE}", "data.ordinal_only=true"]
    assert compose([]).evaluation.truth is True
    assert compose(["evaluation.truth=false"]).evaluation.truth is False
    assert compose(table).evaluation.truth is False
    assert compose([*table, "evaluation.truth=true"]).evaluation.truth is True


def test_configurations_are_immutable() -> None:
    with pytest.raises(ValidationError):
        compose([]).seed = 2  # type: ignore[misc]


@given(
    seed=st.integers(0, 2**31 - 1),
    name=st.one_of(st.none(), st.text("abcdefgonyesul0123456789 :#-_'\"é", min_size=1, max_size=12)),
    delta=st.floats(1e-300, 1, exclude_max=True),
    lr=st.floats(1e-30, 1e30),
    groups=st.one_of(st.none(), st.lists(st.sampled_from("abcdefgh"), min_size=5, unique=True)),
    secure=st.booleans(),
)
def test_written_configurations_read_back_equal(
    seed: int, name: str | None, delta: float, lr: float, groups: list[str] | None, secure: bool
) -> None:
    config = Config.model_validate(
        {
            "seed": seed,
            "name": name,
            "privacy": {"delta": delta, "secure_rng": secure},
            "ppo": {"lr": lr},
            "data": {"groups": groups},
        }
    )
    assert load_text(config.to_yaml()) == config


# Overrides that cannot run, the field the message must name, and a word of its reason or fix.
REFUSED = [
    # unknown
    ("aggregaton=appa", "aggregaton", "did you mean aggregation=appa"),
    ("ppo.stps=3", "ppo.stps", "ppo.steps=3"),
    ("steps=3", "steps", "ppo.steps=3"),
    ("lr=1", "lr", "predictor.lr=1, system.lr=1, ppo.lr=1"),
    ("nonsense.whatever=1", "nonsense.whatever", "appa-secure run --help"),
    ("aggregation=apa", "aggregation", "aggregation=appa"),
    (
        "aggregation=zzzz",
        "aggregation",
        "appa|appa_paper|average|lse|max|maximin|maximin_broad|maximin_close|maximin_conflict|min",
    ),
    ("privacy.unit=persn", "privacy.unit", "'respondent'"),
    ("ppo=3", "ppo", "is a section"),
    ("~data", "data", "not removed"),
    ("data@policy=synthetic", "data", "not removed or moved"),
    ("seed=1,2", "seed", "appa-secure sweep seed=1,2"),
    ("seed=range(1,4)", "seed", "appa-secure sweep"),
    ("just-text", "just-text", "field=value"),
    ("policy.lora.rank=8", "policy.lora.rank", "did you mean policy.lora.r="),
    ("policy.lora={rank:8}", "policy.lora.rank", "no such field"),
    # values
    ("seed=-1", "seed", "greater than or equal to 0"),
    ("seed=1.5", "seed", "integer"),
    ("seed=true", "seed", "integer"),
    ("privacy.enabled=maybe", "privacy.enabled", "boolean"),
    ("privacy.delta=1.5", "privacy.delta", "less than 1"),
    ("privacy.delta=1", "privacy.delta", "less than 1"),
    ("privacy.delta=0", "privacy.delta", "greater than 0"),
    ("privacy.epsilon=0", "privacy.epsilon", "greater than 0"),
    ("privacy.epsilon=inf", "privacy.epsilon", "finite"),
    ("privacy.sample_rate=1.01", "privacy.sample_rate", "less than or equal to 1"),
    ("secagg.threshold=0.5", "secagg.threshold", "greater than 0.5"),
    ("secagg.threshold=1.1", "secagg.threshold", "less than or equal to 1"),
    ("secagg.ring_bits=48", "secagg.ring_bits", "32 or 64"),
    ("secagg.min_cohort=2", "secagg.min_cohort", "greater than or equal to 3"),
    ("aggregation.temperature=0", "aggregation.temperature", "greater than 0"),
    ("aggregation.decay=1", "aggregation.decay", "less than 1"),
    ("aggregation.tau=1.2", "aggregation.tau", "less than or equal to 1"),
    ("ppo.generations=1", "ppo.generations", "greater than or equal to 2"),
    ("ppo.steps=0", "ppo.steps", "greater than or equal to 1"),
    ("data.conflict=1.2", "data.conflict", "less than or equal to 1"),
    ("data.heldout_fraction=1", "data.heldout_fraction", "less than 1"),
    ("name=a/b", "name", "output_root"),
    # combinations
    (f"data=globalopinionqa data.path={HERE}", "task.reward", "task.reward=js"),
    (f"data=table data.path={HERE}", "task.reward", "data.ordinal_only=true"),
    (
        f"data=globalopinionqa data.path={HERE} task.reward=js data.ordinal_only=true",
        "data.ordinal_only",
        "false",
    ),
    ("data=opinionqa", "data.path", "data.path=<"),
    ("data=opinionqa data.path=./nowhere/at/all", "data.path", "does not exist"),
    ("data=table data.path=owner/name", "data.path", "does not exist"),
    (f"data.path={HERE}", "data.path", "reads no file"),
    ("data.groups=[a,a,b,c,d,e]", "data.groups", "twice"),
    ("data.groups=[a] secagg=clear", "data.groups", "at least two"),
    ("data.nominal_respondents=1000", "data.nominal_respondents", "leave it out"),
    ("data.context=110", "data.context", "none of 120 questions"),
    ("data.answers_per_respondent=121", "data.answers_per_respondent", "data.questions=120"),
    ("predictor.heads=5", "predictor.dim", "multiple of predictor.heads=5"),
    ("policy.heads=3", "policy.dim", "multiple of policy.heads=3"),
    ("policy=hf", "policy.path", "policy.path=<"),
    ("policy=stories260k policy.path=owner/name", "policy.path", "does not exist"),
    ("embedder=hf", "embedder.path", "embedder.path=<"),
    (f"data=opinionqa data.path={HERE} privacy.unit=respondent", "privacy.unit", "privacy.unit=response"),
    (
        f"data=globalopinionqa data.path={HERE} task.reward=js data.nominal_respondents=null",
        "privacy.unit",
        "data.nominal_respondents=1000",
    ),
    ("privacy.answers_per_unit=3", "privacy.answers_per_unit", "privacy.unit=respondent"),
    ("privacy.context_noise=0", "privacy.context_noise", "privacy=off"),
    ("federation.members_per_group=5", "federation.members_per_group", "secagg=cohort"),
    ("data.group_count=4", "secagg.min_cohort", "4 groups"),
    ("data.groups=[a,b,c]", "secagg.min_cohort", "3 groups"),
    ("secagg=cohort", "federation.members_per_group", "federation.members_per_group=5"),
    ("secagg.ring_bits=32 aggregation=min", "aggregation.sharpness", "secagg.ring_bits=64"),
    ("secagg.ring_bits=32 aggregation.variant=paper", "aggregation.temperature", "variant=weighted"),
    # output noise
    ("secagg.release=noise", "secagg.release", "secagg.output_epsilon=8"),
    ("secagg.colluders=1", "secagg.colluders", "secagg.output_epsilon=8"),
    ("secagg.output_epsilon=8 secagg=clear", "secagg.output_epsilon", "protects nobody"),
    ("secagg.output_epsilon=8 aggregation=min", "secagg.output_epsilon", "drowns"),
    ("secagg.output_epsilon=8 aggregation=max", "secagg.output_epsilon", "drowns"),
    ("secagg.output_epsilon=8 aggregation=maximin", "secagg.output_epsilon", "drowns"),
    ("secagg.output_epsilon=8 aggregation=lse aggregation.a=-8", "secagg.output_epsilon", "aggregation.a=-4"),
    ("secagg.output_epsilon=8 aggregation.variant=paper", "aggregation.variant", "weighted"),
    ("secagg.output_epsilon=0", "secagg.output_epsilon", "greater than 0"),
    ("aggregation=max aggregation.sharpness=80", "aggregation.sharpness", "rounding"),
    ("aggregation.temperature=0.01", "aggregation.temperature", "rounding"),
    ("aggregation.band=[0.9,0.8]", "aggregation.band", "lo < hi"),
    ("aggregation.variant=paper aggregation.band=[0.5,1]", "aggregation.band", "variant=paper"),
    ("aggregation.kind=median", "aggregation.kind", "average, min, max, lse, appa, maximin"),
    ("aggregation.kind=no_such_module:rule", "aggregation.kind", "cannot be imported"),
    ("aggregation=maximin aggregation.temperature=0.001", "aggregation.temperature", "narrower"),
    ("predictor=truth", "predictor.kind", "privacy=off"),
    ("predictor=truth privacy=off evaluation.truth=false", "predictor.kind", "evaluation.truth=true"),
    ("task.max_weight=100", "task.max_weight", "policy=tabular"),
    ("system=grdpo secagg=cohort federation.members_per_group=5", "secagg.mode", "one client for a group"),
    ("system=sft secagg=clear federation.members_per_group=2", "federation.members_per_group", "system=appa"),
    ("system=fedrlhf secagg.ring_bits=32 aggregation=average", "secagg.ring_bits", "secagg.ring_bits=64"),
    ("system=grdpo ppo.generations=3 ppo.minibatch_size=32", "ppo.generations", "pairs of answers"),
    ("system=maxmin ppo.generations=3 ppo.minibatch_size=32", "ppo.generations", "ppo.generations=4"),
    ("system=sft system.labels=raw", "system.labels", "privacy=off"),
    ("system=grdpo system.labels=raw privacy=off", "system.labels", "predicted preferences"),
    ("system=grdpo policy=tabular", "policy.kind", "system=appa"),
    ("system=sft predictor=truth privacy=off", "predictor.kind", "predicted preferences"),
    ("system=fedrlhf secagg.output_epsilon=8", "secagg.output_epsilon", "system=appa"),
    ("system=maxmin system.rounds=10", "system.free_rounds", "system.free_rounds=2"),
    ("ppo.minibatch_size=63", "ppo.minibatch_size", "ppo.minibatch_size=64"),
    ("until=warmup", "until", "'predictor' or 'align'"),
    (
        "evaluation.truth=false evaluation.predictor_every=5",
        "evaluation.predictor_every",
        "evaluation.truth is off",
    ),
    (
        f"data=table data.path={HERE} data.ordinal_only=true predictor.training=pooled",
        "predictor.training",
        "simulated and published data only",
    ),
    (
        "predictor.training=one_group predictor.local_steps=2",
        "predictor.local_steps",
        "predictor.local_steps=1",
    ),
]


@pytest.mark.parametrize(("overrides", "field", "reason"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refused(overrides: str, field: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides.split())
    message = str(caught.value)
    assert field in message
    assert reason in message
    assert "Fix:" in message or "write field=value" in message


@pytest.mark.parametrize(
    "overrides",
    [
        "privacy.unit=respondent privacy.answers_per_unit=30",
        "privacy.unit=record",
        "secagg=cohort federation.members_per_group=5 data.group_count=3 aggregation.temperature=0.01",
        "secagg=clear data.group_count=3",
        "secagg.output_epsilon=8",
        "secagg.output_epsilon=8 secagg.release=noise secagg.colluders=0",
        "secagg.output_epsilon=8 aggregation=lse",
        "secagg.output_epsilon=8 aggregation=maximin aggregation.temperature=0.05",
        "secagg=cohort federation.members_per_group=5 secagg.output_epsilon=8 aggregation=min",
        "secagg=clear privacy=off federation.members_per_group=4",
        "secagg.ring_bits=32 aggregation=min aggregation.sharpness=10",
        "data=opinionqa data.path=owner/name",
        "privacy=off privacy.context_noise=0",
        "secagg.threshold=1 secagg.min_cohort=8",
    ],
)
def test_what_looks_odd_but_can_run_is_allowed(overrides: str) -> None:
    compose(overrides.split())


def test_the_suggested_bounds_are_themselves_accepted() -> None:
    """A fix that is refused in turn would be worse than none."""
    for overrides, field in (
        ("aggregation=max aggregation.sharpness=80", "aggregation.sharpness"),
        ("secagg.ring_bits=32 aggregation=min", "aggregation.sharpness"),
        ("secagg.ring_bits=32 aggregation.variant=paper", "aggregation.temperature"),
        ("aggregation.temperature=0.01", "aggregation.temperature"),
        ("ppo.minibatch_size=63", "ppo.minibatch_size"),
        ("predictor.heads=5", "predictor.dim"),
    ):
        with pytest.raises(ConfigError) as caught:
            compose(overrides.split())
        fix = str(caught.value).partition("Fix: ")[2].split()[0]
        assert fix.startswith(f"{field}=")
        compose([*overrides.split(), fix])


# Modes as in the table of docs/results/aggregations.md: head of a column, overrides.
MODES = {
    "blind and clear, further sums": ("secagg=blind", "secagg=clear"),
    "blind with output noise": ("secagg=blind secagg.output_epsilon=8",),
    "cohort": ("secagg=cohort federation.members_per_group=5 secagg.output_epsilon=8",),
}
# Options with which a rule stays inside what the table allows it.
INSIDE = {"maximin": "aggregation.band=[0.92,0.94]", "appa, paper": "aggregation.variant=paper"}
OWN_RULE = BUILT_IN["average"]
FORMS = tables(Path(__file__).parent.parent / "docs" / "results" / "aggregations.md")


def test_every_rule_runs_in_the_modes_it_claims_and_is_refused_in_the_others() -> None:
    ((heads, rows),) = (found for found in FORMS if found[0][:2] == ("rule", next(iter(MODES))))
    assert set(MODES) == set(heads[1:])
    claimed = {row[0].replace("`", "") for row in rows}
    assert {rule.partition(",")[0] for rule in claimed} == {*BUILT_IN, "module:name"}
    for row in rows:
        rule = row[0].replace("`", "")
        kind = rule.partition(",")[0]
        own = kind == "module:name"
        for mode, cell in zip(heads[1:], row[1:], strict=True):
            for overrides in MODES[mode]:
                chosen = (
                    f"aggregation={'average' if own else kind} {INSIDE.get(rule, '')} {overrides}".split()
                )
                chosen += ["aggregation.kind='tests.test_config:OWN_RULE'"] if own else []
                if not cell.startswith("refused"):
                    assert compose(chosen).aggregation.kind == ("tests.test_config:OWN_RULE" if own else kind)
                    continue
                with pytest.raises(ConfigError, match="Fix: "):
                    compose(chosen)
    with pytest.raises(ConfigError, match="drowns"):
        compose(["aggregation=maximin", "secagg.output_epsilon=8"])  # at the contrast of its option file
    with pytest.raises(ConfigError, match="drowns"):
        compose(["aggregation=lse", "aggregation.a=-4.5", "secagg.output_epsilon=8"])


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["privacy.delta=2", "secagg.threshold=0.1", "ppo.steps=none"])
    assert [line.partition("=")[0] for line in str(caught.value).splitlines()] == [
        "privacy.delta", "secagg.threshold", "ppo.steps",
    ]  # fmt: skip


def test_a_centralised_predictor_needs_everybody_in_one_process() -> None:
    pytest.importorskip("ray", reason="Flower's simulation engine is not installed")
    with pytest.raises(ConfigError, match=r"predictor\.training=pooled.*federation=local"):
        compose(["predictor.training=pooled", "federation=simulation"])


def test_simulation_without_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_checks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"federation\.kind=simulation.*appa-secure\[simulation\]"):
        compose(["federation=simulation"])


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ("privacy=off", "privacy=off"),
        ("secagg=clear", "secagg=clear"),
        ("secagg.release=recover", "subtract"),
        ("secagg.release=recover aggregation.variant=paper", "renormalised"),
        ("privacy.delta=0.01", "1e-6 is usual"),
        ("predictor.training=pooled", "one trusted party"),
        ("ppo.steps=5", "final one"),
        (f"experiment=globalopinionqa_8 data.path={HERE}", "1000 respondents"),
        ("system=grdpo", "plays no part"),
        ("system=maxmin", "one member"),
    ],
)
def test_notes_say_what_a_choice_means(overrides: str, word: str) -> None:
    quiet = notes(compose(["evaluation.truth=false", "privacy.secure_rng=true"]))
    assert quiet == ()
    assert any(word in note for note in notes(compose(overrides.split())))


def test_resuming_needs_no_file_that_only_the_start_needed(tmp_path: Path) -> None:
    data = tmp_path / "answers"
    data.mkdir()
    config = compose(["data=opinionqa", f"data.path={data}"])
    data.rmdir()
    assert load_text(config.to_yaml(), tmp_path) == config


def test_a_damaged_configuration_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.resolved.yaml"
    for text in ("seed: [", "seed: x\n", "colour: red\n", "- 1\n"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"config\.resolved\.yaml"):
            load(path)
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        load(tmp_path / "missing.yaml")


def test_every_field_says_what_it_means_in_a_line() -> None:
    listed = list(fields())
    assert len(listed) > 80
    for name, _, meaning in listed:
        assert meaning, f"{name} has no meaning"
        assert len(meaning) <= 74, f"{name}: {meaning!r} does not fit a help page of 80 columns"


def test_configuring_is_light() -> None:
    """Checking a configuration, and so --help, must not wait for torch."""
    import subprocess

    code = "import sys, appa_secure.cli; print(sorted({'torch', 'flwr', 'transformers'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
