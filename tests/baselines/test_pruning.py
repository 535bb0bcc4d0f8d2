"""Pruned widths and dropped layers against loops over plain models, and on models in which some parts do nothing."""

from __future__ import annotations

import copy
from typing import get_args
from unittest.mock import patch

import numpy as np
import pytest
import torch
import toys
from transformers import AutoModelForCausalLM

from tenfold import api
from tenfold.compression.calibration import Calibration
from tenfold.compression.compress import TRANSFORMS
from tenfold.models import recipe as schema

both = pytest.mark.parametrize("toy", ["gpt2", "llama"])
MLP = {
    "gpt2": ("transformer.h.{}.mlp.", ("c_fc",), "c_proj"),
    "llama": ("model.layers.{}.mlp.", ("gate_proj", "up_proj"), "down_proj"),
}
WRITERS = ("c_proj.weight", "c_proj.bias", "o_proj.weight", "down_proj.weight")  # without them a block does nothing


def text(padded: bool = False) -> Calibration:
    ids = torch.randint(3, 97, (4, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 25:] = mask[2, :3] = 0
    return Calibration(
        [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(2), mask.split(2), strict=True)], {}
    )


def pruned(model, name: str, keep: float, words=None, **changes):
    """Return the compressed copy and the report."""
    recipe = schema.load_recipe(name).model_dump(exclude_defaults=True) | {"budget": {"keep": keep, "of": "blocks"}}
    return api.compress(copy.deepcopy(model), recipe | changes, text=words)


def deep(name: str, layers: int = 5):
    kind, architecture, settings = toys.TOYS[name]
    with patch.dict(toys.TOYS, {name: (kind, architecture, settings | {"num_hidden_layers": layers})}):
        return toys.build(name)


def rows(model, path: str) -> np.ndarray:
    """Return the weight as ``(out, in)``."""
    weight = model.get_submodule(path).weight.detach().numpy()
    return weight.T if path.rpartition(".")[2].startswith("c_") else weight


def size(model) -> int:
    """Return the number of parameters outside of embeddings and head."""
    outer = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) or m is model.get_output_embeddings()]
    left_out = {id(p) for module in outer for p in module.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in left_out)


