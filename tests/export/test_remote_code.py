"""The modelling file: it is used like any model of transformers, and says what it needs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
from exports import EVERY_STRUCTURE, compressed
from transformers import AutoModelForCausalLM

from tenfold.export.formats import export


@pytest.mark.parametrize(("name", "recipe"), [("gpt2", EVERY_STRUCTURE), ("llama-tied", ((24, 40), (1, 2)))])
def test_a_process_without_tenfold_generates_saves_and_trains(name, recipe, tmp_path):
    compressed(name, tmp_path / "compressed", recipe)
    folder = export(tmp_path / "compressed", "remote-code", tmp_path / "exported")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name("plain_use.py"), folder, tmp_path]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")
    ids = torch.arange(3, 15).reshape(1, 12)
    assert torch.equal(torch.load(tmp_path / "generated.pt"), ours.generate(ids, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("case", ["structures", "t5", "gemma3_text"])
def test_the_file_is_plain_python_without_tenfold(exported, case):
    text = (exported[f"{case} remote-code"][2] / "modeling_tenfold.py").read_text()
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in modules} == {"itertools", "torch", "transformers"}
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"exec", "eval", "open", "__import__", "compile"}
    assert max(map(len, text.splitlines())) <= 130
    assert len(text.splitlines()) < 260


def test_cola_has_no_matrix_and_runs(tmp_path):
    recipe = [{"role": "mlp.in", "structure": {"kind": "cola", "rank": 8}}]
    model = toys.build("llama")
    from folding import fold

    fold(model, recipe, source="noise")
    model.save_pretrained(tmp_path / "compressed")
    folder = export(tmp_path / "compressed", "remote-code", tmp_path / "exported-cola")
    found = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.testing.assert_close(toys.logits(found.eval()), toys.logits(model), atol=1e-5, rtol=1e-5)
    for to in ("dense", "stock", "gguf"):
        with pytest.raises(ValueError, match=r"cola has a non-linearity .* export to remote-code"):
            export(tmp_path / "compressed", to, tmp_path / to)
