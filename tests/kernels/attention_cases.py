# SPDX-License-Identifier: Apache-2.0
"""Inputs of the attention and gather tests: banks with ragged pages and hostile tails; and the
comparison with the reference."""

from dataclasses import dataclass

import torch

from lychee_kernels import memory_attention, ref, rope_tables
from lychee_kernels.ref.compress_pack import quantise
from lychee_kernels.testing import compare, poison

QUANTISED = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Case:
    """Shapes of one test; pages is the number of bank pages, 0 for no bank at all."""

    name: str
    batch: int = 2
    queries: int = 5
    keys: int = 9
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    pages: int = 0
    page_tokens: int = 64
    rope_mode: str = "none"
    bank_dtype: torch.dtype | None = None  # None: that of the inputs
    holes: bool = False
    query_stride: int = 1


CASES = [
    Case("one", batch=1, queries=1, keys=1, heads=1, kv_heads=1, dim=8),
    Case("primes", batch=3, queries=7, keys=13, heads=3, kv_heads=1, dim=24, holes=True),
    Case("causal", queries=130, keys=130, heads=8, dim=64),
    Case("cache", queries=3, keys=1100, heads=14, dim=64, holes=True),
    Case("decode", batch=1, queries=1, keys=300, heads=28, kv_heads=4, dim=128, pages=20),
    Case("pages", queries=19, keys=0, dim=40, pages=5, page_tokens=7, rope_mode="affine"),
    Case("prefix", queries=70, keys=70, heads=8, dim=64, pages=4, rope_mode="affine"),
    Case("tiles", queries=37, keys=150, heads=8, dim=96, pages=3, rope_mode="affine", holes=True),
    Case("long_page", queries=9, dim=256, pages=2, page_tokens=150, rope_mode="affine"),
    Case("int8", pages=4, bank_dtype=torch.int8, rope_mode="affine", dim=72),
    Case("long_int8", dim=32, pages=2, page_tokens=150, bank_dtype=torch.int8, rope_mode="affine"),
    Case("float8", pages=4, bank_dtype=torch.float8_e4m3fn, queries=33, query_stride=3, keys=90),
]
BY_NAME = {case.name: case for case in CASES}


def make_inputs(case, dtype=torch.float32):
    """Arguments of memory_attention: q, k, v and a dict of the rest."""
    q = torch.randn(case.batch, case.heads, case.queries, case.dim).to(dtype)
    k, v = torch.randn(2, case.batch, case.kv_heads, case.keys, case.dim).to(dtype)
    options = {"query_stride": case.query_stride}
    if case.holes:
        options["valid"] = torch.rand(case.batch, case.keys) > 0.3
        # a hidden row may hold anything
        hidden = ~options["valid"][:, None, :, None]
        k, v = k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.nan)
    if case.pages:
        options |= make_bank(case, dtype) | make_table(case) | {"rope_mode": case.rope_mode}
        options["layer"] = 1
        mask_bank(options)
    return q, k, v, options


def make_bank(case, dtype):
    rows = torch.randn(case.pages, 3, case.kv_heads, 2, case.page_tokens, case.dim)
    kv, kv_scale = quantise(rows, case.bank_dtype or dtype)
    frequencies = 10000.0 ** -(torch.arange(0, case.dim, 2) / case.dim)
    cos, sin = rope_tables(4096, frequencies)
    return {"kv": kv, "kv_scale": kv_scale, "cos": cos, "sin": sin}


def make_table(case):
    """Tables with shared pages, ragged lengths, and unused entries that must not be followed."""
    max_pages = case.pages + 2
    shape = (case.batch, max_pages)
    table = torch.stack([torch.randperm(max_pages) % case.pages for _ in range(case.batch)])
    length = torch.randint(1, case.page_tokens + 1, shape)
    length[:, 0] = case.page_tokens
    base = torch.randint(0, 4096 - case.page_tokens, shape)
    num_pages = torch.randint(1, max_pages, (case.batch,))
    unused = torch.arange(max_pages) >= num_pages[:, None]
    table[unused], length[unused], base[unused] = -1, 10**6, -(10**6)
    named = {"page_table": table, "page_len": length, "page_base": base, "num_pages": num_pages}
    return {name: tensor.int() for name, tensor in named.items()}


