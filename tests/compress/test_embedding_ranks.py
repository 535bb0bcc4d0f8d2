"""Ranks of embeddings by the frequency of tokens, against copies of the model with the approximated matrix, in NumPy."""

import copy

import numpy as np
import pytest
import torch
from models import toys
from plain import text

from tenfold.compression.blockwise import BlockwiseCompression
from tenfold.compression.compress import compress
from tenfold.models.sites import count_parameters
from tenfold.nn import FactorizedEmbedding

WORDS = text(8, padded=True)
MEASURED = 40  # tokens: the first two batches
RULES = [{"prune": "mlp"}, {"prune": "attention"}, {"prune": "embedding"}]
TIED = ["gpt2", "qwen3", "gemma3", "opt", "bert"]


def recipe(keep: float = 0.5, of: str = "model", divergence: int = MEASURED, **budget) -> dict:
    calibrate = {"divergence": divergence, "precision": "float32"}
    return {"replace": RULES, "budget": {"keep": keep, "of": of} | budget, "calibrate": calibrate}


def collected(name: str, monkeypatch):
    """Return a model, what chooses its ranks, the statistics and the curve."""
    model, found = toys.build(name).eval(), []
    real = BlockwiseCompression._measure_embedding

    def measure(self, embedding, activations):
        plain = real(self, embedding, activations)
        found.append((embedding, self.state.statistics(len(self.plans))[1], plain))
        return plain

    monkeypatch.setattr(BlockwiseCompression, "_measure_embedding", measure)
    monkeypatch.setattr(BlockwiseCompression, "_carry_out", lambda self, folder: None)
    compress(model, recipe(0.7), text=WORDS)
    return model, *found[0]


@torch.no_grad()
def predictions(model, batches) -> list[torch.Tensor]:
    """Return ``log p`` of all tokens but padding, batch by batch."""
    logits = [(toys_logits(model(**batch)), batch["attention_mask"].bool()) for batch in batches]
    return [out[at].double().log_softmax(-1) for out, at in logits]


def toys_logits(out) -> torch.Tensor:
    return out.prediction_logits if hasattr(out, "prediction_logits") else out.logits


@pytest.mark.parametrize("name", TIED)
def test_losses_are_divergences_of_the_whole_model(name, monkeypatch):
    model, embedding, statistics, plain = collected(name, monkeypatch)
    before = predictions(model, WORDS.batches[:2])
    assert len(plain["options"]) > 3 and plain["options"][-1] is None
    lost = dict(zip(plain["costs"], plain["losses"], strict=True))
    for structure in (one for one in embedding.options(statistics) if one.numel in lost):
        other = copy.deepcopy(model)
        other.get_submodule(embedding.site.path).weight.data = structure.dense(embedding.fit(structure, statistics))
        after = predictions(other, WORDS.batches[:2])
        summed = sum(float((one.exp() * (one - two)).sum()) for one, two in zip(before, after, strict=True))
        assert lost[structure.numel] == pytest.approx(summed / sum(len(one) for one in before), rel=1e-3, abs=1e-7)


def test_statistics_are_of_the_tokens_that_nothing_is_measured_on(monkeypatch):
    model, _, statistics, _ = collected("qwen3", monkeypatch)
    rest, states = predictions(model, WORDS.batches[2:]), []
    handle = model.lm_head.register_forward_pre_hook(lambda module, given: states.append(given[0]))
    predictions(model, WORDS.batches[2:])
    handle.remove()
    weights = sum(one.exp().sum(0) for one in rest).numpy() ** 0.7
    np.testing.assert_allclose(statistics["weights"].numpy(), weights / weights.mean(), rtol=1e-4)
    kept = [x[batch["attention_mask"].bool()] for x, batch in zip(states, WORDS.batches[2:], strict=True)]
    rows = torch.cat(kept).double().numpy()
    moment = rows.T @ rows
    moment += 0.01 * np.trace(moment) / len(moment) * np.eye(len(moment))
    root = statistics["root"].numpy()
    np.testing.assert_allclose(root @ root, moment * len(moment) / np.trace(moment), rtol=1e-4, atol=1e-5)


