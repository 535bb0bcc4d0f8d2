"""Checkpoints that do not fit are refused, each with one sentence that holds the value and the way out."""

import json
import logging
import re
import shutil

import pytest
import torch
import toys
from folding import EMBED, LOW_RANK, MLP, TRAIN, fold
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from tenfold.models.loading import from_pretrained
from tenfold.models.output_folder import check_output
from tenfold.models.quantization_config import TenfoldConfig

PLACED = {"role": "attn.qkv", "structure": {"kind": "placed", "base": LOW_RANK}}
ALLOCATORS = {"role": "attn.out", "structure": TRAIN, "share": {"factors": ["core_1"]}}
LOADERS = {"guard": from_pretrained, "plain": AutoModelForCausalLM.from_pretrained}
GUARD_AND_PLAIN = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
APART = "its weights and its config.json do not belong together: save it again from the model"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("written"), toys.build("gpt2")
    fold(model, [ALLOCATORS, PLACED, MLP, EMBED])
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "shards", max_shard_size="10KB")
    return folder


@pytest.fixture
def single(written, tmp_path):
    return shutil.copytree(written / "single", tmp_path / "single")


@pytest.fixture
def shards(written, tmp_path):
    return shutil.copytree(written / "shards", tmp_path / "shards")


def test_a_model_without_such_a_head_is_one_short_sentence(tmp_path):
    toys.build("t5").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"[^ ]+: transformers has no AutoModelForCausalLM of T5; take a model that it has one of$"
    ):
        from_pretrained(tmp_path, AutoModelForCausalLM)


def change_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def refusal(load, folder, kind=ValueError) -> str:
    """Return the sentence, without the folder that only the guard knows."""
    with pytest.raises(kind) as raised:
        load(folder)
    assert "\n" not in str(raised.value)
    assert load is not from_pretrained or str(folder) in str(raised.value)
    return re.sub(rf"^{re.escape(str(folder))}(/config.json)?: ", "", str(raised.value))


def test_a_good_checkpoint_passes(written):
    for name in ("single", "shards"):
        model = from_pretrained(written / name)
        assert torch.equal(toys.logits(model), toys.logits(AutoModelForCausalLM.from_pretrained(written / name)))


@GUARD_AND_PLAIN
@pytest.mark.parametrize("form", ["single", "shards"])
def test_another_rank_than_the_file_has(load, form, request):
    folder = request.getfixturevalue(form)
    change_config(folder, lambda stored: stored["sites"]["transformer.wte"]["structure"].update(rank=7))
    assert refusal(load, folder) == (
        "transformer.wte.left has shape (97, 5), but config.json says LowRank(out_features=97, in_features=32, "
        "rank=7), which needs (97, 7); restore the config.json that was saved with these weights"
    )


@GUARD_AND_PLAIN
@pytest.mark.parametrize(
    "key",
    [
        "transformer.h.1.mlp.c_proj.inner",
        "transformer.h.0.attn.c_attn.rows",
        "transformer.shared_factors.rule_0_attn_out_core_1_0",
    ],
)
def test_a_factor_that_no_file_holds(load, key, single):
    """Transformers alone would leave it as it is: whatever was in memory there."""
    change_weights(single, lambda weights: weights.pop(key))
    assert refusal(load, single) == f"the checkpoint lacks {key} (1 tensors of factorized layers); {APART}"


@GUARD_AND_PLAIN
def test_a_newer_format(load, single):
    change_config(single, lambda stored: stored.update(format_version=2))
    newer = "the checkpoint has format version 2, this tenfold reads up to 1; install a newer tenfold"
    assert refusal(load, single) == newer


@GUARD_AND_PLAIN
def test_an_unknown_kind_of_structure(load, single):
    change_config(single, lambda stored: stored["sites"]["transformer.wte"]["structure"].update(kind="low_renk"))
    message = refusal(load, single)
    assert message.startswith("site transformer.wte of the checkpoint: there is no structure 'low_renk'; choose one of")


