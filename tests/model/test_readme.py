# SPDX-License-Identifier: Apache-2.0
"""The README's section on the ops runs as printed, and its model reads what it says it reads."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, Qwen2Config, Qwen2ForCausalLM

import lychee_kernels as lk

README = Path(__file__).parents[2] / "README.md"
ROUNDING = {"rtol": 1e-4, "atol": 2e-6}


def code_blocks() -> list[str]:
    text = README.read_text(encoding="utf-8")
    section = re.search(r"^## Use the ops in your own model\n(.*?)^## ", text, re.M | re.S)
    return re.findall(r"```python\n(.*?)```", section.group(1), re.S)


@pytest.fixture
def example() -> dict:
    """The variables that the model's example leaves behind."""
    variables = {}
    exec(code_blocks()[0], variables)
    return variables


@torch.no_grad()
def logits_after_prefix(model, cache, ids, **arguments):
    """What the stock model computes with the keys and values of `cache` before the prompt."""
    model.set_attn_implementation("sdpa")
    logits = model(ids, past_key_values=cache, **arguments).logits
    model.set_attn_implementation("memory")
    return logits


@torch.no_grad()
def test_model_reads_bank_as_it_reads_its_cache(example):
    model, text, question = (example[name] for name in ("model", "text", "question"))
    cache = DynamicCache()
    model.set_attn_implementation("sdpa")
    model(text, past_key_values=cache)
    expected = logits_after_prefix(model, cache, question)
    torch.testing.assert_close(model(question).logits, expected, **ROUNDING)
    without = logits_after_prefix(model, DynamicCache(), question)
    assert (without - expected).abs().max() > 1000 * ROUNDING["atol"]


def test_answer_is_that_of_the_whole_prompt(example):
    model, text, question = (example[name] for name in ("model", "text", "question"))
    options = {"max_new_tokens": 20, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    short = model.generate(question, **options)
    model.set_attn_implementation("sdpa")
    whole = model.generate(torch.cat((text, question), dim=1), **options)
    assert torch.equal(example["answer"], whole.sequences[:, -20:])
    # at every step; a random model's tokens alone would hide much
    torch.testing.assert_close(torch.stack(short.logits), torch.stack(whole.logits), **ROUNDING)


@torch.no_grad()
def test_padded_batch_reads_as_its_rows(example):
    model, question, memory = (example[name] for name in ("model", "question", "memory"))
    short = question[:, 5:]
    alone = [model(ids).logits for ids in (question, short)]
    for name in ("page_table", "page_len", "page_base", "num_pages"):
        memory[name] = torch.cat((memory[name], memory[name]))
    padded = torch.cat((question, torch.nn.functional.pad(short, (5, 0))))
    mask = torch.ones_like(padded)
    mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    together = model(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(together[0], alone[0][0], **ROUNDING)
    torch.testing.assert_close(together[1, 5:], alone[1][0], **ROUNDING)


@torch.no_grad()
def test_model_reads_what_lychee_remembered(tiny_model, tiny_config, prose):
    """The released method's way: memory keys as they are stored, the prompt from position 0 on."""
    bank = tiny_model.remember(prose(150))
    table = bank.page_table([[2, 0]])
    model = Qwen2ForCausalLM(Qwen2Config(**tiny_config)).eval()

    def attend(module, query, key, value, attention_mask, scaling, **_):
        pages = table.attention_arguments(module.layer_idx)
        return lk.memory_attention(query, key, value, **pages)[0].transpose(1, 2), None

    AttentionInterface.register("memory", attend)
    cache = DynamicCache()
    for layer in range(tiny_config["num_hidden_layers"]):
        slots = [
            bank.pages.kv[page, layer, :, :, :length]
            for page, length in zip(table.table[0], table.length[0], strict=True)
        ]
        cache.update(*torch.cat(slots, dim=2).transpose(0, 1)[:, None], layer)
    ids = torch.randint(tiny_config["vocab_size"], (1, 9))
    expected = logits_after_prefix(model, cache, ids, position_ids=torch.arange(9)[None])
    torch.testing.assert_close(model(ids).logits, expected, **ROUNDING)


def test_each_op_runs_as_printed(example):
    blocks = code_blocks()
    assert len(blocks) == 2
    exec(blocks[1], example)
    assert example["found"].chunks.tolist() == [[1, 2]]
    # the gathered keys and values, with the window's own after them, give the same attention
    keys, values, valid = (example[name] for name in ("keys", "values", "valid"))
    k, v = (torch.cat((x[0], example[n]), dim=2) for x, n in ((keys, "k"), (values, "v")))
    valid = torch.cat((valid, torch.ones(1, 80, dtype=torch.bool)), dim=1)
    out, lse = lk.memory_attention(example["q"], k, v, valid=valid)
    torch.testing.assert_close(example["out"], out)
    torch.testing.assert_close(example["lse"], lse)
