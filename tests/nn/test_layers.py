"""Layers: they compute what their dense twins do, and carry their factors through casts, copies and checkpoints."""

import copy

import pytest
import torch
from torch import nn

from tenfold.nn import Adapter, FactorizedEmbedding, FactorizedLinear, SharedFactors, TiedEmbedding, TiedHead
from tenfold.structure import BlockTensorTrain, Dense, Kronecker, LowRank, Scattered, Stacked, Structure, TensorTrain

OUT, IN = 12, 8
STRUCTURES = {
    "low_rank": LowRank(out_features=OUT, in_features=IN, rank=3),
    "kronecker": Kronecker(outs=(4, 3), ins=(2, 4), terms=2),
    "tensor_train": TensorTrain(outs=(2, 3, 2), ins=(2, 2, 2), ranks=(3, 2)),
    "block_train": BlockTensorTrain(outs=(4, 3), ins=(4, 2), rank=2),
    "stacked": Stacked(parts=(LowRank(out_features=6, in_features=IN, rank=2), Kronecker(outs=(3, 2), ins=(4, 2)))),
    "stacked-low_rank": Stacked(parts=(LowRank(out_features=6, in_features=IN, rank=2),) * 2),
    "placed": Scattered(base=LowRank(out_features=9, in_features=6, rank=2), out_features=OUT, in_features=IN),
}
each = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
TRAIN = STRUCTURES["tensor_train"]


def linear(structure, **more):
    layer = FactorizedLinear(structure, **more)
    layer.set_factors(structure.init(1.0))
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def embedding(structure, **more):
    layer = FactorizedEmbedding(structure, **more)
    layer.set_factors(structure.init(1.0))
    return layer


# FactorizedLinear ----------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("rows", [(), (5,), (2, 3), (40,), (300,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_multiplies_by_its_matrix_in_every_mode(structure, rows, bias):
    """With and without gradients, and under autocast."""
    layer, x = linear(structure, bias=bias), torch.randn(*rows, IN)
    assert (layer.bias is not None) == bias
    expected = nn.functional.linear(x, layer.dense(), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() < 0.03 * expected.norm()


PLAIN = Dense(out_features=9, in_features=6)
MATRICES = {
    "dense": Dense(out_features=OUT, in_features=IN),
    "low_rank": STRUCTURES["low_rank"],
    "narrowed": Scattered(base=PLAIN, out_features=OUT, in_features=IN),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("structure", MATRICES.values(), ids=MATRICES)
def test_few_rows_are_multiplied_by_plain_matrices(structure, shared, monkeypatch):
    """What is around the products takes longer than they do, for few rows."""
    name = structure.matrices[-1]
    layer = FactorizedLinear(structure, shared={name: "common"} if shared else None)
    if shared:
        layer.attach(SharedFactors({"common": structure.factor_shapes()[name]}))
    factors = structure.init(1.0)
    layer.set_factors(factors)
    with torch.no_grad():
        nn.init.normal_(layer.bias)
        layer.factors()[name].copy_(factors[name])
        few, many = torch.randn(2, 3, IN), torch.randn(300, IN)
        expected = [nn.functional.linear(x, structure.dense(factors), layer.bias) for x in (few, many)]
        calls, whole = [], Structure._apply
        monkeypatch.setattr(Structure, "_apply", lambda *given: calls.append(given) or whole(*given))
        torch.testing.assert_close([layer(few), layer(many)], expected)
    assert len(calls) == (0 if "matrix" in factors else 1)


@each
def test_parameters_and_buffers_have_the_names_of_the_factors(structure):
    layer = linear(structure)
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    assert {name: p.shape for name, p in parameters.items()} == structure.factor_shapes() | {"bias": (OUT,)}
    assert {name: b.shape for name, b in buffers.items()} == structure.index_shapes()
    twin = linear(structure)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(3, IN)
    assert torch.equal(twin(x), layer(x))
    assert repr(layer) == f"FactorizedLinear({structure!r})"


def test_wrong_factors_are_refused():
    factors = TRAIN.init(1.0)
    with pytest.raises(ValueError, match=r"factor 'core_1' has shape \(3, 3, 2, 1\)"):
        FactorizedLinear(TRAIN).set_factors(factors | {"core_1": factors["core_1"][..., :1]})


@each
def test_index_maps_stay_int32_in_every_type(structure):
    layer = linear(structure).to(torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert all(b.dtype == torch.int32 for b in layer.half().double().buffers())
    assert layer(torch.randn(3, IN, dtype=torch.float64)).dtype == torch.float64


@each
@pytest.mark.parametrize("kind", [FactorizedLinear, FactorizedEmbedding])
def test_the_weight_tells_shape_and_type_and_nothing_else(structure, kind):
    weight = kind(structure, dtype=torch.bfloat16).weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((OUT, IN), torch.bfloat16, "cpu")
    assert weight._is_hf_initialized
    assert (weight + torch.ones(OUT, IN, dtype=torch.bfloat16)).isnan().all()


@each
@pytest.mark.parametrize("rows", [3, 3000])
def test_a_bias_learns_in_its_own_type(structure, rows):
    layer, x = linear(structure), torch.randn(rows, IN)
    upstream = torch.randn(rows, OUT)
    layer(x).backward(upstream)
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0), atol=1e-3, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    layer.zero_grad()
    y.backward(upstream.bfloat16())
    assert layer.bias.grad.dtype == torch.float32
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0), atol=0.5, rtol=0.1)


