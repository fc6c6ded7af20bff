# SPDX-License-Identifier: Apache-2.0
"""Rewrites segments that hold more than the documents of a bank: nothing removed stays behind."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

import torch

from lychee.bank.folder import BankWriter, segment_path
from lychee.bank.manifest import DocumentRecord, Manifest, TextPlace
from lychee.bank.pieces import pages_of_chunk
from lychee.bank.segments import ADVICE, Segment, hash_file
from lychee.errors import BankError


@dataclass
class Use:
    """What of one segment documents use, and where it went."""

    pages: set[int] = field(default_factory=set)
    texts: set[TextPlace] = field(default_factory=set)
    segment: str | None = None
    page_places: dict[int, int] = field(default_factory=dict)
    text_places: dict[TextPlace, TextPlace] = field(default_factory=dict)


def compact(writer: BankWriter, manifest: Manifest) -> Manifest:
    """The same documents, in segments that hold nothing else; the caller commits the result."""
    uses: defaultdict[str, Use] = defaultdict(Use)
    for record in manifest.records():
        uses[record.text.segment].texts.add(record.text)
        for chunk in record.chunks:
            count = pages_of_chunk(chunk.tokens, manifest.memory)
            uses[chunk.segment].pages.update(range(chunk.page, chunk.page + count))
    segments = {}
    for sha256, segment in manifest.segments.items():
        if sha256 not in uses:
            continue
        use = uses[sha256]
        text_bytes = sum(text.size for text in use.texts)
        if (len(use.pages), text_bytes) != (segment.pages, segment.text_bytes):
            segment = rewrite(writer, manifest, sha256, use)
        segments[segment.sha256] = segment
    documents = tuple(moved(record, uses) for record in manifest.documents)
    rest = manifest.unfinished and moved(manifest.unfinished, uses)
    return replace(manifest, segments=segments, documents=documents, unfinished=rest)


def rewrite(writer: BankWriter, manifest: Manifest, sha256: str, use: Use):
    """A segment of what is used of another; `use` learns where everything is now."""
    layout = manifest.layout
    path = segment_path(writer.path, sha256)
    try:
        source = Segment.map(path, layout, manifest.segments[sha256])
        found = hash_file(path, lambda _: None)
    except FileNotFoundError as error:
        raise BankError(f"{path}: expected a segment of the bank, got none", ADVICE) from error
    if found != sha256:
        # copied, the damage would get a hash that fits it
        raise BankError(f"{path}: expected content of SHA-256 {sha256}, got {found}", ADVICE)
    pages = sorted(use.pages)
    use.page_places = {page: place for place, page in enumerate(pages)}
    text = bytearray()
    places = {}
    for place in sorted(use.texts):
        places[place] = len(text)
        text += source.text[place.start : place.start + place.size].numpy().tobytes()
    index = torch.tensor(pages, dtype=torch.int64)
    record = writer.write_segment(layout, source.kv[index], source.scale[index], bytes(text))
    use.segment = record.sha256
    use.text_places = {
        place: TextPlace(record.sha256, start, place.size) for place, start in places.items()
    }
    return record


def moved(record: DocumentRecord, uses: dict[str, Use]) -> DocumentRecord:
    """A document's record with the places that its parts have now."""
    holder = uses[record.text.segment]
    chunks = []
    for chunk in record.chunks:
        use = uses[chunk.segment]
        if use.segment is not None:
            chunk = chunk._replace(segment=use.segment, page=use.page_places[chunk.page])
        chunks.append(chunk)
    text = holder.text_places.get(record.text, record.text)
    return replace(record, text=text, chunks=tuple(chunks))
