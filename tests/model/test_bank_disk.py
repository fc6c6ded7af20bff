# SPDX-License-Identifier: Apache-2.0
"""Banks on disk: what is written is what is read, by whom, in which order and how often."""

import pytest
import torch
from bank_contents import (
    assert_same_memory,
    build_bank,
    documents_of,
    litter,
    many_commits,
    read_back,
)
from safetensors import safe_open

from lychee import LycheeMemory
from lychee.bank import (
    BankBuilder,
    Document,
    MemoryBank,
    is_bank,
    save,
    tables,
    verify_bank,
)
from lychee.bank.manifest import Unfit, read_memory
from lychee.errors import BankError, BankMismatchError, InputError


@pytest.fixture
def short_runs():
    with many_commits():
        yield


@pytest.mark.parametrize("dtype", ["auto", "float16", "int8", "e4m3"])
def test_saved_and_built_banks_are_the_bank_in_memory(
    tiny_model, prose, tmp_path, dtype, short_runs
):
    documents = documents_of(prose, 0, 1, 2) + documents_of(prose, 3, words=400)
    bank = tiny_model.remember(documents, bank_dtype=dtype)
    bank.save(tmp_path / "saved")
    report = build_bank(tiny_model, tmp_path / "built", documents, bank_dtype=dtype)
    assert report.added == tuple(document.name for document in documents)
    assert report.tokens == bank.tokens
    for name in ("saved", "built"):
        assert verify_bank(tmp_path / name) == [] and litter(tmp_path / name) == set()
        stored = MemoryBank.open(tmp_path / name, model=tiny_model)
        assert stored.dtype == bank.dtype and stored.nbytes == bank.nbytes
        assert [stored.text(i) for i in range(len(stored))] == [
            bank.text(i) for i in range(len(bank))
        ]
        for index in range(len(bank)):
            # another batch of chunks rounds differently
            torch.testing.assert_close(
                read_back(stored, index), read_back(bank, index), **rounding_of(dtype)
            )
    assert len(MemoryBank.open(tmp_path / "built").manifest.segments) > 3


def rounding_of(dtype):
    step = {"auto": 0, "float16": 1e-3, "int8": 2 / 127, "e4m3": 1 / 8}[dtype]
    return {"atol": 2e-5 + 4 * step, "rtol": step}


@pytest.mark.parametrize("tier", ["disk", "cpu"])
def test_answers_from_disk_are_those_from_memory(tiny_model, prose, tmp_path, tier, monkeypatch):
    monkeypatch.setattr(save, "SEGMENT_BYTES", 10_000)
    bank = tiny_model.remember(documents_of(prose, 0, 1, 2))
    bank.save(tmp_path / "bank")
    stored = MemoryBank.open(tmp_path / "bank", model=tiny_model, tier=tier)
    assert len(stored.manifest.segments) > 3
    assert_same_memory(stored, bank)
    before = stored.bytes_read
    asked, wanted = (tiny_model.ask(b, "who came again") for b in (stored, bank))
    assert asked.text == wanted.text and asked.trace == wanted.trace
    read = stored.bytes_read - before
    assert (read >= bank.nbytes) if tier == "disk" else (read == 0)


def test_only_pages_asked_for_are_copied(tiny_model, prose, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "SEGMENT_BYTES", 60_000)
    bank = tiny_model.remember(documents_of(prose, 0, 1, 2))
    bank.save(tmp_path / "bank")
    stored = MemoryBank.open(tmp_path / "bank", model=tiny_model)
    page_bytes = stored.pages.layout.page_bytes
    far = stored.page_table([[0], [len(stored) - 1], [0]])
    assert len(far.kv) == 2 and stored.bytes_read == 2 * page_bytes
    near = stored.page_table([[1, 0]])
    [segment] = [s for s in stored.pages.segments if s.kv.data_ptr() == near.kv.data_ptr()]
    assert len(near.kv) == segment.record.pages, "pages of one file are read where they are"
    assert stored.bytes_read == 4 * page_bytes


