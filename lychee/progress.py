# SPDX-License-Identifier: Apache-2.0
"""Progress on standard error: a bar on a terminal, one line per ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from lychee.quantities import as_duration

SECONDS_PER_LINE = 10.0


class ProgressDisplay:
    """Context manager that is called with (done, total) as work goes on."""

    def __init__(self, label: str, unit: str):
        self.label, self.unit = label, unit
        self.bar = None
        self.last_line = time.monotonic()
        self.first: tuple[float, int] | None = None

    def __enter__(self) -> ProgressDisplay:
        if sys.stderr.isatty():
            self.bar, self.task = make_bar(self.label)
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, done: int, total: int, rate: float | None = None) -> None:
        """`rate` in units per second, where the caller knows better than what was done since then.

        Work that was found done already, say, tells nothing of the speed.
        """
        now = time.monotonic()
        self.first = self.first or (now, done)
        if rate is None and now > self.first[0]:
            rate = (done - self.first[1]) / (now - self.first[0])
        speed = f"{rate:,.{0 if rate >= 10 else 1}f} {self.unit}/s" if rate else ""
        left = as_duration(max(0, total - done) / rate) if rate else ""
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total, speed=speed, left=left)
        elif now - self.last_line >= SECONDS_PER_LINE:
            self.last_line = now
            parts = [f"{done:,} of {total:,} {self.unit}", f"{100 * done // max(total, 1)}%"]
            parts += [speed, f"{left} left"] if rate else []
            print(f"lychee: {self.label}: {', '.join(parts)}", file=sys.stderr, flush=True)


def make_bar(label: str):
    """A bar with percentage, speed, time spent and time left, which disappears when it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]}", markup=False),
        Elapsed(),
        TextColumn("left {task.fields[left]}", markup=False),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    return bar, bar.add_task(label, total=None, speed="", left="")
