# SPDX-License-Identifier: Apache-2.0
"""What autograd must notice: writes in place, gradients that would be lost, second backwards."""

import pytest
import torch

import lychee_kernels as lk

PAGES = {
    "page_table": torch.tensor([[0, 1]], dtype=torch.int32),
    "page_len": torch.tensor([[4, 4]], dtype=torch.int32),
    "num_pages": torch.tensor([2], dtype=torch.int32),
}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def bank_of(dtype=torch.float32):
    """Two pages of four tokens, one layer and head; a scale where the dtype needs one."""
    kv = torch.zeros(2, 1, 1, 2, 4, 8, dtype=dtype)
    return kv, torch.zeros(kv.shape[:5]) if dtype == torch.int8 else None


def write(kv, kv_scale, k=None):
    k = torch.randn(4, 1, 8) if k is None else k
    lk.write_memory_(k, k, kv, kv_scale, PAGES["page_table"], int32(0), batch=1, layer=0)


def pack(kv, kv_scale):
    q, k, v = torch.randn(3, 10, 1, 8)
    tables = lk.rope_tables(16, torch.ones(4))
    window = {"batch": 1, "ratio": 4, "layer": 0}
    lk.compress_pack_(q, k, v, *tables, kv, kv_scale, PAGES["page_table"], int32(0), **window)


@pytest.mark.parametrize("write_into", [write, pack])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_writing_into_a_bank_raises_its_version(write_into, dtype):
    bank = bank_of(dtype)
    before = [x._version for x in bank if x is not None]
    write_into(*bank)
    assert all(x._version > n for x, n in zip(bank, before, strict=False) if x is not None)


def test_writing_rows_raises_their_version():
    x, out, weight = torch.randn(3, 8), torch.zeros(3, 8), torch.randn(8, 8)
    room = torch.zeros(2, 1, 1, 1, 8, 8)
    versions = [t._version for t in (x, out, room)]
    lk.gated_mlp_(x, torch.ones(8), weight, weight, weight, eps=1e-6)
    lk.linear_(out, x, weight)
    lk.gather_chunks_(*room, bank_of()[0], None, page_base=None, **PAGES)
    assert all(t._version > n for t, n in zip((x, out, room), versions, strict=True))


def test_writing_works_on_inference_tensors():
    with torch.inference_mode():
        kv, kv_scale = bank_of()
        write(kv, kv_scale)
        assert kv.any()


def test_a_bank_written_after_it_was_read_stops_the_backward():
    q = torch.randn(1, 1, 2, 8, requires_grad=True)
    k = torch.randn(1, 1, 0, 8)
    kv, _ = bank_of()
    out, _ = lk.memory_attention(q, k, k, kv=kv, **PAGES)
    write(kv, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_writing_refuses_a_bank_that_requires_gradients():
    kv, _ = bank_of()
    with pytest.raises(RuntimeError, match="write_memory_: kv: expected a tensor without gradient"):
        write(kv.requires_grad_(), None)
    assert not kv.any()


def second_gradient(run, x):
    (first,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
    first.sum().backward()


def attend(q):
    return lk.memory_attention(q, q.detach(), q.detach())[0]


def gather(kv):
    return lk.gather_chunks(kv, None, page_base=None, **PAGES)[0]


def compress(q):
    tables = lk.rope_tables(16, torch.ones(4))
    return lk.compress_pack(q, q.detach(), q.detach(), *tables, batch=1, ratio=4)[0]


@pytest.mark.parametrize(
    ("run", "shape"),
    [(attend, (1, 1, 5, 8)), (gather, (2, 1, 1, 2, 4, 8)), (compress, (5, 1, 8))],
    ids=["memory_attention", "gather_chunks", "compress_pack"],
)
def test_a_second_backward_is_refused(run, shape):
    with pytest.raises(RuntimeError, match="_bwd: expected one backward"):
        second_gradient(run, torch.randn(shape, requires_grad=True))


@pytest.mark.parametrize("shape", [(1, 2, 0, 8), (0, 2, 3, 8)], ids=["no queries", "no batch"])
def test_gradients_of_empty_attention_are_empty(shape):
    q = torch.randn(shape, requires_grad=True)
    k = torch.randn(shape[0], 1, 3, 8, requires_grad=True)
    lk.memory_attention(q, k, k)[0].sum().backward()
    assert q.grad.shape == q.shape
    assert not k.grad.any()


def test_gradients_of_an_empty_window_are_empty():
    q = torch.randn(0, 1, 8, requires_grad=True)
    tables = lk.rope_tables(4, torch.ones(4))
    out = lk.compress_pack(q, q, q, *tables, batch=1, ratio=4)
    sum(x.sum() for x in out).backward()
    assert q.grad.shape == q.shape
