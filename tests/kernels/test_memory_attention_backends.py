# SPDX-License-Identifier: Apache-2.0
"""memory_attention on every backend: the kernels of a GPU in the emulator, and those of a CPU, against
the float64 reference."""

import dataclasses

import pytest
import torch
from attention_cases import Case, make_inputs, to_double

from lychee_kernels import ref
from lychee_kernels.testing import compare

DECODE = [
    Case("g7_rotated", batch=2, heads=14, dim=128, pages=5, keys=70, rope_mode="affine"),
    Case("g1_small_dim", batch=3, heads=2, dim=64, pages=3, keys=0, rope_mode="affine"),
    Case("g8_holes", batch=1, heads=8, kv_heads=1, dim=64, pages=3, keys=131, holes=True),
    Case("g3_long_pages", heads=3, kv_heads=1, dim=128, pages=2, page_tokens=148, keys=9),
]
DECODE = [dataclasses.replace(case, queries=1) for case in DECODE]
# up to 16 rows (query tokens x heads of a kv head) are decoded together
DECODE += [
    Case("g4_tokens", queries=4, keys=67, dim=64, heads=8, pages=2, rope_mode="affine"),
    Case("g2_strided", queries=3, keys=40, dim=128, pages=3, query_stride=13),
]
PREFILL = [
    Case("prefix", queries=21, keys=90, heads=8, dim=64, pages=3, rope_mode="affine"),
    Case("g7", batch=1, queries=19, keys=19, heads=7, kv_heads=1, dim=128, pages=2),
    Case("holes", queries=40, keys=150, heads=2, dim=64, holes=True, query_stride=3),
    Case("pages_only", batch=1, queries=18, keys=0, kv_heads=4, dim=128, pages=3,
         page_tokens=80, rope_mode="affine"),
]  # fmt: skip
BANKS = [None, torch.int8, torch.float8_e4m3fn]


def plain_attention(q, k, v, options):
    """Gathers the pages in the dtype of q, then multiplies in it, softmax in float32: what a model
    in plain PyTorch does."""
    batch, num_heads, num_queries, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    t, j = torch.arange(num_queries)[:, None], torch.arange(num_keys)
    seen = j <= num_keys - 1 - (num_queries - 1 - t) * options["query_stride"]
    seen = seen.expand(batch, num_queries, num_keys)
    if options.get("valid") is not None:
        valid = options["valid"][:, None]
        seen = seen & valid
        k, v = (x.masked_fill(~valid[..., None], 0.0) for x in (k, v))
    if options.get("kv") is not None:
        names = ("kv", "kv_scale", "page_table", "page_len", "page_base", "num_pages", "cos", "sin")
        page_k, page_v, in_use = ref.gather_chunks(
            *(options[name] for name in names), rope_mode=options["rope_mode"], out_dtype=q.dtype,
            layer_range=(options["layer"], options["layer"] + 1),
        )  # fmt: skip
        k, v = torch.cat((page_k[0], k), 2), torch.cat((page_v[0], v), 2)
        seen = torch.cat((in_use[:, None].expand(-1, num_queries, -1), seen), 2)
    k, v = (x.repeat_interleave(num_heads // num_kv_heads, 1) for x in (k, v))
    scores = (q @ k.mT * head_dim**-0.5).masked_fill(~seen[:, None], -torch.inf).float()
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp()
    return weights.to(q.dtype) @ v, lse


def check(backend, q, k, v, options):
    out, lse = backend.memory_attention(q, k, v, **options)
    double_q, double_k, double_v, double_options = to_double(q, k, v, options)
    exact, exact_lse = ref.memory_attention(double_q, double_k, double_v, **double_options)
    if q.dtype == torch.float32:
        plain, plain_lse = ref.memory_attention(q, k, v, **options)
    else:
        plain, plain_lse = plain_attention(q, k, v, options)
    compare(out, exact, plain)
    compare(lse, exact_lse, plain_lse)
    return out, lse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bank_dtype", BANKS, ids=["same", "int8", "float8"])
@pytest.mark.parametrize("case", DECODE + PREFILL, ids=lambda case: case.name)
def test_16_bit_attention_matches_reference(backend, case, bank_dtype, dtype):
    if bank_dtype is not None and not case.pages:
        pytest.skip("no bank")
    check(backend, *make_inputs(dataclasses.replace(case, bank_dtype=bank_dtype), dtype))
