# SPDX-License-Identifier: Apache-2.0
"""The baselines against plain loops over transformers, and what they refuse."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import lychee.generate
from lychee.baselines.full_context import FULL_TEXT, FullContext, TextCache
from lychee.baselines.memagent import SECTION, MemAgent
from lychee.config import ModelConfig
from lychee.decoder import Decoder
from lychee.errors import InputError
from lychee.generate import GREEDY, Sampling, generate
from lychee.memory_model import LycheeMemory

SECTION_TOKENS = 40


@pytest.fixture(scope="module")
def model(tiny_model, tiny_config):
    """A model whose random weights are large enough that what it writes depends on all it reads."""
    torch.manual_seed(5)
    config = ModelConfig.from_dict(tiny_config | {"tie_word_embeddings": False})
    decoder = Decoder(config, tiny_model.memory.param).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" not in name:
                scale = 3 if "self_attn" in name else 1
                parameter.normal_(0, scale * parameter.shape[-1] ** -0.5)
    return LycheeMemory(decoder, tiny_model.tokenizer, tiny_model.raw_config, tiny_model.memory)


@pytest.fixture(scope="module")
def reference(model, tiny_config):
    """The same weights as transformers runs them."""
    fields = tiny_config | {"tie_word_embeddings": False}
    del fields["model_type"]
    stock = AutoModelForCausalLM.from_config(Qwen2Config(**fields)).eval()
    weights = model.decoder.state_dict()
    stock.load_state_dict({name: weights[name] for name in stock.state_dict()})
    return stock


def continue_prompt(reference, ids, limit):
    """Greedy new ids up to the end token, by transformers' own loop."""
    out = reference.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=0,
        pad_token_id=1,
    )
    new = out[0, len(ids) :].tolist()
    return new[: new.index(0)] if 0 in new else new


def fill(template, encode, **values):
    """A template's ids, its pieces encoded one by one and the values put between them."""
    ids = []
    for piece in template.split("{"):
        name, closed, text = piece.partition("}")
        ids += values[name] + encode(text) if closed else encode(piece)
    return ids


def read_by_transformers(model, reference, text, question):
    """MemAgent's loop for one question; the notes after each section."""
    notes, after = model.tokenizer.encode(" none"), []
    for start in range(0, len(text), SECTION_TOKENS):
        section = text[start : start + SECTION_TOKENS]
        prompt = fill(
            SECTION, model.tokenizer.encode, question=question, memory=notes, text=section
        )
        notes = continue_prompt(reference, prompt, model.memory.size)
        after.append(notes)
    return after


def test_memagent_equals_a_loop_over_transformers(model, reference, prose):
    """Nine questions of unequal length: two batches, left-padded, and a short last section."""
    text = model.tokenizer.encode(prose(80, seed=2))
    assert len(text) % SECTION_TOKENS
    questions = [model.tokenizer.encode(prose(2 + n % 4, seed=n)) for n in range(9)]
    agent = MemAgent(model, section=SECTION_TOKENS)
    seen = {}
    notes = agent.read(text, questions, lambda *event: seen.setdefault(event[0], []).append(event))
    answers = agent.answer_from(questions, notes)
    template = model.memory.templates["answer"]
    for row in (0, 3, 8):
        expected = read_by_transformers(model, reference, text, questions[row])
        assert [after for _, _, after, _ in seen[row]] == expected
        before = [model.tokenizer.encode(" none"), *expected[:-1]]
        changed = [old != new for old, new in zip(before, expected, strict=True)]
        assert [event[3] for event in seen[row]] == changed
        prompt = fill(
            template, model.tokenizer.encode, question=questions[row], memory=expected[-1]
        )
        wanted = continue_prompt(reference, prompt, model.memory.answer)
        assert answers[row] == wanted
    assert len({tuple(notes) for notes in notes}) > 1


# One piece; several pieces with a partial page at the end; whole pages only.
@pytest.mark.parametrize("tokens", [50, 200, 2100])
def test_full_context_equals_transformers(model, reference, prose, monkeypatch, tokens):
    if tokens < 2000:
        monkeypatch.setattr("lychee.baselines.full_context.prefill_step", lambda *_: 64)
    text = model.tokenizer.encode(prose(tokens, seed=4))[:tokens]
    questions = [model.tokenizer.encode(prose(n, seed=n)) for n in (2, 6)]
    method = FullContext(model)
    answers = method.answer_from(method.read(text), questions)
    for question, answer in zip(questions, answers, strict=True):
        prompt = fill(FULL_TEXT, model.tokenizer.encode, text=text, question=question)
        assert answer == continue_prompt(reference, prompt, model.memory.answer)


