# SPDX-License-Identifier: Apache-2.0
"""Banks on disk: what is written is what is read, by whom, in which order and how often."""

import json
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from test_bank import assert_same_memory, documents_of, read_back

from lychee import LycheeMemory
from lychee.bank import BankBuilder, Document, MemoryBank, build, is_bank, save, verify_bank
from lychee.bank.lock import WriterLock
from lychee.errors import BankError, BankLockedError, BankMismatchError, InputError


@pytest.fixture
def short_runs(monkeypatch):
    """Commits after every few chunks, as a long build has them."""
    monkeypatch.setattr(build, "BATCH_TOKENS", 64)
    monkeypatch.setattr(build, "COMMIT_SECONDS", 0)


def build_bank(model, path, documents, **options):
    with BankBuilder(model, path, **options) as builder:
        return builder.add(documents)


def litter(path):
    """Files in a bank's folder that its manifest does not name."""
    manifest = MemoryBank.open(path).manifest
    named = {f"segments/{sha256}.safetensors" for sha256 in manifest.segments}
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    return files - named - {"manifest.json", "lock"}


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
    bank.add([c])
    assert bank.documents[0].text == c.text and bank.describe()["unfinished"] is None


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


def test_a_build_goes_on_where_it_was_stopped(tiny_model, prose, tmp_path, short_runs):
    documents = documents_of(prose, 0, 1) + documents_of(prose, 2, words=500)
    whole = build_bank(tiny_model, tmp_path / "whole", documents)

    def stop(progress):
        if progress.tokens > 0.7 * whole.tokens:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), BankBuilder(tiny_model, tmp_path / "bank") as builder:
        builder.add(documents, stop)
    stopped = MemoryBank.open(tmp_path / "bank")
    assert stopped.describe()["unfinished"] == "document 2"
    assert [d.name for d in stopped.documents] == ["document 0", "document 1"]
    assert verify_bank(tmp_path / "bank") == []
    with pytest.raises(BankError, match="expected no bank yet, got one of 2 documents; --resume"):
        BankBuilder(tiny_model, tmp_path / "bank")
    seen = []
    with BankBuilder(tiny_model, tmp_path / "bank", resume=True) as builder:
        report = builder.add(documents, seen.append)
    assert report.skipped == ("document 0", "document 1") and report.added == ("document 2",)
    assert 0 < report.tokens < 0.4 * whole.tokens, "compressed again what was there"
    assert seen[-1].tokens == seen[-1].tokens_total == whole.tokens
    assert seen[-1].documents == seen[-1].documents_total == 3
    resumed, reference = (MemoryBank.open(tmp_path / name) for name in ("bank", "whole"))
    assert [c[:5] for c in resumed.chunks] == [c[:5] for c in reference.chunks]
    for index in range(len(reference)):
        torch.testing.assert_close(
            read_back(resumed, index), read_back(reference, index), atol=2e-5, rtol=0
        )


def test_an_unfinished_document_may_change_or_wait(tiny_model, prose, tmp_path, short_runs):
    [first, long] = documents_of(prose, 0) + documents_of(prose, 1, words=400)

    def stop(progress):
        if progress.tokens > 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), BankBuilder(tiny_model, tmp_path) as builder:
        builder.add([long], stop)
    assert MemoryBank.open(tmp_path).describe()["unfinished"] == long.name
    # others come first, another interruption, then the old text again, then a new one
    build_bank(tiny_model, tmp_path, [first], resume=True)
    report = build_bank(tiny_model, tmp_path, [first, long], resume=True)
    assert 0 < report.tokens < len(tiny_model.tokenizer.encode(long.text))
    changed = Document(long.name, prose(80, seed=7))
    build_bank(tiny_model, tmp_path, [changed], resume=True)
    bank = MemoryBank.open(tmp_path, model=tiny_model)
    assert [d.text for d in bank.documents] == [first.text, changed.text]
    assert verify_bank(tmp_path) == [] and litter(tmp_path) == set()


def test_progress_of_a_build(tiny_model, prose, tmp_path, short_runs):
    documents = documents_of(prose, *range(6))
    seen = []
    with BankBuilder(tiny_model, tmp_path / "list") as builder:
        report = builder.add(documents, seen.append)
    assert [p.tokens for p in seen] == sorted(p.tokens for p in seen)
    assert all(p.tokens <= p.tokens_total for p in seen)
    middle = next(p for p in seen if 0.3 < p.tokens / report.tokens < 0.7)
    assert 0.5 * report.tokens < middle.tokens_total < 2 * report.tokens
    assert middle.tokens_per_second > 0 and 0 < middle.seconds_left < float("inf")
    assert seen[-1].seconds_left == 0 and seen[-1].documents == 6
    with BankBuilder(tiny_model, tmp_path / "stream") as builder:
        builder.add(iter(documents), seen.append)
    assert seen[-1].documents_total is None
    assert_same_memory(MemoryBank.open(tmp_path / "stream"), MemoryBank.open(tmp_path / "list"))


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


def test_a_second_writer_is_told_who_writes(tiny_model, prose, tmp_path):
    a, b = documents_of(prose, 0, 1)
    build_bank(tiny_model, tmp_path, [a])
    code = "import sys, pathlib; from lychee.bank.lock import WriterLock as Lock; "
    code += "lock = Lock(pathlib.Path(sys.argv[1])); print('held', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == b"held\n"
        bank = MemoryBank.open(tmp_path, model=tiny_model)
        for refused in (lambda: bank.add([b]), lambda: bank.remove(a.name)):
            with pytest.raises(BankLockedError, match=f"got process {owner.pid} on "):
                refused()
        tiny_model.ask(bank, "who")
        # however its owner dies, a lock is free at once
        owner.kill()
        owner.wait()
        assert json.loads((tmp_path / "lock").read_text())["pid"] == owner.pid
    bank.add([b])
    assert [d.name for d in bank.documents] == [a.name, b.name]


def test_readers_see_whole_states_while_writers_work(tiny_model, prose, tmp_path, short_runs):
    """A process reads without pause while another adds, replaces and removes."""
    texts = [documents_of(prose, seed, words=40)[0].text for seed in range(4)]
    build_bank(tiny_model, tmp_path, [Document("fixed", texts[0])])
    context = multiprocessing.get_context("fork")
    stop, results = context.Event(), context.Queue()

    def read():
        torch.set_num_threads(1)
        seen, states = [], 0
        try:
            while not stop.is_set():
                bank = MemoryBank.open(tmp_path)
                for index in range(len(bank)):
                    assert torch.isfinite(bank.page_table([[index]]).kv.float()).all()
                    assert bank.text(index)
                state = [(d.name, texts.index(d.text)) for d in bank.documents]
                states += state not in seen
                seen += [state]
            results.put((len(seen), states))
        except BaseException as error:
            results.put(repr(error))
            raise

    reader = context.Process(target=read)
    reader.start()
    for turn in range(6):
        build_bank(tiny_model, tmp_path, [Document("moving", texts[1 + turn % 3])], resume=True)
        if turn % 2:
            MemoryBank.open(tmp_path).remove("moving")
    stop.set()
    result = results.get(timeout=60)
    reader.join()
    assert isinstance(result, tuple), result
    assert result[0] > 3 and result[1] > 1


def test_lock_file_says_who(tmp_path):
    lock = WriterLock(tmp_path / "lock")
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    with pytest.raises(BankLockedError, match=f"process {os.getpid()} on .*, since "):
        WriterLock(tmp_path / "lock")
    lock.release()
    WriterLock(tmp_path / "lock").release()
