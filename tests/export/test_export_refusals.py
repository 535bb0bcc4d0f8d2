"""What a format can't hold is one sentence with the reason and the nearest format that can; memory stays at one shard."""

import gc
import json
import weakref

import pytest
from exports import compressed

from tenfold.export import card
from tenfold.export.formats import FORMATS, export
from tenfold.export.trim import find_parts, trim
from tenfold.export.weights import Weights, open_checkpoint, plain_weights


def test_an_unknown_format_and_a_wrong_option(tmp_path):
    compressed("llama", tmp_path / "compressed")
    with pytest.raises(ValueError, match="there is no format 'gguff'; did you mean 'gguf'"):
        export(tmp_path / "compressed", "gguff", tmp_path / "out")
    with pytest.raises(ValueError, match="the format dense has no option outtype"):
        export(tmp_path / "compressed", "dense", tmp_path / "out", outtype="f16")


def test_stock_that_is_as_large_as_dense_is_refused(tmp_path):
    compressed("llama", tmp_path / "compressed")
    with pytest.raises(ValueError, match="stock would be as large as dense; export to dense, or to remote-code"):
        export(tmp_path / "compressed", "stock", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stock_is_refused_where_no_configuration_says_the_width(tmp_path):
    compressed("openai-gpt", tmp_path / "compressed", ((24, 40), None))
    with pytest.raises(ValueError, match="stock would be as large as dense; export to dense, or to remote-code"):
        export(tmp_path / "compressed", "stock", tmp_path / "out")


@pytest.mark.parametrize("to", ["stock", "remote-code", "gguf"])
def test_mixtures_of_experts_are_exported_to_dense(to, tmp_path):
    compressed("mixtral", tmp_path / "compressed")
    with pytest.raises(ValueError, match="export to dense" if to != "gguf" else "export to"):
        export(tmp_path / "compressed", to, tmp_path / "out")


def test_gguf_needs_a_tokenizer(tmp_path):
    compressed("llama", tmp_path / "compressed")
    with pytest.raises(ValueError, match=r"copy tokenizer\.json"):
        export(tmp_path / "compressed", "gguf", tmp_path / "out")


@pytest.mark.parametrize(("to", "package"), [("gguf", "gguf"), ("onnx", "onnx and onnxscript")])
def test_a_missing_package_gives_the_line_to_install(to, package, tmp_path, monkeypatch):
    compressed("llama", tmp_path / "compressed")
    monkeypatch.setattr(card, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'tenfold\[{to}\]'"):
        export(tmp_path / "compressed", to, tmp_path / "out")


def test_the_card_keeps_licence_and_figures(tmp_path):
    compressed("llama", tmp_path / "compressed")
    old = "---\nlicense: mit\ntags: [compressed]\n---\n\n# old\n\nLoad it so.\n\nMade by:\n\n```\ntenfold\n```\n\n## Figures\n"
    (tmp_path / "compressed" / "README.md").write_text(old)
    text = (export(tmp_path / "compressed", "remote-code", tmp_path / "out") / "README.md").read_text()
    assert "license: mit" in text
    assert 'from_pretrained("out", trust_remote_code=True)' in text
    assert "## Figures" in text
    assert "Load it so" not in text


def test_an_export_replaces_a_compressed_model(tmp_path):
    compressed("llama", tmp_path / "compressed")
    with pytest.raises(FileExistsError):
        export(tmp_path / "compressed", "dense", tmp_path / "compressed")
    export(tmp_path / "compressed", "dense", tmp_path / "compressed", overwrite=True)
    assert "quantization_config" not in json.loads((tmp_path / "compressed" / "config.json").read_text())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_shard_is_in_memory_at_most(name, tmp_path):
    """Of all tensors that were read, no more than a shard is alive when the next one is."""
    compressed(name, tmp_path / "compressed", ((24, 40), (1, 2)) if name == "llama" else None)
    limit, alive, most = 20_000, [], 0
    with open_checkpoint(tmp_path / "compressed") as checkpoint:
        weights = plain_weights(checkpoint)
        parts = find_parts(weights)
        tensors, narrow = trim(weights, parts, lambda part: len(part.used))

        def read(key):
            nonlocal most
            value = narrow(key).clone()
            alive.append((weakref.ref(value), value.nbytes))
            gc.collect()
            most = max(most, sum(size for reference, size in alive if reference() is not None))
            return value

        (tmp_path / "out").mkdir()
        Weights(weights.model, tensors, read).save(tmp_path / "out", limit)
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert most <= limit + largest
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3


def test_trimming_is_by_a_loop(tmp_path):
    """Units whose column in the output matrix is zero are those that are cut."""
    compressed("llama", tmp_path / "compressed", ((24, 40), (1, 2)))
    with open_checkpoint(tmp_path / "compressed") as checkpoint:
        weights = plain_weights(checkpoint)
        for part in find_parts(weights):
            out = weights.read(f"{part.sites[-1].path}.weight")
            width = out.shape[1] // part.units
            used = [k for k in range(part.units) if bool(out[:, k * width : (k + 1) * width].any())]
            assert part.used.tolist() == used
            assert part.units in (2, 48)


def test_every_format_says_how_to_load_it():
    for kind in FORMATS.values():
        assert "{title}" in kind.load
        assert kind.what.endswith(".")
