# SPDX-License-Identifier: Apache-2.0
"""Banks in memory: page dtypes, tables, tiers, and documents that come and go."""

import gc
import weakref

import pytest
import torch
from bank_contents import assert_same_memory, documents_of, read_back

import lychee_kernels as lk
from lychee.bank import DTYPES, Document, page_bytes, pages_of
from lychee.bank.pages import PageLayout, PagePool
from lychee.bank.pieces import cut_document
from lychee.compressor import TensorSink
from lychee.config import MemoryConfig
from lychee.errors import BankError, BankMismatchError, InputError, MemoryConfigError


# Rounding to nearest: half a step of 1/127, and half a step of a 3-bit mantissa.
@pytest.mark.parametrize(("dtype", "step"), [("int8", 0.5 / 127), ("e4m3", 1 / 16)])
def test_quantised_pages_are_within_a_rounding(tiny_model, prose, dtype, step):
    """One window per chunk, so that no rounding error of an earlier window is compounded."""
    text = prose(9)
    exact = tiny_model.remember(text)
    bank = tiny_model.remember(text, bank_dtype=dtype)
    assert bank.chunks[0].tokens <= tiny_model.memory.window
    wanted, got = read_back(exact, 0), read_back(bank, 0)
    # Per token and head int8 errs by a share of the largest value, e4m3 of each value or, below
    # its normal range, of the largest.
    largest = wanted.abs().amax(-1, keepdim=True)
    scale = largest if dtype == "int8" else wanted.abs().clamp(min=2**-6 / 448 * largest)
    assert (((got - wanted).abs() / scale).nan_to_num() <= step * 1.001).all()
    head_dim = tiny_model.decoder.config.head_dim
    assert bank.nbytes == exact.nbytes * (head_dim + 4) // (4 * head_dim)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_answers(tiny_model, prose, dtype):
    bank = tiny_model.remember(prose(150), bank_dtype=dtype)
    assert bank.dtype == dtype and bank.pages.kv.dtype == DTYPES[dtype]
    assert bank.nbytes == len(bank.chunks) * page_bytes(tiny_model.decoder.config, dtype)
    assert isinstance(tiny_model.ask(bank, "who came again").text, str)


def test_attention_applies_the_scales(tiny_model, prose):
    """Attention over quantised pages is attention over the values that they stand for."""
    bank = tiny_model.remember(prose(60), bank_dtype="int8")
    config = tiny_model.decoder.config
    table = bank.page_table([[1, 0]])
    q = torch.randn(1, config.num_attention_heads, 3, config.head_dim)
    none = torch.empty(1, config.num_key_value_heads, 0, config.head_dim)
    for layer in range(config.num_hidden_layers):
        out, _ = lk.memory_attention(q, none, none, **table.attention_arguments(layer))
        memory = torch.cat([read_back(bank, chunk) for chunk in (1, 0)], dim=3)[layer]
        k, v = memory[:, 0], memory[:, 1]
        k, v = (t.repeat_interleave(q.shape[1] // len(t), 0) for t in (k, v))
        expected = torch.softmax(q[0] @ k.mT * config.head_dim**-0.5, -1) @ v
        torch.testing.assert_close(out[0], expected, atol=1e-5, rtol=1e-5)


def test_documents_come_and_go(tiny_model, prose):
    """However a bank came to hold its documents, it is the bank of them."""
    a, b, c, d = documents_of(prose, 0, 1, 2, 3)
    bank = tiny_model.remember([a, b, c])
    pages = len(bank.pages)
    report = bank.add([Document(b.name, d.text), a])
    assert (report.replaced, report.skipped, report.added) == ((b.name,), (a.name,), ())
    assert_same_memory(bank, tiny_model.remember([a, Document(b.name, d.text), c]))
    bank.remove([a.name, c.name])
    assert_same_memory(bank, tiny_model.remember([Document(b.name, d.text)]))
    assert bank.add([d]).added == (d.name,)
    assert_same_memory(bank, tiny_model.remember([Document(b.name, d.text), d]))
    assert len(bank.pages) <= pages + 8, "freed pages are used again"


def test_an_answer_does_not_keep_the_bank(tiny_model, prose):
    """Pages go with the last reference, not with some later collection of cycles."""
    gc.disable()
    try:
        bank = tiny_model.remember(prose(60))
        known = weakref.ref(bank)
        answer = tiny_model.ask(bank, "who came again")
        del bank
        assert known() is None and answer.trace
    finally:
        gc.enable()


def test_removing_an_unknown_document_removes_nothing(tiny_model, prose):
    bank = tiny_model.remember(documents_of(prose, 0, 1))
    with pytest.raises(InputError, match="another: expected a document of the bank"):
        bank.remove(["document 0", "another"])
    assert len(bank.documents) == 2


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([Document("a", "x."), Document("a", "y.")], "expected names that differ, got a twice"),
        ([Document("a", "x."), Document("b", " \n")], "b: expected text, got an empty document"),
        ([Document("", "x.")], "document name: expected 1 to 4096 characters, got 0"),
        ([Document("a", "x \udc80.")], "a: expected Unicode text, got half a character at 2"),
    ],
)
def test_bad_documents_add_nothing(tiny_model, prose, documents, message):
    bank = tiny_model.remember(documents_of(prose, 0))
    with pytest.raises(InputError) as error:
        bank.add(documents)
    assert message in str(error.value)
    assert len(bank.documents) == 1


