"""Structured matrices: definitions and notation.

``W (out, in)`` is as in ``nn.Linear``: ``y = W x``, for row vectors ``x @ W.T``. A matrix is written as an **einsum**: every
factor carries index labels, some labels belong to the output, some to the input, and

    W[outs, ins] = sum over all other labels of the product of the factors.

Multi-indices run with their first label slowest: row ``(a, b)`` is number ``a * B + b``. Any number of factors may share a label.
Sizes are the capital letters of their labels; ``R`` is a rank or a number of terms.

| family | an element | parameters | multiply-adds per vector | fit |
|---|---|---|---|---|
| ``Dense`` | ``matrix[o, i]`` | O I | O I | exact |
| ``LowRank`` | ``left[o, r] right[r, i]`` | R (O + I) | R (O + I) | optimal: SVD |
| ``Kronecker`` | ``outer[r, a, c] inner[r, b, d]`` | R (AC + BD) | min(R AC(B or D) + ...) | optimal for 2 factors: Van Loan |
| ``TensorTrain`` | ``core_0[., a0, c0, r] core_1[r, a1, c1, s] ..`` | sum R A C R' | by plan | TT-SVD, within sqrt(d - 1) |
| ``RowTensorTrain`` | ``core_0[t, ., c0, r] core_1[t, r, c1, .] ..`` | T sum R C R' | by plan | TT-SVD per row |
| ``BlockTensorTrain`` | ``left[b, a, c, r] right[c, b, d, r]`` | R (ABC + BCD) | R (ABC + BCD) | optimal: SVD per block |
| ``Blast`` | ``left[p, a, r] coupling[p, q, r] right[q, c, r]`` | R (PA + PQ + QC) | the same | alternating |
| ``Tucker`` | ``core[p.., q..] out_0[a0, p0] .. in_0[c0, q0] ..`` | prod R + sum A R + sum C R | by plan | HOSVD, HOOI |
| ``CP`` | ``weights[r] out_0[a0, r] .. in_0[c0, r] ..`` | R (sum A + sum C) | by plan | alternating |
| ``Stacked`` | the parts below each other (fused QKV, gate and up) | sum | sum | of the parts |
| ``Sum`` | the sum of the elements of the parts | sum | sum | greedy, then alternating |
| ``Scattered`` | ``base`` at given rows and columns, zero elsewhere | as the base | as the base | as the base |
| ``CustomEinsum`` | any einsum, from a recipe | prod of sizes per factor | by plan | alternating |

The plan with the lowest price for the number of rows is chosen (``tenfold.structure.matmul``), including to make ``W`` first,
so no structure costs much more than a dense matrix at many rows.

Example: 1 x 2 blocks of a 2 x 4 matrix as one Kronecker term, ``outer (2 x 2)`` and ``inner (1 x 2)``::

    [[o00 i0, o00 i1, o01 i0, o01 i1],
     [o10 i0, o10 i1, o11 i0, o11 i1]]
"""

from tenfold.structure.base import Factors as Factors
from tenfold.structure.base import Structure as Structure
from tenfold.structure.blast import Blast as Blast
from tenfold.structure.block_train import BlockTensorTrain as BlockTensorTrain
from tenfold.structure.cola import Cola as Cola
from tenfold.structure.combinators import CustomEinsum as CustomEinsum
from tenfold.structure.combinators import Scattered as Scattered
from tenfold.structure.combinators import Stacked as Stacked
from tenfold.structure.combinators import Sum as Sum
from tenfold.structure.kronecker import Kronecker as Kronecker
from tenfold.structure.low_rank import Dense as Dense
from tenfold.structure.low_rank import LowRank as LowRank
from tenfold.structure.tensor_train import RowTensorTrain as RowTensorTrain
from tenfold.structure.tensor_train import TensorTrain as TensorTrain
from tenfold.structure.tucker import CP as CP
from tenfold.structure.tucker import Tucker as Tucker
