"""Whatever a model folder is like, ``compress`` reads what ``from_pretrained`` makes of it, or refuses it in a sentence.

The recipe keeps full rank, so that the result must give the logits of the model that was given.
"""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

FULL = """
name: full
replace: [{role: mlp.in, structure: {kind: low_rank, rank: 32}}]
calibrate: {num_samples: 4}
"""
MATRIX = "model.layers.1.mlp.up_proj.weight"


def said(err: str) -> str:
    """Return the one sentence that an error ends with."""
    last = err.strip().splitlines()[-1] if err.strip() else ""
    return last if last.startswith("tenfold: ") else ""


@torch.no_grad()
def logits(folder) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(input_ids=torch.arange(24).reshape(2, 12) + 5).logits.float()


@pytest.fixture
def compress(call, tmp_path):
    """Return the function that compresses a folder to ``out``."""
    (tmp_path / "full.yaml").write_text(FULL)

    def run(folder, *more):
        text = ("--calibrate", tmp_path / "llama" / "text.txt")
        return call("compress", folder, "-o", tmp_path / "out", "--recipe", tmp_path / "full.yaml", *text, *more)

    return run


# name -> change of the folder: what transformers reads, must be read


def shards(files, folder):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder / "new", max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    for file in (folder / "new").glob("model*"):
        file.rename(folder / file.name)


def stale_shards(files, folder):
    """Shards of another model and their index beside the single file."""
    kept = (folder / "model.safetensors").read_bytes()
    files.tensors(folder, lambda found: {key: value * 2 for key, value in found.items()})
    shards(files, folder)
    (folder / "model.safetensors").write_bytes(kept)


def own_head(files, folder):
    """A merged adapter: the configuration says tied, and the file has a head of its own; transformers keeps both."""
    files.configure(folder, tie_word_embeddings=True)


def tied(files, folder):
    files.configure(folder, tie_word_embeddings=True)
    files.tensors(folder, lambda found: {key: value for key, value in found.items() if key != "lm_head.weight"})


def no_dtype(files, folder):
    files.configure(folder, remove=("dtype", "torch_dtype"))
    files.tensors(folder, lambda found: {key: value.bfloat16() for key, value in found.items()})


def bfloat16(files, folder):
    files.configure(folder, dtype="bfloat16")
    files.tensors(folder, lambda found: {key: value.bfloat16() for key, value in found.items()})


def pickled(files, folder):
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


READ = {
    "single": lambda files, folder: None,
    "shards": shards,
    "stale-shards": stale_shards,
    "own-head": own_head,
    "tied": tied,
    "no-dtype": no_dtype,
    "bfloat16": bfloat16,
    "pickled": pickled,
}


@pytest.mark.parametrize("kind", READ)
def test_what_transformers_reads_is_read(compress, files, llama, tmp_path, kind):
    READ[kind](files, llama)
    expected = logits(llama)
    status, _, err = compress(llama)
    if status:
        assert status == 2 and "llama" in said(err), err
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
        return
    near = {"atol": 0.05, "rtol": 0.05} if kind in ("no-dtype", "bfloat16") else {"atol": 1e-3, "rtol": 1e-3}
    torch.testing.assert_close(logits(tmp_path / "out"), expected, **near)
    plain, folded = (AutoModelForCausalLM.from_pretrained(place) for place in (llama, tmp_path / "out"))
    assert folded.dtype == plain.dtype
    ties = [model.lm_head.weight is model.model.embed_tokens.weight for model in (plain, folded)]
    assert ties[0] == ties[1]


# what transformers would fill with random values, or what another tool has quantised, is refused


def prefixed(files, folder):
    files.tensors(folder, lambda found: {f"_orig_mod.{key}": value for key, value in found.items()})


def one_missing(files, folder):
    files.tensors(folder, lambda found: {key: value for key, value in found.items() if key != MATRIX})


def one_layer_more(files, folder):
    files.configure(folder, num_hidden_layers=3)


def one_layer_less(files, folder):
    files.configure(folder, num_hidden_layers=1)


def another_shape(files, folder):
    files.tensors(folder, lambda found: found | {MATRIX: found[MATRIX][:, :-2].contiguous()})


def fp8(files, folder):
    def change(found):
        for key in [key for key in found if key.endswith("proj.weight")]:
            scale = found[key].abs().max() / 448
            found[key], found[f"{key}_scale_inv"] = (found[key] / scale).to(torch.float8_e4m3fn), scale.reshape(1, 1)
        return found

    files.tensors(folder, change)
    files.configure(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})


