# SPDX-License-Identifier: Apache-2.0
"""The reading loop: checking drafts in batches gives what reading turn by turn gives."""

import pytest

from lychee.generate import Sampling
from lychee.reading import ReadingLoop, ReadingOptions


def read(model, bank, questions, **options):
    events = []
    ids = [model.tokenizer.encode(question) for question in questions]
    notes = ReadingLoop(model.reasoner, bank, **options).run(
        ids, lambda event: events.append((event.question, event.chunk, event.notes))
    )
    return notes, events


def turn_by_turn(model, bank, question, together=1):
    """The loop as the paper states it: decode the notes anew for every chunk, or so many."""
    notes = list(model.reasoner.prompts.no_memory)
    ids = model.tokenizer.encode(question)
    after = []
    for first in range(0, len(bank), together):
        chunks = list(range(first, min(first + together, len(bank))))
        pages = bank.page_table([chunks], in_place=True)
        after += [notes] * (len(chunks) - 1)
        [notes] = model.reasoner.update([ids], [notes], pages)
        after.append(notes)
    return after


@pytest.mark.parametrize(("questions", "together"), [(1, 1), (3, 1), (40, 1), (3, 4), (1, 100)])
def test_read_equals_turn_by_turn(tiny_model, prose, questions, together):
    bank = tiny_model.remember(prose(700, seed=2))
    assert len(bank) > 20
    asked = [prose(5, seed=10 + index) for index in range(questions)]
    notes, events = read(tiny_model, bank, asked, together=together)
    for index, question in enumerate(asked[:4]):
        expected = turn_by_turn(tiny_model, bank, question, together)
        mine = [event for event in events if event[0] == index]
        assert [chunk for _, chunk, _ in mine] == list(range(len(bank)))
        assert [after for _, _, after in mine] == expected
        assert notes[index] == expected[-1]


def test_the_loop_exercises_both_paths(tiny_model, prose):
    """Guards the test above: some chunks must change the notes, and some must not."""
    bank = tiny_model.remember(prose(700, seed=2))
    for together in (1, 4):
        after = turn_by_turn(tiny_model, bank, prose(5, seed=10), together)[
            together - 1 :: together
        ]
        before = [list(tiny_model.reasoner.prompts.no_memory), *after[:-1]]
        changed = sum(old != new for old, new in zip(before, after, strict=True))
        assert 0 < changed < len(after)


def test_chunks_read_together_are_sources_of_what_they_told(tiny_model, prose):
    """Steps name their turn; a turn stands at its last chunk, and all its chunks are cited."""
    bank = tiny_model.remember(prose(200, seed=2))
    question = prose(5, seed=10)
    answer = tiny_model.ask(bank, question, reading=ReadingOptions(together=3))
    assert [step.turn for step in answer.trace] == [chunk // 3 for chunk in range(len(bank))]
    changed = [step.chunk for step in answer.trace if step.changed]
    assert changed and all(chunk % 3 == 2 or chunk == len(bank) - 1 for chunk in changed)
    turns = {source.chunk // 3 for source in answer.sources}
    assert turns and [source.chunk for source in answer.sources] == [
        step.chunk for step in answer.trace if step.turn in turns
    ]
    assert answer.usage.reads == len(bank)


def test_positions_of_chunks_read_together(tiny_model, prose):
    """Each chunk's memory stands where it stands alone, whatever is read beside it."""
    bank = tiny_model.remember(prose(60))
    assert len(bank) >= 3
    alone = [bank.page_table([[chunk]]).base[0].tolist() for chunk in range(3)]
    together = bank.page_table([[0, 1, 2]], in_place=True)
    assert together.base[0].tolist() == sum(alone, [])
    behind = bank.page_table([[0, 1, 2]])
    assert behind.base[0].tolist() != together.base[0].tolist()


def test_leaves_notes_respects_the_limit(tiny_model, prose):
    """Notes as long as the limit end by the limit, not by a stop token."""
    bank = tiny_model.remember(prose(60))
    ids = tiny_model.tokenizer.encode(prose(5))
    pages = bank.page_table([[0]])
    notes = list(tiny_model.reasoner.prompts.no_memory)
    for _ in range(6):
        [new] = tiny_model.reasoner.update([ids], [notes], pages)
        assert tiny_model.reasoner.leaves_notes([ids], [notes], pages) == [new == notes]
        notes = new


def test_sampling_is_reproducible(tiny_model, prose):
    bank = tiny_model.remember(prose(120))
    hot = Sampling(temperature=1.5, seed=3)
    first = read(tiny_model, bank, [prose(5)], sampling=hot)
    assert first == read(tiny_model, bank, [prose(5)], sampling=hot)
    assert first != read(tiny_model, bank, [prose(5)], sampling=Sampling(temperature=1.5, seed=4))


def test_unequal_prompts_do_not_disturb_each_other(tiny_model, prose):
    """A row in a left-padded batch gives what it gives alone (the released code does not)."""
    bank = tiny_model.remember(prose(60))
    questions = [tiny_model.tokenizer.encode(prose(n, seed=n)) for n in (2, 5, 9)]
    notes = [list(tiny_model.reasoner.prompts.no_memory)] * 3
    together = tiny_model.reasoner.update(questions, notes, bank.page_table([[0]] * 3))
    for question, expected in zip(questions, together, strict=True):
        alone = tiny_model.reasoner.update([question], notes[:1], bank.page_table([[0]]))
        assert alone == [expected]
