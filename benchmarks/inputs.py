# SPDX-License-Identifier: Apache-2.0
"""Arguments of an op and its peers for one case: per role, a list of sets to rotate through.

The sets of a list are equal copies, so that every call gives the same result from other memory.
"""

import torch
from machine import cold_bytes
from peers import Recorded, attention, keys_of, sdpa
from shapes import PAGE, RATIO, Case

import lychee_kernels as lk

THETA = 1e6
CHUNK_TOKENS = 1024
DISTINCT_PAGES = 512

Arguments = dict[str, list[dict]]


def rotating(case: Case, arguments: dict, *data: str) -> list[dict]:
    """`arguments`; in a cold case, also copies of its tensors `data`, more than caches can hold."""
    nbytes = sum(arguments[name].nbytes for name in data if arguments[name] is not None)
    copies = [arguments]
    while case.shape.cold and len(copies) * nbytes < cold_bytes():
        copies.append(arguments | {name: clone(arguments[name]) for name in data})
    return copies


def clone(x):
    return None if x is None else x.clone()


def tables(case: Case, positions: int):
    """Halved float32 tables as our ops take them, and full ones in the case's dtype for peers."""
    dim = case.shape.head_dim
    frequencies = THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    halves = lk.rope_tables(positions, frequencies)
    return halves, [torch.cat((half, half), dim=-1).to(case.dtype) for half in halves]


def random_bank(case: Case, pages: int, layers: int, page_tokens: int = PAGE):
    """kv and kv_scale of one random layer, copied to all layers; values have deviation 1.

    Beyond DISTINCT_PAGES pages repeat: drawing a GiB of random numbers takes ten seconds.
    """
    distinct = min(pages, DISTINCT_PAGES)
    shape = (distinct, 1, case.shape.kv_heads, 2, page_tokens, case.shape.head_dim)
    scale = None
    if case.bank_dtype.itemsize == 1:
        scale = 0.5 + torch.rand(shape[:-1])
        if case.bank_dtype == torch.int8:
            kv = torch.randint(-127, 128, shape, dtype=torch.int8)
            scale /= 73
        else:
            kv = torch.randn(shape).to(case.bank_dtype)
    else:
        kv = torch.randn(shape).to(case.bank_dtype)
    page = torch.arange(pages) % distinct
    return (
        None if x is None else x.expand(-1, layers, *x.shape[2:])[page].contiguous()
        for x in (kv, scale)
    )


def shuffled_pages(count: int, batch: int = 1) -> dict:
    """A page table [batch, count] of full pages in random order at consecutive positions."""
    table = torch.randperm(batch * count, dtype=torch.int32).view(batch, count)
    base = torch.arange(count, dtype=torch.int32) * PAGE
    return {
        "page_table": table,
        "page_len": torch.full_like(table, PAGE),
        "page_base": base.expand_as(table).contiguous(),
        "num_pages": torch.full((batch,), count, dtype=torch.int32),
    }


