"""Choice of a rotation: principal components for slicing, and the search towards structures."""

from itertools import pairwise

import pytest
import torch
import toys

from tenfold.models.invariances.residual_rotation import (
    StreamMatrix,
    best_rotation,
    fuse_norms,
    helmert,
    pca_rotation,
    rotate_residual,
    stream_matrices,
)
from tenfold.models.sites import find_sites, weight_of
from tenfold.structure import Kronecker, LowRank


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def second_moment(width):
    scale = torch.logspace(0, -2, width, dtype=torch.float64)
    x = torch.randn(4 * width, width, dtype=torch.float64) * scale @ toys.rotation(width) + 0.3
    return x.T @ x / len(x)


def test_principal_components_come_first():
    second = second_moment(12)
    q = pca_rotation(second)
    close(q.T @ q, torch.eye(12).double())
    energies = q.T @ second @ q
    close(energies, energies.diagonal().diag())
    assert bool((energies.diagonal().diff() <= 0).all())


def test_principal_components_beside_the_ones():
    """The leading ``k`` in the complement of the ones lie on the first ``k + 1`` coordinates; what is left is the mean."""
    second = second_moment(12)
    q, flat = pca_rotation(second, layer_norm=True), torch.full((12, 12), 1 / 12).double()
    close(q.T @ q, torch.eye(12).double())
    close(q.sum(1), torch.ones(12).double())
    centred = (torch.eye(12) - flat) @ second @ (torch.eye(12) - flat)
    values, vectors = torch.linalg.eigh(centred)
    for k in range(1, 12):
        x = vectors[:, -k:] @ torch.randn(k).double() + 0.7
        new = q.T @ x
        assert new.mean() == pytest.approx(x.mean())
        close(new[k + 1 :], torch.full((12 - k - 1,), float(x.mean())).double())
        kept = q[:, : k + 1] - q[:, : k + 1].mean(1, keepdim=True)  # vectors of zero sum on the first coordinates
        assert torch.linalg.matrix_rank(kept, rtol=1e-9) == k
        held = torch.linalg.qr(kept)[0][:, :k] if k < 11 else torch.linalg.svd(kept)[0][:, :k]
        assert float((held.T @ centred @ held).trace()) == pytest.approx(float(values[-k:].sum()))


def test_helmert_basis():
    basis = helmert(5)
    close(basis.T @ basis, torch.eye(4).double())
    close(basis.sum(0), torch.zeros(4).double())
    assert torch.equal(basis[:, 1] * 6**0.5, torch.tensor([1.0, 1, -2, 0, 0]).double())


KRONECKER = Kronecker(outs=(6, 2), ins=(6, 2), terms=1)


def planted(q, noise=0.0):
    """Two readers and a writer that are Kronecker products after the rotation ``q``."""
    exact = [KRONECKER.dense(KRONECKER.init(1.0, dtype=torch.float64)) for _ in range(3)]
    exact = [weight + noise * torch.randn(12, 12) for weight in exact]
    weights = [exact[0] @ q.T, exact[1] @ q.T, q @ exact[2]]
    return [StreamMatrix(weight, KRONECKER, k < 2) for k, weight in enumerate(weights)]


def error(matrix, q):
    """The least error of a matrix after a rotation, from the definition."""
    weight = matrix.weight @ q if matrix.reads else q.T @ matrix.weight
    return float((weight - KRONECKER.dense(KRONECKER.fit(weight, sweeps=50))).square().sum())


@pytest.mark.parametrize("layer_norm", [False, True])
def test_rotations_towards_a_structure(layer_norm):
    """The error never grows, ends where it is said to, and falls far below that of the matrices as they are."""
    given = planted(toys.rotation(12, True), noise=0.05)
    q, losses = best_rotation(given, layer_norm=layer_norm, rounds=25, sweeps=3)
    close(q.T @ q, torch.eye(12).double())
    assert (float((q.sum(1) - 1).abs().max()) < 1e-9) == layer_norm
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(losses))
    assert losses[-1] < 0.8 * losses[0]
    assert sum(error(matrix, q) for matrix in given) <= losses[-1] * (1 + 1e-6)


def test_a_planted_rotation_is_found_from_nearby():
    near = torch.linalg.qr(torch.eye(12).double() + 0.02 * torch.randn(12, 12))[0]
    given = planted(near * near.diagonal().sign())
    _, losses = best_rotation(given, rounds=120, tolerance=0.0)
    assert losses[-1] < 1e-3 * losses[0]


def test_one_step_is_the_best_rotation_for_what_was_fitted():
    given = planted(toys.rotation(12, True), noise=0.3)
    fits = [KRONECKER.dense(KRONECKER.fit(matrix.weight.double(), sweeps=50)) for matrix in given]
    q, _ = best_rotation(given, rounds=2, tolerance=-1.0, sweeps=50)
    for _ in range(20):
        skew = 1e-3 * torch.randn(12, 12).double().triu(1)
        other = q @ torch.linalg.matrix_exp(skew - skew.T)
        loss = [
            sum(float((matrix.rotate(r) - fit).square().sum()) for matrix, fit in zip(given, fits, strict=True))
            for r in (q, other)
        ]
        assert loss[0] <= loss[1]


def test_rotations_of_a_model():
    model = fuse_norms(toys.shake(toys.build("llama")))
    block = {"kind": "block_train", "rank": 2}
    structures = {
        site.path: LowRank.for_shape(
            *site.shape, block | {"outs": [site.shape[0] // 4, 4], "ins": [4, site.shape[1] // 4]}
        )
        for site in find_sites(model)
        if site.role in ("attn.q", "mlp.in", "mlp.out")
    }
    given = stream_matrices(model, structures)
    assert [matrix.reads for matrix in given] == [not path.endswith("down_proj") for path in structures]
    q, losses = best_rotation(given, rounds=3)
    assert len(losses) == 3
    logits = toys.logits(model)
    close(toys.logits(rotate_residual(model, q)), logits)
    left = 0.0
    for path, structure in structures.items():
        weight = weight_of(model.get_submodule(path)).detach().double()
        left += float((weight - structure.dense(structure.fit(weight))).square().sum())
    assert left == pytest.approx(losses[-1], rel=1e-4)
    assert left < losses[0]
