"""Saving and loading: every way of transformers to load a folded checkpoint gives the very same model."""

import copy
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import toys
import transformers
from folding import EMBED, KRONECKER, LOW_RANK, MLP, TRAIN, fold, reference, rules
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import tenfold.models.loading
from tenfold.models.checkpoint_format import describe
from tenfold.models.cost import count
from tenfold.models.densify import densify
from tenfold.models.sites import FACTORIZED
from tenfold.models.surgery import CONTAINER
from tenfold.nn import Adapter, FactorizedLinear, TiedHead

ALLOCATORS = {"role": "mlp.in", "structure": TRAIN, "share": {"factors": ["core_1"]}, "freeze": ["core_1", "core_0"]}
PLACED = {"role": "attn.out", "structure": {"kind": "placed", "base": KRONECKER}}
MIXED = [ALLOCATORS, PLACED, {"role": "mlp.out", "structure": KRONECKER}, EMBED]


def folded(name="gpt2", recipe=None, dtype=torch.float32, **more):
    model = toys.build(name).to(dtype)
    fold(model, recipe or rules(model), **more)
    return model


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A toy with everything at once: shared, frozen and permuted factors, a tied embedding; its logits, its folder."""
    torch.manual_seed(0)
    model, folder = folded(recipe=MIXED), tmp_path_factory.mktemp("mixed")
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return model, toys.logits(model), folder


# ways to load ------------------------------------------------------------------------------------------------------

WAYS = {
    "plain": {},
    "cpu": {"device_map": "cpu"},
    "auto": {"device_map": "auto"},
    "dtype-auto": {"dtype": "auto"},
    "dtype": {"dtype": torch.float32},
    "eager": {"attn_implementation": "eager"},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_to_load_gives_the_same_bits(way, mixed):
    model, expected, folder = mixed
    again = AutoModelForCausalLM.from_pretrained(folder, **way)
    if "attn_implementation" in way:
        torch.testing.assert_close(toys.logits(again), expected)
    else:
        assert torch.equal(toys.logits(again), expected)
    for (name, ours), (other, theirs) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert (name, ours.requires_grad, ours.dtype) == (other, theirs.requires_grad, theirs.dtype)


OFFLOADED = ("transformer.h.0", "transformer.h.1", "transformer.wte", f"transformer.{CONTAINER}", "lm_head")


@pytest.mark.parametrize("away", [(), *((name,) for name in OFFLOADED), OFFLOADED], ids="+".join)
def test_offloaded_parts_are_read_from_disk_when_they_are_used(away, mixed, tmp_path):
    _, expected, folder = mixed
    places = dict.fromkeys((*OFFLOADED, "transformer.wpe", "transformer.drop", "transformer.ln_f"), "cpu")
    places |= dict.fromkeys(away, "disk")
    again = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")
    for _ in range(2):  # once more, after they went back; what is offloaded keeps no matrix, which rounds otherwise
        torch.testing.assert_close(toys.logits(again), expected)


def test_what_does_not_fit_into_memory_is_read_from_disk_and_can_be_saved(mixed, tmp_path):
    _, expected, folder = mixed
    how = {"device_map": "auto", "max_memory": {"cpu": 30_000}, "offload_folder": tmp_path / "offload"}
    again = AutoModelForCausalLM.from_pretrained(folder, **how)
    assert "disk" in again.hf_device_map.values()
    torch.testing.assert_close(toys.logits(again), expected)
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(toys.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), expected)


def test_a_model_that_was_loaded_is_saved_as_it_was(mixed, tmp_path):
    _, expected, folder = mixed
    again = AutoModelForCausalLM.from_pretrained(folder)
    again.save_pretrained(tmp_path / "one")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(toys.logits(third), expected)
    configs = [json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "one")]
    assert configs[0] == configs[1]


def test_a_callers_state_dict_is_what_is_saved(mixed, tmp_path):
    """The sharded savers of Trainer and accelerate pass one."""
    again = AutoModelForCausalLM.from_pretrained(mixed[2])
    state = {name: value + 1 if name.endswith("ln_f.bias") else value for name, value in again.state_dict().items()}
    again.save_pretrained(tmp_path, state_dict=state)
    read = AutoModelForCausalLM.from_pretrained(tmp_path).transformer.ln_f.bias
    torch.testing.assert_close(read, again.transformer.ln_f.bias + 1)


FRESH = """
    import sys, torch, tenfold.models.loading
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    for name, auto, way, folder, expected in [line.split() for line in sys.stdin]:
        model = globals()[auto].from_pretrained(folder)
        inputs, logits = torch.load(expected)
        with torch.no_grad():
            print(name, way, torch.equal(model(**inputs)[0], logits))
