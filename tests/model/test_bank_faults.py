# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile banks: one clear error, nothing lost, nothing elsewhere."""

import errno
import json
import os
import shutil

import pytest
from bank_contents import build_bank, documents_of, litter

from lychee.bank import BankBuilder, Document, MemoryBank, verify_bank
from lychee.bank.folder import BankWriter
from lychee.bank.manifest import checksum
from lychee.errors import BankError, InputError


@pytest.fixture
def bank_path(sound_bank, tmp_path):
    return shutil.copytree(sound_bank, tmp_path / "bank")


def first_segment(path):
    [sha256, *_] = MemoryBank.open(path).manifest.segments
    return path / "segments" / f"{sha256}.safetensors"


def edit(path, change):
    """Let `change` edit the manifest's body; the checksum is made to fit."""
    file = path / "manifest.json"
    whole = json.loads(file.read_text())
    change(whole["body"])
    file.write_text(json.dumps(whole | {"checksum": checksum(whole["body"])}))


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_truncated_segment(tiny_model, bank_path):
    path = first_segment(bank_path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(BankError, match=f"{path.name}: expected .* bytes, got .*restore") as error:
        MemoryBank.open(bank_path, model=tiny_model)
    assert "\n" not in str(error.value)
    [problem] = verify_bank(bank_path)
    assert path.name in problem


@pytest.mark.parametrize("part", ["header", "kv", "scale", "text"])
def test_one_flipped_bit_is_found(bank_path, part):
    path = first_segment(bank_path)
    bank = MemoryBank.open(bank_path)
    [segment, *_] = bank.pages.segments
    sizes = {"kv": segment.kv.numel(), "scale": segment.scale.numel(), "text": len(segment.text)}
    ends = {"text": path.stat().st_size}
    ends["scale"] = ends["text"] - sizes["text"]
    ends["kv"] = ends["scale"] - sizes["scale"]
    ends["header"] = 200
    assert verify_bank(bank_path) == []
    bank.verify()
    flip(path, ends[part] - 7)
    problems = verify_bank(bank_path)
    assert any(path.name in problem for problem in problems)
    assert len(problems) == (2 if part == "text" else 1), "a damaged text names its document"
    with pytest.raises(BankError):
        MemoryBank.open(bank_path).verify()


def test_missing_segment(tiny_model, bank_path):
    path = first_segment(bank_path)
    path.unlink()
    with pytest.raises(BankError, match=f"{path.name}: expected a segment of the bank, got none"):
        MemoryBank.open(bank_path)
    [problem] = verify_bank(bank_path)
    assert path.name in problem
    with pytest.raises(BankError, match="expected a segment of the bank, got none"):
        BankBuilder(tiny_model, bank_path, resume=True)


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_flipped_bit_in_the_manifest(bank_path, place):
    file = bank_path / "manifest.json"
    size = file.stat().st_size
    flip(file, {"first": 0, "middle": size // 2, "last": size - 3}[place])
    for refused in (MemoryBank.open, verify_bank, BankWriter):
        with pytest.raises(BankError, match=r"manifest\.json: expected"):
            refused(bank_path)


def test_manifest_of_another_version(bank_path):
    file = bank_path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 2}))
    with pytest.raises(BankError, match="expected format version 1, got 2; read it with the rel"):
        MemoryBank.open(bank_path)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[" * 100_000, b"\xff\xfe", b'{"format": 1e999}', b"1" * 10_000]
)
def test_manifests_that_are_none(bank_path, content):
    (bank_path / "manifest.json").write_bytes(content)
    with pytest.raises(BankError, match=r"manifest\.json: expected .*restore it from a copy"):
        MemoryBank.open(bank_path)


