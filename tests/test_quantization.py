"""Quantization by value: grids, packing, integer kernels, modules."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import hf_compress as hc
from hf_compress.kinds import low_rank_
from hf_compress.quantization import (
    dequantize,
    dequantized,
    fake_quantize,
    fake_quantize_rows,
    find_grid,
    grids,
    is_quantized,
    kernels,
    options_of,
    pack,
    quantize,
    quantize_,
    quantized_,
    unpack,
)
from hf_compress.quantization.packing import packed_size

LOW_BITS = (4, 3, 2)


def linear(size=50, out=7, bias=True):
    return nn.Linear(size, out, bias=bias)


def conv1d(size=50, out=7):
    return Conv1D(out, size)


def low_rank(size=50, out=31, rank=11):
    layer = nn.Linear(size, out)
    low_rank_(layer, rank)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.weight_in)
    return layer


def embedding(rows=40, size=37):
    return nn.Embedding(rows, size)


KINDS = {"linear": linear, "conv1d": conv1d, "low_rank": low_rank, "embedding": embedding}
OPTIONS = {
    "8": {"bits": 8},
    "8 tensor": {"bits": 8, "activations": "tensor"},
    "8 weights": {"bits": 8, "activations": None, "decode": "call"},
    "4": {"bits": 4},
    "4 call": {"bits": 4, "decode": "call", "group_size": 16},
    "3": {"bits": 3, "group_size": 20},
    "2": {"bits": 2, "group_size": 7},
}
kinds = pytest.mark.parametrize("kind", KINDS)
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def sample(module):
    return torch.tensor([[3, 0, 39], [7, 7, 1]]) if isinstance(module, nn.Embedding) else torch.randn(2, 3, 50)


def reference(module, x):
    """What a quantized module should compute, from its float tensors alone."""
    found, how = dequantized(module), module.activations if hasattr(module, "activations") else None
    if isinstance(module, nn.Embedding):
        return found["weight"][x]
    for name in module._shapes():
        x = F.linear(x if how is None else fake_quantize_rows(x, how), found[name].to(x.dtype))
    return x if module.bias is None else x + module.bias


# --- grids -------------------------------------------------------------------------------------------------------


def numpy_decode(integers, scale, zero, group_size):
    columns = np.arange(integers.shape[1]) // group_size
    return (integers.astype(np.float64) - zero.astype(np.float64)[:, columns] / 16) * scale.astype(np.float64)[:, columns]


def absmax_error(weight, bits, group_size):
    """Squared error of the symmetric grid whose ends are the group's largest weight; scales in float16 as ours are."""
    top, total = 2 ** (bits - 1) - 1, 0.0
    for start in range(0, weight.shape[1], group_size):
        group = weight[:, start : start + group_size].astype(np.float64)
        scale = (np.abs(group).max(1, keepdims=True) / top).astype(np.float16).astype(np.float64)
        total += (np.square(np.clip(np.round(group / scale), -top - 1, top) * scale - group)).sum()
    return total


