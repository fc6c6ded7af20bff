# SPDX-License-Identifier: Apache-2.0
"""What the tests of banks build, and how they compare what banks hold."""

from contextlib import contextmanager

import pytest
import torch

from lychee.bank import BankBuilder, Document, MemoryBank, build


def documents_of(prose, *seeds, words=60):
    return [Document(f"document {seed}", prose(words, seed=seed)) for seed in seeds]


def read_back(bank, chunk):
    """Keys and values [L, Hkv, 2, memory tokens, D] of a chunk, float32, scales applied."""
    table = bank.page_table([[chunk]])
    kept = []
    for page, used in zip(table.table[0].tolist(), table.length[0].tolist(), strict=True):
        values = table.kv[page].float()
        if table.scale is not None:
            values = values * table.scale[page][..., None]
        kept.append(values[:, :, :, :used])
    return torch.cat(kept, dim=3)


def assert_same_memory(bank, other):
    """Two banks hold the same documents in the same order with the same pages, bit for bit."""
    assert [(d.name, d.text) for d in bank.documents] == [(d.name, d.text) for d in other.documents]
    assert [chunk[:5] for chunk in bank.chunks] == [chunk[:5] for chunk in other.chunks]
    for index in range(len(bank)):
        assert torch.equal(read_back(bank, index), read_back(other, index)), index


def build_bank(model, path, documents, **options):
    with BankBuilder(model, path, **options) as builder:
        return builder.add(documents)


@contextmanager
def many_commits(batch_tokens=64):
    """Builds commit after every few chunks, as long ones do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "BATCH_TOKENS", batch_tokens)
        patch.setattr(build, "COMMIT_SECONDS", 0)
        yield


def litter(path):
    """Files in a bank's folder that its manifest does not name."""
    manifest = MemoryBank.open(path).manifest
    named = {f"segments/{sha256}.safetensors" for sha256 in manifest.segments}
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    return files - named - {"manifest.json", "lock"}
