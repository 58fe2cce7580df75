"""What happened in a run, in plain words: each sentence is computed from the records."""

import math
from dataclasses import dataclass

from appa_secure.report.run import NOT_PRIVATE, Alignment, Run, lookup

UNITS = {
    "response": "one person's answer to one question",
    "respondent": "all the answers of one person",
    "record": "one group's answers to one question",
}
MEASURES = {
    "wasserstein": "how close the model's distribution of answers is to the group's (Wasserstein similarity)",
    "js": "how much the model's distribution of answers overlaps the group's (Jensen-Shannon similarity)",
    "cosine": "how alike the model's and the group's distribution of answers are (cosine similarity)",
    "kl": "how well the model's distribution of answers predicts the group's (KL similarity)",
    "borda": "how high the model's ranking places what the group prefers (Borda score)",
    "kendall": "how often the model and the group order two answers alike (Kendall's tau)",
    "binary": "how often the model's first choice is the group's",
    "choice": "what share of the group gives the answer that the model chooses",
}
STAGES = {
    "setup": "reading data",
    "context": "private context",
    "predictor": "training the predictor",
    "warmup": "teaching the answer format",
    "before": "measuring before",
    "align": "training the model",
    "after": "measuring after",
}
RULES = {
    "average": "every group counts the same",
    "min": "only the worst-off group counts",
    "max": "only the best-off group counts",
    "lse": "between average and worst-off (a below 0) or best-off group (a above 0) of each answer",
    "appa": "groups that have fared worse so far count more",
    "maximin": "groups that have fared worse so far count more, up to a fixed cap, towards the best possible worst-off group",
}

SYSTEMS = {
    "grdpo": "none: groups compare answers by themselves, and those whose comparisons the model fits worse count more",
    "gripo": "none: groups compare answers by themselves, and those whose comparisons the model fits worse count more",
    "fedrlhf": "none: each group improves the model by its own reward, and the results are averaged",
    "sft": "none: the model imitates every group's own answers alike",
    "maxmin": "reward models of groups that think alike, and in each step the one that fares worst",
}


@dataclass(frozen=True)
class Banner:
    """A warning above everything else."""

    title: str
    reasons: tuple[str, ...]


def number(value: float | None, digits: int = 3) -> str:
    """A figure for a table; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(share: float) -> str:
    """A share as a whole percentage."""
    return f"{100 * share:.0f} %"


def interval(bounds: tuple[float, float] | None, digits: int = 3) -> str:
    """A 95 % interval in brackets; empty where there is none."""
    return "" if bounds is None else f"{bounds[0]:.{digits}f} to {bounds[1]:.{digits}f}"


def size(count: float) -> str:
    """Bytes in a unit that fits."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def gap_closed(run: Run, split: str, which: str = "avg") -> float | None:
    """Share of the way from the policy before training to the ceiling that was covered; None if unknown."""
    stated = lookup(run.summary, f"gap_closed.{split}.{which}")
    if isinstance(stated, int | float):
        return float(stated)
    before, after = run.alignment(split, "before"), run.alignment(split, "after")
    ceiling = run.ceiling(split, which)
    if before is None or after is None or ceiling is None:
        return None
    start: float = getattr(before, which)
    end: float = getattr(after, which)
    return (end - start) / (ceiling - start) if ceiling > start else None


def _change(before: float, after: float, bounds: tuple[float, float] | None) -> str:
    if bounds is not None and bounds[0] <= before <= bounds[1]:
        return f"did not clearly change ({before:.3f} before, {after:.3f} after)"
    verb = "rose" if after > before else "fell" if after < before else "stayed"
    return f"{verb} from {before:.3f} to {after:.3f}"


def _worst(alignment: Alignment) -> str:
    return min(alignment.per_group, key=lambda name: alignment.per_group[name])