def test_an_interrupted_add_leaves_the_bank_as_it_was(tiny_model, prose):
    bank = tiny_model.remember(documents_of(prose, 0))
    used = bank.pages.used

    def interrupt(progress):
        if progress.tokens:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bank.add(documents_of(prose, 1), interrupt)
    assert len(bank.documents) == 1 and bank.pages.used == used
    assert not torch.cat([bank.pages.bytes()[0][page] for page in bank.pages.free]).any()


def test_pages_elsewhere_are_copied_when_asked_for():
    """The path of pages kept in the CPU's memory for a model on an accelerator."""
    layout = PageLayout(2, 1, 8, "int8")
    pool = PagePool(layout, torch.device("cpu"), torch.device("meta"))
    source = PagePool(layout, torch.device("cpu"))
    source.allocate(3)
    for piece in source.bytes():
        piece.random_(0, 255)
    taken = pool.allocate(3)
    pool.write(taken[::-1], source)
    for piece, original in zip(pool.bytes(), source.bytes(), strict=True):
        assert torch.equal(piece[list(taken[::-1])], original)
    kv, scale, places = pool.bring(taken[1:])
    assert kv.shape == (2, *layout.shape) and kv.device.type == "meta"
    assert scale.shape == (2, *layout.shape[:-1]) and list(places) == [0, 1]
    assert pool.bytes_read == 2 * layout.page_bytes


@pytest.mark.parametrize("options", [{"tier": "gpu"}, {"tier": "disk"}, {"tier": "tape"}])
def test_tiers_that_cannot_be(tiny_model, prose, options):
    with pytest.raises(BankError, match="tier: expected"):
        tiny_model.remember(prose(20), **options)


def test_unknown_dtype_is_refused(tiny_model, prose):
    with pytest.raises(BankError, match="bank dtype: expected one of float32, .* got 'int4'"):
        tiny_model.remember(prose(20), bank_dtype="int4")


def test_pages_of_a_text():
    memory = MemoryConfig(window=512, chunk=1024, ratio=4)  # four pages a chunk
    assert [pages_of(tokens, memory) for tokens in (0, 1, 256, 257, 1024, 3000)] == [
        *(0, 1, 1, 2, 4, 12)
    ]
    # With a margin a chunk holds less of the text, and takes pages for both.
    memory = MemoryConfig(window=512, chunk=1024, ratio=4, margin=8)
    assert [pages_of(tokens, memory) for tokens in (0, 1, 248, 249, 1016, 1017)] == [
        *(0, 1, 1, 2, 4, 5)
    ]


def test_a_margin_is_blank_text_behind_every_chunk(tiny_model, prose):
    """The memory is that of the chunks' tokens and the margin, and the text is covered once."""
    model, text = tiny_model.limited(margin=6), prose(60)
    bank = model.remember(text)
    assert len(bank) > 2 and bank.tokens == len(model.tokenizer.encode(text))
    assert [chunk.start for chunk in bank.chunks[1:]] == [chunk.stop for chunk in bank.chunks[:-1]]
    blank = (model.tokenizer.encode("\n\n") * 6)[:6]
    pieces = cut_document(model, Document("text", text))
    for index, (chunk, piece) in enumerate(zip(bank.chunks, pieces, strict=True)):
        assert chunk.tokens == len(piece.ids) <= model.memory.chunk - 6
        assert chunk.memory_tokens == -(-(chunk.tokens + 6) // model.memory.ratio)
        ids = [*piece.ids, *blank]
        padding = -len(ids) % model.memory.ratio
        sink = TensorSink(model.decoder.config.num_hidden_layers)
        with torch.inference_mode():
            model.compressor.run(
                torch.tensor([ids + [0] * padding]),
                sink,
                ratio=model.memory.ratio,
                window=model.memory.window,
                mask=torch.arange(len(ids) + padding)[None] < len(ids),
            )
        expected = torch.stack([memory[0] for memory in sink.memory()])
        torch.testing.assert_close(read_back(bank, index), expected)
    assert isinstance(model.ask(bank, "who came again").text, str)
    with pytest.raises(BankMismatchError, match="expected a bank of margin 0 .* got margin 6"):
        tiny_model.ask(bank, "who came again")
    with pytest.raises(MemoryConfigError, match="margin: expected 0 to .* got -1"):
        tiny_model.limited(margin=-1)