def compress_pack(case: Case) -> Arguments:
    shape = case.shape
    heads = (shape.query_heads, shape.kv_heads, shape.kv_heads)
    text, memory = (
        [torch.randn(shape.batch, shape.rows, h, shape.head_dim).to(case.dtype) for h in heads]
        for _ in range(2)
    )
    is_memory = torch.arange(shape.rows) % (RATIO + 1) == RATIO

    def segment_order(x, memory_x):
        return torch.cat((x[:, ~is_memory].flatten(0, 1), memory_x[:, is_memory].flatten(0, 1)))

    (cos, sin), (full_cos, full_sin) = tables(case, shape.rows)
    pages = shuffled_pages(shape.memory // PAGE, shape.batch)["page_table"]
    kv, kv_scale = random_bank(case, pages.numel(), 1)
    ours = dict(zip("qkv", map(segment_order, text, memory), strict=True)) | {
        "cos": cos,
        "sin": sin,
        "kv": kv,
        "kv_scale": kv_scale,
        "page_table": pages,
        "slot0": torch.zeros(shape.batch, dtype=torch.int32),
        "batch": shape.batch,
    }
    names = ("q", "k", "v", "memory_q", "memory_k", "memory_v")
    eager = dict(zip(names, text + memory, strict=True)) | {
        "is_memory": is_memory,
        "positions": torch.arange(shape.rows).expand(shape.batch, -1),
        "cos": full_cos,
        "sin": full_sin,
        "kv": kv[:, 0].clone(),
        "kv_scale": kv_scale[:, 0].clone(),
        "pages": pages.long(),
    }
    return {"ours": rotating(case, ours, *"qkv"), "eager": rotating(case, eager, *names)}


def gated_mlp(case: Case) -> Arguments:
    rows, hidden, intermediate = case.shape.rows, case.shape.hidden, case.shape.intermediate
    arguments = {
        "x": torch.randn(rows, hidden),
        "norm_weight": 1 + 0.1 * torch.randn(hidden),
        "gate": torch.randn(intermediate, hidden) * hidden**-0.5,
        "up": torch.randn(intermediate, hidden) * hidden**-0.5,
        "down": torch.randn(hidden, intermediate) * intermediate**-0.5,
        "eps": 1e-6,
    }
    ours = arguments | {"scratch": torch.empty(rows, hidden)}
    return {"ours": [ours], "eager": [arguments]}


def linear(case: Case) -> Arguments:
    rows, hidden, outputs = case.shape.rows, case.shape.hidden, case.shape.outputs
    arguments = {
        "x": torch.randn(rows, hidden).to(case.dtype),
        "norm_weight": (1 + 0.1 * torch.randn(hidden)).to(case.dtype),
        "weight": (torch.randn(outputs, hidden) * hidden**-0.5).to(case.dtype),
        "eps": 1e-6,
    }
    ours = arguments | {"out": torch.empty(rows, outputs, dtype=case.dtype)}
    return {name: rotating(case, a, "weight") for name, a in (("ours", ours), ("eager", arguments))}


def select_chunks(case: Case) -> Arguments:
    chunks, pages_per_chunk = case.shape.chunks, CHUNK_TOKENS // PAGE
    arguments = {
        "scores": torch.randn(1, chunks),
        "threshold": 0.5,
        "max_chunks": case.shape.budget,
        "chunk_pages": torch.randperm(chunks * pages_per_chunk, dtype=torch.int32).view(chunks, -1),
        "chunk_tokens": torch.randint(1, CHUNK_TOKENS + 1, (chunks,), dtype=torch.int32),
        "page_tokens": PAGE,
    }
    return {"ours": [arguments], "eager": [arguments]}


def gather_chunks(case: Case) -> Arguments:
    shape = case.shape
    (cos, sin), full = tables(case, shape.tokens)
    selection = shuffled_pages(shape.tokens // PAGE)
    kv, kv_scale = random_bank(case, shape.tokens // PAGE, shape.layers)
    banks = rotating(case, {"kv": kv, "kv_scale": kv_scale}, "kv", "kv_scale")
    ours = selection | {"cos": cos, "sin": sin, "out_dtype": case.dtype}
    eager = {
        "pages": selection["page_table"][0].long(),
        "cos": full[0],
        "sin": full[1],
        "dtype": case.dtype,
    }
    return {"ours": [ours | bank for bank in banks], "eager": [eager | bank for bank in banks]}


def attention_inputs(case: Case) -> Arguments:
    """Decoding and prefill; a cold case reads another layer of the bank in each call."""
    shape = case.shape
    pages = shape.memory // PAGE
    (cos, sin), full = tables(case, shape.memory)
    selection = shuffled_pages(pages, shape.batch)
    kv, kv_scale = random_bank(case, shape.batch * pages, 1)
    layers = -(-cold_bytes() // kv.nbytes) if shape.cold else 1
    kv, kv_scale = (
        None if x is None else x.expand(-1, layers, *x.shape[2:]).contiguous()
        for x in (kv, kv_scale)
    )
    q, k, v = segment(case)
    mask = None
    if shape.segment:
        keys = shape.memory + shape.segment
        mask = torch.full((shape.queries, keys), -torch.inf, dtype=case.dtype)
        mask = mask.triu(shape.memory + 1)
    ours = selection | {"q": q, "k": k, "v": v, "kv": kv, "kv_scale": kv_scale}
    ours |= {"cos": cos, "sin": sin, "rope_mode": "affine"}
    eager = {"q": q, "k": k, "v": v, "pages": selection["page_table"].long()}
    eager |= {"cos": full[0], "sin": full[1], "mask": mask}
    layer = [
        {"kv": kv[:, i], "kv_scale": None if kv_scale is None else kv_scale[:, i]}
        for i in range(layers)
    ]
    keys, values = (
        torch.cat(parts, dim=2)
        for parts in zip(
            keys_of(**layer[0], pages=eager["pages"], cos=full[0], sin=full[1], dtype=case.dtype),
            (k, v),
            strict=True,
        )
    )
    ready = {"q": q, "keys": keys, "values": values, "mask": mask}
    return {
        "ours": [ours | {"layer": i} for i in range(layers)],
        "eager": [eager | one for one in layer],
        "ready": rotating(case, ready, "keys", "values"),
    }


def segment(case: Case):
    """Random q, and k and v of the segment."""
    shape = case.shape
    q = torch.randn(shape.batch, shape.query_heads, shape.queries, shape.head_dim)
    k, v = torch.randn(2, shape.batch, shape.kv_heads, shape.segment, shape.head_dim)
    return (x.to(case.dtype) for x in (q, k, v))


def attention_backward(case: Case) -> Arguments:
    """Forward passes to go back through; memory is one page per batch entry, as in training."""
    shape = case.shape
    memory = shape.memory
    (cos, sin), (full_cos, full_sin) = tables(case, memory)
    kv, _ = random_bank(case, shape.batch, 1, page_tokens=memory)
    q, k, v = segment(case)
    mask = torch.full((shape.queries, memory + shape.segment), -torch.inf, dtype=case.dtype)
    mask = mask.triu(memory + 1)
    table = torch.arange(shape.batch, dtype=torch.int32)[:, None]
    pages = {
        "page_table": table,
        "page_len": torch.full_like(table, memory),
        "page_base": torch.zeros_like(table),
        "num_pages": torch.ones(shape.batch, dtype=torch.int32),
    }
    rotation = {"cos": full_cos, "sin": full_sin}
    keys, values = (
        torch.cat(parts, dim=2)
        for parts in zip(
            keys_of(kv[:, 0], None, table.long(), **rotation, dtype=case.dtype), (k, v), strict=True
        )
    )
    grad = torch.randn_like(q)

    def eager(q, k, v, kv, forward=attention):
        return forward(q, k, v, kv, None, table.long(), full_cos, full_sin, mask)

    def ours(q, k, v, kv, attention=lk.memory_attention):
        out, _ = attention(q, k, v, kv=kv, **pages, cos=cos, sin=sin, rope_mode="affine")
        return out

    def recorded(forward, *inputs, skip=0):
        return [{"recorded": Recorded(forward, inputs), "grad": grad, "skip": skip}]

    compiled = torch.compile(attention, dynamic=False)
    return {
        "ours": recorded(ours, q, k, v, kv),
        "eager": recorded(eager, q, k, v, kv[:, 0]),
        "compile": recorded(lambda *x: eager(*x, forward=compiled), q, k, v, kv[:, 0]),
        "ready": recorded(lambda *x: sdpa(*x, mask), q, keys, values, skip=memory),
    }