@pytest.mark.traced
@each
def test_a_layer_is_compiled_as_one_graph(structure):
    layer, x = linear(structure), torch.randn(6, IN)
    layer(x).sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    torch._dynamo.reset()


LONG, FAR = (2, 4, 5, 80, 81, 128, 129, 2000), 9000  # numbers of rows


@pytest.mark.traced
@each
@torch.no_grad()
def test_all_numbers_of_rows_take_three_graphs_at_most(structure):
    layer, graphs = linear(structure), []
    torch._dynamo.reset()
    compiled = torch.compile(
        layer, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True, dynamic=True
    )
    for rows in LONG:
        compiled(torch.randn(rows, IN))
    torch._dynamo.reset()
    assert len(graphs) <= 3


@pytest.mark.traced
@each
@pytest.mark.parametrize("strict", [True, False])
@torch.no_grad()
def test_a_layer_is_exported_for_any_number_of_rows(structure, strict):
    layer = linear(structure)
    shapes = ({0: torch.export.Dim("rows", min=2, max=FAR)},)
    program = torch.export.export(layer, (torch.randn(7, IN),), dynamic_shapes=shapes, strict=strict).module()
    for rows in LONG:
        x = torch.randn(rows, IN)
        torch.testing.assert_close(program(x), layer(x))
    torch._dynamo.reset()


def test_frozen_factors_are_not_trained_and_are_frozen_again_after_a_load():
    layer = linear(TRAIN, frozen=("core_0", "bias"))
    assert all(p.requires_grad for p in layer.parameters())  # until freeze is called
    layer.freeze()
    assert {name for name, p in layer.named_parameters() if not p.requires_grad} == {"core_0", "bias"}
    layer.core_0 = nn.Parameter(layer.core_0.detach())  # what transformers does
    layer.freeze()
    assert not layer.core_0.requires_grad


# FactorizedEmbedding -------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_an_embedding_looks_up_rows_and_its_head_multiplies(structure, scale):
    layer, ids = embedding(structure, scale=scale), torch.tensor([[0, 11, 3], [3, 3, 5]])
    torch.testing.assert_close(layer(ids), layer.dense()[ids] * scale)
    states = torch.randn(2, 3, IN)
    torch.testing.assert_close(layer(states, as_head=True), states @ layer.dense().T)  # without the scale