@GUARD_AND_PLAIN
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda site: site["structure"].pop("rank"), "low_rank needs rank"),
        (lambda site: site["structure"].update(rnk=3), "low_rank has no field 'rnk'"),
        (lambda site: site["structure"].update(rank="five"), "'rank': 'five'} is no structure; restore the"),
        (lambda site: site.pop("structure"), "structure: field required, not {'bias': False}; restore the"),
    ],
    ids=["missing", "unknown", "text", "nothing"],
)
def test_a_structure_that_is_none(load, change, complaint, single):
    change_config(single, lambda stored: change(stored["sites"]["transformer.wte"]))
    message = refusal(load, single)
    assert message.startswith("site transformer.wte of the checkpoint: ")
    assert complaint in message


def test_unknown_keys_of_the_configuration_are_kept_out(single):
    change_config(single, lambda stored: stored.update(colour="blue"))
    again = from_pretrained(single)
    stored = TenfoldConfig(**json.loads((single / "config.json").read_text())["quantization_config"])
    assert stored.to_dict() == again.config.quantization_config.to_dict()


def test_a_dense_model_is_not_folded_while_it_is_read(tmp_path):
    toys.build("gpt2").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"^the configuration is that of a compressed checkpoint; compress a dense one with"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TenfoldConfig())


# what only the guard can see -----------------------------------------------------------------------------------------


def test_a_missing_shard(shards):
    gone = sorted(shards.glob("model-*.safetensors"))[1]
    gone.unlink()
    message = refusal(from_pretrained, shards, FileNotFoundError)
    assert message == f"{shards} lacks the weights {gone.name}; copy that file there too"


def test_a_missing_file_of_weights(single):
    (single / "model.safetensors").unlink()
    message = refusal(from_pretrained, single, FileNotFoundError)
    assert message == f"{single} holds no weights (*.safetensors); copy them there too"


@pytest.mark.parametrize("present", [True, False])
def test_a_folder_without_a_model(present, tmp_path):
    folder = tmp_path if present else tmp_path / "nowhere"
    message = refusal(from_pretrained, folder, FileNotFoundError)
    assert message == f"{folder} holds no config.json; give a folder that save_pretrained wrote"


def test_an_ordinary_tensor_that_is_missing(single):
    """Transformers warns and draws it at random."""
    change_weights(single, lambda weights: weights.update(other=weights.pop("transformer.ln_f.weight")))
    assert isinstance(AutoModelForCausalLM.from_pretrained(single), torch.nn.Module)
    message = refusal(from_pretrained, single)
    assert message == f"{single} lacks transformer.ln_f.weight (1 tensors) and has other (1 tensors) left over; {APART}"


def test_the_new_head_of_another_class_is_not_missing(single):
    with pytest.warns(UserWarning, match=r"has no score.weight: this head of a GPT2ForSequenceClassification is new"):
        model = from_pretrained(single, AutoModelForSequenceClassification, num_labels=3)
    assert model.score.weight.shape == (3, 32)


def test_dense_models_pass(tmp_path):
    model = toys.build("bert")
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, type(model))
    torch.testing.assert_close(toys.logits(again), toys.logits(model))


def test_without_the_hook_transformers_only_warns(single, monkeypatch, caplog):
    """Why the model card says: import tenfold. Nothing can be done about it from a checkpoint."""
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "tenfold")
    library = logging.getLogger("transformers")
    monkeypatch.setattr(library, "propagate", True)
    with caplog.at_level("WARNING", "transformers"):
        model = AutoModelForCausalLM.from_pretrained(single)
    assert "Unknown quantization type, got tenfold" in caplog.text
    assert type(model.transformer.wte) is torch.nn.Embedding


# places to write -----------------------------------------------------------------------------------------------------


def test_a_result_is_not_written_over_another(tmp_path):
    for free in (tmp_path, tmp_path / "new"):
        assert not check_output(free, overwrite=False)
    (tmp_path / "note").write_text("mine")
    for taken in [tmp_path]:
        with pytest.raises(FileExistsError, match="is there already and not empty; choose another folder or add"):
            check_output(taken, overwrite=False)
        assert not check_output(taken, overwrite=True)
