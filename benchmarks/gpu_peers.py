# SPDX-License-Identifier: Apache-2.0
"""Peers that exist on a GPU only, beside those of peers.py: the attention kernels that PyTorch and
FlashInfer bring, and the project's own Triton kernels."""

from functools import cache

import peers
import shapes
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

import lychee_kernels as lk
from lychee_kernels import triton


def last_rows(q, keys):
    """Every query sees the pages and the segment up to its own place; None for one query."""
    return None if q.shape[2] == 1 else causal_lower_right(q.shape[2], keys.shape[2])


def sdpa_flash(q, keys, values, mask):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return peers.sdpa(q, keys, values, last_rows(q, keys))


def sdpa_cudnn(q, keys, values, mask):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return peers.sdpa(q, keys, values, last_rows(q, keys))


@cache
def compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def flex_mask(queries, keys, device):
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b, h, t, j):
        return j <= keys - queries + t

    return create_block_mask(seen, None, None, queries, keys, device=device)


def flex(q, keys, values, mask):
    """FlexAttention on ready keys and values."""
    queries, count = q.shape[2], keys.shape[2]
    block_mask = None if queries == 1 else flex_mask(queries, count, q.device)
    return compiled_flex_attention()(q, keys, values, block_mask=block_mask, enable_gqa=True)


def flashinfer_decode(wrapper, q, cache):
    return wrapper.run(q, cache)[:, :, None]


def flashinfer_arguments(ours: list[dict]) -> list[dict]:
    """FlashInfer's paged decoding over an equal cache without rotation, planned once."""
    import flashinfer

    first = ours[0]
    q, kv = first["q"], first["kv"]
    batch, count = first["page_table"].shape
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
    indptr = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * count
    wrapper.plan(
        indptr, first["page_table"].flatten(), first["page_len"][:, -1].contiguous(), q.shape[1],
        kv.shape[2], kv.shape[5], kv.shape[4], q_data_type=q.dtype, kv_data_type=kv.dtype,
    )  # fmt: skip
    return [
        {
            "wrapper": wrapper,
            "q": q[:, :, 0].contiguous(),
            # keys before values, then heads: [pages, 2, Hkv, P, D]
            "cache": arguments["kv"][:, arguments["layer"]].transpose(1, 2).contiguous(),
        }
        for arguments in ours
    ]


def triton_attention(
    q, k, v, kv, kv_scale, layer, page_table, page_len, page_base, num_pages, cos, sin, rope_mode
):
    return triton.call(
        "memory_attention", q, k, v, kv, kv_scale, layer, page_table, page_len, page_base,
        num_pages, None, cos, sin, int(rope_mode == "affine"), 1, q.shape[-1] ** -0.5,
    )  # fmt: skip


def triton_compress_pack(q, k, v, cos, sin, kv, kv_scale, page_table, slot0, batch):
    rotated = triton.call(
        "compress_pack_", q, k, v, cos, sin, kv, kv_scale, page_table, slot0, batch, shapes.RATIO,
        0, None, None, 0,
    )  # fmt: skip
    return *rotated, kv, kv_scale


def triton_gather_chunks(
    kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin, out_dtype
):
    return triton.call(
        "gather_chunks", kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin, 0,
        kv.shape[1], 1, out_dtype,
    )  # fmt: skip


def triton_select_chunks(**arguments):
    return lk.ChunkSelection(*triton.call("select_chunks", *arguments.values()))


# Called with our arguments, and returning what our op returns.
TRITON = {
    "memory_attention": triton_attention,
    "compress_pack": triton_compress_pack,
    "gather_chunks": triton_gather_chunks,
    "select_chunks": triton_select_chunks,
}