def test_an_embedding_may_have_a_factor_of_any_name():
    layer = embedding(Kronecker(outs=(4, 3), ins=(4, 2), scaled=True), scale=2.0)
    torch.testing.assert_close(layer(torch.tensor([3])), 2 * layer.dense()[3:4])


@each
def test_autocast_leaves_an_embedding_alone(structure):
    """As nn.Embedding: the stream of states stays in the type of the factors."""
    layer, ids = embedding(structure), torch.tensor([0, 11, 3])
    expected = layer(ids)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(ids), expected)


def test_the_row_of_padding_is_a_row_like_any_other():
    layer = embedding(TRAIN, padding_idx=4)
    assert (layer.padding_idx, layer.num_embeddings, layer.embedding_dim) == (4, OUT, IN)
    torch.testing.assert_close(layer(torch.tensor([4])), layer.dense()[4:5])
    layer(torch.tensor([4])).sum().backward()
    assert layer.core_0.grad.abs().sum() > 0  # factors have no row of padding to leave out


def test_the_scale_is_rounded_to_the_type():
    layer = embedding(TRAIN, scale=3.3).to(torch.bfloat16)
    rows = TRAIN.rows(layer.factors(), torch.arange(OUT))
    assert torch.equal(layer(torch.arange(OUT)), rows * torch.tensor(3.3).bfloat16())


# second names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_tied_head_has_no_matrix_and_follows_the_embedding(bias):
    layer = embedding(TRAIN, scale=2.0)
    head = TiedHead(layer, nn.Parameter(torch.randn(OUT)) if bias else None)
    states = torch.randn(5, IN)
    torch.testing.assert_close(head(states), nn.functional.linear(states, layer.dense(), head.bias))
    assert [name for name, _ in head.named_parameters()] == ["bias"] * bias
    assert (head.in_features, head.out_features, head.weight.shape) == (IN, OUT, (OUT, IN))
    with torch.no_grad():
        layer.core_0.mul_(2)
    torch.testing.assert_close(head(states), nn.functional.linear(states, layer.dense(), head.bias))
    head.attach(other := embedding(TRAIN))
    torch.testing.assert_close(head.dense(), other.dense())


def test_a_tied_embedding_is_the_embedding():
    layer, ids = embedding(TRAIN, scale=2.0), torch.tensor([1, 2])
    second = TiedEmbedding(layer)
    assert torch.equal(second(ids), layer(ids))
    assert not list(second.parameters())


def test_hooks_of_the_embedding_fire_for_its_head():
    """Offloading and FSDP bring the factors in a hook of the module that owns them."""
    layer, calls = embedding(TRAIN), []
    layer.register_forward_pre_hook(lambda *_: calls.append("embedding"))
    TiedHead(layer)(torch.randn(1, IN))
    TiedEmbedding(layer)(torch.tensor([0]))
    assert calls == ["embedding"] * 2


# SharedFactors -------------------------------------------------------------------------------------------------------


GROUPS = ("first", "first", "second", "second")


def two_groups():
    """Four layers, the middle core shared by two and two."""
    torch.manual_seed(3)
    container = SharedFactors(dict.fromkeys(GROUPS, (3, 3, 2, 2)))
    layers = nn.ModuleList(FactorizedLinear(TRAIN, shared={"core_1": key}) for key in GROUPS)
    model = nn.ModuleDict({"container": container, "layers": layers})
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    for layer in layers:
        layer.attach(container)
    return model


def run(model, x):
    for layer in model["layers"]:
        x = layer(x)[..., :IN]
    return x


def test_layers_of_one_group_share_one_tensor_and_groups_do_not():
    model = two_groups()
    names = [name for name, _ in model.named_parameters()]
    assert names[:2] == ["container.first", "container.second"]
    assert not any(name.endswith("core_1") for name in names)
    assert sum(p.numel() for p in model.parameters()) == 4 * (TRAIN.numel - 36 + OUT) + 2 * 36
    for layer, key in zip(model["layers"], GROUPS, strict=True):
        assert layer.factors()["core_1"] is model["container"].get_parameter(key)


