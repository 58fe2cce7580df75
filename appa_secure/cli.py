"""The command line: `appa-secure run | sweep | report | members | audit verify | audit privacy | fields`.

Standard output carries paths only, so that commands can be chained; tables, progress and errors go to
standard error. Expected failures end with one readable message: exit code 2 for a configuration that cannot
run, 1 for the rest.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from appa_secure import __version__, config_checks, console, records
from appa_secure.config import GROUPS, compose, fields, load, option_summary, options
from appa_secure.errors import AppaError, ConfigError
from appa_secure.progress import Progress

app = typer.Typer(
    name="appa-secure",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Align a language model with groups that disagree, held by institutions that never show their "
    "preferences: not to each other, and not to the aggregator.",
    epilog="Start with [bold]appa-secure run[/bold]: eight synthetic groups, differential privacy and secure "
    "aggregation on, a few minutes on two cores. Then [bold]appa-secure run --help[/bold].",
)
audit = typer.Typer(
    no_args_is_help=True,
    help="Checks for auditors: of what a run left behind, and of what a configuration leaks.",
)
app.add_typer(audit, name="audit")

_MAIN_FIELDS = (
    "seed", "name", "output_root", "task.reward", "data.path", "data.groups", "data.context", "privacy.unit",
    "privacy.epsilon", "privacy.delta", "secagg.min_cohort", "secagg.release", "aggregation.variant",
    "aggregation.temperature", "federation.members_per_group", "policy.path", "policy.lora", "ppo.steps",
    "ppo.prompts_per_step", "ppo.generations", "ppo.kl_coef", "evaluation.truth",
)  # fmt: skip


def _groups_help() -> str:
    lines = (
        f"  [bold]{group:<12}[/bold]"
        + textwrap.fill(
            " ".join(options(group)), 74, initial_indent=" " * 14, subsequent_indent=" " * 14
        ).strip()
        for group in GROUPS
    )
    return "\b\n[bold]Groups and their options[/bold] (what they are: appa-secure fields)\n" + "\n".join(
        lines
    )


def _fields_help() -> str:
    meaning = {name: text for name, _, text in fields()}
    lines = []
    for name in _MAIN_FIELDS:
        lines.append(f"  [bold]{name}[/bold]")
        lines.append(f"      {meaning[name]}")
    return "\b\n[bold]Main fields[/bold] (all of them: appa-secure fields)\n" + "\n".join(lines)


_RUN_HELP = f"""Run the whole path once: predictor, secure rewards, PPO, report.

Write what differs from the experiment as [bold]group=option[/bold] or [bold]section.field=value[/bold]. \
Nothing starts before every value and combination has been checked. The last line of standard output is the \
run directory.

\b
[bold]Examples[/bold]
  appa-secure run
  appa-secure run experiment=smoke seed=2
  appa-secure run data=opinionqa data.path=PATH aggregation=appa seed=1
  appa-secure run experiment=opinionqa_dense data.path=PATH
  appa-secure run privacy=off secagg=clear
  appa-secure run --resume runs/demo-1

{_groups_help()}

{_fields_help()}
"""

_SWEEP_HELP = """Run every combination of the values given for any fields, and compare.

Several values are written with commas, or as range(1,4). All combinations are checked before the first \
starts. Repeat the command to go on after an interruption; add values to add runs: finished runs are not \
repeated. An experiment may declare the values itself. Standard output lists the run directories; the
folder above them gets results.parquet and the report of the whole sweep.

\b
[bold]Examples[/bold]
  appa-secure sweep experiment=smoke aggregation=appa,average seed=1,2,3
  appa-secure sweep privacy.epsilon=1,2,4,8 name=epsilon --jobs 2
