"""tenfold's layers against those of other packages, on the same structure with the same factors, in the same run.

    pip install --no-deps tensorly-torch==0.5.0 tensorly==0.10.0 pyfastkron==1.1.0
    python benchmarks/peers.py
    python benchmarks/peers.py --table

Forward, and forward with backward, float32, medians of turns; tensorly-torch in both of its implementations, of which the faster
one counts (of CP in one: the other one takes 20 s, and more memory backward than 24 GB). pyfastkron multiplies with one Kronecker
product of two or more factors. Our layer counts twice: ``memory`` keeps its input and factors for the way back, ``speed`` also
what lies between products, or its matrix, as the other packages do. A dense layer goes along. Results go to
results/bench/DEVICE/peers.json, row by row; what is there is not measured again. Let nothing else run.
"""

import argparse
import json
import math
import statistics
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from study import device_folder
from torch import nn

from tenfold.evaluate.layers import one_pass
from tenfold.evaluate.machine import seconds
from tenfold.nn import FactorizedLinear
from tenfold.nn.kept import keep_matrices
from tenfold.structure import CP, TensorTrain, Tucker

CPU, REPEATS = torch.device("cpu"), 9
OUTS, INS = (8, 8, 6, 8), (4, 6, 8, 4)  # 3072 x 768
BOTH = ("factorized", "reconstructed")
TENSORLY = {
    "block TT, rank 64": ("blocktt", (1, 64, 64, 64, 1), BOTH),
    "CP, a tenth": ("cp", 0.1, BOTH[:1]),  # W through einsum over eight factors: 20 s, and more memory than there is
    "Tucker, a tenth": ("tucker", 0.1, BOTH),
}
KRONECKER = {  # out and in of every factor
    "64 x 64, 64 x 64": ((64, 64), (64, 64)),
    "48 x 24, 64 x 32": ((48, 64), (24, 32)),
    "1536 x 384, 2 x 2": ((1536, 2), (384, 2)),
    "16 x 16, three times": ((16, 16, 16), (16, 16, 16)),
    "8 x 8, four times": ((8, 8, 8, 8), (8, 8, 8, 8)),
}
ROWS = (256, 512, 2048)
MODES = ("memory", "speed")


class FastKron(nn.Module):
    """``x (A_1 (x) A_2 (x) ..)``, each ``A_k (in_k, out_k)``."""

    def __init__(self, factors: list[torch.Tensor]):
        super().__init__()
        self.factors = [factor.requires_grad_(True) for factor in factors]  # it refuses parameters

    def parameters(self, recurse: bool = True):
        return iter(self.factors)

    def forward(self, x):
        from pyfastkron import fastkrontorch

        return fastkrontorch.gemkm(x, self.factors)


def against_tensorly(kind: str, rank, ways) -> tuple[FactorizedLinear, dict[str, nn.Module]]:
    import tltorch

    peers = {
        how: tltorch.FactorizedLinear(INS, OUTS, bias=False, factorization=kind, rank=rank, implementation=how)
        for how in ways
    }
    weight = peers["factorized"].weight
    if kind == "blocktt":
        structure = TensorTrain(outs=OUTS, ins=INS, ranks=tuple(weight.rank[1:-1]))
        factors = {f"core_{k}": core for k, core in enumerate(weight.factors)}
    else:
        names = [*(f"out_{k}" for k in range(4)), *(f"in_{k}" for k in range(4))]
        factors = dict(zip(names, weight.factors, strict=True))
        if kind == "cp":
            structure = CP(outs=OUTS, ins=INS, rank=weight.rank, weighted=True)
            factors |= {"weights": weight.weights}
        else:
            structure = Tucker(outs=OUTS, ins=INS, ranks=tuple(weight.rank))
            factors |= {"core": weight.core}
    with torch.no_grad():  # factors of sensible sizes, the same for all
        start = structure.init(0.02)
        for name, value in factors.items():
            value.copy_(start[name])
        for peer in peers.values():
            peer.load_state_dict(peers["factorized"].state_dict())
    return layer_of(structure, start), peers


def against_fastkron(outs, ins) -> tuple[FactorizedLinear, dict[str, nn.Module]]:
    structure = TensorTrain(outs=outs, ins=ins, ranks=(1,) * (len(outs) - 1))
    factors = structure.init(0.02)
    turned = [factor.squeeze(0).squeeze(-1).T.contiguous() for factor in factors.values()]
    return layer_of(structure, factors), {"pyfastkron": FastKron(turned)}


def layer_of(structure, factors) -> FactorizedLinear:
    layer = FactorizedLinear(structure, bias=False)
    layer.set_factors(factors)
    return layer