def int8(files, folder):
    def change(found):
        for key in [key for key in found if key.endswith("proj.weight")]:
            scale = found[key].abs().amax(1)
            found[key.replace("weight", "SCB")] = scale
            found[key] = (found[key] / scale[:, None] * 127).round().to(torch.int8)
        return found

    files.tensors(folder, change)
    files.configure(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})


def packed(files, folder):
    def change(found):
        for key in [key for key in found if key.endswith("proj.weight")]:
            found[key.replace("weight", "qweight")] = found.pop(key).to(torch.int32)
        return found

    files.tensors(folder, change)
    files.configure(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 8})


REFUSED = {
    "prefixed": (prefixed, "tensors"),
    "one-missing": (one_missing, MATRIX),
    "one-layer-more": (one_layer_more, "model.layers.2"),
    "one-layer-less": (one_layer_less, "model.layers.1"),
    "another-shape": (another_shape, MATRIX),
    "fp8": (fp8, "fp8"),
    "int8": (int8, "bitsandbytes"),
    "gptq": (packed, "gptq"),
}
RANDOM = [(kind, command) for kind in list(REFUSED)[:5] for command in ("compress", "evaluate", "export", "heal")]
QUANTISED = [(kind, command) for kind in list(REFUSED)[5:] for command in ("compress", "inspect", "export")]


@pytest.mark.parametrize(("kind", "command"), RANDOM + QUANTISED)
def test_what_would_be_random_is_refused(compress, call, files, llama, tmp_path, kind, command):
    change, named = REFUSED[kind]
    change(files, llama)
    text, out = ("--text", llama / "text.txt"), ("-o", tmp_path / "out")
    if command == "compress":
        status, _, err = compress(llama)
    else:
        heal = (*text, *out, "--loss", "cross_entropy=1", "--steps", 1, "--tokens-per-step", 64)
        given = {"evaluate": (*text, "--window", 32), "heal": heal, "export": ("--to", "dense", *out), "inspect": ()}[
            command
        ]
        status, _, err = call(command, llama, *given)
    assert status == 2 and named in said(err) and "llama" in said(err), (status, err)
    assert not list(tmp_path.glob("*out*"))


# folded checkpoints


@pytest.fixture
def folded(compress, llama, tmp_path):
    assert compress(llama)[0] == 0
    return tmp_path / "out"


@pytest.mark.parametrize(
    "change", [{"quantization_config": {"quant_method": "tenfald"}}, {}], ids=["unknown", "removed"]
)
def test_a_folded_checkpoint_that_says_it_is_dense_is_refused(call, files, folded, change):
    files.configure(folded, () if change else ("quantization_config",), **change)
    status, _, err = call("evaluate", folded, "--text", folded.parent / "llama" / "text.txt", "--window", 32)
    assert status == 2 and "model.layers.0.mlp.up_proj" in err, (status, err)


@pytest.mark.parametrize("version", [0, -1, 0.5, True])
def test_format_versions_are_whole_numbers_from_1_up(call, files, folded, version):
    config = json.loads((folded / "config.json").read_text())["quantization_config"]
    files.configure(folded, quantization_config=config | {"format_version": version})
    status, _, err = call("export", folded, "--to", "dense", "-o", folded.parent / "dense")
    assert status == 2 and "format version" in err, (status, err)


def golden(tmp_path, name="scattered"):
    from pathlib import Path

    return shutil.copytree(next(Path(__file__).parents[1].glob(f"golden/version-*/{name}")), tmp_path / name)


ROWS = "model.layers.0.mlp.up_proj.rows"
MAPS = {
    "out-of-range": lambda rows: rows + 100,
    "negative": lambda rows: rows - 5,
    "twice": lambda rows: torch.zeros_like(rows),
    "int64": lambda rows: rows.to(torch.int64),
    "float": lambda rows: rows.float(),
}


@pytest.mark.parametrize("change", MAPS.values(), ids=MAPS)
def test_index_maps_are_checked(call, files, tmp_path, change):
    folder = golden(tmp_path)
    files.tensors(folder, lambda found: found | {ROWS: change(found[ROWS])})
    status, _, err = call("export", folder, "--to", "dense", "-o", tmp_path / "dense")
    assert status == 2 and ROWS in err, (status, err)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn], ids=str)
def test_factors_are_floating_point_numbers(call, files, tmp_path, dtype):
    folder, key = golden(tmp_path, "low_rank"), "model.layers.0.mlp.up_proj.left"
    files.tensors(folder, lambda found: found | {key: found[key].to(dtype)})
    status, _, err = call("export", folder, "--to", "dense", "-o", tmp_path / "dense")
    assert status == 2 and key in err, (status, err)
