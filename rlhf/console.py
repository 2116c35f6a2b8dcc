"""Output for the user: notes, tables and progress bars. All of it follows --quiet and --json."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

NumberTable = Sequence[Sequence[str]]


class Console:
    """Prints text (default), results only (--quiet), or one JSON object per line (--json); only on the main process."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False, main: bool = True) -> None:
        self.quiet, self.as_json, self.main = quiet, as_json, main
        self._rich = RichConsole(stderr=False, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line of information."""
        if not self.main or self.quiet:
            return
        if self.as_json:
            self._emit({"note": text})
        else:
            self._rich.print(text, markup=False, style="dim")

    def title(self, text: str) -> None:
        """Print the heading of a stage."""
        if not self.main or self.quiet:
            return
        if self.as_json:
            self._emit({"stage": text})
        else:
            self._rich.print(f"\n{text}", markup=False, style="bold")

    def table(self, title: str, header: Sequence[str], rows: NumberTable) -> None:
        """Print a table, also with --quiet."""
        if not self.main:
            return
        if self.as_json:
            self._emit({"table": title, "rows": [dict(zip(header, row, strict=True)) for row in rows]})
            return
        table = Table(title=title, title_justify="left", title_style="bold")
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        # A piped table must not be cut to 80 columns.
        console = self._rich if self._rich.is_terminal else RichConsole(width=160, highlight=False)
        console.print(table)

    def text(self, text: str) -> None:
        """Print a result that is not a table, also with --quiet."""
        if not self.main:
            return
        if self.as_json:
            self._emit({"text": text})
        else:
            self._rich.print(text, markup=False)

    def paint(self, text: Text) -> None:
        """Print styled text; it is plain where the terminal has no colours."""
        if not self.main:
            return
        if self.as_json:
            self._emit({"text": text.plain})
        else:
            self._rich.print(text)

    def _emit(self, value: Mapping[str, Any]) -> None:
        sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
        sys.stdout.flush()

    @contextmanager
    def progress(self, label: str, total: int, unit: str) -> Iterator[Bar]:
        """Yield a progress bar with rate, time left and metrics; without a terminal it prints a line every 10 s."""
        bar = Bar(self, label, total, unit)
        with bar:
            yield bar


class Bar:
    """Progress of one long task; created by `Console.progress`."""

    def __init__(self, console: Console, label: str, total: int, unit: str) -> None:
        self.console, self.label, self.total, self.unit = console, label, total, unit
        self._begun, self._last = time.monotonic(), -1e9
        self._progress: Progress | None = None

    def __enter__(self) -> Bar:
        c = self.console
        if c.main and not c.quiet and not c.as_json and c._rich.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=c._rich,
            )
            self._progress.start()
            self._task = self._progress.add_task(self.label, total=self.total, numbers="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, done: int, numbers: Mapping[str, float]) -> None:
        """Show how many units are done, with a few metrics (name -> value)."""
        elapsed = max(time.monotonic() - self._begun, 1e-9)
        rate = done / elapsed
        words = " ".join(f"{k} {v:.3g}" for k, v in numbers.items())
        c = self.console
        if not c.main or c.quiet:
            return
        if c.as_json:
            c._emit({"progress": self.label, "done": done, "total": self.total, **numbers})
        elif self._progress is not None:
            self._progress.update(self._task, completed=done, numbers=f"{rate:.2g} {self.unit}/s  {words}")
        elif time.monotonic() - self._last >= 10 or done >= self.total:
            self._last = time.monotonic()
            eta = (self.total - done) / rate if rate else 0.0
            c.note(f"{self.label} {done}/{self.total} {self.unit}s  {rate:.2g}/s  eta {eta:.0f} s  {words}")