def test_prompts_in_pieces_give_what_one_pass_gives(model, prose, monkeypatch):
    """Left-padded prompts over memory pages; pieces may be padding from end to end."""
    bank = model.remember(prose(60))
    prompts = [model.tokenizer.encode(prose(n, seed=n)) for n in (30, 12, 1)]
    pages = bank.page_table([[0], [1], [0]])
    states = []
    original = lychee.generate.prefill
    monkeypatch.setattr(
        lychee.generate, "prefill", lambda *a: states.append(original(*a)) or states[-1]
    )
    arguments = {"pages": pages, "first_position": 8, "max_new_tokens": 4, "stop": ()}
    once = generate(model.decoder, prompts, **arguments)
    monkeypatch.setattr(lychee.generate, "prefill_step", lambda *_: 5)
    assert generate(model.decoder, prompts, **arguments) == once
    torch.testing.assert_close(states[1], states[0], atol=1e-5, rtol=0)


def test_answers_of_both(model, prose):
    """Usage and trace as `LycheeMemory.ask_many` gives them."""
    text, questions = prose(80, seed=2), [prose(3), prose(5, seed=1)]
    tokens = len(model.tokenizer.encode(text))
    for method in (MemAgent(model, section=SECTION_TOKENS), FullContext(model)):
        answers = method.answer(text, questions)
        assert [answer.question for answer in answers] == questions
        assert all(answer.usage.text_tokens == tokens for answer in answers)
        assert answers[0].usage.read_seconds > 0
        again = method.answer(text, questions)
        assert [a.text for a in again] == [a.text for a in answers]
    steps = MemAgent(model, section=SECTION_TOKENS).answer(text, questions)[1].trace
    assert [step.chunk for step in steps] == list(range(-(-tokens // SECTION_TOKENS)))
    assert (steps[0].start, steps[-1].stop) == (0, len(text))
    assert all(a.stop <= b.start for a, b in zip(steps, steps[1:], strict=False))


def test_sampling_reaches_the_notes(model, prose):
    text, question = prose(80, seed=2), [prose(3)]
    hot = Sampling(temperature=1.5, seed=3)
    traces = [
        MemAgent(model, section=SECTION_TOKENS, sampling=sampling).answer(text, question)
        for sampling in (GREEDY, hot, hot)
    ]
    notes = [[step.memory for step in trace[0].trace] for trace in traces]
    assert notes[1] == notes[2] != notes[0]


def limited(model: LycheeMemory, positions: int) -> LycheeMemory:
    """The same model with fewer positions."""
    small = copy.copy(model)
    small.decoder = copy.copy(model.decoder)
    small.decoder.config = replace(model.decoder.config, max_position_embeddings=positions)
    return small


def test_a_length_beyond_the_models_positions_is_refused(model, prose):
    small = limited(model, 400)
    with pytest.raises(InputError, match=r"section: expected 1 to \d+ tokens, .* 400 positions"):
        MemAgent(small, section=300)
    with pytest.raises(InputError, match=r"section: expected 1 to \d+ tokens, .* got 0"):
        MemAgent(small, section=0)
    with pytest.raises(InputError, match=r"text: expected at most \d+ tokens, .* 400 positions"):
        FullContext(small).answer(prose(400), ["the sea"])
    longest = MemAgent(small).section
    assert 0 < longest < 400
    assert MemAgent(model).section == 5000
    MemAgent(small, section=longest)
    with pytest.raises(InputError, match="got"):
        MemAgent(small, section=longest + 1)


@pytest.mark.parametrize("method", [MemAgent, FullContext])
def test_empty_texts_and_questions_are_refused(model, method):
    with pytest.raises(InputError, match="context: expected text, got nothing"):
        method(model).answer("", ["who?"])
    with pytest.raises(InputError, match="question: expected text, got nothing"):
        method(model).answer("the sea", [" "])


def test_text_cache_takes_whole_pages(model):
    cache = TextCache(model.decoder, 100)
    rows = torch.zeros(1, 2, 30, 8)
    cache.append(0, rows, rows)
    cache.length = 30
    with pytest.raises(ValueError, match="cache: expected whole pages"):
        cache.append(0, rows, rows)