@pytest.mark.parametrize("bits", LOW_BITS)
@pytest.mark.parametrize("size, group_size", [(128, 64), (100, 64), (37, 16), (5, 64), (1, 2)])
@pytest.mark.parametrize("spread", ["normal", "heavy", "positive", "shifted", "tiny"])
def test_low_bits_are_no_worse_than_the_absmax_grid(bits, size, group_size, spread):
    weight = torch.randn(6, size)
    weight = {
        "normal": weight,
        "heavy": weight**3,
        "positive": weight.abs(),
        "shifted": weight + 5,
        "tiny": weight * 1e-3,
    }[spread]
    integers, scale, zero = quantize(weight, bits, group_size)
    assert integers.dtype == torch.uint8 and int(integers.max()) < 2**bits
    assert scale.dtype == torch.float16 and scale.shape == zero.shape == (6, -(-size // group_size))
    expected = numpy_decode(integers.numpy(), scale.numpy(), zero.numpy(), group_size)
    decoded = dequantize(integers, scale, zero, group_size)
    np.testing.assert_allclose(decoded.numpy(), expected, rtol=1e-6, atol=1e-7)
    error = np.square(expected - weight.numpy().astype(np.float64)).sum()
    assert error <= absmax_error(weight.numpy(), bits, group_size) * (1 + 1e-6)


def test_the_search_gains_on_absmax():
    weight = torch.randn(64, 256)
    integers, scale, zero = quantize(weight, 4, 64)
    error = (dequantize(integers, scale, zero, 64) - weight).square().sum().item()
    assert error < 0.68 * absmax_error(weight.numpy(), 4, 64)


def test_integers_are_the_nearest_points_of_their_grid():
    weight = torch.randn(3, 32)
    integers, scale, zero = quantize(weight, 3, 16)
    points = np.arange(8)[None, None] - zero.numpy().astype(float)[:, :, None] / 16
    points = np.repeat(points * scale.numpy().astype(float)[:, :, None], 16, 1)
    nearest = np.abs(points - weight.numpy()[:, :, None]).min(-1)
    np.testing.assert_allclose(np.abs(dequantize(integers, scale, zero, 16).numpy() - weight.numpy()), nearest, atol=1e-6)


def test_what_a_grid_holds_comes_back_and_zeros_stay_zero():
    weight = (torch.randint(0, 16, (4, 64)) - 6).float() / 4
    weight[:, 0], weight[:, 1] = -1.5, 2.25  # both ends
    integers, scale, zero = quantize(weight, 4, 64)
    assert torch.equal(dequantize(integers, scale, zero, 64), weight)
    for bits in LOW_BITS:
        assert not dequantize(*quantize(torch.zeros(2, 5), bits, 4), 4).any()
    assert not dequantize(*quantize(torch.zeros(2, 5), 8)).any()


def test_chunks_do_not_matter(monkeypatch):
    weight = torch.randn(9, 40)
    whole = find_grid(weight, 4, 16)
    monkeypatch.setattr(grids, "CHUNK", 64)
    assert all(torch.equal(a, b) for a, b in zip(whole, find_grid(weight, 4, 16), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eight_bits_are_symmetric_by_row_in_the_dtype_of_the_weight(dtype):
    weight = (torch.randn(5, 33) * torch.tensor([1e-4, 1e-2, 1.0, 30.0, 1e3])[:, None]).to(dtype)
    integers, scale, zero = quantize(weight, 8)
    expected = (np.abs(weight.float().numpy()).max(1, keepdims=True) / np.float32(127)).astype(np.float32)
    assert zero is None and integers.dtype == torch.int8 and scale.dtype == dtype
    assert torch.equal(scale, torch.from_numpy(expected).to(dtype))
    step = scale.float().numpy()
    assert np.array_equal(integers.numpy(), np.clip(np.round(weight.float().numpy() / step), -127, 127))


def test_fake_quantization_is_what_quantizing_gives_and_lets_gradients_through():
    weight = torch.randn(4, 20, requires_grad=True)
    for bits in (8, *LOW_BITS):
        size = None if bits == 8 else 8
        scale, zero = find_grid(weight, bits, size)
        for given in ((), (scale, zero)):
            rounded = fake_quantize(weight, bits, size, *given)
            torch.testing.assert_close(rounded, dequantize(*quantize(weight, bits, size), size), rtol=0, atol=1e-6)
            factor = torch.randn(4, 20)
            (grad,) = torch.autograd.grad((rounded * factor).sum(), weight)
            assert torch.equal(grad, factor)
    scale, zero = find_grid(weight, 4, 8)
    half = fake_quantize(weight, 4, 8, scale * 2, zero)
    expected = numpy_decode(
        np.clip(
            np.round(
                weight.detach().numpy().astype(np.float64) / np.repeat(scale.numpy().astype(float) * 2, 8, 1)[:, :20]
                + np.repeat(zero.numpy() / 16, 8, 1)[:, :20]
            ),
            0,
            15,
        ),
        scale.numpy() * 2,
        zero.numpy(),
        8,
    )
    np.testing.assert_allclose(half.detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("how", ["token", "tensor"])
def test_activations_are_rounded_by_their_range(how):
    x = (torch.randn(2, 5, 19) * torch.rand(2, 5, 1) * 10).requires_grad_()
    values = x.detach().numpy().reshape(10, 19) if how == "token" else x.detach().numpy().reshape(1, -1)
    low, high = values.min(1, keepdims=True), values.max(1, keepdims=True)
    integers = np.round((values - low) * (np.float32(255) / (high - low + np.float32(1e-8))))
    expected = (low.astype(np.float64) + integers * ((high - low) / np.float32(255)).astype(np.float64)).reshape(2, 5, 19)
    rounded = fake_quantize_rows(x, how)
    np.testing.assert_allclose(rounded.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    factor = torch.randn(2, 5, 19)
    (grad,) = torch.autograd.grad((rounded * factor).sum(), x)
    assert torch.equal(grad, factor)
    assert fake_quantize_rows(torch.ones(0, 3)).shape == (0, 3)
    constant = torch.full((2, 4), -0.3)
    assert torch.equal(fake_quantize_rows(constant), constant)


# --- packing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", LOW_BITS)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 9, 64, 101])
def test_packing_gives_back_every_integer(bits, size):
    integers = torch.randint(0, 2**bits, (3, 2, size), dtype=torch.uint8)
    packed = pack(integers, bits)
    assert packed.dtype == torch.int8 and packed.shape == (3, 2, packed_size(size, bits))
    assert packed.shape[-1] <= -(-size * bits // 8) + (bits == 3)
    assert torch.equal(unpack(packed, bits, size), integers)


def test_four_bits_are_two_a_byte():
    integers = np.random.default_rng(0).integers(0, 16, (5, 10)).astype(np.uint8)
    expected = (integers[:, 0::2] | integers[:, 1::2] << 4).view(np.int8)
    assert np.array_equal(pack(torch.from_numpy(integers), 4).numpy(), expected)


@pytest.mark.parametrize("bits, most", [(8, 8.1), (4, 4.4), (3, 3.4), (2, 2.4)])
def test_bits_per_weight(bits, most):
    layer = nn.Linear(384, 400, bias=False)
    quantize_(layer, bits=bits)
    stored = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert 8 * stored / (384 * 400) <= most


# --- the integer kernel ------------------------------------------------------------------------------------------

integer_kernels = pytest.mark.skipif(not kernels.has_integer_kernels(), reason="this CPU has no exact u8 x s8 kernel")
SHAPES = [(1, 1, 1), (1, 4, 3), (5, 33, 17), (3, 384, 20), (70, 771, 65), (300, 64, 48)]


@integer_kernels
@pytest.mark.parametrize("rows, size, out", SHAPES)
def test_int8_linear_is_integer_arithmetic(rows, size, out):
    x, weight = torch.randn(rows, size) * 3, torch.randint(-127, 128, (out, size), dtype=torch.int8)
    scale, bias = torch.rand(out, 1) + 0.1, torch.randn(out)
    integers, step, low = kernels._rounded(x)
    expected, *same = grids.quantize_rows(x)
    assert torch.equal(integers[:, :size].float(), expected)  # the fused kernel and the formula, bit for bit
    assert torch.equal(step, same[0]) and torch.equal(low, same[1])
    sums = integers[:, :size].numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T
    prepared = kernels.prepare(weight, scale)
    product = kernels._product(integers, prepared)
    assert np.array_equal(product.numpy(), sums.astype(np.float32) * scale.numpy().T)
    exact = sums * scale.numpy().astype(np.float64).T * step.numpy().astype(np.float64)
    exact += low.numpy() * (weight.numpy().astype(np.float64).sum(1) * scale.numpy()[:, 0]) + bias.numpy()
    size_of_terms = 255 * 127 * size * 1.1 * float(step.max())
    for y in (kernels.int8_linear(x, prepared, bias), kernels.int8_linear_traced(x, weight, scale, bias)):
        np.testing.assert_allclose(y.numpy(), exact, rtol=1e-6, atol=2e-7 * size_of_terms)


@integer_kernels
def test_sums_do_not_saturate():
    weight = torch.full((32, 512), 127, dtype=torch.int8)
    weight[1] = -127
    integers = F.pad(torch.full((40, 512), 255, dtype=torch.uint8), (0, kernels.TAIL))
    product = kernels._product(integers, kernels.prepare(weight, torch.ones(32, 1)))
    assert (product[:, 0] == 512 * 255 * 127).all() and (product[:, 1] == -512 * 255 * 127).all()


@integer_kernels
@pytest.mark.parametrize("rows, size, out", SHAPES)
def test_a_row_does_not_depend_on_its_batch(rows, size, out):
    layer = nn.Linear(size, out)
    quantize_(layer, bits=8)
    x = torch.randn(rows, size)
    with torch.no_grad():
        together = layer(x)
        for i in {0, rows // 2, rows - 1}:
            assert torch.equal(layer(x[i : i + 1])[0], together[i])
            assert torch.equal(layer(x[i]), together[i])
            assert torch.equal(layer(torch.stack([x[i] * 0, x[i], x[i] * 1e4]))[1], together[i])
        assert torch.equal(layer(x.flip(0)).flip(0), together)


def test_without_the_kernel_the_same_values_are_multiplied_in_floating_point(monkeypatch):
    for how in ("token", "tensor"):
        layer, x = linear(), torch.randn(4, 50)
        quantize_(layer, bits=8, activations=how)
        with torch.no_grad():
            integer = layer(x)
            monkeypatch.setattr(kernels, "_EXACT", False)
            torch.testing.assert_close(layer(x), integer, rtol=1e-5, atol=1e-5)
        monkeypatch.undo()


# --- modules -----------------------------------------------------------------------------------------------------


@kinds
@options
def test_a_module_computes_what_its_integers_say(kind, options):
    module = KINDS[kind]()
    x, before = sample(module), None
    with torch.no_grad():
        before = module(x)
    quantize_(module, **options)
    assert is_quantized(module) and not any(p.requires_grad for n, p in module.named_parameters() if n != "bias")
    with torch.no_grad():
        y = module(x)
        torch.testing.assert_close(y, reference(module, x), rtol=1e-4, atol=1e-4)
        assert torch.equal(module(x), y)
        assert y.shape == before.shape and y.dtype == before.dtype
    with torch.inference_mode():
        assert torch.equal(module(x), y)
    worst = {8: 0.03, 4: 0.15, 3: 0.3, 2: 0.6}[options["bits"]]
    assert (y - before).norm() < worst * before.norm()
    module.decode = "call" if module.decode == "load" else "load"
    with torch.no_grad():
        assert torch.equal(module(x), y)


@kinds
@options
def test_a_loader_makes_the_same_module(kind, options, tmp_path):
    module = KINDS[kind]()
    with torch.device("meta"):
        empty = KINDS[kind]()
    quantize_(module, **options)
    quantized_(empty, **options_of(module))
    assert options_of(empty) == options_of(module) and type(empty) is type(module)
    state = module.state_dict()
    layout = {n: (t.shape, t.dtype) for n, t in state.items()}
    assert layout == {n: (t.shape, t.dtype) for n, t in empty.state_dict().items()}
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(state)
    x = sample(module)
    with torch.no_grad():
        expected = module(x)
        for other in (empty, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(x), expected)
    assert copy.deepcopy(module)._derived == {}
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        KINDS[kind]().load_state_dict(state, strict=False)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_width_makes_a_checkpoint_look_dense(size):
    for bits in (8, *LOW_BITS):
        layer = nn.Linear(size, 4)
        quantize_(layer, bits=bits)
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            nn.Linear(size, 4).load_state_dict(layer.state_dict(), strict=False)


@options
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(options, dtype):
    layer, table = linear(), embedding()
    quantize_(layer, **options)
    quantize_(table, **options)
    integers = [layer.weight.clone(), table.weight.clone()]
    x, ids = sample(layer), sample(table)
    with torch.no_grad():
        y, rows = layer(x.to(dtype).float()), table(ids)
    layer.to(dtype), table.to(dtype)
    assert torch.equal(layer.weight, integers[0]) and torch.equal(table.weight, integers[1])
    with torch.no_grad():
        assert layer(x.to(dtype)).dtype == table(ids).dtype == dtype
        torch.testing.assert_close(layer(x.to(dtype)).float(), y, rtol=0.05, atol=0.05)
        torch.testing.assert_close(table(ids).float(), rows, rtol=0.02, atol=0.02)
        if options["bits"] < 8:
            assert torch.equal(dequantized(table.float())["weight"][ids], rows)  # casts cost nothing


@options
def test_gradients_are_those_of_the_decoded_weight(options):
    for make in (linear, conv1d, low_rank):
        module = make()
        quantize_(module, **options)
        weights = dequantized(module)
        dense = weights["weight"] @ weights["weight_in"] if "weight_in" in weights else weights["weight"]
        x = torch.randn(4, 3, 50, requires_grad=True)
        with torch.no_grad():
            value = module(x)
        y = module(x)
        assert torch.equal(y, value)  # training and inference see the same function
        factor = torch.randn_like(y)
        to_x, to_bias = torch.autograd.grad((y * factor).sum(), [x, module.bias])
        torch.testing.assert_close(to_x, factor @ dense, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(to_bias, factor.sum((0, 1)), rtol=1e-4, atol=1e-4)
        vector = torch.randn(50, requires_grad=True)
        torch.testing.assert_close(torch.autograd.grad(module(vector).sum(), vector)[0], dense.sum(0), rtol=1e-4, atol=1e-4)


def test_gradients_by_finite_differences():
    layer = linear(6, 4).double()
    quantize_(layer, bits=4, decode="call")
    assert torch.autograd.gradcheck(layer, torch.randn(3, 6, dtype=torch.double, requires_grad=True))


@options
def test_inputs_of_any_shape(options):
    layer = linear(bias=False)
    quantize_(layer, **options)
    x = torch.randn(2, 3, 4, 50)
    with torch.no_grad():
        y = layer(x)
        if options.get("activations", "token") != "tensor":
            for part, expected in ((x[1, 2, 3], y[1, 2, 3]), (x[0, 0], y[0, 0]), (x[1], y[1])):
                torch.testing.assert_close(layer(part), expected, rtol=1e-5, atol=1e-5)
        wide = torch.randn(2, 3, 4, 100)
        wide[..., ::2] = x
        torch.testing.assert_close(layer(wide[..., ::2]), y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer(x.transpose(0, 2)), y.transpose(0, 2), rtol=1e-5, atol=1e-5)
        for shape in ((0, 50), (2, 0, 50)):
            assert layer(torch.empty(shape)).shape == (*shape[:-1], 7)
    empty = torch.empty(0, 50, requires_grad=True)
    layer(empty).sum().backward()
    assert empty.grad.shape == (0, 50)


@options
def test_derived_tensors_follow_the_stored_ones(options):
    first, second, x = linear(), linear(), sample(linear())
    quantize_(first, **options)
    quantize_(second, **options)
    expected = copy.deepcopy(second)
    with torch.no_grad():
        start, wanted = first(x), expected(x)
        changed = copy.deepcopy(first)
        changed(x)
        changed.load_state_dict(second.state_dict())
        assert torch.equal(changed(x), wanted)
        changed = copy.deepcopy(first)
        changed(x)
        for name, parameter in second.named_parameters():
            changed._parameters[name] = parameter
        assert torch.equal(changed(x), wanted)
        changed = copy.deepcopy(first)
        changed(x)
        for name, parameter in second.named_parameters():
            changed.get_parameter(name).copy_(parameter)
        assert torch.equal(changed(x), wanted)
        assert torch.equal(first(x), start)
    with torch.inference_mode():
        fresh = copy.deepcopy(first)
    fresh._derived = {}
    with torch.inference_mode():
        fresh(x)
    fresh(x.clone().requires_grad_()).sum().backward()  # what inference mode left behind can be trained through


def test_a_tied_head_shares_the_integers():
    table, head = nn.Embedding(30, 16), nn.Linear(16, 30, bias=False)
    head.weight = table.weight
    for options in ({"bits": 8, "activations": None}, {"bits": 4}):
        table_, head_ = copy.deepcopy((table, head))
        quantize_(table_, **options)
        quantized_(head_, **options)
        for name in table_._parameters:
            head_._parameters[name] = table_._parameters[name]
        x = torch.randn(5, 16)
        with torch.no_grad():
            torch.testing.assert_close(head_(x), x @ table_(torch.arange(30)).T)


def test_the_dtype_of_a_model_stays_what_it_was():
    from tests.zoo import build

    model, batch = build("bert")
    expected = model.dtype
    for module in list(model.modules()):
        if type(module) in (nn.Linear, nn.Embedding):
            quantize_(module, bits=4)
    assert model.dtype == expected and model(**batch).logits.dtype == expected


def test_given_scales_are_used():
    layer = linear()
    weight, scale = layer.weight.detach().clone(), torch.full((7, 1), 0.01)
    quantize_(layer, bits=8, given={"weight_scale": scale})
    assert np.array_equal(layer.weight.numpy(), np.clip(np.round(weight.numpy() / np.float32(0.01)), -127, 127))
    layer = linear()
    scale, zero = find_grid(layer.weight, 4, 16)
    expected = fake_quantize(layer.weight, 4, 16, scale * 1.5, zero)
    quantize_(layer, bits=4, group_size=16, given={"weight_scale": scale * 1.5, "weight_zero": zero})
    torch.testing.assert_close(dequantized(layer)["weight"], expected.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4}, {"bits": 4, "decode": "call"}], ids=str)
def test_compilers_see_one_graph(options):
    module = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 8))
    for layer in (module[0], module[2]):
        quantize_(layer, **options)
    torch._dynamo.reset()
    compiled, x = torch.compile(module, backend="aot_eager", fullgraph=True), torch.randn(5, 20)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)
    x.requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).square().sum(), x),
        torch.autograd.grad(module(x).square().sum(), x),
        rtol=1e-4,
        atol=1e-4,
    )


# --- refusals ----------------------------------------------------------------------------------------------------


class Subclass(nn.Linear):
    pass


def twice():
    layer = linear()
    quantize_(layer, bits=8)
    return layer


def broken():
    layer = linear()
    layer.weight.data[0, 0] = float("nan")
    return layer


@pytest.mark.parametrize(
    "make, options, says",
    [
        (linear, {"bits": 5}, "8, 4, 3, 2, got 5"),
        (linear, {"bits": True}, "got True"),
        (linear, {"bits": 8, "group_size": 64}, "leave it out"),
        (linear, {"bits": 4, "group_size": 0}, "whole number >= 2"),
        (linear, {"bits": 4, "group_size": 6.4}, "whole number >= 2"),
        (linear, {"bits": 8, "activations": "row"}, '"token", "tensor" or None'),
        (linear, {"bits": 4, "activations": "tensor"}, "weights alone"),
        (linear, {"bits": 4, "decode": "never"}, '"load" or "call"'),
        (twice, {"bits": 8}, "quantized already"),
        (lambda: Subclass(3, 2), {"bits": 8}, "not subclasses"),
        (lambda: nn.LayerNorm(3), {"bits": 8}, "got LayerNorm"),
        (lambda: nn.Embedding(3, 2, max_norm=1.0), {"bits": 8}, "max_norm"),
        (broken, {"bits": 8}, "NaN"),
        (broken, {"bits": 4}, "NaN"),
        (linear, {"bits": 8, "given": {}}, "got nothing"),
        (linear, {"bits": 4, "given": {"weight_scale": torch.ones(7, 1)}}, "got nothing"),
        (linear, {"bits": 8, "given": {"weight_scale": torch.ones(7)}}, r"\(7, 1\)"),
        (linear, {"bits": 8, "given": {"weight_scale": torch.zeros(7, 1)}}, "above 0"),
    ],
)
def test_refusals_change_nothing(make, options, says):
    module = make()
    before, kind = {n: t.clone() for n, t in module.state_dict().items()}, type(module)
    with pytest.raises(hc.CompressionError, match=says):
        quantize_(module, **options)
    assert type(module) is kind and all(torch.allclose(t, before[n], equal_nan=True) for n, t in module.state_dict().items())


def test_only_quantized_modules_have_integers():
    with pytest.raises(hc.CompressionError, match="not quantized"):
        dequantized(linear())


def test_exported_graphs_hold_the_integer_product():
    layer = linear()
    quantize_(layer, bits=8)
    x = torch.randn(4, 50)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,))
        torch.testing.assert_close(exported.module()(x), layer(x), rtol=1e-5, atol=1e-5)
    used = {str(node.target) for node in exported.graph.nodes}
    assert ("aten._int_mm.default" in used) == kernels.has_integer_kernels()
