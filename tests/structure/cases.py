"""The structures that every law is tested on: each family in tiny sizes, and diagrams drawn at random."""

import random

import pytest
import torch

from tenfold.structure import (
    CP,
    Blast,
    BlockTensorTrain,
    CustomEinsum,
    Dense,
    Kronecker,
    LowRank,
    RowTensorTrain,
    Scattered,
    Stacked,
    Structure,
    Sum,
    TensorTrain,
    Tucker,
)

LOW_RANK = LowRank(out_features=4, in_features=6, rank=2)
KRONECKER = Kronecker(outs=(2, 2), ins=(3, 2), terms=2)
SMALL_TRAIN = TensorTrain(outs=(2, 2), ins=(2, 3), ranks=(3,))

FAMILIES: dict[str, Structure] = {
    "dense": Dense(out_features=3, in_features=4),
    "low_rank": LOW_RANK,
    "low_rank-full": LowRank(out_features=3, in_features=5, rank=3),
    "kronecker": KRONECKER,
    "kronecker-one-term": Kronecker(outs=(3, 2), ins=(2, 1)),
    "kronecker-scaled": Kronecker(outs=(2, 3), ins=(2, 2), terms=2, scaled=True),
    "kronecker-three": Kronecker(outs=(2, 1, 3), ins=(2, 3, 1), terms=2),
    "kronecker-three-scaled": Kronecker(outs=(2, 2, 2), ins=(1, 2, 2), terms=2, scaled=True),
    "tensor_train": SMALL_TRAIN,
    "tensor_train-three": TensorTrain(outs=(2, 3, 2), ins=(1, 2, 3), ranks=(2, 3)),
    "tensor_train-above-bound": TensorTrain(outs=(2, 2), ins=(2, 1), ranks=(5,)),
    "tensor_train-one-core": TensorTrain(outs=(3,), ins=(4,), ranks=()),
    "row_train": RowTensorTrain(out_features=3, ins=(2, 3), ranks=(2,)),
    "row_train-three": RowTensorTrain(out_features=2, ins=(2, 2, 3), ranks=(2, 3)),
    "block_train": BlockTensorTrain(outs=(3, 2), ins=(2, 4), rank=2),
    "block_train-monarch": BlockTensorTrain(outs=(2, 3), ins=(3, 2), rank=1),
    "blast": Blast(outs=(2, 3), ins=(3, 2), rank=2),
    "tucker": Tucker(outs=(4,), ins=(5,), ranks=(2, 3)),
    "tucker-four": Tucker(outs=(2, 3), ins=(3, 2), ranks=(2, 2, 2, 1)),
    "cp": CP(outs=(2, 3), ins=(3,), rank=3),
    "cp-weighted": CP(outs=(3, 2), ins=(2, 2), rank=2, weighted=True),
    "written": CustomEinsum(
        factors=(("gate", ("a", "k")), ("left", ("a", "b", "k")), ("right", ("k", "c"))),
        outs=("a", "b"),
        ins=("c",),
        sizes=(("a", 2), ("b", 2), ("c", 3), ("k", 2)),
    ),
    "written-one-factor": CustomEinsum(
        factors=(("only", ("k", "c", "a")),), outs=("a",), ins=("c",), sizes=(("a", 2), ("c", 3), ("k", 2))
    ),
}

COMBINED: dict[str, Structure] = {
    "sum": Sum(parts=(KRONECKER, LOW_RANK)),
    "sum-dense": Sum(parts=(Dense(out_features=4, in_features=6), LOW_RANK)),
    "sum-nested": Sum(parts=(Sum(parts=(LOW_RANK, SMALL_TRAIN)), LOW_RANK)),
    "placed": Scattered(base=LOW_RANK, out_features=6, in_features=7),
    "placed-rows": Scattered(base=LOW_RANK, out_features=6, in_features=6, map_columns=False),
    "placed-columns": Scattered(base=LOW_RANK, out_features=4, in_features=7, map_rows=False),
    "placed-permutation": Scattered(base=KRONECKER, out_features=4, in_features=6),
    "placed-nested": Scattered(
        base=Scattered(base=LOW_RANK, out_features=5, in_features=6), out_features=6, in_features=8
    ),
    "placed-sum": Scattered(base=Sum(parts=(LOW_RANK, KRONECKER)), out_features=5, in_features=6),
    "sum-placed": Sum(parts=(LOW_RANK, Scattered(base=KRONECKER, out_features=4, in_features=6))),
    "stacked-placed": Stacked(parts=(Scattered(base=LOW_RANK, out_features=5, in_features=6), LOW_RANK)),
    "stacked": Stacked(parts=(LOW_RANK, KRONECKER)),
    "stacked-sum": Stacked(parts=(LowRank(out_features=2, in_features=6, rank=1), Sum(parts=(LOW_RANK, KRONECKER)))),
    "placed-stacked": Scattered(base=Stacked(parts=(LOW_RANK, KRONECKER)), out_features=9, in_features=6),
    "permuted-stacked": Scattered(
        base=Stacked(parts=(LOW_RANK, KRONECKER)), out_features=8, in_features=6, map_columns=False
    ),
    "permuted-sum": Scattered(base=Sum(parts=(LOW_RANK, KRONECKER)), out_features=4, in_features=6),
    "sum-stacked": Sum(
        parts=(
            LowRank(out_features=6, in_features=6, rank=1),
            Stacked(parts=(KRONECKER, Dense(out_features=2, in_features=6))),
        )
    ),
}


def random_diagram(seed: int) -> CustomEinsum:
    """Two to four factors; every label goes to a random set of them, so it may be shared by all or belong to one.

    Labels differ in their primes only, as a mathematician would write them: no code may give primes a meaning.
    """
    draw = random.Random(seed)
    names = [f"factor_{k}" for k in range(draw.randint(2, 4))]
    labels = [draw.choice("xy") + "'" * k for k in range(draw.randint(3, 7))]
    draw.shuffle(labels)
    outs, ins = labels[: draw.randint(1, 2)], labels[-1:] if len(labels) < 5 else labels[-2:]
    holders = {label: draw.sample(names, draw.randint(1, len(names))) for label in labels}
    for name in names:  # no factor is a scalar
        if not any(name in holder for holder in holders.values()):
            holders[draw.choice(labels)].append(name)
    held = {name: [label for label in labels if name in holders[label]] for name in names}
    factors = [(name, draw.sample(own, len(own))) for name, own in held.items()]
    return CustomEinsum(factors=factors, outs=outs, ins=ins, sizes=[(label, draw.randint(1, 3)) for label in labels])


DIAGRAMS: dict[str, Structure] = {f"diagram-{seed}": random_diagram(seed) for seed in range(12)}
ALL = FAMILIES | COMBINED | DIAGRAMS


def each(cases: dict[str, Structure]):
    """Runs a test for every structure of ``cases``, under its name."""
    return pytest.mark.parametrize("structure", list(cases.values()), ids=list(cases))


def factors_of(structure: Structure, seed: int = 0) -> dict[str, torch.Tensor]:
    return structure.init(1.0, torch.Generator().manual_seed(seed), torch.float64)


def member(structure: Structure, seed: int = 1) -> torch.Tensor:
    """A matrix of this structure."""
    return structure.dense(factors_of(structure, seed))