def compared(layer: FactorizedLinear, peers: dict[str, nn.Module], rows: int, backward: bool) -> dict:
    """Seconds of every contender, in turns; ``ratio`` is that of the fastest peer over ours."""
    out, inner = layer.structure.shape
    x, upstream = torch.randn(rows, inner, requires_grad=backward), torch.randn(rows, out)
    faster = layer_of(layer.structure, layer.factors())
    keep_matrices(faster, "speed")
    contenders = {"memory": layer, "speed": faster, "dense": nn.Linear(inner, out, bias=False)} | peers
    for name, peer in peers.items():
        error = (peer(x.detach()) - layer(x.detach())).norm() / layer(x.detach()).norm()
        if not error < 1e-3:
            raise SystemExit(f"{name} is another matrix than ours: relative error {float(error):.1e}")
    times = {name: [] for name in contenders}
    for _ in range(REPEATS + 1):
        for name, module in contenders.items():
            run = one_pass(module, x, upstream, backward)
            calls = max(1, math.ceil(0.005 / times[name][-1])) if times[name] else 1
            times[name].append(seconds(run, CPU, calls))
    found = {name: values[1:] for name, values in times.items()}
    best = min(peers, key=lambda name: statistics.median(found[name]))

    def ratio(other: str, mode: str) -> float:
        return statistics.median(theirs / ours for theirs, ours in zip(found[other], found[mode], strict=True))

    return {
        "rows": rows, "pass": "forward + backward" if backward else "forward", "shape": [out, inner],
        "parameters": layer.structure.numel, "seconds": {name: statistics.median(all) for name, all in found.items()},
        "best_peer": best, "ratio": {mode: ratio(best, mode) for mode in MODES},
        "ratio_dense": {mode: ratio("dense", mode) for mode in MODES},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/bench"))
    parser.add_argument("--table", action="store_true", help="only write docs/speed-peers.md from the result files")
    given = parser.parse_args()
    if not given.table:
        measure(device_folder(given.output))
    write_table(given.output, Path("docs/speed-peers.md"))


def measure(folder: Path) -> None:
    file = folder / "peers.json"
    result = json.loads(file.read_text()) if file.exists() else {"rows": []}
    try:
        result["versions"] = {name: version(name) for name in ("torch", "tensorly-torch", "tensorly", "pyfastkron")}
    except PackageNotFoundError as missing:
        raise SystemExit(f"{missing.name} is not installed; install all three as --help says") from None
    done = {(row["peer"], row["name"], row["rows"], row["pass"]) for row in result["rows"]}
    made = {("tensorly-torch", name): (against_tensorly, given) for name, given in TENSORLY.items()}
    made |= {("pyfastkron", name): (against_fastkron, given) for name, given in KRONECKER.items()}
    for (peer, name), (against, given) in made.items():
        torch.manual_seed(0)
        layer, peers = against(*given)
        for rows in ROWS:
            for backward in (False, True):
                if (peer, name, rows, "forward + backward" if backward else "forward") in done:
                    continue
                row = {"peer": peer, "name": name} | compared(layer, peers, rows, backward)
                result["rows"].append(row)
                file.write_text(json.dumps(result, indent=1) + "\n")
                shown = f"{in_modes(row['ratio'])} of {row['best_peer']}, {in_modes(row['ratio_dense'])} of dense"
                print(f"{peer}, {name}, {rows} rows, {row['pass']}: {shown}", flush=True)


def in_modes(ratio: dict[str, float]) -> str:
    return " / ".join(f"{value:.2f}" for value in ratio.values())


ABOUT = """Written by `python benchmarks/peers.py --table` from `results/bench/*/peers.json`: how many times as fast as the other
package, and as `nn.Linear`, on the same structure with the same factors (medians of turns in one run, float32; in mode
`memory`, and behind the stroke in mode `speed`, where it was measured). tensorly-torch counts with the faster of its two
implementations (CP with one: the other one takes 20 s, and more memory than 24 GB).
"""


def write_table(results: Path, target: Path) -> None:
    lines = ["# Against other packages\n", ABOUT]
    for file in sorted(results.glob("*/peers.json")):
        result = json.loads(file.read_text())
        shown = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        lines += [
            f"## {file.parent.name}\n\n{shown}\n",
            "| package | structure | matrix | rows | | of the package's | of dense | its way |",
        ]
        lines += ["|" + "---|" * 8]
        for row in result["rows"]:
            lines.append(
                f"| {row['peer']} | {row['name']} | {row['shape'][0]} x {row['shape'][1]} | {row['rows']:,} | {row['pass']} | "
                f"{in_modes(row['ratio'])} | {in_modes(row['ratio_dense'])} | {row['best_peer']} |"
            )
        lines.append("")
    target.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
