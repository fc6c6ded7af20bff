# SPDX-License-Identifier: Apache-2.0
"""Plots: where lines cross, which plots a set of results has, and what a missing package says."""

import sys

import pytest

from lychee.errors import InputError
from lychee.eval import plots


def make_cell(
    method, tokens, seconds, *, ratio=4, bank_dtype="auto", gate="auto", notes=None, score=0.5
):
    ours = method == "ours"
    return {
        "task": "vt",
        "source": "",
        "length": tokens,
        "tokens": tokens,
        "method": method,
        "ratio": ratio if ours else None,
        "bank_dtype": bank_dtype if ours else None,
        "gate": gate if ours else None,
        "notes": notes if ours else None,
        "metric": "exact",
        "score": score,
        "interval_95": [score / 2, (1 + score) / 2],
        "answer_seconds": 2 * seconds,
        "ask_seconds": seconds,
        "peak_bytes": tokens << 10,
        "chunks": tokens / 512,
        "chunks_read": tokens / 1024,
    }


CELLS = [make_cell("ours", n, s) for n, s in ((1024, 4.0), (2048, 5.0), (4096, 6.0))]
CELLS += [make_cell("memagent", n, s) for n, s in ((1024, 2.0), (2048, 5.5), (4096, 20.0))]


def test_crossover_by_hand():
    # On logarithms, gaps of +1 at 1 and -1 at 4 meet in the middle: 2.
    assert plots.crossover([(1, 20.0), (4, 1.0)], [(1, 2.0), (4, 10.0)]) == pytest.approx(2.0)
    # What is missing on one side does not count.
    longer = [(1, 20.0), (2, 99.0), (4, 1.0)]
    assert plots.crossover(longer, [(1, 2.0), (4, 10.0)]) == pytest.approx(2.0)
    below, above = [(1, 1.0), (4, 1.0)], [(1, 2.0), (4, 2.0)]
    assert plots.crossover(below, above) is None and plots.crossover(above, below) is None
    # Below, above, below again: the last place counts.
    zigzag = [(1, 1.0), (4, 4.0), (16, 1.0)]
    assert plots.crossover(zigzag, [(1, 2.0), (4, 2.0), (16, 2.0)]) == pytest.approx(8.0)
    assert plots.crossover(zigzag[:2], [(1, 2.0), (4, 2.0)]) is None
    twice = [(1, 4.0), (4, 1.0), (16, 4.0), (64, 1.0)]
    assert plots.crossover(twice, [(x, 2.0) for x, _ in twice]) == pytest.approx(32.0)


def test_series_have_a_name_and_two_points():
    found = plots.series(CELLS, "tokens", "ask_seconds", *plots.LINE)
    assert found["ours, ratio 4"] == [(1024, 4.0), (2048, 5.0), (4096, 6.0)]
    assert set(found) == {"ours, ratio 4", "memagent"}
    ungated = [make_cell("ours", n, 1.0, gate="off") for n in (1, 2)]
    assert list(plots.series(ungated, "tokens", "score", *plots.LINE)) == ["ours, ratio 4, no gate"]
    assert plots.series(CELLS[:1], "tokens", "ask_seconds", "method") == {}


def test_results_give_the_plots_they_can(tmp_path):
    pytest.importorskip("matplotlib")
    names = {path.name for path in plots.draw_all(CELLS, tmp_path)}
    by_length = {"accuracy", "time_from_nothing", "time_to_answer", "peak_memory", "chunks_read"}
    assert names == {f"{name}-vt.png" for name in by_length}
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)
    settings = [make_cell("ours", 1024, 1.0, ratio=ratio, score=1 / ratio) for ratio in (2, 4)]
    settings += [make_cell("ours", 1024, 1.0, bank_dtype="int8", score=1.0)]
    settings += [make_cell("ours", 1024, 1.0, notes=size) for size in (8, 32)]
    names = {path.name for path in plots.draw_all(settings, tmp_path)}
    assert names == {f"accuracy_by_{name}-vt.png" for name in ("ratio", "bank", "notes")}
    plots.draw_curves({"frozen": [[(0, 0.1), (1, 0.2)]]}, "step", "reward", tmp_path / "reward.png")
    assert (tmp_path / "reward.png").stat().st_size > 5000


def test_the_crossover_is_marked():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure = plots.PLOTS["time_to_answer"](pyplot, CELLS)
    marks = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    (place,) = [line.get_xdata()[0] for line in marks]
    ours, agent = (
        [(c["tokens"], c["ask_seconds"]) for c in part] for part in (CELLS[:3], CELLS[3:])
    )
    assert place == plots.crossover(ours, agent) and 1024 < place < 2048
    assert f"below memagent from {place:,.0f} tokens" in marks[0].get_label()
    pyplot.close(figure)


@pytest.mark.parametrize("notes", [None, 256])
def test_the_crossover_is_that_of_the_line_with_a_gate_where_there_is_one(notes):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    without = [make_cell("ours", n, 5.0, gate="off", notes=notes) for n in (1024, 2048, 4096)]
    for cells, expected in ((without + CELLS, 0), (without + CELLS[3:], 1)):
        figure = plots.PLOTS["time_to_answer"](pyplot, cells)
        marks = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
        (place,) = [line.get_xdata()[0] for line in marks]
        ours = [(c["tokens"], c["ask_seconds"]) for c in (CELLS[:3], without)[expected]]
        agent = [(c["tokens"], c["ask_seconds"]) for c in CELLS[3:]]
        assert place == plots.crossover(ours, agent)
        dotted = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
        assert len(dotted) == 1
        pyplot.close(figure)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"matplotlib, got none; install it: .*\[plot\]"):
        plots.load_matplotlib()
