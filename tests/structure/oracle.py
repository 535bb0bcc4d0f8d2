"""What the matrix of a structure is by definition: slow, in loops, and without any code of the package.

Of a structure only its integers are read, of its factors only their numbers.
"""

from functools import reduce
from itertools import product

import numpy as np


def matrix(structure, factors) -> np.ndarray:
    """``W (out, in)``, entry by entry."""
    numbers = {name: np.asarray(value) for name, value in factors.items()}
    return DEFINITIONS[type(structure).__name__](structure, numbers)


def number(digits, sizes) -> int:
    """The place of a multi-index, its first digit slowest."""
    place = 0
    for digit, size in zip(digits, sizes, strict=True):
        place = place * size + digit
    return place


def every(sizes):
    return product(*(range(size) for size in sizes))


def filled(outs, ins, entry) -> np.ndarray:
    """The matrix with ``entry(row digits, column digits)`` at every place."""
    w = np.zeros((np.prod(outs, dtype=int), np.prod(ins, dtype=int)))
    for a, c in product(every(outs), every(ins)):
        w[number(a, outs), number(c, ins)] = entry(a, c)
    return w


def dense(s, f):
    return f["matrix"]


def low_rank(s, f):
    def entry(o, i):
        return sum(f["left"][o[0], r] * f["right"][r, i[0]] for r in range(s.rank))

    return filled([s.out_features], [s.in_features], entry)


def kronecker(s, f):
    names = ["outer", "inner"] if len(s.outs) == 2 else [f"factor_{k}" for k in range(len(s.outs))]
    scale = f["scale"] if s.scaled else np.ones(s.terms)
    return sum(scale[r] * reduce(np.kron, [f[name][r] for name in names]) for r in range(s.terms))


def tensor_train(s, f):
    def entry(a, c):
        slices = [f[f"core_{k}"][:, a[k], c[k], :] for k in range(len(s.outs))]
        return reduce(np.matmul, slices).item()

    return filled(s.outs, s.ins, entry)


def row_train(s, f):
    def entry(t, c):
        return reduce(np.matmul, [f[f"core_{k}"][t[0], :, c[k], :] for k in range(len(s.ins))]).item()

    return filled([s.out_features], s.ins, entry)


def block_train(s, f):
    """Column ``(c, d)`` first meets block ``c`` of the right factor, then, permuted, block ``b`` of the left one."""
    (big_a, big_b), (big_c, big_d) = s.outs, s.ins
    w = np.zeros((big_a, big_b, big_c, big_d))
    for b, c in every((big_b, big_c)):
        w[:, b, c, :] = f["left"][b, :, c, :] @ f["right"][c, b, :, :].T
    return w.reshape(big_a * big_b, big_c * big_d)


def blast(s, f):
    def block(p, q):
        return f["left"][p] @ np.diag(f["coupling"][p, q]) @ f["right"][q].T

    return np.block([[block(p, q) for q in range(s.ins[0])] for p in range(s.outs[0])])


def tucker(s, f):
    names = [f"out_{k}" for k in range(len(s.outs))] + [f"in_{k}" for k in range(len(s.ins))]

    def entry(a, c):
        return sum(
            f["core"][ranks] * np.prod([f[name][at, r] for name, at, r in zip(names, a + c, ranks, strict=True)])
            for ranks in every(s.ranks)
        )

    return filled(s.outs, s.ins, entry)


def cp(s, f):
    weights, w = f["weights"] if s.weighted else np.ones(s.rank), 0
    for r in range(s.rank):
        column = reduce(np.kron, [f[f"out_{k}"][:, r] for k in range(len(s.outs))])
        row = reduce(np.kron, [f[f"in_{k}"][:, r] for k in range(len(s.ins))])
        w = w + weights[r] * np.outer(column, row)
    return w


def written(s, f):
    size = dict(s.sizes)
    labels = list(dict.fromkeys(label for _, own in s.factors for label in own))
    w = np.zeros([int(np.prod([size[label] for label in side])) for side in (s.outs, s.ins)])
    for values in every([size[label] for label in labels]):
        at = dict(zip(labels, values, strict=True))
        row, column = (number([at[x] for x in side], [size[x] for x in side]) for side in (s.outs, s.ins))
        w[row, column] += np.prod([f[name][tuple(at[label] for label in own)] for name, own in s.factors])
    return w


def parts(s, f) -> list[np.ndarray]:
    made = []
    for k, part in enumerate(s.parts):
        mine = f"part_{k}_"
        made.append(matrix(part, {name.removeprefix(mine): v for name, v in f.items() if name.startswith(mine)}))
    return made


def placed(s, f):
    maps = {"rows": s.map_rows, "columns": s.map_columns}
    mine = {name for name, mapped in maps.items() if mapped}
    inner = {n.removeprefix("base_") if n.endswith(tuple(maps)) else n: v for n, v in f.items() if n not in mine}
    base, w = matrix(s.base, inner), np.zeros((s.out_features, s.in_features))
    for i, j in every(base.shape):
        w[f["rows"][i] if s.map_rows else i, f["columns"][j] if s.map_columns else j] = base[i, j]
    return w


DEFINITIONS = {
    "Dense": dense,
    "LowRank": low_rank,
    "Kronecker": kronecker,
    "TensorTrain": tensor_train,
    "RowTensorTrain": row_train,
    "BlockTensorTrain": block_train,
    "Blast": blast,
    "Tucker": tucker,
    "CP": cp,
    "CustomEinsum": written,
    "Sum": lambda s, f: sum(parts(s, f)),
    "Stacked": lambda s, f: np.vstack(parts(s, f)),
    "Scattered": placed,
}
