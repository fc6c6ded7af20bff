# SPDX-License-Identifier: Apache-2.0
"""Builds that are stopped and go on, their progress, and who may read or write meanwhile."""

import json
import multiprocessing
import os
import subprocess
import sys

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

from lychee.bank import BankBuilder, Document, MemoryBank, verify_bank
from lychee.bank.lock import WriterLock
from lychee.errors import BankError, BankLockedError


@pytest.fixture(autouse=True)
def short_runs():
    with many_commits():
        yield


def test_a_build_goes_on_where_it_was_stopped(tiny_model, prose, tmp_path):
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


def test_an_unfinished_document_may_change_or_wait(tiny_model, prose, tmp_path):
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


def test_progress_of_a_build(tiny_model, prose, tmp_path):
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


def test_readers_see_whole_states_while_writers_work(tiny_model, prose, tmp_path):
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
