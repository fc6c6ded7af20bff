# SPDX-License-Identifier: Apache-2.0
"""Full disks: one clear error, nothing lost, and with room again the same call goes on."""

import os
import resource
import shutil
import subprocess

import pytest
from bank_contents import build_bank, documents_of, litter

from lychee.bank import MemoryBank, verify_bank
from lychee.errors import BankError

ADVICE = "what was committed before is whole; make room"


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_limit_on_the_size_of_files(tiny_model, sound_bank, tmp_path, prose, share):
    """Where no disk can be mounted this stands in for one: writes stop part of the way."""
    bank_path = shutil.copytree(sound_bank, tmp_path / "bank")
    before = MemoryBank.open(bank_path)
    extra = documents_of(prose, 7, 8)
    whole = shutil.copytree(bank_path, bank_path.parent / "whole")
    build_bank(tiny_model, whole, extra, resume=True)
    largest = max(s.size for s in MemoryBank.open(whole).manifest.segments.values())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * largest), limits[1]))
        with pytest.raises(BankError, match=ADVICE):
            build_bank(tiny_model, bank_path, extra, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert verify_bank(bank_path) == [] and litter(bank_path) == set()
    assert MemoryBank.open(bank_path).manifest == before.manifest
    report = build_bank(tiny_model, bank_path, extra, resume=True)
    assert report.added == tuple(document.name for document in extra)
    assert verify_bank(bank_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "lychee-test", str(path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    yield path
    # lazily: a bank that is still open keeps its files mapped
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def free_bytes(path):
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def names_in(path):
    return [document.name for document in MemoryBank.open(path).documents]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_a_small_disk(tiny_model, sound_bank, small_disk, prose, share):
    """Left free is a share of what adding takes."""
    extra, first = documents_of(prose, 7, 8, 9), names_in(sound_bank)
    path = small_disk / "bank"

    def add():
        build_bank(tiny_model, path, extra, resume=True)

    def remove():
        MemoryBank.open(path).remove(first[:1])

    shutil.copytree(sound_bank, path)
    room = free_bytes(small_disk)
    add()
    needed = room - free_bytes(small_disk)
    shutil.rmtree(path)
    shutil.copytree(sound_bank, path)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(free_bytes(small_disk) - int(share * needed)))
    for change in (add,) if share else (add, remove):
        with pytest.raises(BankError, match="got: No space left on device") as error:
            change()
        assert ADVICE in str(error.value)
        assert verify_bank(path) == [] and litter(path) == set() and names_in(path) == first
    filler.unlink()
    add()
    remove()
    assert verify_bank(path) == [] and litter(path) == set()
    assert names_in(path) == [*first[1:], *(document.name for document in extra)]
