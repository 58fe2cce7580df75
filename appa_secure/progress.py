"""How far a long stage is: bars on a terminal, one line per step without one; always on standard error.

Standard output is left alone: its last line is the path of the run directory, for scripts to read.
"""

import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

import rich.progress
from rich.console import Console
from rich.markup import escape

_WINDOW = 20  # steps of the moving average: smooths single slow steps, follows a change of pace

Field = float | int | str | None


def _text(value: Field) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return " ".join(str(value).split())  # a line stays one line


class Progress:
    """One object for all stages of a run; use as a context manager, or call `close`.

    `stream` defaults to standard error; `clock` gives seconds and is an argument for tests.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._stage: str | None = None
        self._marks: deque[tuple[int, float]] = deque(maxlen=_WINDOW + 1)  # (steps done, when)
        self._last = clock()
        self._tasks: dict[str, rich.progress.TaskID] = {}
        self._bars: rich.progress.Progress | None = None
        if self._stream.isatty():
            self._bars = rich.progress.Progress(
                rich.progress.TextColumn("{task.description:<10}"),
                rich.progress.BarColumn(bar_width=30),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[facts]}"),
                console=Console(file=self._stream),
            )

    def step(self, stage: str, done: int, total: int, **fields: Field) -> None:
        """Report that `done` of `total` steps of `stage` are behind us, with facts such as `reward=0.871`.

        Floats show three significant digits, None shows as "-". The first step of a stage, also of a resumed
        one, counts as having begun at the report before it.
        """
        facts = " ".join(f"{name} {_text(value)}" for name, value in fields.items())
        facts = f"{facts} eta {self._seconds_left(stage, done, total)}s".lstrip()
        if self._bars is None:
            print(f"{stage} step {done}/{total} {facts}", file=self._stream, flush=True)
            return
        self._bars.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(escape(stage), total=total, facts="")
        self._bars.update(self._tasks[stage], completed=done, total=total, facts=escape(facts))

    def note(self, text: str) -> None:
        """One line that is not a step, such as what a stage begins with."""
        line = _text(text)
        if self._bars is None:
            print(line, file=self._stream, flush=True)
        else:
            self._bars.console.print(escape(line), highlight=False)

    def _seconds_left(self, stage: str, done: int, total: int) -> int:
        now = self._clock()
        if stage != self._stage or done <= self._marks[-1][0]:  # another stage, or a step done again
            self._stage = stage
            self._marks.clear()
            self._marks.append((done - 1, self._last))
        self._marks.append((done, now))
        self._last = now
        (first, begun), (last, ended) = self._marks[0], self._marks[-1]
        return round((total - done) * (ended - begun) / (last - first))

    def close(self) -> None:
        """Leave the bars as they are and give the terminal back. Closing twice is allowed."""
        if self._bars is not None:
            self._bars.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
