"""Stock shapes: the mix that costs least, and checkpoints that need no tenfold."""

import copy
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from models import toys
from plain import text

from tenfold.compression.activations import Activations
from tenfold.compression.allocation import TradeoffCurve
from tenfold.compression.blockwise import BlockwiseCompression
from tenfold.compression.compress import compress
from tenfold.compression.depth import measure_removals
from tenfold.compression.resume_state import ResumeState
from tenfold.compression.stock_shapes import NoStockShapes, choose_stock_shapes
from tenfold.compression.unit_selection import order_groups_by_covariance
from tenfold.compression.weight_source import InMemoryWeights
from tenfold.models.model_card import save_compressed
from tenfold.models.stock import find_stock_form, stock_head_counts

WORDS = text(8)
RULES = [{"prune": "mlp"}, {"prune": "heads"}]
NAMES = ["gpt2", "opt", "gpt_neox", "phi", "llama-tied", "mistral", "qwen2", "qwen3", "gemma3_text", "bert", "mixtral",
         "qwen2_moe", "qwen3_moe"]  # fmt: skip
PLAIN = """
import sys, torch, transformers
from pathlib import Path
sys.modules["tenfold"] = None  # can't be imported
for folder in Path(sys.argv[1]).iterdir():
    kind = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model = getattr(transformers, kind).from_pretrained(folder)
    assert not [name for name, module in model.named_modules() if "tenfold" in type(module).__module__]
    ids = torch.arange(3, 27).reshape(2, 12)
    torch.save(model(input_ids=ids)[0], folder / "logits.pt")
"""


def stock(model, keep: float, rules=RULES, align: int = 8, **calibrate):
    """Return the model in stock shapes, and what was chosen."""
    found: list[dict] = []
    budget = {"keep": keep, "of": "model", "shapes": "stock", "align": align}
    recipe = {"replace": rules, "budget": budget, "calibrate": calibrate}
    after, _ = compress(copy.deepcopy(model), recipe, text=WORDS, announce=found.extend)
    return after, {choice["item"]: choice["chosen"] for choice in found}


def size(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_results_are_ordinary_checkpoints_equal_to_the_models_in_memory(tmp_path):
    expected = {}
    for name in NAMES:
        model = toys.build(name)
        keep = 0.9 if name == "bert" else 0.75
        after, _ = stock(model, keep)
        save_compressed(after, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert "quantization_config" not in config and config["architectures"] == [type(model).__name__]
        assert (keep - 0.2) * size(model) < size(after) <= keep * size(model), name
        expected[name] = toys.logits(after)
    subprocess.run([sys.executable, "-c", PLAIN, str(tmp_path)], check=True)
    found = {name: torch.load(tmp_path / name / "logits.pt") for name in NAMES}
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], atol=2e-6, rtol=0, msg=name)


def test_free_shapes_have_no_stock_form():
    after = compress(
        toys.build("llama"),
        {"replace": [{"prune": "mlp"}], "budget": {"keep": 0.77, "of": "sites"}, "calibrate": {}},
        text=WORDS,
    )[0]
    widths = {layer.mlp.down_proj.in_features for layer in after.model.layers}
    assert (find_stock_form(after) is None) == (len(widths) > 1)
    assert find_stock_form(toys.build("llama")) is None  # nothing is compressed


