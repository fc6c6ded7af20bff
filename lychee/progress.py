# SPDX-License-Identifier: Apache-2.0
"""Progress on standard error: a bar on a terminal, one line per ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

SECONDS_PER_LINE = 10.0


class ProgressDisplay:
    """Context manager that is called with (done, total) as work goes on."""

    def __init__(self, label: str, unit: str):
        self.label, self.unit = label, unit
        self.bar = None
        self.last_line = time.monotonic()

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

    def __call__(self, done: int, total: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total)
            return
        now = time.monotonic()
        if now - self.last_line >= SECONDS_PER_LINE:
            self.last_line = now
            share = f"{100 * done // max(total, 1)}%"
            print(
                f"lychee: {self.label}: {done:,} of {total:,} {self.unit}, {share}",
                file=sys.stderr,
                flush=True,
            )


def make_bar(label: str):
    """A bar with percentage, time spent and time left, which disappears when it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        Elapsed(),
        TextColumn("left"),
        Remaining(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    return bar, bar.add_task(label, total=None)
