# SPDX-License-Identifier: Apache-2.0
"""compress_pack, compress_pack_, write_memory_: copies, rotation, bank writes, gradients."""

import pytest
import torch
from pack_cases import BANK_DTYPES, FLOATS, POSITIONS, Case, gradients, make_bank, make_inputs

from lychee_kernels import compress_pack, compress_pack_, ref, write_memory_
from lychee_kernels.testing import compare, poison

CASES = [
    Case("one", batch=1, groups=1, ratio=1, heads=1, kv_heads=1, dim=8),
    Case("primes", batch=3, groups=7, ratio=5, heads=3, kv_heads=1, dim=24, scattered=True),
    Case("model", batch=1, groups=64, heads=14, dim=128),
    Case("memory_queries", memory_queries_only=True, dim=40),
    Case("memory_queries_scattered", memory_queries_only=True, scattered=True, ratio=2),
    Case("no_rows", groups=0),
]
named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@named
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compress_pack_matches_reference(case, dtype):
    inputs, options = make_inputs(case, dtype)
    actual = compress_pack(*inputs, **options)
    baseline = ref.compress_pack(*inputs, **options)
    exact = ref.compress_pack(*(x.double() for x in inputs), **options)
    for i in range(2):
        compare(actual[i], exact[i], baseline[i])
    for i in range(2, 5):
        assert torch.equal(actual[i], baseline[i])
    assert all(x.is_contiguous() for x in actual)


def test_compress_pack_puts_rows_where_the_document_says():
    # W = 4, r = 2: raw 0 1 . 2 3 . and memory rows between
    rows = torch.arange(6.0)[:, None, None].expand(6, 1, 8).contiguous()
    identity = torch.ones(6, 4), torch.zeros(6, 4)
    q_rot, k_rot, v_out, mem_k, mem_v = compress_pack(
        rows, rows, rows + 10, *identity, batch=1, ratio=2
    )
    order = [0, 1, 4, 2, 3, 5]
    assert q_rot[0, 0, :, 0].tolist() == k_rot[0, 0, :, 0].tolist() == order
    assert v_out[0, 0, :, 0].tolist() == [10 + row for row in order]
    assert mem_k[0, 0, :, 0].tolist() == [4, 5]
    assert mem_v[0, 0, :, 0].tolist() == [14, 15]


@named
def test_compress_pack_gradients_match_reference(case):
    inputs, options = make_inputs(case)
    weights = [torch.randn_like(x) for x in compress_pack(*inputs, **options)]
    actual = gradients(compress_pack, inputs, options, weights)
    baseline = gradients(ref.compress_pack, inputs, options, weights)
    exact = gradients(ref.compress_pack, [x.double() for x in inputs], options, weights)
    for result in zip(actual, exact, baseline, strict=True):
        compare(*result)