"""

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[OVERRIDE]...", help="group=option or section.field=value", show_default=False),
]


@app.command(help=_RUN_HELP)
def run(
    overrides: Overrides = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_DIR", help="Go on with an interrupted run, with the options it began with."
        ),
    ] = None,
) -> None:
    if resume is None:
        config = compose(overrides or [])
    elif overrides:
        raise ConfigError(
            f"--resume {resume}: a run goes on with the options it began with. "
            f"Fix: leave out {' '.join(overrides)}"
        )
    else:
        config = load(_existing(resume, records.CONFIG))
    console.people.print(console.choices(config))
    from appa_secure import launch

    directory = launch.run(config, resume)
    _show_outcome(directory)
    typer.echo(directory)


@app.command(help=_SWEEP_HELP)
def sweep(
    overrides: Overrides = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Runs at the same time.")] = 1,
) -> None:
    from appa_secure import sweep as sweeping

    members = sweeping.plan(overrides or [])
    _say(f"{len(members)} runs in {members[0].directory.parent}")
    root = members[0].directory.parent
    sweeping.note(root, members)
    if jobs == 1:  # each run shows its own progress
        succeeded = sweeping.run_all(members, jobs, _say)
    else:
        with Progress() as progress:
            succeeded = sweeping.run_all(
                members, jobs, progress.note, lambda done: progress.step("sweep", done, len(members))
            )
    console.people.print(console.comparison([(member.varied, member.summary()) for member in members]))
    if any(member.summary() is not None for member in members):
        from appa_secure import report as reporting

        _say(f"report: {reporting.render_study(root)}")
    for member in members:
        typer.echo(member.directory)
    if not all(succeeded):
        raise AppaError(f"{succeeded.count(False)} of {len(members)} runs did not finish; repeat the command")


@app.command()
def manipulation(overrides: Overrides = None) -> None:
    """Measure what a lying group gains under every aggregation rule, and what the others lose.

    Takes the options of a run with policy=tabular, such as experiment=tabular_conflict; a simulation, not private.
    """
    config = compose(overrides or ["experiment=tabular_conflict"])
    if config.policy.kind != "tabular":
        raise ConfigError(
            f"policy.kind={config.policy.kind}: groups lie to policy=tabular only. Fix: policy=tabular"
        )
    from appa_secure import manipulation as lying

    name = config.name or f"manipulation-{config.experiment}-{config.seed}"
    directory = lying.study(config, Path(config.output_root) / name, _say)
    typer.echo(directory / "manipulation.md")


@app.command()
def report(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Run directories, or the folder of one sweep.")
    ],
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown tables instead, seeds taken together.")
    ] = False,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD[=VALUE]",
            help="Sweep: compare the values of this varied field with its first, or VALUE.",
        ),
    ] = None,
) -> None:
    """Write report.html again for each run; for several runs, compare them.

    A sweep's report has means over seeds with 95 % intervals, and paired differences over the same seeds: between
    the values of --by (as in --by privacy, --by aggregation=min), or else between the average rule, or the first
    combination, and each other one. Standard output lists the pages written.
    """
    from appa_secure import report as reporting

    if len(directories) == 1 and (directories[0] / records.SWEEP).is_file():
        text = reporting.study_markdown(directories[0], by) if markdown else None
        typer.echo(reporting.render_study(directories[0], by) if text is None else text, nl=text is None)
        return
    if by is not None:
        raise ConfigError(f"--by {by}: compares the runs of a sweep. Fix: name the folder of one sweep")
    for directory in directories:
        _existing(directory, records.CONFIG)

    if markdown:
        typer.echo(reporting.results_markdown(directories), nl=False)
        return
    pages = [reporting.render(directory) for directory in directories]
    if len(directories) > 1:
        rows = [({"run": directory.name}, _summary(directory)) for directory in directories]
        console.people.print(console.comparison(rows))
        pages.append(reporting.compare(directories)[1])
    elif (summary := _summary(directories[0])) is not None:
        console.people.print(reporting.terminal_table(summary))
    for page in pages:
        typer.echo(page)


@app.command()
def members(
    directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run that is going on, or stopped.")],
    leave: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A member that leaves.")] = None,
    join: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="One that left and comes back.")
    ] = None,
    rotate: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Gets a new signing key.")] = None,
) -> None:
    """Change who takes part in a run, from its next alignment step on.

    Tells every site's machine, and the coordinator last, as the operators of a deployment would. Refused, with nothing
    changed, below secagg.min_cohort. Repeat an option for several names. Standard output names the file written.
    """
    _existing(directory, records.CONFIG)
    from appa_secure import launch
    from appa_secure.membership import FILE

    news = launch.change_members(directory, leave=leave or (), join=join or (), rotate=rotate or ())
    _say(f"membership {news.version}: {len(news.groups)} clients, {', '.join(sorted(news.groups))}")
    typer.echo(directory / FILE)


@audit.command("verify")
def audit_verify(
    directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory.")],
    head: Annotated[
        str | None,
        typer.Option(metavar="HASH", help="Last hash of the transcript, as another party noted it."),
    ] = None,
) -> None:
    """Check the transcript's hash chain and recompute the privacy ledger.

    A rewritten transcript shows only against a hash kept elsewhere: pass it as --head.
    """
    config = load(_existing(directory, records.CONFIG))
    rows, found = records.verify(_existing(directory, records.TRANSCRIPT), head)
    _say(f"transcript: {rows} rows, unbroken, ends with {found}")
    if config.secagg.output_epsilon is not None:
        _check_ledger(directory, records.OUTPUT_LEDGER, config.secagg.output_epsilon, "secagg.output_epsilon")
    if not config.privacy.enabled:
        _say("ledger: none; privacy=off, nothing here is private")
        return
    _check_ledger(directory, records.LEDGER, config.privacy.epsilon, "privacy.epsilon")


def _check_ledger(directory: Path, name: str, budget: float, field: str) -> None:
    """Recompute a ledger of the run and compare it with its budget; AppaError where it spent more."""
    from appa_secure.privacy.ledger import check_rows

    events = records.read_journal(_existing(directory, name))
    spent = check_rows(events)
    of = "" if name == records.LEDGER else f" {name}"
    _say(f"ledger{of}: {len(events)} events, each epsilon at least what its events cost")
    for client, epsilon in spent.items():
        over = "" if epsilon <= budget else f", over the budget of {budget:g}"
        _say(f"  {client}: epsilon {epsilon:.3f}{over}")
    if max(spent.values(), default=0.0) > budget:
        raise AppaError(f"{name}: a client spent more than {field}={budget:g}")


_PRIVACY_HELP = f"""Measure what a configuration's releases leak, beside what its accounting claims.