def test_a_shared_tensor_collects_the_gradients_of_its_layers():
    model, x = two_groups(), torch.randn(5, IN)
    run(model, x).square().sum().backward()
    cores = [model["container"].first.detach().clone().requires_grad_() for _ in range(2)]
    y = x
    for layer, core in zip(model["layers"], [*cores, None, None], strict=True):
        factors = layer.factors() | ({} if core is None else {"core_1": core})
        y = nn.functional.linear(y, TRAIN.dense(factors), layer.bias)[..., :IN]
    y.square().sum().backward()
    torch.testing.assert_close(model["container"].first.grad, cores[0].grad + cores[1].grad)


def test_copies_and_casts_keep_to_their_own_container():
    model, x = two_groups(), torch.randn(5, IN)
    before, twin = run(model, x), copy.deepcopy(model)
    assert twin["layers"][0]._container[0] is twin["container"]
    nn.init.zeros_(twin["container"].first)
    assert torch.equal(run(model, x), before)
    assert run(twin.double(), x.double()).dtype == torch.float64
    other = two_groups()
    nn.init.zeros_(other["container"].first)
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other, x), before)


def test_a_shared_factor_is_frozen_where_it_lies_and_not_set_by_one_layer():
    model = two_groups()
    layer = model["layers"][0]
    layer.frozen = ("core_1",)
    layer.freeze()
    assert not model["container"].first.requires_grad
    assert model["container"].second.requires_grad
    kept = model["container"].first.clone()
    layer.set_factors(TRAIN.init(1.0))
    assert torch.equal(model["container"].first, kept)


def test_a_layer_that_shares_everything_knows_its_type():
    structure = Kronecker(outs=(4, 3), ins=(2, 4))
    layer = FactorizedLinear(structure, bias=False, shared={"outer": "a", "inner": "b"})
    layer.attach(SharedFactors({"a": (1, 4, 2), "b": (1, 3, 4)}, dtype=torch.bfloat16))
    assert layer.weight.dtype == torch.bfloat16
    assert not list(layer.parameters())


# Adapter -------------------------------------------------------------------------------------------------------------


def adapted():
    yield "linear", nn.Linear(IN, OUT)
    yield "linear-no-bias", nn.Linear(IN, OUT, bias=False)
    yield from ((name, linear(structure)) for name, structure in STRUCTURES.items())
    yield "shared", two_groups()["layers"][0]


@pytest.mark.parametrize("layer", [layer for _, layer in adapted()], ids=[name for name, _ in adapted()])
def test_an_adapter_starts_as_its_layer_and_trains_only_itself(layer):
    x, dense = torch.randn(6, IN), layer.weight.detach() if isinstance(layer, nn.Linear) else layer.dense().detach()
    adapter = Adapter(layer, rank=2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(adapter(x), layer(x))
    trained = {name for name, p in adapter.named_parameters() if p.requires_grad}
    assert trained == {"part_1_left", "part_1_right"}
    assert adapter.part_1_right.std() > 0
    before = {name: p.clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.SGD([p for p in adapter.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        adapter(x).square().sum().backward()
        optimizer.step()
    expected = dense + adapter.part_1_left @ adapter.part_1_right
    torch.testing.assert_close(adapter(x), nn.functional.linear(x, expected, adapter.bias), rtol=1e-4, atol=1e-3)
    assert not torch.allclose(adapter.dense(), dense)
    for name, value in layer.named_parameters():
        assert torch.equal(value, before[name])
        assert value.requires_grad


def test_an_adapter_keeps_the_type_of_its_layer():
    adapter = Adapter(nn.Linear(IN, OUT).to(torch.bfloat16), rank=1)
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}


def test_an_adapter_beside_what_it_can_not_hold_is_refused():
    with pytest.raises(ValueError, match=r"not Conv2d; factorise it first$"):
        Adapter(nn.Conv2d(1, 1, 1), rank=1)
