"""Model cards: how to load the model, what it was made from, under which licence, and its figures."""

import re
from pathlib import Path

import pytest
import toys
import transformers

import tenfold
from tenfold.models.model_card import read_card, save_compressed

GOLDEN = Path(__file__).parents[1] / "golden" / "version-1" / "low_rank"


@pytest.fixture
def base(tmp_path):
    """A dense model as it is in the cache of a hub, with a licence."""
    folder = tmp_path / "models--some--base" / "snapshots" / "0123"
    toys.build("llama").save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nlicense_name: [no text]\ntags: [text]\n---\nabout\n")
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["stock", "compressed", "encoder"])
def test_the_code_on_a_card_loads_the_model(tmp_path, monkeypatch, kind):
    model = tenfold.load(GOLDEN, "cpu")[0] if kind == "compressed" else toys.build({"stock": "llama"}.get(kind, "bert"))
    save_compressed(model, tmp_path / 'it\'s "one"')
    header, body = read_card(tmp_path / 'it\'s "one"' / "README.md")
    code = re.search("```python\n(.*?)```", body, re.DOTALL)[1]
    assert ("import tenfold" in code) == (kind == "compressed")
    assert header["library_name"] == ("tenfold" if kind == "compressed" else "transformers")
    assert header["tags"] == ["tenfold", "factorized" if kind == "compressed" else "pruned"]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert type(names["model"]) is type(model)


def test_base_and_licence_pass_from_card_to_card(tmp_path, base):
    save_compressed(base, tmp_path / "compressed")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")
    save_compressed(again, tmp_path / "healed")
    for name in ("compressed", "healed"):
        header, _ = read_card(tmp_path / name / "README.md")
        assert header["base_model"] == "some/base" and header["base_model_relation"] == "finetune"
        assert header["license"] == "mit" and "license_name" not in header


def test_a_path_is_no_name_of_a_base_model(tmp_path, base):
    for name in (tmp_path, tmp_path / "gone"):
        base.name_or_path = str(name)
        save_compressed(base, tmp_path / "out")
        assert "base_model" not in read_card(tmp_path / "out" / "README.md")[0]