@torch.no_grad()
def seen(model, words, path: str, behind: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the inputs or outputs ``(tokens, width)`` of a module for every sample, and which tokens count."""
    found = []
    register = model.get_submodule(path).register_forward_hook
    handle = register(lambda module, given, made: found.extend(made if behind else given[0]))
    for batch in words.batches:
        model(**batch)
    handle.remove()
    masks = [row.bool().numpy() for batch in words.batches for row in batch["attention_mask"]]
    return [(x.numpy().astype(float), mask) for x, mask in zip(found, masks, strict=True)]


def score(samples, size: int = 1) -> np.ndarray:
    """Return the L2 norm over samples of the mean over tokens of the norm of ``size`` neighbours."""
    count = samples[0][0].shape[1] // size
    total = np.zeros(count)
    for x, mask in samples:
        for k in range(count):
            values = [
                np.linalg.norm(row[k * size : (k + 1) * size]) for row, counts in zip(x, mask, strict=True) if counts
            ]
            total[k] += np.mean(values) ** 2
    return np.sqrt(total)


def best(scores: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def test_every_change_that_a_recipe_may_name_is_there():
    assert set(get_args(schema.First)) == set(TRANSFORMS)


# widths by weights -------------------------------------------------------------------------------------------------------


@both
def test_units_of_the_least_range_go(toy):
    before = toys.build(toy)
    after, report = pruned(before, "peak-to-peak", 0.8)
    prefix, into, out = MLP[toy]
    units = report["widths"]["mlp"][1]
    for layer in range(2):
        path = prefix.format(layer)
        ranges = [
            sum(max(row) - min(row) for row in both)
            for both in zip(*(rows(before, path + n) for n in into), strict=True)
        ]
        kept = best(np.array(ranges), units)
        for name in into:
            np.testing.assert_array_equal(rows(after, path + name), rows(before, path + name)[kept])
        np.testing.assert_array_equal(rows(after, path + out), rows(before, path + out)[:, kept])
        if toy == "gpt2":
            bias = [m.get_submodule(path + "c_fc").bias for m in (after, before)]
            assert torch.equal(bias[0], bias[1][kept])


@both
def test_units_without_weights_go_first_and_nothing_changes(toy, tmp_path):
    before = toys.build(toy)
    prefix, into, _ = MLP[toy]
    with torch.no_grad():
        for layer in range(2):
            idle = torch.randperm(48, generator=torch.Generator().manual_seed(layer))[:12]
            for module in (before.get_submodule(prefix.format(layer) + name) for name in into):
                (module.weight.T if toy == "gpt2" else module.weight)[idle] = 0.0
                if module.bias is not None:
                    module.bias[idle] = 0.0
    after, report = pruned(before, "peak-to-peak", 0.87 if toy == "llama" else 0.945)
    lost = np.subtract(*report["widths"]["mlp"])
    assert 8 <= lost <= 12 and report["widths"]["heads"][0] == report["widths"]["heads"][1]
    torch.testing.assert_close(toys.logits(after), toys.logits(before), atol=1e-5, rtol=1e-4)
    after.save_pretrained(tmp_path)
    again, kind = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(kind.values()) and not hasattr(again.config, "quantization_config")
    assert getattr(again.config, "n_inner" if toy == "gpt2" else "intermediate_size") == report["widths"]["mlp"][1]
    torch.testing.assert_close(toys.logits(again.eval()), toys.logits(before), atol=1e-5, rtol=1e-4)


# widths by activations ---------------------------------------------------------------------------------------------------


def test_idle_units_and_heads_go_first_and_nothing_changes():
    before = toys.build("llama")
    with torch.no_grad():
        for layer, block in enumerate(before.model.layers):
            idle = torch.randperm(48, generator=torch.Generator().manual_seed(layer))[:24]
            block.mlp.up_proj.weight[idle] = 0.0
            block.self_attn.v_proj.weight.view(2, 8, 32)[layer] = 0.0  # another group of heads in every layer
    whole = sum(p.numel() for p in before.model.layers.parameters()) + 32
    after, report = pruned(
        before, "minitron", 1 - 2 * (24 * 3 * 32 + 48 * 32) / whole + 1e-6, text(), shrink={"mlp": 1, "heads": 1}
    )
    assert report["widths"] == {"mlp": [48, 24], "heads": [2, 1], "hidden": [32, 32]}
    config = after.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    torch.testing.assert_close(toys.logits(after), toys.logits(before), atol=1e-5, rtol=1e-4)


def test_idle_channels_go_first_and_only_what_norms_divide_by_changes(tmp_path):
    """An RMSNorm of fewer channels divides by a mean over fewer squares, which its gain can make up for."""
    before = toys.build("llama-tied")
    idle = torch.tensor([1, 4, 5, 11, 17, 20, 28, 31])
    with torch.no_grad():
        before.model.embed_tokens.weight[:, idle] = 0.0
        for block in before.model.layers:
            block.self_attn.o_proj.weight[idle] = 0.0
            block.mlp.down_proj.weight[idle] = 0.0
    after, report = pruned(before, "minitron", 0.7501, text(), shrink={"hidden": 1})
    assert report["widths"]["hidden"] == [32, 24] and after.config.hidden_size == 24
    after.save_pretrained(tmp_path)
    again, kind = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(kind.values()) and again.model.embed_tokens.weight is again.lm_head.weight
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            if name.endswith("norm.weight"):
                parameter.mul_((32 / 24) ** 0.5)
    torch.testing.assert_close(toys.logits(again.eval()), toys.logits(before), atol=1e-4, rtol=1e-3)


def test_of_a_gpt2_the_largest_activations_stay():
    """The heads are as wide as the channels there, so that both go together."""
    before, words = toys.build("gpt2"), text(padded=True)
    after, report = pruned(before, "minitron", 0.6, words)
    assert report["widths"]["heads"] == [4, 3] and report["widths"]["hidden"] == [32, 24]
    assert after.config.n_embd == 24 and after.config.n_head == 3
    norms = [f"transformer.h.{k}.ln_{n}" for k in range(2) for n in (1, 2)]
    channels = best(sum(score(seen(before, words, norm, True)) for norm in norms), 24)
    for name in ("wte", "wpe"):
        path = f"transformer.{name}"
        np.testing.assert_array_equal(rows(after, path), rows(before, path)[:, channels])
    for layer in range(2):
        block = f"transformer.h.{layer}."
        units = best(score(seen(before, words, block + "mlp.c_proj")), report["widths"]["mlp"][1])
        heads = best(score(seen(before, words, block + "attn.c_proj"), 8), 3)
        inside = np.concatenate([np.arange(8 * h, 8 * h + 8) for h in heads])
        made = np.concatenate([inside + 32 * k for k in range(3)])
        for name, out, into in (
            ("mlp.c_fc", units, channels), ("mlp.c_proj", channels, units),
            ("attn.c_attn", made, channels), ("attn.c_proj", channels, inside),
        ):  # fmt: skip
            np.testing.assert_array_equal(rows(after, block + name), rows(before, block + name)[np.ix_(out, into)])
            bias = [m.get_submodule(block + name).bias.detach().numpy() for m in (after, before)]
            np.testing.assert_array_equal(bias[0], bias[1][out])
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight"):
            old, new = (m.get_parameter(block + name).detach().numpy() for m in (before, after))
            np.testing.assert_array_equal(new, old[channels])


def test_groups_of_heads_go_by_the_sum_of_their_heads():
    """The more evenly a head attends, the smaller is its output: one of the first group's is the largest of all, one small."""
    before, words = toys.build("llama"), text(padded=True)
    with torch.no_grad():
        for block in before.model.layers:
            block.self_attn.q_proj.weight.view(4, 8, 32).mul_(torch.tensor([40.0, 0.0, 25.0, 25.0])[:, None, None])
            values = block.self_attn.v_proj.weight.view(2, 8, 32)
            values[1] = values[0]
    after, report = pruned(before, "minitron", 0.87, words, shrink={"heads": 1})
    assert report["widths"] == {"mlp": [48, 48], "heads": [2, 1], "hidden": [32, 32]}
    for layer in range(2):
        block = f"model.layers.{layer}.self_attn."
        scores = score(seen(before, words, block + "o_proj"), 8).reshape(2, 2)
        assert scores[0, 0] > scores[1, 0] and scores[0].sum() < scores[1].sum()
        np.testing.assert_array_equal(rows(after, block + "k_proj"), rows(before, block + "k_proj")[8:])
        np.testing.assert_array_equal(rows(after, block + "v_proj"), rows(before, block + "v_proj")[8:])
        np.testing.assert_array_equal(rows(after, block + "q_proj"), rows(before, block + "q_proj")[16:])
        np.testing.assert_array_equal(rows(after, block + "o_proj"), rows(before, block + "o_proj")[:, 16:])


def test_a_fused_matrix_that_holds_head_after_head_keeps_whole_heads():
    before, words = toys.build("gpt_neox"), text()
    after, report = pruned(before, "minitron", 0.5, words)
    count, width = report["widths"]["heads"][1], report["widths"]["hidden"][1]
    assert count == 3 and width == 24
    norms = [f"gpt_neox.layers.{k}.{n}_layernorm" for k in range(2) for n in ("input", "post_attention")]
    channels = best(sum(score(seen(before, words, norm, True)) for norm in norms), width)
    for layer in range(2):
        block = f"gpt_neox.layers.{layer}.attention."
        heads = best(score(seen(before, words, block + "dense"), 8), count)
        made = rows(before, block + "query_key_value")[:, channels].reshape(4, 24, width)[heads].reshape(-1, width)
        np.testing.assert_array_equal(rows(after, block + "query_key_value"), made)


@pytest.mark.parametrize(
    "toy", ["gpt2", "gpt2-untied", "gpt_neox", "opt", "llama", "llama-tied", "qwen2", "qwen3", "phi"]
)
@pytest.mark.parametrize("keep", [0.85, 0.6])
def test_the_budget_is_met_and_what_is_saved_is_what_is_there(toy, keep, tmp_path):
    before = toys.build(toy)
    after, report = pruned(before, "minitron", keep, text())
    assert report["parameters"]["total"] == sum(p.numel() for p in after.parameters())
    unit = 2 * (3 * 32 + 1)  # the most that another unit in both blocks would take
    assert size(after) <= keep * size(before) < size(after) + unit
    heads, hidden = report["widths"]["heads"], report["widths"]["hidden"]
    assert heads == ([4, hidden[1] // 8] if toy.startswith(("gpt", "opt")) else [2, 2])
    assert hidden[1] < 32 or keep > 0.6
    api.save(after, tmp_path / "model", None, report)
    again, kind = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(kind.values())
    torch.testing.assert_close(toys.logits(again.eval()), toys.logits(after))
    assert again.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


@pytest.mark.parametrize(
    "shrink", [{"mlp": 1, "hidden": 1}, {"mlp": 1, "hidden": 0.5}, {"mlp": 0.5, "heads": 1, "hidden": 1}]
)
def test_widths_shrink_in_proportion(shrink):
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 4,
    }
    kind, architecture, settings = toys.TOYS["qwen3"]
    with patch.dict(toys.TOYS, {"qwen3": (kind, architecture, settings | sizes)}):
        before = toys.build("qwen3")
    _, report = pruned(before, "minitron", 0.6, text(), shrink=shrink)
    lost = {width: (1 - new / old) / shrink[width] for width, (old, new) in report["widths"].items() if width in shrink}
    assert max(lost.values()) - min(lost.values()) < 0.07 and min(lost.values()) > 0.2
    assert all(new == old for width, (old, new) in report["widths"].items() if width not in shrink)


@pytest.mark.parametrize(
    ("toy", "name", "changes", "says"),
    [
        ("gpt2", "minitron", {"shrink": {"heads": 1}}, "give hidden a number under shrink"),
        ("llama", "peak-to-peak", {"shrink": {"hidden": 1}}, "scores units of MLPs only"),
        (
            "llama",
            "peak-to-peak",
            {"budget": {"keep": 0.1, "of": "blocks"}},
            r"can't be met by these widths; keep at least 0\.\d",
        ),
        ("llama", "peak-to-peak", {"budget": None}, "nothing says how much recipe peak-to-peak shall prune"),
        ("llama", "peak-to-peak", {"shrink": {"mlp": 0}}, "a shrink of nothing"),
        ("llama", "peak-to-peak", {"transform": None}, "there is no transform"),
        ("llama", "minitron", {"calibrate": None}, "give a calibration text"),
        ("t5", "peak-to-peak", {}, "are not alike"),
        ("openai-gpt", "peak-to-peak", {}, "no configuration of this openai-gpt says mlp"),
        ("bert", "drop-layers-perplexity", {}, "has no perplexity"),
    ],
)
def test_what_cant_be_pruned_is_said(toy, name, changes, says):
    words = None if name == "peak-to-peak" or "calibrate" in changes else text()
    with pytest.raises(ValueError, match=says):
        pruned(toys.build(toy), name, 0.8, words, **changes)


def test_a_folded_model_is_refused():
    model, _ = api.compress(toys.build("gpt2"), "low-rank")
    with pytest.raises(ValueError, match="is compressed"):
        pruned(model, "peak-to-peak", 0.8)


# layers ------------------------------------------------------------------------------------------------------------------


def blocks(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@torch.no_grad()
def loss_of(model, words, numbers) -> float:
    """Return the mean cross entropy of the model with these blocks only, token by token."""
    small = copy.deepcopy(model)
    kept = torch.nn.ModuleList(block for k, block in enumerate(blocks(small)) if k in numbers)
    if hasattr(small, "transformer"):
        small.transformer.h = kept
    else:
        small.model.layers = kept
    small.config.num_hidden_layers = len(kept)
    losses = []
    for batch in words.batches:
        chances = small(**batch, use_cache=False).logits.double().log_softmax(-1)
        for sample, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
            losses += [-float(chances[sample, k - 1, ids[k]]) for k in range(1, len(ids)) if mask[k] and mask[k - 1]]
    return float(np.mean(losses))


@both
def test_the_layers_go_without_which_the_loss_is_least(toy):
    before, words = deep(toy), text(padded=True)
    with torch.no_grad():  # blocks that matter
        for block in blocks(before):
            for parameter in block.parameters():
                parameter.mul_(3)
    after, report = pruned(before, "drop-layers-perplexity", 0.41, words)
    left = list(range(5))
    for losses in report["losses"]:
        found = {number: loss_of(before, words, [k for k in left if k != number]) for number in left}
        assert {int(path.rpartition(".")[2]): loss for path, loss in losses.items()} == pytest.approx(found, rel=1e-5)
        left.remove(min(found, key=found.__getitem__))
    gone = [int(path.rpartition(".")[2]) for path in report["dropped"]]
    assert (
        len(gone) == 3
        and sorted(left + gone) == list(range(5))
        and len(blocks(after)) == after.config.num_hidden_layers == 2
    )
    for old, new in zip([blocks(before)[k] for k in left], blocks(after), strict=True):
        for one, other in zip(old.parameters(), new.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("toy", ["gpt2", "llama", "gemma3_text"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_blocks_that_do_nothing_go_first_and_nothing_changes(toy, precision, tmp_path):
    """The text is what the model itself finds likeliest, so that every block that does something is missed."""
    before = deep(toy)
    with torch.no_grad():
        for number, block in enumerate(blocks(before)):
            for name, parameter in block.named_parameters():
                parameter.mul_(3.0 if number not in (1, 3) else float(not name.endswith(WRITERS)))
    words = text()
    for batch in words.batches:
        batch["input_ids"] = before.generate(
            batch["input_ids"][:, :1], min_new_tokens=39, max_new_tokens=39, do_sample=False
        )
    after, report = pruned(before, "drop-layers-perplexity", 0.61, words, calibrate={"precision": precision})
    assert sorted(path.rpartition(".")[2] for path in report["dropped"]) == ["1", "3"]
    torch.testing.assert_close(toys.logits(after), toys.logits(before))
    after.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == 3
    torch.testing.assert_close(toys.logits(again), toys.logits(before))


def test_a_round_runs_a_candidate_from_the_block_that_goes():
    """Of ``n`` blocks: all for either sample to see whether the model knows the text, ``n - 1`` for the states in front of them,
    and behind each candidate what comes after it.
    """
    model, runs = deep("llama"), []
    for block in blocks(model):
        block.mlp.register_forward_hook(lambda *given: runs.append(1))
    recipe = api.with_keep("drop-layers-perplexity", 0.81, "blocks")
    api.compress(model, recipe, text=Calibration(text().batches[:1], {}))
    assert len(runs) == 2 * 5 + 4 + (4 + 3 + 2 + 1)


def test_losses_that_are_no_numbers():
    model = deep("llama")
    model.model.layers[2].mlp.down_proj.weight.data[3, 3] = 1e38
    model.model.norm.weight.data[:] = 1e38
    with pytest.raises(ValueError, match=r"the loss without block \d is NaN or Inf"):
        pruned(model, "drop-layers-perplexity", 0.81, text())
