"""The pages: complete, self-contained, safe against what data may contain, tolerant of unfinished runs."""

import base64
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from appa_secure.errors import RunError
from appa_secure.report import compare, plots, render
from appa_secure.report.html import statement_html
from appa_secure.report.run import load_run
from appa_secure.report.words import predictor

MakeRun = Callable[..., Path]
EVIL = "<script>alert(1)</script>"


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests about words: drawing is what takes time."""
    monkeypatch.setattr(plots, "_draw", lambda height, paint: "<svg/>")


@pytest.fixture(scope="module")
def finished(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a finished run."""
    return render(make_run(tmp_path_factory.mktemp("runs") / "run", steps=12))


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def figures(self) -> list[str]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
        return [base64.b64decode(source.split(",", 1)[1]).decode() for source in sources]


def captions(page: Path) -> list[str]:
    return re.findall(r"<figcaption>([^<]*)", page.read_text(encoding="utf-8"))


def test_a_finished_run_shows_everything(finished: Path) -> None:
    assert finished.name == "report.html"
    page = Page(finished)
    assert page.open == []
    assert captions(finished) == [
        "Training questions",
        "Held-out questions",
        "Average and worst-off group",
        "Each group during training",
        "Reward",
        "Fairness",
        "Weights of the groups",
        "What the coordinator knows of the groups",
        "Privacy spent by each client",
    ]
    assert len(page.figures) == 9
    summary = json.loads((finished.parent / "summary.json").read_text())
    for split in ("train", "heldout"):
        for when in ("before", "after"):
            for name, value in summary["alignment"][split][when]["per_group"].items():
                assert name in page.text
                assert f"{value:.3f}" in page.text
    for expected in (
        "NOT PRIVATE: measured against true answers",
        "ε 7.97",
        "1 in 1,000,000",
        "chain intact",
        "16 entries",
        "3 min 08 s",
        "3.3 kB",
        "1.2 MB",
        "epsilon: 8.0",
        "numpy ",
        "training the model",
        f"appa-secure audit verify run --head {summary['transcript_head']}",
    ):
        assert expected in page.text


def test_answers_that_cannot_be_read_are_counted(tmp_path: Path, make_run: MakeRun, no_figures: None) -> None:
    run = make_run(tmp_path / "run", steps=1)
    path = run / "summary.json"
    summary = json.loads(path.read_text())
    summary["alignment"]["heldout"]["after"]["malformed"] = 0.0625
    path.write_text(json.dumps(summary))
    assert "Unreadable answers – 0.062" in Page(render(run)).text


def test_win_rates_over_the_model_before_training_are_told(
    tmp_path: Path, make_run: MakeRun, no_figures: None
) -> None:
    run = make_run(tmp_path / "run", steps=1)
    path = run / "summary.json"
    summary = json.loads(path.read_text())
    summary["alignment"]["train"]["after"]["win_rate"] = {"per_group": {}, "avg": 0.734, "min": 0.651}
    path.write_text(json.dumps(summary))
    text = Page(render(run)).text
    assert "Win rate over the model before – 0.734" in text
    assert "Lowest win rate of a group – 0.651" in text


def test_figures_are_images_of_valid_svg_with_the_names_of_the_groups(
    tmp_path: Path, make_run: MakeRun
) -> None:
    page = Page(render(make_run(tmp_path / "run", steps=4)))
    for svg in page.figures:
        ElementTree.fromstring(svg)
    for name in ("Democrat", "Republican", "Female"):
        assert name in page.figures[0]
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")