def _outcome(run: Run, split: str, lead: str) -> str | None:
    before, after = run.alignment(split, "before"), run.alignment(split, "after")
    if before is None or after is None:
        return None
    sentence = f"{lead}, agreement with the groups {_change(before.avg, after.avg, after.ci_avg)} on average"
    if after.ci_avg is not None:
        sentence += f" (95 % interval {interval(after.ci_avg)})"
    old, new = _worst(before), _worst(after)
    if old == new:
        sentence += f"; the worst-off group, {new}, went from {before.min:.3f} to {after.min:.3f}"
    else:
        sentence += f"; the worst-off group was {old} at {before.min:.3f} and is now {new} at {after.min:.3f}"
    closed = gap_closed(run, split)
    if closed is not None and closed > 0:
        sentence += f". The average gained {percent(closed)} of what any model could have gained"
    unreadable = lookup(run.summary, f"alignment.{split}.after.malformed")
    if isinstance(unreadable, int | float) and unreadable >= 0.01:
        sentence += f". {percent(unreadable)} of the model's answers were not in the form asked for"
    return sentence + "."


def headline(run: Run) -> list[str]:
    """Two to six sentences: what was done, what came out, what it means."""
    if not run.finished:
        return _unfinished(run)
    who = f"{len(run.groups)} groups of people" if run.groups else "several groups of people"
    if run.get("until") == "predictor":
        return [
            f"A predictor learned how {who} answer survey questions. The run ends here by its own choice "
            "(until=predictor): no language model was trained.",
            *([said] if (said := predictor(run)) else []),
        ]
    outcomes = [
        sentence
        for split, lead in (
            ("train", "On the questions it was trained on"),
            ("heldout", "On questions it never saw"),
        )
        if (sentence := _outcome(run, split, lead))
    ]
    unmeasured = (
        "How well it agrees with the groups' true answers was not measured: outside an experiment nobody may "
        "look. The curves below are the run's own estimates."
    )
    return [
        f"A language model was trained to answer survey questions the way {who} answer them.",
        *(outcomes + _fairness(run) if outcomes else [unmeasured]),
    ]


def _unfinished(run: Run) -> list[str]:
    total = lookup(run.config, "ppo.steps")
    done = run.steps[-1]["step"] if run.steps else 0
    progress = f"{done} of {total} training steps" if total else f"{done} training steps"
    sentences = [f"This run has not come to its end: {progress} are recorded."]
    if run.transcript and run.transcript[-1].get("event") == "abort":
        reason = run.transcript[-1].get("reason", "without a reason")
        sentences.append(f"The last thing it recorded is an abort: {reason}.")
    return [*sentences, "What follows is what it had recorded by then."]


def _fairness(run: Run) -> list[str]:
    before, after = run.alignment("train", "before"), run.alignment("train", "after")
    if before is None or after is None or before.fairness is None or after.fairness is None:
        return []
    old, new = (max(one.per_group.values()) - min(one.per_group.values()) for one in (before, after))
    word = "shrank" if new < old else "grew" if new > old else "stayed the same"
    return [
        f"The distance between the best-off and the worst-off group {word}: {old:.3f} before, {new:.3f} "
        f"after. The fairness index went from {before.fairness:.4f} to {after.fairness:.4f} (1: all "
        "groups are served equally well)."
    ]


def banner(run: Run) -> Banner | None:
    """The warning that the run needs, or None. What is not known counts as not protected."""
    reasons = []
    if run.dp_enabled is False:
        reasons.append(
            "Differential privacy was OFF: the trained model and everything derived from it may reveal what "
            "single people answered."
        )
    if run.secagg_mode == "clear":
        reasons.append(
            "Secure aggregation was OFF: the coordinator saw what every single group sent, including each "
            "group's rewards."
        )
    if run.get("predictor.training", "federated") != "federated":
        reasons.append(
            "The predictor was trained by one trusted party that held all groups' answers, for comparison. What the "
            "report says of secure aggregation does not hold for that training, and privacy does not hold towards it."
        )
    measured = lookup(run.summary, "predictor") or run.measurement
    if measured or run.alignment("train", "after") or run.alignment("heldout", "after"):
        reasons.append(
            "The groups' true answers were used to measure the result. The figures of this report that "
            "compare with true answers are not covered by the privacy guarantee."
        )
    if run.dp_enabled and lookup(run.config, "privacy.secure_rng") is False:
        reasons.append(
            "The noise was made from the run's seed, so that the run can be repeated. Whoever knows the seed can take "
            "it off: the privacy figures hold only towards those who do not."
        )
    if run.dp_enabled is None or run.secagg_mode is None:
        reasons.append("The records do not say whether differential privacy and secure aggregation were on.")
    if run.summary.get("stamp") == NOT_PRIVATE and not reasons:
        reasons.append("The run marked itself so; its records do not say why.")
    if not reasons:
        return None
    apart = run.get("predictor.training", "federated") == "federated"
    protected = run.dp_enabled is True and run.secagg_mode in ("blind", "cohort") and apart
    return Banner(
        "NOT PRIVATE: measured against true answers" if protected else "NOT PRIVATE", tuple(reasons)
    )


