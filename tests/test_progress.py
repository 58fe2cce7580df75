"""Heartbeat lines without a terminal, bars with one."""

import io

import pytest

from appa_secure.progress import Progress


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_one_line_per_step_with_facts_and_seconds_left(clock: Clock) -> None:
    out = io.StringIO()
    progress = Progress(out, clock)
    for done in (1, 2):
        clock.now += 1.5
        progress.step("align", done, 10, reward=0.87123, fi=0.991, eps=7.98, z=None, note="a\nb", z2=12345.6)
    assert out.getvalue().splitlines() == [
        "align step 1/10 reward 0.871 fi 0.991 eps 7.98 z - note a b z2 12346 eta 14s",
        "align step 2/10 reward 0.871 fi 0.991 eps 7.98 z - note a b z2 12346 eta 12s",
    ]


def test_the_estimate_follows_a_change_of_pace(clock: Clock) -> None:
    out = io.StringIO()
    progress = Progress(out, clock)
    for done in range(1, 61):
        clock.now += 10 if done <= 30 else 1
        progress.step("align", done, 100)
    assert out.getvalue().splitlines()[-1].endswith("eta 40s")  # 40 left, the last 20 took 1 s each


def test_a_resumed_stage_counts_only_its_own_steps_and_a_new_stage_starts_afresh(clock: Clock) -> None:
    out = io.StringIO()
    progress = Progress(out, clock)
    clock.now += 2
    progress.step("predictor", 1, 3)
    clock.now += 5
    progress.step("align", 101, 200)
    clock.now += 5
    progress.step("align", 101, 200)  # a step that was aborted and done again
    assert [line.split()[-1] for line in out.getvalue().splitlines()] == ["4s", "495s", "495s"]


def test_nothing_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        progress.note("reading 380 questions")
        progress.step("align", 1, 1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "reading 380 questions\nalign step 1/1 eta 0s\n"


def test_a_terminal_gets_bars_that_take_text_literally(clock: Clock) -> None:
    out = Terminal()
    with Progress(out, clock) as progress:
        progress.note("[red]not markup[/red]")
        clock.now += 1
        progress.step("align", 3, 4, reward=0.5, group="[bold]x")
    text = out.getvalue()
    assert "[red]not markup[/red]" in text
    assert "align" in text
    assert "3/4" in text
    assert "reward 0.5 group [bold]x" in text
    assert "align step 3/4" not in text
