# SPDX-License-Identifier: Apache-2.0
"""gather_chunks: pages of a bank as contiguous keys and values."""

from .. import ref
from .._check import check, check_bank, check_page_values, check_range
from .._loader import backend


def gather_chunks(
    kv, kv_scale, page_table, page_len, page_base, num_pages, cos=None, sin=None,
    *, layer_range=None, rope_mode="none", out_dtype=None,
):  # fmt: skip
    """Gather, dequantise and rotate the pages of each row, all layers at once.

    Token j of a row's page i goes to index i * P + j, so that shapes do not depend on the data;
    pages in use come first, and `valid` marks the indices that hold a token. The result can be
    passed to memory_attention as k, v and valid.

    Args:
        kv, kv_scale, page_table, page_len, page_base, num_pages: as in memory_attention.
        cos, sin: [N, D/2], float32; affine only.
        layer_range: (first, last), layers first .. last - 1; or None: all of them.
        rope_mode: "none" or "affine", as in memory_attention.
        out_dtype: floating dtype of k and v; or None: that of a float bank, float32 of a
            quantised one.

    Returns:
        k, v: [layers, B, Hkv, max_pages * P, D], out_dtype; zeros where not valid.
        valid: [B, max_pages * P], bool.

    Raises:
        RuntimeError: shape, dtype, page or position out of range; message names the argument.

    Numerics: dequantisation and rotation in float32 (float64 for float64), rounded once.
    Backward: kv (rows that read one page add up). Devices: any, in plain PyTorch.
    Source: LycheeMemory, selective activation of compressed memory.
    Reference: lychee_kernels.ref.gather_chunks.
    """
    op = "gather_chunks"
    backend(op)
    check(rope_mode in ("none", "affine"), op, "rope_mode", "none or affine", rope_mode)
    check(kv.dim() == 6, op, "kv", "6 dimensions", kv.dim())
    check_bank(op, kv, kv_scale, 0, kv.shape[2], kv.shape[5])
    first, last = (0, kv.shape[1]) if layer_range is None else layer_range
    check_range(op, "layer_range", first, 0, last)
    check_range(op, "layer_range", last, first, kv.shape[1])
    affine = rope_mode == "affine"
    check(not affine or (cos is not None and sin is not None and page_base is not None),
          op, "cos", "cos, sin and page_base when rope_mode is affine", "None")  # fmt: skip
    positions = cos.shape[0] if affine else None
    check_page_values(op, kv, page_table, page_len, page_base, num_pages, positions)
    return ref.gather_chunks(
        kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin,
        layer_range=(first, last), rope_mode=rope_mode, out_dtype=out_dtype,
    )  # fmt: skip