def test_idle_heads_go_first_and_nothing_is_lost():
    model = toys.build("mistral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, :16] = 0  # the heads of group 0
    after, chosen = stock(model, 0.93, [{"prune": "heads"}], damping=1e-8)
    assert [layer.self_attn.o_proj.in_features for layer in after.model.layers] == [16, 16], chosen
    torch.testing.assert_close(toys.logits(after), toys.logits(model), atol=1e-4, rtol=0)


def test_idle_block_goes_first_and_nothing_is_lost():
    model = toys.build("gpt2")
    with torch.no_grad():
        for part in (model.transformer.h[0].attn.c_proj, model.transformer.h[0].mlp.c_proj):
            part.weight.zero_()
            part.bias.zero_()
    after, chosen = stock(model, 0.62, [{"prune": "mlp"}])
    assert chosen["transformer.h.0"] == "dropped" and after.config.n_layer == 1
    torch.testing.assert_close(toys.logits(after), toys.logits(model), atol=1e-5, rtol=0)


@torch.no_grad()
def test_loss_of_removals_is_that_of_models_without_these_blocks():
    model = toys.build("gpt2")
    model.transformer.h.append(copy.deepcopy(model.transformer.h[0]))
    model.config.n_layer = 3
    paths = [f"transformer.h.{k}" for k in range(3)]
    activations = Activations(model, paths, WORDS.batches)
    found = measure_removals(activations, InMemoryWeights(model, paths), 10**6, [1.0, 1.0, 1.0], 2.0)

    def loss(gone) -> float:
        short = copy.deepcopy(model)
        short.transformer.h = torch.nn.ModuleList(block for k, block in enumerate(model.transformer.h) if k not in gone)
        rows = []
        for batch in WORDS.batches:
            p, q = (m(**batch, use_cache=False).logits.double().log_softmax(-1) for m in (model, short))
            rows.append((p.exp() * (p - q)).sum(-1).flatten())
        return float(torch.cat(rows).mean())

    first = min(range(3), key=lambda k: loss({k}))
    second = min({0, 1, 2} - {first}, key=lambda k: loss({first, k}))
    assert [number for number, _ in found] == [first, second]
    assert [nats for _, nats in found] == pytest.approx([loss({first}), loss({first, second})], rel=1e-4)
    between = (found[0][1] + found[1][1]) / 2
    given = InMemoryWeights(model, paths), 10**6, [1.0, 1.0, 1.0], 2.0
    assert measure_removals(Activations(model, paths, WORDS.batches), *given, limit=between) == found[:1]


def test_mix_is_the_best_of_all():
    random = np.random.default_rng(0)
    blocks = {f"h.{k}": 500.0 for k in range(4)}
    curves = []
    for path in blocks:
        for kind, step, count in (("mlp", 10, 30), ("heads", 40, 4)):
            losses = np.append(np.sort(random.random(count - 1))[::-1], 0.0)
            curves.append(TradeoffCurve(f"{path}.{kind}", step * np.arange(1, count + 1), losses,
                                        list(range(1, count + 1)), tied=kind))  # fmt: skip
    allowed, removals = {"mlp": [6, 12, 18, 24, 30], "heads": [1, 2, 4]}, [("h.2", 0.3), ("h.0", 1.1)]
    for budget in (700, 1000, 1500, 1999, 2000):
        best = None
        for gone, mlp, heads in itertools.product(range(3), allowed["mlp"], allowed["heads"]):
            left = [path for path in blocks if path not in [path for path, _ in removals[:gone]]]
            cost = sum(500.0 - 10 * (30 - mlp) - 40 * (4 - heads) for _ in left)
            loss = [0.0, 0.3, 1.1][gone]
            for curve in curves:
                if curve.name.rpartition(".")[0] in left:
                    loss += curve.losses[curve.options.index(mlp if curve.tied == "mlp" else heads)]
            if cost <= budget and (best is None or loss < best[0]):
                best = loss, cost, {"heads": heads, "mlp": mlp}
        found = choose_stock_shapes(curves, allowed, blocks, removals, budget)
        assert (found.loss, found.cost, found.options) == (pytest.approx(best[0]), best[1], best[2])
    with pytest.raises(NoStockShapes, match="280"):
        choose_stock_shapes(curves, allowed, blocks, removals, 200)


def test_groups_are_ordered_as_least_squares_says():
    random = np.random.default_rng(1)
    rows = random.standard_normal((200, 12)) @ random.standard_normal((12, 12))
    weight, root = random.standard_normal((5, 12)), random.standard_normal((5, 5))
    second, outputs = rows.T @ rows / 200, root @ root.T
    groups = [np.arange(3 * k, 3 * k + 3) for k in range(4)]
    order, losses = order_groups_by_covariance(
        *map(torch.tensor, (weight, outputs, second)), list(map(torch.tensor, groups))
    )

    def loss(kept) -> float:
        at = np.concatenate([groups[k] for k in kept]) if kept else np.array([], int)
        near = np.linalg.lstsq(rows[:, at], rows @ weight.T, rcond=None)[0]
        rest = rows @ weight.T - rows[:, at] @ near
        return np.trace(rest @ outputs @ rest.T) / 200 / 2

    greedy: list[int] = []
    while len(greedy) < 4:
        greedy.append(min(set(range(4)) - set(greedy), key=lambda k: loss([*greedy, k])))
    assert order == greedy
    assert losses == pytest.approx([loss(greedy[:k]) for k in range(5)], abs=1e-8)


@pytest.mark.parametrize(("name", "counts"), [("gpt2", []), ("bert", [4]), ("llama", [1, 2]), ("qwen3", [1, 2])])
def test_only_heads_that_a_configuration_can_say_are_pruned(name, counts):
    assert stock_head_counts(toys.build(name)) == counts


def test_a_budget_that_no_stock_shape_meets_names_the_smallest():
    with pytest.raises(ValueError, match=r"keep 0.2 of the model can't be met .* \d"):
        stock(toys.build("bert"), 0.2)


def test_free_widths_are_foreseen_as_a_run_with_free_shapes_does():
    found: list[dict] = []
    settings = {"name": "x", "replace": RULES, "calibrate": {"divergence": 0}}  # trials are at sizes of the shapes
    for shapes in ("stock", "free"):
        budget = {"keep": 0.8, "of": "model", "shapes": shapes, "align": 8}
        _, report = compress(toys.build("llama"), settings | {"budget": budget}, text=WORDS)
        found.append(report["choices"])
    stock_choices, free = found
    assert sum(one["shape"]["free"] for one in stock_choices) == pytest.approx(sum(one["loss"] for one in free))
    assert sum(one["loss"] for one in free) <= sum(one["loss"] for one in stock_choices)


def test_trials_are_at_stock_sizes_and_at_least_one_smaller_than_whole(monkeypatch):
    found, real = [], BlockwiseCompression._scale_by_trials
    monkeypatch.setattr(
        BlockwiseCompression,
        "_scale_by_trials",
        lambda self, c, trials, *a: found.extend(trials) or real(self, c, trials, *a),
    )
    model = toys.build("llama")
    stock(model, 0.9, divergence=16)
    assert len(found) == 2 * model.config.num_hidden_layers
    for trial in found:
        (size,) = trial.sizes.values()
        assert size == 1 if "attn" in trial.path else size % 8 == 0 and size < model.config.intermediate_size


def test_a_resumed_run_keeps_what_the_shapes_are(tmp_path):
    about = {"kind": "mlp", "size": 24, "of": 48, "free": 0.1}
    choice = {"item": "a", "chosen": 24, "parameters": 1, "of": 2, "loss": 0.2, "unit": "nats a token", "shape": about}
    (tmp_path / "unfinished" / "statistics").mkdir(parents=True)
    ResumeState(tmp_path, 1).save_choices({"a": 24}, [choice])
    assert ResumeState(tmp_path, 1).choices == [choice]


def test_free_widths_may_not_reach_what_fewer_blocks_do():
    _, chosen = stock(toys.build("gpt2"), 0.45, [{"prune": "mlp"}])
    assert "dropped" in chosen.values()