def test_rows_are_put_together_by_segment(tiny_model, prose, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "SEGMENT_BYTES", 60_000)
    monkeypatch.setattr(tables, "WORTHWHILE_ROWS", 3)
    tiny_model.remember(documents_of(prose, 0, 1, 2)).save(tmp_path)
    bank = MemoryBank.open(tmp_path, model=tiny_model)
    chunks = [len(bank) - 1, *range(len(bank) - 1)]
    homes = [bank.pages.home(bank.chunks[chunk].pages[0]) for chunk in chunks]
    assert len(set(homes)) > 2
    found = list(bank.chunk_tables(chunks))
    assert sorted(row for rows, _ in found for row in rows) == list(range(len(chunks)))
    mapped = {segment.kv.data_ptr() for segment in bank.pages.segments}
    for rows, table in found:
        enough = homes.count(homes[rows[0]]) >= 3
        assert (table.kv.data_ptr() in mapped) == (enough or len({homes[r] for r in rows}) == 1)
        for place, row in enumerate(rows):
            alone = bank.page_table([[chunks[row]]])
            count = int(alone.count)
            assert torch.equal(table.length[place, :count], alone.length[0])
            pages, wanted = (
                t.kv[t.table[i, :count].long()] for t, i in ((table, place), (alone, 0))
            )
            assert torch.equal(pages, wanted)


def test_segments_are_safetensors(tiny_model, prose, tmp_path):
    bank = tiny_model.remember(documents_of(prose, 0), bank_dtype="e4m3")
    bank.save(tmp_path)
    [path] = (tmp_path / "segments").iterdir()
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"kv", "scale", "text"}
        kv, scale = file.get_tensor("kv"), file.get_tensor("scale")
        assert bytes(file.get_tensor("text").numpy()).decode() == bank.documents[0].text
    order = [page for chunk in bank.chunks for page in chunk.pages]
    assert torch.equal(kv.view(torch.uint8), bank.pages.kv.view(torch.uint8)[order])
    assert torch.equal(scale, bank.pages.scale[order])


def test_add_replace_remove(tiny_model, prose, tmp_path):
    a, b, c, d = documents_of(prose, 0, 1, 2, 3)
    build_bank(tiny_model, tmp_path, [a, b, c])
    bank = MemoryBank.open(tmp_path, model=tiny_model)
    changed = Document(b.name, d.text)
    report = bank.add([changed, a])
    assert (report.replaced, report.skipped, report.added) == ((b.name,), (a.name,), ())
    assert [document.name for document in bank.documents] == [a.name, b.name, c.name]
    assert bank.documents[1].text == d.text
    MemoryBank.open(tmp_path).remove(c.name)
    assert len(bank.documents) == 3, "an open bank keeps its state"
    bank.refresh()
    assert [document.name for document in bank.documents] == [a.name, b.name]
    content = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert a.text.encode() in content and d.text.encode() in content
    assert c.text.encode() not in content and b.text.encode() not in content
    with pytest.raises(InputError, match="document 2: expected a document of the bank"):
        bank.remove([a.name, c.name])
    assert verify_bank(tmp_path) == [] and litter(tmp_path) == set()
    bank.remove([a.name, b.name])
    assert len(bank) == len(bank.manifest.segments) == 0
    assert isinstance(tiny_model.ask(bank, "who").text, str), "an empty bank answers as well"
    bank.add([c])
    assert bank.documents[0].text == c.text and bank.describe()["unfinished"] is None