def privacy(run: Run) -> list[str]:
    """What the guarantee says, for a reader who has never met epsilon."""
    if run.dp_enabled is None:
        return ["The records do not say whether differential privacy was on."]
    if not run.dp_enabled:
        return [
            "Differential privacy was off. There is no limit on what this run reveals about single people."
        ]
    unit = UNITS.get(str(run.get("privacy.unit")), "one record")
    spent = run.largest_epsilon
    if spent is None:
        return [
            f"Differential privacy was on (it protects {unit}); what was spent has not been summed up yet."
        ]
    factor = f"{math.exp(spent):,.0f}" if spent >= 3 else f"{math.exp(spent):.1f}"
    delta = run.get("privacy.delta")
    rare = (
        f", except with a probability of 1 in {1 / delta:,.0f}"
        if isinstance(delta, float) and delta > 0
        else ""
    )
    return [
        f"Differential privacy was on. It protects {unit}.",
        f"The largest ε of any client is {spent:.2f}. This means: whoever holds all that this run releases "
        f"can, by looking at it, change the odds of a guess about {unit} by a factor of at most "
        f"{factor}{rare}.",
        "Smaller is stronger: 0 reveals nothing, below 1 is strong, up to about 10 is common in practice.",
        "ε was spent on the predictor of the groups' preferences. It does not grow with the number of steps "
        "that train the language model: these only use what the predictor had already paid for.",
    ]


def measure(run: Run) -> str:
    """What an alignment score says."""
    return MEASURES.get(str(run.get("task.reward")), "how alike the model's and the group's answers are")


def aggregation(run: Run) -> str:
    """The rule by which the groups' rewards become one."""
    system = str(run.get("system.kind", "appa"))
    if system in SYSTEMS:
        return f"{system}: {SYSTEMS[system]}"
    kind = str(run.get("aggregation.kind", "unknown"))
    variant = run.get("aggregation.variant")
    name = f"{kind} ({variant})" if kind == "appa" and variant else kind
    rule = RULES.get(kind)
    if kind == "appa" and run.get("aggregation.tau") is not None:
        rule = f"{rule}, in steps whose fairness index is below {run.get('aggregation.tau')}"
    return f"{name}: {rule}" if rule else name


def predictor(run: Run) -> str | None:
    """How far the predictions that rewards come from agree with the groups' true answers; None if not measured."""
    parts = []
    for split, name in (("train", "training"), ("heldout", "held-out")):
        own, shared = (lookup(run.summary, f"predictor.{split}.{which}.avg") for which in ("own", "shared"))
        if own is None or shared is None:
            return None
        parts.append(f"{number(own)} on {name} questions ({number(shared)} if one answer served all groups)")
    return f"Private predictions agree with the groups' true answers to {' and '.join(parts)}."


def secagg(run: Run) -> str:
    """Who could see what the clients sent."""
    return {
        "blind": "On, blind: the coordinator saw sums over all groups only, never what one group sent.",
        "cohort": "On, within each group: the coordinator saw group averages, never what one member sent.",
        "clear": "Off: the coordinator saw what every group sent.",
    }.get(str(run.secagg_mode), "Unknown: the records do not say.")
