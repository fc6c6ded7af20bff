# SPDX-License-Identifier: Apache-2.0
"""What the ops are compared with: each op put together from ordinary PyTorch calls.

Rotation tables come rounded to the working dtype and, for keys, already looked up by position, as
models do once per pass for all layers. Attention alone also starts from ready data: keys that are
gathered, contiguous, dequantised and rotated.
"""

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F

INT8_LEVEL = 127.0


def rotate(x, cos, sin):
    """x [..., D] with tables [..., D], in the dtype of x."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def compress_pack(
    q, k, v, memory_q, memory_k, memory_v, is_memory, positions, cos, sin, kv, kv_scale, pages
):
    """The released code's way: both projections of every row, one of them discarded.

    q and memory_q [B, n, Hq, D], k, v, memory_k, memory_v [B, n, Hkv, D]; is_memory [n]; positions
    [B, n]; kv [pages, Hkv, 2, P, D] and pages [B, m / P] of one layer.
    """
    choice = is_memory[:, None, None]
    q = torch.where(choice, memory_q, q)
    k = torch.where(choice, memory_k, k)
    v = torch.where(choice, memory_v, v)
    # memory becomes [B, Hkv, 2, m, D]
    memory = torch.stack((k[:, is_memory], v[:, is_memory]), dim=2).permute(0, 3, 2, 1, 4)
    scale = memory.float().abs().amax(-1, keepdim=True) / INT8_LEVEL
    stored = (memory.float() / scale.clamp_min(1e-30)).round().clamp(-INT8_LEVEL, INT8_LEVEL)
    kv[pages] = in_pages(stored, kv.shape[3]).to(kv.dtype)
    kv_scale[pages] = in_pages(scale, kv.shape[3])[..., 0]
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return rotate(q, cos, sin), rotate(k, cos, sin), v, kv, kv_scale


def in_pages(x, page_tokens):
    """[B, Hkv, 2, m, D] -> [B, m / P, Hkv, 2, P, D]."""
    return x.unflatten(3, (-1, page_tokens)).permute(0, 3, 1, 2, 4, 5)


def gated_mlp(x, norm_weight, gate, up, down, eps):
    """Norm, gated feed-forward block and residual of x [rows, hidden]."""
    normed = F.rms_norm(x, norm_weight.shape, norm_weight, eps)
    return x + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)


def linear(x, norm_weight, weight, eps):
    """Projection of x [rows, hidden] behind its norm."""
    return F.linear(F.rms_norm(x, norm_weight.shape, norm_weight, eps), weight)


def select_chunks(scores, threshold, max_chunks, chunk_pages, chunk_tokens, page_tokens):
    """The pages of one row's best chunks, by nonzero and indexing: sizes depend on the data."""
    chunks = (scores[0] >= threshold).nonzero()[:, 0]
    if len(chunks) > max_chunks:
        best = scores[0, chunks].topk(max_chunks).indices
        chunks = chunks[best].sort().values
    tokens = chunk_tokens[chunks]
    base = tokens.cumsum(0) - tokens
    offset = torch.arange(chunk_pages.shape[1], device=scores.device) * page_tokens
    length = (tokens[:, None] - offset).clamp(0, page_tokens)
    used = length > 0
    position = base[:, None] + offset
    return chunk_pages[chunks][used], length[used], position[used], chunks


def gather_chunks(kv, kv_scale, pages, cos, sin, dtype):
    """kv [pages, L, Hkv, 2, P, D], pages [n], cos and sin [n * P, D] -> k, v [L, Hkv, n * P, D]."""
    x = kv[pages].to(dtype) * kv_scale[pages].to(dtype).unsqueeze(-1)
    # halves of [2, L, Hkv, n * P, D]
    k, v = x.permute(3, 1, 2, 0, 4, 5).flatten(3, 4)
    return rotate(k, cos, sin), v


def keys_of(kv, kv_scale, pages, cos, sin, dtype):
    """kv [pages, Hkv, 2, P, D] of one layer, pages [B, n] -> keys, values [B, Hkv, n * P, D]."""
    x = kv[pages]
    if kv_scale is not None:
        x = x.to(dtype) * kv_scale[pages].to(dtype).unsqueeze(-1)
    # halves of [2, B, Hkv, n * P, D]
    keys, values = x.permute(3, 0, 2, 1, 4, 5).flatten(3, 4)
    return rotate(keys, cos, sin), values


def attention(q, k, v, kv, kv_scale, pages, cos, sin, mask):
    """Gather, dequantise, rotate and attend; k, v [B, Hkv, S, D] come after the pages."""
    keys, values = keys_of(kv, kv_scale, pages, cos, sin, q.dtype)
    if k.shape[2]:
        keys, values = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
    return sdpa(q, keys, values, mask)


def sdpa(q, keys, values, mask):
    """q [B, Hq, T, D] over ready keys and values [B, Hkv, N, D]; mask [T, N], added, or None."""
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)


def grouped_matmul(q, keys, values, mask):
    """The same by two matrix products per kv head, all its query heads at once."""
    batch, query_heads, queries, head_dim = q.shape
    grouped = q.reshape(batch, keys.shape[1], -1, head_dim)
    scores = (grouped @ keys.mT).float() * head_dim**-0.5
    if mask is not None:
        scores = (scores.unflatten(2, (-1, queries)) + mask).flatten(2, 3)
    out = scores.softmax(-1).to(q.dtype) @ values
    return out.view(batch, query_heads, queries, head_dim)


class Recorded:
    """A forward pass, made when its first backward pass needs it."""

    def __init__(self, forward: Callable, inputs: tuple[torch.Tensor, ...]):
        self.forward, self.inputs = forward, inputs

    @cached_property
    def out_and_leaves(self):
        leaves = [x.clone().requires_grad_() for x in self.inputs]
        return self.forward(*leaves), leaves


def backward(recorded, grad, skip):
    """Gradients of q and of the segment's k and v, which follow `skip` ready memory tokens."""
    out, leaves = recorded.out_and_leaves
    dq, dk, dv, *rest = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    return dq, dk[:, :, skip:], dv[:, :, skip:], *rest
