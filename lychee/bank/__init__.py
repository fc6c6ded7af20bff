# SPDX-License-Identifier: Apache-2.0
"""Memory banks: compressed memory of documents, in memory and on disk.

pages, tables, pieces and memory_bank hold a bank in memory; manifest, segments and folder are the
format on disk and its atomic changes; build, save, compaction, stored_bank and verify work on it.
"""

from lychee.bank.build import BankBuilder
from lychee.bank.build_progress import BuildProgress, BuildReport
from lychee.bank.folder import is_bank
from lychee.bank.identity import ModelIdentity
from lychee.bank.memory_bank import Chunk, MemoryBank
from lychee.bank.pages import DTYPES, PAGE_TOKENS, TIERS, PagePool, PageTable, page_bytes
from lychee.bank.pieces import Document, pages_of
from lychee.bank.stored_bank import StoredBank
from lychee.bank.verify import verify_bank

__all__ = [
    "DTYPES",
    "PAGE_TOKENS",
    "TIERS",
    "BankBuilder",
    "BuildProgress",
    "BuildReport",
    "Chunk",
    "Document",
    "MemoryBank",
    "ModelIdentity",
    "PagePool",
    "PageTable",
    "StoredBank",
    "is_bank",
    "page_bytes",
    "pages_of",
    "verify_bank",
]
