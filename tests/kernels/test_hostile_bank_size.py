# SPDX-License-Identifier: Apache-2.0
"""A bank of more than 2^31 elements, in a sparse file: offsets must be 64 bits wide everywhere."""

import pytest
import torch

from lychee_kernels import compress_pack_, memory_attention, rope_tables, write_memory_

PAGE = (1, 1, 2, 64, 128)
PAGES = 2**31 // (2 * 64 * 128) + 3


@pytest.fixture
def large_bank(tmp_path):
    path, size = tmp_path / "bank", PAGES * 2 * 64 * 128
    with open(path, "wb") as file:
        file.truncate(size)
    if path.stat().st_blocks * 512 > 2**20:
        pytest.skip("this file system stores the holes of a sparse file")
    try:
        bank = torch.from_file(str(path), shared=True, size=size, dtype=torch.int8)
    except RuntimeError as error:
        pytest.skip(f"cannot map {size} bytes: {error}")
    assert bank.numel() > 2**31
    yield bank.view(PAGES, *PAGE), path
    assert path.stat().st_blocks * 512 < 2**22, "something was written far outside the page"


def test_last_page_of_a_large_bank_is_written_and_read(large_bank):
    kv, _ = large_bank
    kv_scale = torch.zeros(PAGES, *PAGE[:-1])
    small, small_scale = torch.zeros(1, *PAGE, dtype=torch.int8), torch.zeros(1, *PAGE[:-1])
    q, k, v = torch.randn(3, 128, 1, 128)
    tables = rope_tables(128, 100.0 ** -(torch.arange(0, 128, 2) / 128))
    slot0 = torch.zeros(1, dtype=torch.int32)
    last, first = torch.tensor([[PAGES - 1]]).int(), torch.tensor([[0]]).int()
    results = []
    for bank, scale, table in ((kv, kv_scale, last), (small, small_scale, first)):
        compress_pack_(
            q, k, v, *tables, bank, scale, table, slot0, batch=1, ratio=3, layer=0
        )  # fmt: skip
        memory = k[:32], v[:32]
        write_memory_(*memory, bank, scale, table, slot0 + 32, batch=1, layer=0)
        query = q[:2].transpose(0, 1)[None]
        length, count = torch.tensor([[64]]).int(), torch.tensor([1]).int()
        out, _ = memory_attention(
            query, query[:, :, :0], query[:, :, :0], kv=bank, kv_scale=scale, page_table=table,
            page_len=length, page_base=length - 64, num_pages=count, cos=tables[0], sin=tables[1],
            rope_mode="affine", query_stride=0,
        )  # fmt: skip
        results.append(out)
    assert torch.equal(kv[-1], small[0]) and torch.equal(kv_scale[-1], small_scale[0])
    assert small.any(3).all()
    assert torch.equal(*results)
    # where 32-bit offsets would have wrapped to
    assert not kv[:4].any() and not kv_scale[:4].any()