def test_a_page_loads_nothing_and_runs_nothing(finished: Path) -> None:
    tags = Page(finished).tags
    assert not {"script", "link", "iframe", "object", "form", "base"} & {tag for tag, _ in tags}
    for _, attributes in tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in finished.read_text()
    policy = next(a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_text_from_data_is_shown_and_never_obeyed(tmp_path: Path, make_run: MakeRun) -> None:
    groups = (EVIL, '"><img src=x onerror=alert(1)>', "$\\frac$ {{7*7}}", "日本 & 'x'", "E")
    run = make_run(tmp_path / "run", groups=groups, steps=3)
    (run / "config.resolved.yaml").write_text(f"experiment: '{EVIL}'\nname: '{EVIL}'\n")
    (run / "environment.txt").write_text(f"numpy {EVIL}\n")
    statement = f"# {EVIL}\n\n- **{EVIL}**\n\n| {EVIL} |\n|---|\n| `{EVIL}` |\n"
    (run / "privacy_statement.md").write_text(statement)
    path = render(run)
    page = Page(path)
    assert "<script" not in path.read_text(encoding="utf-8").lower()
    assert "onerror" not in {name for _, attributes in page.tags for name in attributes}
    assert page.text.count(EVIL) >= 6
    assert "{{7*7}}" in page.text
    assert "日本 & 'x'" in page.text
    for svg in page.figures:
        assert "<script" not in svg
        ElementTree.fromstring(svg)
    assert "$\\frac$ {{7*7}}" in page.figures[0], "a group's name is no formula"
    _, comparison = compare([run, run])
    assert "<script" not in comparison.read_text(encoding="utf-8").lower()


def test_an_aborted_run_says_so_and_shows_what_there_is(tmp_path: Path, make_run: MakeRun) -> None:
    path = render(make_run(tmp_path / "run", finished=False))
    text = Page(path).text
    assert "This run has not come to its end: 30 of 60 training steps are recorded." in text
    assert "4 of 8 clients answered, 6 are needed" in text
    assert "summary.json is missing" in text
    assert "Stages that were completed: predictor." in text
    assert "The largest ε of any client is 7.90" in text
    assert "Fairness" in captions(path)


FILES = (
    "config.resolved.yaml",
    "environment.txt",
    "metrics.jsonl",
    "measurement.jsonl",
    "summary.json",
    "privacy_ledger.jsonl",
    "privacy_statement.md",
    "transcript.jsonl",
)


@pytest.mark.parametrize("name", FILES)
def test_any_file_may_be_missing_empty_or_broken(
    tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = make_run(tmp_path / "run", steps=2, groups=("A", "B", "C", "D", "E"))
    (run / name).unlink()
    assert any(f"{name} is missing" in note for note in load_run(run).notes) == (name != "measurement.jsonl")
    (run / name).write_bytes(b"")
    load_run(run)
    (run / name).write_bytes(b"\xff[{ not what it should be\n")
    if name not in ("metrics.jsonl", "measurement.jsonl", "summary.json", "config.resolved.yaml"):
        monkeypatch.setattr(plots, "_draw", lambda height, paint: "<svg/>")  # these do not change any figure
    page = Page(render(run))
    assert page.open == []
    assert f"{name} could not be read" in page.text


@pytest.mark.usefixtures("no_figures")
def test_without_a_configuration_nothing_is_taken_for_protected(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "run", steps=2, finished=False, truth=False)
    assert "NOT PRIVATE" not in Page(render(run)).text
    (run / "config.resolved.yaml").unlink()
    text = Page(render(run)).text
    assert "NOT PRIVATE" in text
    assert "do not say whether differential privacy" in text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        render(tmp_path)
    with pytest.raises(RunError, match="not a directory"):
        render(tmp_path / "absent")


@pytest.mark.usefixtures("no_figures")
def test_a_changed_transcript_shows(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "run", steps=3)
    lines = (run / "transcript.jsonl").read_bytes().splitlines(keepends=True)
    (run / "transcript.jsonl").write_bytes(b"".join(lines[:-1]))
    assert "does not verify" in Page(render(run)).text  # cut off: the head in summary.json is another
    (run / "transcript.jsonl").write_bytes(b"".join([lines[0], *lines[2:]]))
    text = Page(render(run)).text
    assert "row 1 calls itself row 2" in text
    assert "chain intact" not in text


@pytest.mark.usefixtures("no_figures")
def test_a_private_run_has_no_banner_and_the_others_say_why(tmp_path: Path, make_run: MakeRun) -> None:
    quiet = render(make_run(tmp_path / "a", truth=False, steps=2))
    assert "NOT PRIVATE" not in Page(quiet).text
    assert "was not measured" in Page(quiet).text
    assert "Each group during training" not in captions(quiet)
    loud = Page(render(make_run(tmp_path / "b", dp=False, mode="clear", steps=2))).text
    assert "Differential privacy was OFF" in loud
    assert "Secure aggregation was OFF" in loud
    assert "privacy_ledger.jsonl is missing" not in loud


def test_rendering_twice_gives_the_same_page(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "run", steps=3)
    assert render(run).read_bytes() == render(run).read_bytes()


def test_many_groups_and_a_single_step_are_drawn(tmp_path: Path, make_run: MakeRun) -> None:
    names = tuple(f"A rather long name of country number {k}" for k in range(24))
    page = Page(render(make_run(tmp_path / "run", groups=names, steps=1)))
    assert len(page.figures) == 9
    assert "number 23" in page.text


def test_compare_writes_a_table_and_plots(tmp_path: Path, make_run: MakeRun) -> None:
    runs = [make_run(tmp_path / kind, kind=kind, steps=2) for kind in ("appa", "average", "min")]
    markdown, page = compare(runs)
    assert page == tmp_path / "comparison.html"
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 5
    assert captions(page) == ["Training questions", "Held-out questions"]
    for row in table[2:]:
        for cell in row.strip("|").split(" | "):
            assert cell.split(" [")[0].strip() in Page(page).text
    _, elsewhere = compare(runs[:1], tmp_path / "x.html")
    assert elsewhere == tmp_path / "x.html"


def test_the_statements_markdown_becomes_html() -> None:
    text = (
        "# Title\nFirst **bold**\nline with `code`.\n\n- one\n  goes on\n- two\n\n"
        "| a | b |\n|---|---|\n| 1 | <2 |\n"
    )
    assert str(statement_html(text)).replace("\n", "") == (
        "<h3>Title</h3><p>First <strong>bold</strong>line with <code>code</code>.</p>"
        "<ul><li>onegoes on</li><li>two</li></ul>"
        '<div class="scroll"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
        "<tbody><tr><td>1</td><td>&lt;2</td></tr></tbody></table></div>"
    )
    assert "<script" not in statement_html("x <script>alert(1)</script>\n\n<script>alert(1)</script>")


def test_the_predictors_agreement_is_told_where_it_was_measured(tmp_path: Path, make_run: MakeRun) -> None:
    run = load_run(make_run(tmp_path / "run", steps=2))
    assert predictor(run) is None
    parts = {w: {"avg": x} for w, x in (("own", 0.951), ("shared", 0.9))}
    sentence = predictor(
        replace(run, summary={**run.summary, "predictor": {"train": parts, "heldout": parts}})
    )
    assert sentence is not None
    assert ".951 on training questions (.900 if one" in sentence.replace("0.", ".")