Plants canaries in clients' data, lets the real clients release what the run would release, and reports a lower bound on \
epsilon with confidence: for the context, for one client's updates, and for the sum over clients. Then tries \
membership inference and the reconstruction of context answers. No run directory is needed or touched.

A measured bound above the claim proves a broken build: exit code 1. A bound below it proves nothing more than itself. \
Takes the overrides of [bold]appa-secure run[/bold].

\b
[bold]Examples[/bold]
  appa-secure audit privacy experiment=smoke
  appa-secure audit privacy experiment=smoke --json > audit.json
  appa-secure audit privacy data=opinionqa data.path=PATH --canaries 16000
  appa-secure audit privacy privacy.epsilon=2 privacy.unit=respondent --no-attacks

{_groups_help()}
"""


@audit.command("privacy", help=_PRIVACY_HELP)
def audit_privacy(
    overrides: Overrides = None,
    canaries: Annotated[
        int,
        typer.Option(
            min=100, help="Training canaries at least. A claim of 8 needs some 16000 to be refutable."
        ),
    ] = 4000,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.9999, help="Of every measured bound.")] = 0.95,
    attacks: Annotated[
        bool, typer.Option(help="Membership inference and context reconstruction, after the canaries.")
    ] = True,
    policy: Annotated[
        bool,
        typer.Option("--policy", help="Attack the answers of the run's language model too; trains it twice."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to write; default: OUTPUT_ROOT/audit-EXPERIMENT-SEED."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as JSON, not the page's path.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the report as Markdown.")] = False,
) -> None:
    config = compose(overrides or [])
    from appa_secure.audit import privacy
    from appa_secure.progress import Progress

    with Progress() as progress:
        found = privacy.investigate(config, canaries, confidence, attacks, policy, progress)
    folder = out or Path(config.output_root) / f"audit-{config.experiment}-{config.seed}"
    page = privacy.write(found, folder)
    if as_json or markdown:
        typer.echo((folder / (privacy.JSON if as_json else privacy.MARKDOWN)).read_text("utf-8"), nl=False)
    else:
        _say((folder / privacy.MARKDOWN).read_text("utf-8"))
        typer.echo(page)
    if found.exceeded:
        raise AppaError(
            f"{page}: measured epsilon exceeds the claim: {', '.join(v.name for v in found.exceeded)}"
        )


@app.command("fields")
def list_fields(
    section: Annotated[str | None, typer.Argument(metavar="[SECTION]", help="Such as data or ppo.")] = None,
) -> None:
    """List what can be set: every group's options and every field with its default and meaning."""
    sections = list(dict.fromkeys(name.partition(".")[0] for name, _, _ in fields()))
    if section is not None and section not in (*sections, *GROUPS):
        raise ConfigError(f"{section}: no such section. Fix: one of {', '.join(sections)}")
    for group in GROUPS if section is None else [section] if section in GROUPS else []:
        for option in options(group):
            typer.echo(f"{group}={option}\n    {option_summary(group, option)}")
    for name, default, meaning in fields():
        if section in (None, name.partition(".")[0]):
            typer.echo(f"{name}={config_checks.as_yaml(default)}\n    {meaning}")


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _existing(directory: Path, name: str) -> Path:
    """A file of a run directory; ConfigError if it is not there."""
    path = directory / name
    if not path.is_file():
        raise ConfigError(f"{directory} has no {name}. Fix: name a run directory that appa-secure run made")
    return path


def _summary(directory: Path) -> dict[str, Any] | None:
    """The run's summary.json; None while it has not ended well."""
    path = directory / records.SUMMARY
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def _say(line: str) -> None:
    """One line for people, as it is: names from data are no markup, and long hashes are not wrapped."""
    console.people.print(line, markup=False, highlight=False, soft_wrap=True)


def _show_outcome(directory: Path) -> None:
    from appa_secure import report as reporting

    if (summary := _summary(directory)) is not None:
        console.people.print(reporting.terminal_table(summary))
    for title, name in (("report", records.REPORT), ("privacy", records.STATEMENT_MD)):
        if (directory / name).exists():
            _say(f"{title}: {directory / name}")


def main() -> None:
    """Entry point of the console script."""
    try:
        app(prog_name="appa-secure")
    except ConfigError as error:
        typer.echo(f"appa-secure: cannot start\n{error}", err=True)
        sys.exit(2)
    except AppaError as error:
        typer.echo(f"appa-secure: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