"""


def test_a_fresh_process_that_imports_tenfold_reads_the_same_bits(tmp_path):
    jobs = []
    for name, auto in [
        ("gpt2", "AutoModelForCausalLM"),
        ("llama", "AutoModelForCausalLM"),
        ("qwen3", "AutoModelForCausalLM"),
        ("bert", "AutoModelForMaskedLM"),
        ("t5", "AutoModelForSeq2SeqLM"),
    ]:
        model, expected = folded(name), tmp_path / f"{name}.pt"
        torch.save((toys.inputs(model), toys.logits(model)), expected)
        for way, size in [("single", "5GB"), ("shards", "10KB")]:
            model.save_pretrained(tmp_path / name / way, max_shard_size=size)
            jobs.append(f"{name} {auto} {way} {tmp_path / name / way} {expected}")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FRESH)],
        input="\n".join(jobs),
        capture_output=True,
        text=True,
        cwd=Path(tenfold.models.loading.__file__).parents[2],
    )
    assert done.stdout.split("\n")[:-1] == [" ".join([*job.split()[::2][:2], "True"]) for job in jobs], done.stderr


# number types ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_fitted_in_float32_and_kept(dtype, tmp_path):
    """Nothing but the rounding of the factors is lost."""
    plain = toys.build("gpt2").to(dtype)
    model, floats = copy.deepcopy(plain), copy.deepcopy(plain).float()
    errors = [list(fold(either, MIXED).values()) for either in (model, floats)]
    assert errors[0] == errors[1]
    for name, value in floats.to(dtype).state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {dtype}
    torch.testing.assert_close(toys.logits(again), toys.logits(model))
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(toys.logits(wide), toys.logits(reference(plain.float(), wide)))


def test_layers_that_t5_keeps_in_float32_share_half_precision_factors(tmp_path):
    shared = {"role": "mlp.out", "structure": TRAIN, "share": {"factors": ["core_1"]}}
    toys.build("t5").save_pretrained(tmp_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16)
    fold(model, [shared])
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16)
    layer = again.get_submodule("encoder.block.1.layer.1.DenseReluDense.wo")
    assert (layer.core_0.dtype, layer.like.dtype) == (torch.float32, torch.float32)
    assert {p.dtype for p in again.get_submodule(CONTAINER).parameters()} == {torch.float16}
    torch.testing.assert_close(toys.logits(again), toys.logits(model))


def test_half_and_float_after_loading(mixed):
    again = AutoModelForCausalLM.from_pretrained(mixed[2])
    assert {p.dtype for p in again.half().parameters()} == {torch.float16}
    assert {p.dtype for p in again.float().parameters()} == {torch.float32}


def test_index_maps_stay_int32(mixed):
    again = AutoModelForCausalLM.from_pretrained(mixed[2], dtype=torch.bfloat16)
    maps = [buffer for name, buffer in again.named_buffers() if name.endswith((".rows", ".columns"))]
    assert [m.dtype for m in maps] == [torch.int32] * 4
    again.to(torch.float16)
    assert {again.get_buffer(f"transformer.h.1.attn.c_proj.{name}").dtype for name in ("rows", "columns")} == {
        torch.int32
    }


# what a loaded model can do ----------------------------------------------------------------------------------------


@pytest.fixture
def loaded(mixed):
    return AutoModelForCausalLM.from_pretrained(mixed[2])


def test_it_generates_with_and_without_a_cache(loaded):
    ids = torch.arange(3, 9)[None]
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    plain = loaded.generate(ids, use_cache=False, **how)
    assert plain.sequences.shape == (1, 12)
    for cache in ({}, {"cache_implementation": "static", "disable_compile": True}):
        cached = loaded.generate(ids, **cache, **how)
        assert torch.equal(cached.sequences, plain.sequences)
        torch.testing.assert_close(cached.logits, plain.logits)


def test_a_deep_copy_shares_nothing_and_stays_whole(loaded):
    before, twin = toys.logits(loaded), copy.deepcopy(loaded)
    assert torch.equal(toys.logits(twin), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(toys.logits(loaded), before)
    for layer in twin.modules():  # the head asks the embedding of the copy, the layers its container
        if isinstance(layer, FACTORIZED):
            assert not any(value.any() for value in layer.factors().values() if value.is_floating_point())
    assert not twin.lm_head.dense().any()


def test_gradient_checkpointing_gives_the_same_gradients(loaded):
    def gradients():
        loaded.zero_grad()
        logits = loaded(**toys.inputs(loaded)).logits
        cross_entropy(logits.flatten(0, 1), toys.inputs(loaded)["input_ids"].flatten()).backward()
        return {name: p.grad.clone() for name, p in loaded.named_parameters() if p.grad is not None}

    loaded.train().requires_grad_(True)
    for module in loaded.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = gradients()
    loaded.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients()
    assert len(plain) == len(list(loaded.parameters()))
    assert plain.keys() == checkpointed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, msg=name)


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, number):
        ids = (torch.arange(10) * 7 + number) % 97
        return {"input_ids": ids, "labels": ids}


def train(model, folder, steps, resume=False):
    settings = TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=steps, save_steps=2, learning_rate=0.01, use_cpu=True,
        report_to="none", disable_tqdm=True, lr_scheduler_type="constant", logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=settings, train_dataset=Sentences())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_saves_resumes_and_leaves_frozen_factors_alone(mixed, tmp_path):
    def start():
        return AutoModelForCausalLM.from_pretrained(mixed[2], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)

    whole = train(start(), tmp_path / "whole", 4)
    train(start(), tmp_path / "parts", 2)
    resumed = train(start(), tmp_path / "parts", 4, resume=True)
    assert toys.logits(resumed.model).equal(toys.logits(whole.model))
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert toys.logits(saved).equal(toys.logits(whole.model.eval()))
    for name, value in start().named_parameters():
        moved = not torch.equal(value, saved.get_parameter(name))
        assert moved == ("core_0" not in name and "core_1" not in name), name


@pytest.mark.traced
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_the_compiler_sees_one_graph(name, mixed, loaded):
    model = loaded if name == "gpt2" else folded(name)
    inputs, expected = toys.inputs(model), toys.logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs, use_cache=False)[0], expected)
    torch._dynamo.reset()


@pytest.mark.traced
def test_a_static_cache_decodes_in_one_graph(loaded, monkeypatch):
    """One more for the prompt; both without a break, and the tokens are those of code that is not compiled."""
    graphs, ids = [], toys.inputs(loaded)["input_ids"]
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    expected = loaded.generate(**asked, max_new_tokens=6)

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(loaded, "forward", torch.compile(loaded.forward, backend=counting, fullgraph=True))
    assert torch.equal(loaded.generate(**asked, max_new_tokens=6, cache_implementation="static"), expected)
    torch._dynamo.reset()
    assert len(graphs) == 2


def test_it_is_exported_for_any_length(loaded):
    given = {"input_ids": toys.inputs(loaded)["input_ids"], "use_cache": False}
    dynamic = {"input_ids": {1: torch.export.Dim("length", min=2, max=60)}, "use_cache": None}
    program = torch.export.export(loaded, (), given, dynamic_shapes=dynamic, strict=False).module()
    for length in (2, 12, 60):
        ids = torch.arange(2 * length).reshape(2, length) % 97
        with torch.no_grad():
            torch.testing.assert_close(program(input_ids=ids, use_cache=False)[0], loaded(ids)[0])


# other heads, other forms ------------------------------------------------------------------------------------------


def test_another_head_takes_the_folded_layers_along(mixed):
    model, _, folder = mixed
    base = AutoModel.from_pretrained(folder)
    assert torch.equal(toys.logits(base), toys.logits(model.transformer))
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert torch.equal(toys.logits(classifier.transformer), toys.logits(model.transformer))
    assert classifier.score.weight.shape == (3, 32)


@pytest.mark.parametrize("kind", ["T5EncoderModel", "T5ForSequenceClassification"])
def test_parts_of_t5_take_the_folded_layers_along(kind, tmp_path):
    """The second of them holds the whole of T5 under a name of its own, ties included."""
    whole = folded("t5")
    whole.save_pretrained(tmp_path)
    part = getattr(transformers, kind).from_pretrained(tmp_path)
    part.tie_weights()  # accelerate calls it
    part.save_pretrained(tmp_path)
    again = getattr(transformers, kind).from_pretrained(tmp_path)
    ids = toys.inputs(whole)["input_ids"]
    for model in (part, again):
        assert torch.equal(model.get_encoder()(ids)[0], whole.encoder(ids)[0])


def test_an_embedding_that_is_tied_to_the_head_is_folded_for_both(tmp_path):
    """One class of transformers ties the other way round."""
    torch.manual_seed(0)
    model = transformers.OpenAIGPTDoubleHeadsModel(toys.config("openai-gpt")).eval()
    assert model.all_tied_weights_keys == {"transformer.tokens_embed.weight": "lm_head.weight"}
    dense = copy.deepcopy(model)
    fold(model, [EMBED, MLP])
    torch.testing.assert_close(toys.logits(model), toys.logits(reference(dense, model)))
    model.save_pretrained(tmp_path)
    assert torch.equal(toys.logits(type(model).from_pretrained(tmp_path)), toys.logits(model))


def test_a_base_model_is_saved_and_finds_its_head_again(mixed, tmp_path):
    _, expected, folder = mixed
    base = AutoModel.from_pretrained(folder)
    base.save_pretrained(tmp_path)
    assert "h.0.mlp.c_fc" in json.loads((tmp_path / "config.json").read_text())["quantization_config"]["sites"]
    assert torch.equal(toys.logits(AutoModel.from_pretrained(tmp_path)), toys.logits(base))
    assert torch.equal(toys.logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_a_head_that_only_the_checkpoint_has_unties_t5(tmp_path):
    """T5's configuration always says that the head is tied; version 1.1 brings one of its own."""
    model = toys.build("t5-gated")
    model.lm_head.weight = torch.nn.Parameter(torch.randn(97, 32))
    model.save_pretrained(tmp_path)
    dense = type(model).from_pretrained(tmp_path)
    model = copy.deepcopy(dense)
    assert count(model)["total"] - count(model)["without_head"] == 97 * 32
    fold(model, [EMBED, MLP])
    torch.testing.assert_close(toys.logits(model), toys.logits(reference(dense, model)), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(toys.logits(type(model).from_pretrained(tmp_path)), toys.logits(model))


def test_an_adapter_is_saved_with_what_it_stands_beside(tmp_path):
    model = folded("llama", [MLP])
    for path in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):  # a folded layer and a dense one
        model.set_submodule(path, Adapter(model.get_submodule(path), rank=2))
        torch.nn.init.normal_(model.get_submodule(path).part_1_left)
    model.config.quantization_config = describe(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(toys.logits(again), toys.logits(model))
    assert count(again) == count(model)


def test_a_dense_copy_needs_no_tenfold(mixed, tmp_path):
    model, expected, _ = mixed
    dense = densify(copy.deepcopy(model))
    dense.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(module, FactorizedLinear | TiedHead) for module in again.modules())
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    torch.testing.assert_close(toys.logits(again), expected)
    for one in (dense, again):
        assert one.lm_head.weight is one.transformer.wte.weight
    assert count(again) == count(toys.build("gpt2"))
    assert hasattr(model.config, "quantization_config")  # the model that was copied is as it was
    assert torch.equal(toys.logits(model), expected)


def test_a_folded_model_is_folded_on(tmp_path):
    """Stage by stage: other sites, the same sites again, the embedding again, and then a head of its own."""
    model, dense = toys.build("gpt2"), toys.build("gpt2")
    fold(model, [{**ALLOCATORS, "layers": [0]}, EMBED])
    fold(model, [{"role": "mlp.out", "structure": KRONECKER}, {"role": "embed", "structure": {**LOW_RANK, "rank": 4}}])
    assert model.config.quantization_config.sites.keys() == {
        "transformer.wte", "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"
    }  # fmt: skip
    for untie in (False, True):
        if untie:
            fold(model, [{"role": "head", "structure": LOW_RANK}], untie=True)
        torch.testing.assert_close(toys.logits(model), toys.logits(reference(dense, model)))
        model.save_pretrained(tmp_path)
        assert torch.equal(toys.logits(AutoModelForCausalLM.from_pretrained(tmp_path)), toys.logits(model))


def test_two_stages_may_not_use_one_shared_factor():
    model = toys.build("gpt2")
    fold(model, [{**ALLOCATORS, "layers": [0]}])
    with pytest.raises(ValueError, match=r"share .*factorise all that share a factor at once"):
        fold(model, [{**ALLOCATORS, "layers": [1]}])
