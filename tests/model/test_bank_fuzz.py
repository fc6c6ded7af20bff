# SPDX-License-Identifier: Apache-2.0
"""Random damage to manifests and segments: a BankError, or a bank that can be read to its end.

LYCHEE_FUZZ=100000 in the environment tries as many cases of each kind.
"""

import copy
import json
import os

import pytest
from bank_contents import build_bank, documents_of, many_commits

from lychee.bank import MemoryBank, verify_bank
from lychee.bank.manifest import checksum, parse_manifest
from lychee.bank.segments import Segment
from lychee.errors import BankError

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

CASES = int(os.environ.get("LYCHEE_FUZZ", 60))
fuzz = hypothesis.settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    derandomize=CASES < 1000,
    suppress_health_check=list(hypothesis.HealthCheck),
)
numbers = st.integers(-3, 300) | st.sampled_from([2**31, 2**53, 2**63, -(2**63), 10**30])
values = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def bank_path(tiny_model, prose, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "bank"
    with many_commits(40):
        build_bank(tiny_model, path, documents_of(prose, 0, 1, words=50), bank_dtype="int8")
    return path


def places_in(value, path=()):
    """Paths of everything in a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places_in(value[key], (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value


def read_to_the_end(path):
    """Everything that a reader may ask for; a BankError is an answer, nothing else is."""
    try:
        bank = MemoryBank.open(path)
        for index, chunk in enumerate(bank.chunks):
            table = bank.page_table([[index]])
            used = table.table[0, : table.count[0]]
            assert ((used >= 0) & (used < len(table.kv))).all()
            assert table.length.sum() == chunk.memory_tokens
            bank.text(index)
        json.dumps(bank.describe())
        verify_bank(path)
    except BankError as error:
        assert "expected" in str(error) and "\n" not in str(error)


def test_manifests_with_one_value_changed(bank_path):
    file = bank_path / "manifest.json"
    sound = file.read_bytes()
    body = json.loads(sound)["body"]
    places = list(places_in(body))

    @fuzz
    @hypothesis.given(st.sampled_from(places), values)
    def check(path, new):
        changed = replaced(body, path, new)
        try:
            whole = {"format": "lychee-bank", "version": 1, "body": changed}
            file.write_text(json.dumps(whole | {"checksum": checksum(changed)}))
        except ValueError:
            hypothesis.reject()
        read_to_the_end(bank_path)

    try:
        check()
    finally:
        file.write_bytes(sound)


def test_manifests_of_any_bytes(bank_path):
    file = bank_path / "manifest.json"
    sound = file.read_bytes()

    @fuzz
    @hypothesis.given(st.integers(0, len(sound)), st.integers(0, 40), st.binary(max_size=40))
    def check(place, cut, new):
        data = sound[:place] + new + sound[place + cut :]
        try:
            parsed = parse_manifest(data, file)
        except BankError:
            return
        assert parsed.to_bytes() == sound, "a change that the checksum missed"

    check()


def test_segments_of_any_bytes(bank_path, tmp_path_factory):
    manifest = MemoryBank.open(bank_path).manifest
    [record, *_] = manifest.segments.values()
    sound = (bank_path / "segments" / f"{record.sha256}.safetensors").read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    file = tmp_path_factory.mktemp("segment") / "segment"

    @fuzz
    @hypothesis.given(st.integers(0, header + 100), st.integers(0, 40), st.binary(max_size=40))
    def check(place, cut, new):
        data = sound[:place] + new + sound[place + cut :]
        file.write_bytes(data)
        try:
            segment = Segment.map(file, manifest.layout, record)
        except BankError:
            return
        assert data[:header] == sound[:header] and len(data) == len(sound)
        assert bytes(segment.text.numpy()) == data[-record.text_bytes :]

    check()