def mask_bank(options):
    """Makes every bank row that no page_len covers NaN (float) or extreme (quantised)."""
    kv, kv_scale = options["kv"], options["kv_scale"]
    covered = torch.zeros(kv.shape[0], kv.shape[4], dtype=torch.bool)
    for b, count in enumerate(options["num_pages"].tolist()):
        for i in range(count):
            covered[options["page_table"][b, i], : options["page_len"][b, i]] = True
    page, offset = (~covered).nonzero(as_tuple=True)
    kv[page, :, :, :, offset] = torch.tensor(127 if kv.dtype == torch.int8 else torch.nan).to(
        kv.dtype
    )
    if kv_scale is not None:
        kv_scale[page, :, :, :, offset] = torch.nan


def strided_views(q, k, v, options):
    """The same arguments inside poisoned tensors: q in a [B, T, Hq, D] projection, k and v at the
    front of a longer cache, the bank in wider rows."""
    dim, kv = q.shape[3], options["kv"]
    projection = poison(torch.empty(*q.transpose(1, 2).shape[:3], dim + 16))
    wide_q = projection[..., 8 : 8 + dim].transpose(1, 2)
    caches = poison(torch.empty(2, *k.shape[:2], k.shape[2] + 30, dim))
    cache_k, cache_v = caches[:, :, :, : k.shape[2]]
    bank = poison(torch.empty(*kv.shape[:-1], dim + 8))[..., :dim]
    for view, tensor in zip((wide_q, cache_k, cache_v, bank), (q, k, v, kv), strict=True):
        view.copy_(tensor)
    return wide_q, cache_k, cache_v, options | {"kv": bank}


def to_double(q, k, v, options):
    """The same arguments for the exact result: float64, float banks included."""
    options = dict(options)
    for name in ("kv", "cos", "sin"):
        tensor = options.get(name)
        if tensor is not None and tensor.dtype not in QUANTISED:
            options[name] = tensor.double()
    return q.double(), k.double(), v.double(), options


def check_forward(q, k, v, options):
    actual = memory_attention(q, k, v, **options)
    exact_q, exact_k, exact_v, exact_options = to_double(q, k, v, options)
    exact, exact_lse = ref.memory_attention(exact_q, exact_k, exact_v, **exact_options)
    baseline, baseline_lse = ref.memory_attention(q, k, v, **options)
    compare(actual[0], exact, baseline)
    compare(actual[1], exact_lse, baseline_lse)


def gradients(function, q, k, v, options, grad):
    """Gradients of q, k, v and a float bank for the output's gradient `grad`."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    options = dict(options)
    bank = options.get("kv")
    if bank is not None and bank.dtype not in QUANTISED:
        options["kv"] = bank.detach().requires_grad_()
        leaves.append(options["kv"])
    out, lse = function(*leaves[:3], **options)
    assert not lse.requires_grad
    return torch.autograd.grad(out, leaves, grad.to(out.dtype))


def check_gradients(q, k, v, options, grad):
    actual = gradients(memory_attention, q, k, v, options, grad)
    exact = gradients(ref.memory_attention, *to_double(q, k, v, options), grad)
    baseline = gradients(ref.memory_attention, q, k, v, options, grad)
    for result in zip(actual, exact, baseline, strict=True):
        compare(*result)


def op_arguments(q, k, v, options):
    """Positional arguments of torch.ops.lychee.memory_attention."""
    names = ("kv", "kv_scale", "layer", "page_table", "page_len", "page_base", "num_pages", "valid",
             "cos", "sin")  # fmt: skip
    rest = [options.get(name, 0 if name == "layer" else None) for name in names]
    mode = 1 if options.get("rope_mode") == "affine" else 0
    return q, k, v, *rest, mode, options["query_stride"], q.shape[-1] ** -0.5