HOSTILE = {
    "path outside": lambda body: body["segments"][0].update(sha256="../../../../etc/passwd"),
    "absolute path": lambda body: body["segments"][0].update(sha256="/etc/passwd"),
    "huge segment": lambda body: body["segments"][0].update(size=2**60, pages=2**31 - 1),
    "negative pages": lambda body: body["segments"][0].update(pages=-1),
    "pages that are no number": lambda body: body["segments"][0].update(pages=True),
    "twice one segment": lambda body: body["segments"].append(body["segments"][0]),
    "page outside": lambda body: body["documents"][0]["chunks"][0].__setitem__(4, 10**6),
    "segment outside": lambda body: body["documents"][0]["chunks"][0].__setitem__(3, -1),
    "chunk beyond the text": lambda body: body["documents"][0]["chunks"][0].__setitem__(1, 10**6),
    "chunk that ends early": lambda body: body["documents"][0]["chunks"][1].__setitem__(1, 0),
    "too many tokens": lambda body: body["documents"][0]["chunks"][0].__setitem__(2, 10**9),
    "text outside": lambda body: body["documents"][0]["text"].__setitem__(1, 10**6),
    "more characters than bytes": lambda body: body["documents"][0].update(characters=10**9),
    "no chunks": lambda body: body["documents"][0].update(chunks=[]),
    "one name twice": lambda body: body["documents"].append(body["documents"][0]),
    "nameless": lambda body: body["documents"][0].update(name=""),
    "huge layout": lambda body: body["layout"].update(layers=2**40),
    "layout of another size": lambda body: body["layout"].update(layers=1),
    "unknown dtype": lambda body: body["layout"].update(dtype="int4"),
    "other pages": lambda body: body["layout"].update(page_tokens=1),
    "ratio 0": lambda body: body["memory"].update(ratio=0),
    "ratio that divides nothing": lambda body: body["memory"].update(ratio=3),
    "surplus field": lambda body: body.update(script="rm"),
    "missing field": lambda body: body.pop("unfinished"),
    "text for a list": lambda body: body.update(documents="none"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests(bank_path, name):
    edit(bank_path, HOSTILE[name])
    with pytest.raises(BankError) as error:
        MemoryBank.open(bank_path)
    assert "expected" in str(error.value) and "root:" not in str(error.value)


def test_links_are_not_followed(tiny_model, bank_path, tmp_path, prose):
    """Neither read nor written through: a bank from elsewhere could point anywhere."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("precious")
    path = first_segment(bank_path)
    shutil.move(path, precious / "segment")
    path.symlink_to(precious / "segment")
    with pytest.raises(BankError, match="expected an ordinary file, got a link"):
        MemoryBank.open(bank_path)
    shutil.rmtree(bank_path)
    bank_path.mkdir()
    (bank_path / "segments").symlink_to(precious)
    with pytest.raises(BankError, match="expected a folder, got a link"):
        BankBuilder(tiny_model, bank_path)
    (bank_path / "segments").unlink()
    (bank_path / "lock").unlink()
    (bank_path / "lock").symlink_to(precious / "file")
    with pytest.raises(BankError, match="lock: expected a writable lock"):
        BankBuilder(tiny_model, bank_path)
    (bank_path / "lock").unlink()
    for name in ("manifest.json.part", "segments/segment.part"):
        (bank_path / name).parent.mkdir(exist_ok=True)
        (bank_path / name).symlink_to(precious / "file")
    build_bank(tiny_model, bank_path, documents_of(prose, 0))
    assert (precious / "file").read_text() == "precious"
    assert verify_bank(bank_path) == [] and litter(bank_path) == set()


def test_a_manifest_that_never_ends(bank_path):
    (bank_path / "manifest.json").unlink()
    os.mkfifo(bank_path / "manifest.json")
    with pytest.raises(BankError, match=r"manifest\.json: expected an ordinary file"):
        MemoryBank.open(bank_path)


def test_a_segment_that_may_not_be_read(bank_path, monkeypatch):
    """Through a stand-in for the system's refusal, which root never meets."""
    path, refused = first_segment(bank_path), os.open

    def refuse(name, *arguments):
        if name == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(name))
        return refused(name, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(BankError, match=f"{path.name}: expected a readable file, got: Permission"):
        MemoryBank.open(bank_path)
    [problem] = verify_bank(bank_path)
    assert path.name in problem


def test_text_that_is_no_utf8(bank_path):
    """With hashes made to fit, so that only decoding can find it."""
    bank = MemoryBank.open(bank_path)
    document = bank.documents[0]
    path = bank_path / "segments" / f"{document.place.segment}.safetensors"
    data = bytearray(path.read_bytes())
    data[data.index(document.text[:20].encode())] = 0xFF
    path.write_bytes(data)
    with pytest.raises(BankError, match="document 0: expected UTF-8 text .* got byte 0xff at 0"):
        _ = MemoryBank.open(bank_path).documents[0].text
    assert any("document 0" in problem for problem in verify_bank(bank_path))


def test_bad_documents_stop_a_build_before_it_starts(tiny_model, tmp_path, prose):
    good = documents_of(prose, 0)
    with BankBuilder(tiny_model, tmp_path) as builder:
        with pytest.raises(InputError, match="empty: expected text, got an empty document"):
            builder.add([*good, Document("empty", " ")])
        builder.add(good)
    assert len(MemoryBank.open(tmp_path).documents) == 1


def test_no_bank_at_all(tiny_model, tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        for refused in (MemoryBank.open, verify_bank):
            with pytest.raises(BankError, match="expected a bank, got .*lychee build"):
                refused(path)
    assert not any(tmp_path.iterdir())


def test_a_bank_that_went_away_is_not_made_anew(tiny_model, bank_path, prose):
    bank = MemoryBank.open(bank_path, model=tiny_model)
    shutil.rmtree(bank_path)
    for change in (lambda: bank.add(documents_of(prose, 5)), lambda: bank.remove("document 0")):
        with pytest.raises(BankError, match="expected"):
            change()
    assert not bank_path.exists()
