# SPDX-License-Identifier: Apache-2.0
"""The CUDA library beside a torch without CUDA: it loads, registers, and refuses in clear words."""

import pytest
import torch

from lychee_kernels import _loader

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
CPU_ONLY = {"cpu_isa", "gated_mlp_", "linear_"}
OPS = [
    name.removeprefix("lychee::")
    for name in sorted(torch._C._dispatch_get_all_op_names())
    if name.startswith("lychee::") and name.removeprefix("lychee::") not in CPU_ONLY
]
needs_library = pytest.mark.skipif(
    not _loader.CUDA_LIBRARY.exists(), reason="built without nvcc: there is no CUDA library"
)


def call_on_cuda(op, *arguments):
    """Reaches what a CUDA tensor would reach, with CPU tensors: there may be no GPU."""
    return getattr(torch.ops.lychee, op).default.redispatch(CUDA, *arguments)


def refusal(op, *arguments):
    with pytest.raises(RuntimeError) as caught:
        call_on_cuda(op, *arguments)
    return str(caught.value)


@needs_library
@pytest.mark.parametrize("op", OPS)
def test_cuda_kernels_are_registered(op):
    assert _loader.has_cuda_kernel(op)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lychee::{op}", "CUDA")


@needs_library
def test_cuda_kernels_refuse_tensors_of_another_device():
    pages = torch.zeros(4, 1).int()
    text = refusal("select_chunks", torch.zeros(1, 4), 0.0, 1, pages, pages[:, 0], 4)
    assert "select_chunks: scores: expected a CUDA tensor, got a tensor on another device" in text


def test_an_op_without_cuda_kernel_says_what_is_missing(monkeypatch, tmp_path):
    assert not _loader.has_cuda_kernel("gated_mlp_")
    x, w = torch.ones(2, 8), torch.ones(8, 8)
    arguments = x, x[0], 1e-6, w, w, w
    library = tmp_path / "_C_cuda.so"
    monkeypatch.setattr(_loader, "CUDA_LIBRARY", library)
    expected = "gated_mlp_: device: expected CPU tensors in a build without CUDA kernels"
    assert expected in refusal("gated_mlp_", *arguments)
    assert f"LYCHEE_CUDA=1 {_loader.BUILD_COMMAND}" in refusal("gated_mlp_", *arguments)
    library.touch()
    expected = "gated_mlp_: device: expected CPU tensors as there is no CUDA kernel, got CUDA"
    assert expected in refusal("gated_mlp_", *arguments)


def test_a_broken_cuda_library_names_the_build_command(monkeypatch, tmp_path):
    library = tmp_path / "_C_cuda.so"
    library.write_bytes(b"not a library")
    monkeypatch.setattr(_loader, "CUDA_LIBRARY", library)
    with pytest.raises(ImportError, match="rebuild it with: pip install"):
        _loader.load_library()