def test_damaged_pages_are_not_copied_into_a_sound_segment(tiny_model, prose, tmp_path):
    a, b, c = documents_of(prose, 0, 1, 2)
    build_bank(tiny_model, tmp_path, [a, b])
    (segment,) = tmp_path.glob("segments/*")
    data = bytearray(segment.read_bytes())
    data[len(data) // 3] ^= 1
    segment.chmod(0o644)
    segment.write_bytes(data)
    bank = MemoryBank.open(tmp_path, model=tiny_model)
    for change in (lambda: bank.remove(b.name), lambda: bank.add([Document(b.name, c.text)])):
        with pytest.raises(BankError, match=f"{segment.name}: expected content of SHA-256"):
            change()
        assert "expected content of SHA-256" in verify_bank(tmp_path)[0]
        assert segment.read_bytes() == data


def test_a_folder_with_another_manifest_is_no_bank(tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "my app"}')
    assert not is_bank(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "lychee-bank", "version":')
    assert is_bank(tmp_path)
    (tmp_path / "manifest.json").write_text("damaged")
    (tmp_path / "segments").mkdir()
    assert is_bank(tmp_path)


def test_equal_texts_share_a_segment(tiny_model, prose, tmp_path, short_runs):
    text = prose(60)
    twins = [Document("one", text), Document("other", text)]
    for twin in twins:
        build_bank(tiny_model, tmp_path, [twin], resume=True)
    bank = MemoryBank.open(tmp_path)
    segments = len(bank.manifest.segments)
    bank.remove("one")
    assert len(bank.manifest.segments) == segments
    assert bank.documents[0].text == text and verify_bank(tmp_path) == []


def test_a_bank_of_another_model_is_refused_by_name(tiny_model, tiny_config, prose, tmp_path):
    tiny_model.save_pretrained(tmp_path / "mine")
    mine = LycheeMemory.from_pretrained(tmp_path / "mine")
    bank = mine.remember(prose(60))
    bank.save(tmp_path / "bank")
    with torch.no_grad():
        before = tiny_model.decoder.model.layers[0].mlp.up_proj.weight.clone()
        tiny_model.decoder.model.layers[0].mlp.up_proj.weight.mul_(1.01)
        tiny_model.save_pretrained(tmp_path / "other")
        tiny_model.decoder.model.layers[0].mlp.up_proj.weight.copy_(before)
    other = LycheeMemory.from_pretrained(tmp_path / "other")
    for refused in (
        lambda: MemoryBank.open(tmp_path / "bank", model=other),
        lambda: MemoryBank.open(tmp_path / "bank").attach(other),
        lambda: other.ask(MemoryBank.open(tmp_path / "bank"), "who"),
        lambda: BankBuilder(other, tmp_path / "bank", resume=True),
        lambda: other.ask(bank, "who"),
    ):
        with pytest.raises(BankMismatchError) as error:
            refused()
        assert all(str(model.identity) in str(error.value) for model in (mine, other))
    assert is_bank(tmp_path / "bank") and verify_bank(tmp_path / "bank") == []
    again = LycheeMemory.from_pretrained(tmp_path / "mine", ratio=2)
    with pytest.raises(BankMismatchError, match="expected a bank of ratio 2 .* got ratio 4"):
        MemoryBank.open(tmp_path / "bank", model=again)


def test_the_fingerprint_is_of_the_weights(tiny_model, tmp_path):
    """Neither the dtype they are loaded as nor limits of the reader count; training does."""
    tiny_model.save_pretrained(tmp_path / "model")
    loaded = LycheeMemory.from_pretrained(tmp_path / "model")
    half = LycheeMemory.from_pretrained(tmp_path / "model", dtype="bfloat16")
    prints = {model.identity.fingerprint for model in (tiny_model, loaded, half)}
    assert len(prints) == 1
    trained = LycheeMemory.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        trained.decoder.model.layers[1].self_attn.lychee_memory_k_proj.weight.add_(1e-3)
    assert trained.identity.fingerprint not in prints


def test_bank_dtype_of_a_bank_is_kept(tiny_model, prose, tmp_path):
    a, b = documents_of(prose, 0, 1)
    build_bank(tiny_model, tmp_path, [a], bank_dtype="int8")
    with pytest.raises(BankError, match="bank dtype: expected int8 as the bank's, got float32"):
        BankBuilder(tiny_model, tmp_path, bank_dtype="float32", resume=True)
    build_bank(tiny_model, tmp_path, [b], resume=True)
    assert MemoryBank.open(tmp_path).dtype == "int8"


def test_save_overwrites_only_on_purpose(tiny_model, prose, tmp_path):
    a, b = (tiny_model.remember(documents_of(prose, seed)) for seed in (0, 1))
    a.save(tmp_path / "bank")
    with pytest.raises(BankError, match="expected no bank yet"):
        b.save(tmp_path / "bank")
    reader = MemoryBank.open(tmp_path / "bank")
    b.save(tmp_path / "bank", overwrite=True)
    assert_same_memory(MemoryBank.open(tmp_path / "bank"), b)
    assert_same_memory(reader, a)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with pytest.raises(BankError, match="an empty folder, got one with diary.txt"):
        a.save(tmp_path / "notes")
    with pytest.raises(BankError, match="expected a writable folder"):
        a.save(tmp_path / "notes" / "diary.txt")
    assert sorted(p.name for p in (tmp_path / "notes").iterdir()) == ["diary.txt"]


def test_banks_from_before_there_was_a_margin():
    stored = {"window": 64, "chunk": 128, "ratio": 4, "param": ["q"], "cut": "sentence"}
    assert read_memory(stored) == read_memory(stored | {"margin": 0})
    assert read_memory(stored | {"margin": 8}).text == 120
    for margin in (-1, 128, 1.5, None):
        with pytest.raises(Unfit, match="margin"):
            read_memory(stored | {"margin": margin})
