# SPDX-License-Identifier: Apache-2.0
"""memory_attention over banks that hold every e4m3 code, NaN included, on every backend."""

import pytest
import torch
from attention_cases import Case, make_inputs
from test_memory_attention_backends import PAGE_NAMES, check


@pytest.mark.parametrize("rope_mode", ["none", "affine"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("queries", [1, 20])
def test_every_float8_code_is_read_and_nan_stays_where_it_belongs(backend, queries, dim, rope_mode):
    backend.leave_out(True)  # test_triton.py has it
    case = Case("codes", batch=1, queries=queries, keys=0, heads=3, kv_heads=1, dim=dim, pages=9,
                bank_dtype=torch.float8_e4m3fn, rope_mode=rope_mode)  # fmt: skip
    q, k, v, options = make_inputs(case, torch.float16)
    codes = torch.arange(254) + (torch.arange(254) >= 127)  # without 0x7f and 0xff, NaN
    kv = torch.stack([codes[torch.randperm(254)][:dim] for _ in range(9 * 3 * 2 * 64)])
    kv = kv.view(9, 3, 1, 2, 64, dim).to(torch.uint8)
    options["kv"], options["kv_scale"] = (
        kv.view(torch.float8_e4m3fn),
        torch.rand(9, 3, 1, 2, 64) / 99,
    )
    options |= {name: options[name].clamp(min=0) for name in PAGE_NAMES}
    options["page_table"] = torch.arange(11).int()[None] % 9
    options["page_len"][:], options["num_pages"][:] = 60, 3
    out, _ = check(backend, q, k, v, options)
    assert out.isfinite().all()
    kv[2, 1, 0, 1, 7, 5], kv[0, 1, 0, 1, 59, dim - 2] = 0x7F, 0xFF
    kv[:, :, :, :, 60:] = 0x7F  # not read
    marked, _ = check(backend, q, k, v, options)
    assert marked[..., [5, dim - 2]].isnan().all() and marked.isnan().sum() == 2 * 3 * queries
    kv[1, 1, 0, 0, 9, dim // 2] = 0xFF
    everywhere, lse = check(backend, q, k, v, options)
    assert everywhere.isnan().all() and lse.isnan().all()
