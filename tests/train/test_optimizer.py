"""Muon on factors, and learning rates by fans, against loops over matrices."""

import copy

import numpy as np
import pytest
import small
import torch
from models import toys

from tenfold.api import compress
from tenfold.nn import FactorizedLinear
from tenfold.structure import BlockTensorTrain, Kronecker, LowRank, TensorTrain
from tenfold.train.optimizer import Muon, optimizer_for, orthogonalize

FOLDED = {"role": ["mlp.in", "mlp.out"], "structure": {"kind": "block_train", "rank": 2}}
STRUCTURES = [
    LowRank(out_features=6, in_features=10, rank=3),
    BlockTensorTrain(outs=(3, 2), ins=(5, 4), rank=2),
    Kronecker(outs=(3, 2), ins=(5, 4), terms=3),
    TensorTrain(outs=(3, 2, 4), ins=(5, 4, 2), ranks=(3, 6)),
]


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_a_factor_is_a_batch_of_matrices_that_are_applied(structure):
    """Factors applied from the last to the first as batches of matrices compute ``W x``."""
    factors = structure.init(1.0, torch.Generator().manual_seed(0))
    diagram = structure.normal_form()[0].spec
    sizes, x = dict(diagram.sizes), torch.randn(structure.shape[1], generator=torch.Generator().manual_seed(1))
    labels, state = list(diagram.ins), x.reshape(diagram.shape_of(diagram.ins))
    for name, own in reversed(diagram.factors):
        batch, out, inner = ([own[k] for k in axes] for axes in structure.axes()[name])
        matrices = factors[name].permute([own.index(label) for label in (*batch, *out, *inner)])
        b, o, i = (int(np.prod([sizes[label] for label in some])) for some in (batch, out, inner))
        assert structure.fans()[name] == (i, o)
        # what is summed but not in the state yet has size one
        inside = [label for label in inner if label in labels]
        rest = [label for label in labels if label not in (*batch, *inside)]
        vectors = state.permute([labels.index(label) for label in (*batch, *inside, *rest)]).reshape(b, i, -1)
        state = matrices.reshape(b, o, i) @ vectors
        labels = [*batch, *out, *rest]
        state = state.reshape([sizes[label] for label in labels])
    state = state.permute([labels.index(label) for label in diagram.outs]).reshape(-1)
    torch.testing.assert_close(state, structure.dense(factors) @ x)


def test_steps_are_orthogonal():
    matrices = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
    for some in (matrices, matrices.mT):
        u, _, v = torch.linalg.svd(some, full_matrices=False)
        values = torch.linalg.svdvals(orthogonalize(some).float())
        assert values.min() > 0.6 and values.max() < 1.3
        near = orthogonalize(some).float()
        cosine = (near * (u @ v)).sum() / near.norm() / (u @ v).norm()
        assert cosine > 0.97


def test_a_matrix_moves_as_in_torch():
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(12, 7, generator=generator), torch.randn(3, 12, 7, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        Muon([{"params": [ours], "view": ((), (0,), (1,))}], lr=0.1, weight_decay=0.3),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"),
    ]
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=8e-3, rtol=0)  # bfloat16 inside, theirs at least


def test_every_block_moves_along_its_own_momentum():
    """``left (b, a, c, r)`` of a block train: ``b`` matrices ``(a, c r)``."""
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 2, 3, 4, 5, generator=generator)
    factor = torch.nn.Parameter(start.clone())
    optimizer = Muon([{"params": [factor], "view": ((0,), (1,), (2, 3))}], lr=0.1, weight_decay=0.5)
    expected, momentum = start.double().numpy().copy(), np.zeros((2, 3, 20))
    for gradient in gradients:
        factor.grad = gradient.clone()
        optimizer.step()
        for block in range(2):
            g = gradient[block].reshape(3, 20).double().numpy()
            momentum[block] = 0.95 * momentum[block] + 0.05 * g
            u, _, v = np.linalg.svd(0.05 * g + 0.95 * momentum[block], full_matrices=False)
            step = 0.2 * np.sqrt(20) * (u @ v).reshape(3, 4, 5)
            expected[block] = expected[block] * (1 - 0.1 * 0.5) - 0.1 * step
    moved = factor.detach().double().numpy() - start.double().numpy()
    wanted = expected - start.double().numpy()
    assert np.linalg.norm(moved - wanted) < 0.25 * np.linalg.norm(wanted)  # singular values 0.7 to 1.2 stand for 1
    assert (moved * wanted).sum() > 0.98 * np.linalg.norm(moved) * np.linalg.norm(wanted)


def test_rates_by_fans():
    """``layer in / (factor in) / 2`` for the two factors of a block train, 1 for everything else."""
    model = small.model()
    compress(model, {"replace": [FOLDED]})
    optimizer = optimizer_for(model, "adamw", "fans", 0.1, 0.0)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLinear):
            (_, _), (c, d) = module.structure.outs, module.structure.ins
            assert rate[id(module.right)] == pytest.approx(0.1 * c * d / d / 2), name
            assert rate[id(module.left)] == pytest.approx(0.1 * c * d / (c * module.structure.rank) / 2), name
            assert rate[id(module.bias)] == 0.1
    assert rate[id(model.transformer.wte.weight)] == 0.1


def test_rates_by_fans_are_not_for_muon():
    with pytest.raises(ValueError, match="write optimizer: adamw"):
        optimizer_for(small.model(), "muon", "fans", 0.1, 0.0)


def test_muon_has_the_matrices_of_blocks_and_nothing_else():
    model = toys.build("llama")
    compress(model, {"replace": [FOLDED]})
    optimizer = optimizer_for(model, "muon", "one", 0.1, 0.0)
    muon = {id(p) for group in optimizer.param_groups if "view" in group for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in muon) == (parameter.ndim > 1 and "embed" not in name and "lm_head" not in name), name


def test_every_parameter_is_in_one_group_and_schedulers_reach_all():
    model = small.model()
    optimizer = optimizer_for(model, "muon", "one", 0.1, 0.0)
    assert isinstance(optimizer, Muon)
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_not_for_muon_moves_as_by_adamw_and_states_come_back():
    """So they do after the state is saved and loaded into another optimizer."""
    found = []
    for kind in ("muon", "adamw", "again"):
        model = small.model()
        optimizer = optimizer_for(model, "adamw" if kind == "adamw" else "muon", "one", 1e-2, 0.1)
        for step in range(4):
            if kind == "again" and step == 2:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = optimizer_for(model, "muon", "one", 9.9, 0.9)
                optimizer.load_state_dict(state)
            for parameter in model.parameters():
                generator = torch.Generator().manual_seed(step)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        found.append({name: value.detach() for name, value in model.named_parameters()})
    muon, adamw, again = found
    for name, value in muon.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, adamw[name]) == (value.ndim == 1 or "wte" in name or "wpe" in name), name


def test_without_matrices_of_blocks_it_is_adamw():
    assert type(optimizer_for(small.model(), "adamw", "one", 0.1, 0.0)) is torch.optim.AdamW
    assert type(optimizer_for(torch.nn.LayerNorm(3), "muon", "one", 0.1, 0.0)) is torch.optim.AdamW
