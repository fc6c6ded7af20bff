# SPDX-License-Identifier: Apache-2.0
"""The whole recipe in small: stages start from each other's models, and go on where they were."""

import pytest
import torch
from small_run import RECIPE, run_folder, weights

from lychee.errors import InputError
from lychee.memory_model import LycheeMemory
from lychee.train.reproduce import SHIPPED_RECIPE, Plan, reproduce, training_class

PLAN = """
[[stage]]
name = "first"
kind = "pretrain"
config = "first.toml"

[[stage]]
name = "second"
kind = "sft"
config = "second.toml"

[[stage]]
name = "third"
kind = "gate"
config = "third.toml"
"""
GATE = """
held_out = 0.4
validation = 10

[gate]
layers = 3
tail = 3
"""
BEGIN, END = RECIPE.index("[model]"), RECIPE.index("[memory]")


@pytest.fixture
def plan(tmp_path, books):
    """A plan of three stages; the second has a learning rate too small to change a weight."""
    stage = RECIPE[RECIPE.rindex("[[stage]]") :].replace("[3e-3, 1e-5]", "[1e-30, 1e-30]")
    traces = RECIPE[:BEGIN] + RECIPE[END : RECIPE.index("[[stage]]")] + stage
    (tmp_path / "first.toml").write_text(
        RECIPE.replace("save_every", 'export="float32"\nsave_every')
    )
    (tmp_path / "second.toml").write_text(traces.replace("weight_decay = 0.01", ""))
    (tmp_path / "third.toml").write_text(RECIPE[:BEGIN] + GATE + stage)
    (tmp_path / "plan.toml").write_text(PLAN)
    (tmp_path / "out").mkdir()
    run_folder(tmp_path / "out" / "first", books)
    return tmp_path / "plan.toml"


def test_stages_run_in_order_and_start_from_each_other(tmp_path, plan, books, capsys):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="first/model: expected the stage before to be finished"):
        reproduce(plan, out, books, only="second")
    reproduce(plan, out, books, only="first")
    assert not (out / "second").exists()
    assert reproduce(plan, out, books) == out / "third" / "model"
    assert "second: finished after 0.00 hours" in capsys.readouterr().out
    first, second = weights(out / "first"), weights(out / "second")
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    second, third = (LycheeMemory.from_pretrained(out / n / "model") for n in ("second", "third"))
    assert third.trained and second.gate is None and third.gate is not None
    # What is finished is not trained again.
    files = [out / name / "metrics.jsonl" for name in ("first", "second", "third")]
    logs = [file.read_text() for file in files]
    reproduce(plan, out, books)
    assert logs == [file.read_text() for file in files]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('kind = "sft"', 'kind = "guess"'), r"stage\[2\].kind: expected one of pretrain, sft"),
        (('name = "second"', 'name = "first"'), "expected stages of different names"),
        (('config = "first.toml"', ""), r"stage\[1\].config: expected a value, got none"),
        ((PLAN, ""), "stage: expected a value, got none"),
    ],
)
def test_bad_plans(plan, change, message):
    plan.write_text(PLAN.replace(*change))
    with pytest.raises(InputError, match=message):
        Plan.load(plan)


def test_an_unknown_stage_is_refused(tmp_path, plan, books):
    with pytest.raises(InputError, match="only: expected one of first, second, third, got fourth"):
        reproduce(plan, tmp_path / "out", books, only="fourth")


def test_the_shipped_recipe_fits_its_kinds():
    """Every config that `lychee train reproduce` would run can be read by its kind."""
    for stage in Plan.load(SHIPPED_RECIPE).stages:
        recipe = training_class(stage.kind).recipe_type.load(SHIPPED_RECIPE.parent / stage.config)
        assert recipe.total_steps > 0