def test_every_tier_is_the_best_of_its_rank(monkeypatch):
    model, embedding, statistics, _ = collected("gpt2", monkeypatch)
    weight = model.get_submodule(embedding.site.path).weight.detach().double().numpy()
    weights, root = (statistics[key].double().numpy() for key in ("weights", "root"))
    order, sizes = np.argsort(-weights, kind="stable"), []
    for structure in embedding.options(statistics):
        near, first, ranks = structure.dense(embedding.fit(structure, statistics)).double().numpy(), 0, []
        for part in structure.base.parts:
            rows, first = order[first : first + part.shape[0]], first + part.shape[0]
            rank = getattr(part, "rank", weight.shape[1])
            scaled = np.sqrt(weights[rows])[:, None] * (weight[rows] @ root)
            least = (np.linalg.svd(scaled, compute_uv=False)[rank:] ** 2).sum()
            error = ((np.sqrt(weights[rows])[:, None] * ((weight - near)[rows] @ root)) ** 2).sum()
            assert error == pytest.approx(least, rel=1e-3, abs=1e-6 * (scaled**2).sum())
            ranks.append(rank)
        assert first == len(weight)
        sizes.append(structure.numel / weight.size)
    assert sizes == sorted(sizes, reverse=True)
    assert all(size <= share for size, share in zip(sizes, (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3), strict=True))


def test_the_result_meets_the_budget_and_can_be_read_again(tmp_path):
    model = toys.build("qwen3").eval()
    whole = count_parameters(model, "model")
    model, report = compress(model, recipe(0.35), text=WORDS)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, FactorizedEmbedding)
    assert count_parameters(model, "model") <= 0.35 * whole
    choice = next(choice for choice in report["choices"] if choice["item"].endswith("embed_tokens"))
    assert choice["parameters"] == embedding.structure.numel and choice["unit"] == "nats a token"
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    ids = WORDS.batches[0]["input_ids"]
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("llama", {"keep": 0.6}),  # its head is not tied
        ("qwen3", {"keep": 0.6, "of": "blocks"}),
        ("qwen3", {"keep": 0.6, "divergence": 0}),
    ],
)
def test_the_embedding_stays_where_it_is_not_counted_or_measured(name, given):
    model, report = compress(toys.build(name).eval(), recipe(**given), text=WORDS)
    assert isinstance(model.get_input_embeddings(), torch.nn.Embedding)
    assert not any(choice["item"].endswith("embed_tokens") for choice in report["choices"])


def test_blocks_are_tried_at_sizes_that_count_what_the_embedding_gives(monkeypatch):
    tried, real = {}, BlockwiseCompression._expect_sizes

    def expect(self, known):
        sizes, costs = real(self, known), 0.0
        for curve in (curve for curve in [*known, *self.outer] if not curve.settled):
            share = sum(other.whole for other in known) / blocks if curve in self.outer else 1.0
            costs += share * float(curve.costs[curve.options.index(sizes[curve.name])])
        tried.setdefault(len(self.outer), []).append((sum(curve.whole for curve in known), costs, sizes))
        return sizes

    model = toys.build("qwen3").eval()
    blocks = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "embed" not in name)
    whole, outside = count_parameters(model, "model"), model.get_input_embeddings().weight.numel()
    monkeypatch.setattr(BlockwiseCompression, "_expect_sizes", expect)
    monkeypatch.setattr(BlockwiseCompression, "_carry_out", lambda self, folder: None)
    compress(copy.deepcopy(model), recipe(0.7), text=WORDS)
    compress(model, recipe(0.7) | {"replace": RULES[:2]}, text=WORDS)
    known, cost, sizes = tried[1][-1]  # all blocks are known
    assert known == blocks
    allowed = blocks + outside - 0.3 * whole
    assert 0.98 * allowed < cost <= allowed
    assert set(sizes) - set(tried[0][-1][2]) == {"model.embed_tokens"}