@pytest.mark.parametrize("used", range(5))
def test_compress_pack_gradient_of_one_output_alone(used):
    inputs, options = make_inputs(CASES[1])
    leaves = [x.requires_grad_() for x in inputs[:3]]
    results = []
    for function in (compress_pack, ref.compress_pack):
        loss = function(*inputs, **options)[used].square().sum()
        results.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for actual, expected in zip(*results, strict=True):
        if expected is None:
            assert actual is None or not actual.any()
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["primes", "model", "memory_queries"])
def test_compress_pack_gradients_match_reference_in_16_bits(name, dtype):
    inputs, options = make_inputs(next(case for case in CASES if case.name == name), dtype)
    weights = [torch.randn_like(x) for x in compress_pack(*inputs, **options)]
    actual = gradients(compress_pack, inputs, options, weights)
    baseline = gradients(ref.compress_pack, inputs, options, weights)
    exact_weights = [w.double() for w in weights]
    exact = gradients(ref.compress_pack, [x.double() for x in inputs], options, exact_weights)
    for result in zip(actual, exact, baseline, strict=True):
        compare(*result)


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision")
def test_compress_pack_backward_passes_gradcheck():
    # The kernels have no float64, but the op is linear in q, k and v: a large step is as exact.
    inputs, options = make_inputs(Case("small", groups=2, ratio=2, heads=2, kv_heads=1, dim=8))
    leaves = [x.requires_grad_() for x in inputs[:3]]
    assert torch.autograd.gradcheck(
        lambda *x: compress_pack(*x, *inputs[3:], **options), leaves, eps=0.5, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_compress_pack_is_the_same_past_the_cache(dtype, dim):
    # q_rot and dq of 16 MiB and more are stored past the cache; each head alone is not
    case = Case("large", batch=1, groups=(1 << 18) // dim, heads=8, kv_heads=1, dim=dim, ratio=1)
    inputs, options = make_inputs(case, dtype)
    options["positions"] = torch.randint(0, POSITIONS, (1, 2 * case.groups))
    inputs = [inputs[0].repeat(1, 8 // dtype.itemsize, 1).requires_grad_(), *inputs[1:]]
    q_rot = compress_pack(*inputs, **options)[0]
    assert q_rot.nbytes >= 1 << 24
    weights = torch.randn_like(q_rot)
    (dq,) = torch.autograd.grad(q_rot, inputs[0], weights)
    for h in (0, q_rot.shape[1] - 1):
        head = inputs[0][:, h : h + 1].detach().requires_grad_()
        alone = compress_pack(head, *inputs[1:], **options)[0]
        assert torch.equal(q_rot[:, h : h + 1], alone)
        (expected,) = torch.autograd.grad(alone, head, weights[:, h : h + 1])
        assert torch.equal(dq[:, h : h + 1], expected)


@pytest.mark.parametrize("bank_dtype", BANK_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compress_pack_writes_the_bank_as_the_reference(bank_dtype, dtype):
    case = CASES[1]
    inputs, options = make_inputs(case, dtype)
    inputs[1][-1] = 0  # a row of zeros has scale 0
    bank = make_bank(case, bank_dtype)
    options |= {"layer": 1, "mem_valid": torch.rand(case.batch, case.groups) > 0.3}
    results = []
    for function in (compress_pack_, ref.compress_pack_):
        kv, kv_scale, *rest = (None if x is None else x.clone() for x in bank)
        outputs = function(*inputs, kv, kv_scale, *rest, **options)
        results.append((outputs, kv, kv_scale))
    (outputs, kv, kv_scale), (expected, expected_kv, expected_scale) = results
    functional = {name: options[name] for name in ("batch", "ratio", "pos0", "positions")}
    for actual, same in zip(outputs, compress_pack(*inputs, **functional)[:3], strict=True):
        assert torch.equal(actual, same)
    # whatever was not written keeps its poison, in both
    torch.testing.assert_close(kv.float(), expected_kv.float(), rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(kv[:, 1], bank[0][:, 1])
    if kv_scale is not None:
        torch.testing.assert_close(kv_scale, expected_scale, rtol=0, atol=0, equal_nan=True)
        assert (kv_scale == 0).any()


@pytest.mark.parametrize("bank_dtype", BANK_DTYPES, ids=str)
def test_write_memory_writes_valid_rows_densely(bank_dtype):
    case = Case("write", batch=2, groups=6, kv_heads=1, dim=16)
    kv, kv_scale, table, slot0 = make_bank(case, bank_dtype)
    k, v = torch.randn(2, 12, 1, 16)
    valid = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1]], dtype=torch.bool)
    write_memory_(k, v, kv, kv_scale, table, slot0, batch=2, layer=2, mem_valid=valid)
    stored = kv.double() if kv_scale is None else kv.double() * kv_scale[..., None]
    # relative rounding of the store; int8 rounds to half a step of amax / 127
    step = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(bank_dtype, 2**-4)
    for b in range(2):
        for g, j in enumerate(valid[b].nonzero()[:, 0].tolist()):
            slot = 2 + g
            page = table[b, slot // 4]
            for part, x in enumerate((k, v)):
                row, expected = stored[page, 2, 0, part, slot % 4], x[b * 6 + j, 0].double()
                half_step = expected.abs().max() / 254 if bank_dtype == torch.int8 else 0
                assert ((row - expected).abs() <= expected.abs() * step + half_step + 1e-6).all()


@pytest.mark.parametrize(
    "name", ["compress_pack", "compress_pack_bwd", "compress_pack_", "write_memory_"]
)
def test_compress_pack_passes_opcheck(name):
    case = CASES[1]
    inputs, options = make_inputs(case)
    kv, kv_scale, table, slot0 = make_bank(case, torch.float8_e4m3fn)
    bank = (kv.float().nan_to_num(), None, table, slot0)
    tail = (options["positions"], 0)
    memory = inputs[1][-21:], inputs[2][-21:]
    arguments = {
        "compress_pack": (inputs[0].requires_grad_(), *inputs[1:], 3, 5, *tail),
        "compress_pack_bwd": (
            torch.randn(3, 2, 42, 24),
            torch.randn(3, 2, 7, 24),
            *inputs[3:],
            3,
            5,
            *tail,
            False,
        ),
        "compress_pack_": (*(x.detach() for x in inputs), *bank, 3, 5, 1, None, *tail),
        "write_memory_": (*memory, *bank, 3, 1, torch.rand(3, 7) > 0.5),
    }
    torch.library.opcheck(getattr(torch.ops.lychee, name).default, arguments[name])


def test_compress_pack_compiles_to_one_graph():
    inputs, options = make_inputs(CASES[1])
    bank = make_bank(CASES[1], torch.int8)

    def write(*bank):
        return compress_pack_(*inputs, *bank, **options, layer=0)[0] + 1

    first, second = ([x.clone() for x in bank] for _ in range(2))
    expected = write(*first)
    actual = torch.compile(write, fullgraph=True, backend="aot_eager")(*second)
    assert torch.equal(actual, expected)
    assert torch.equal(first[0], second[0])


def test_compress_pack_gradient_compiles_to_one_graph():
    inputs, options = make_inputs(CASES[1])
    leaves = [x.requires_grad_() for x in inputs[:3]]

    def loss(*leaves):
        outputs = compress_pack(*leaves, *inputs[3:], **options)
        return sum(x.square().sum() for x in outputs)

    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(map(torch.equal, actual, expected))


def test_compress_pack_reads_slices_of_one_projection():
    inputs, options = make_inputs(CASES[2])
    expected = compress_pack(*inputs, **options)
    fused = poison(torch.empty(320, 14 + 2 + 2 + 1, 128))
    fused[:, :14], fused[:, 14:16], fused[:, 16:18] = inputs[:3]
    slices = fused[:, :14], fused[:, 14:16], fused[:, 16:18]
    actual = compress_pack(*slices, *inputs[3:], **options)
    assert all(map(torch.equal, actual, expected))
