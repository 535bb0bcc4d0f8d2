"""Checkpoints that were written once are read for ever: every format version and structure, and the logits of then."""

import json
import re
from pathlib import Path

import pytest
import torch

import tenfold.structure
from tenfold.models.quantization_config import VERSION
from tenfold.structure.base import FactorSpec

HERE = Path(__file__).parent
FOLDERS = sorted(path.parent for path in HERE.glob("version-*/*/config.json"))
IDS = torch.arange(14).reshape(2, 7) + 1


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_golden_checkpoints_give_the_logits_of_then(folder):
    expected = torch.tensor(json.loads((folder / "logits.json").read_text())).reshape(*IDS.shape, -1)
    assert expected.std() > 0.1
    model, _ = tenfold.load(folder, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
        if folder.name != "cola":  # has no matrix
            torch.testing.assert_close(tenfold.densify(model)(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_every_structure_and_format_version_has_its_folder():
    configs = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in FOLDERS]
    assert {config["format_version"] for config in configs} == set(range(1, VERSION + 1))
    named = set(re.findall(r'"kind": "([a-z_]+)"', json.dumps(configs)))
    public = [value for value in vars(tenfold.structure).values() if isinstance(value, type)]
    assert {value.kind for value in public if issubclass(value, FactorSpec) and value.kind} <= named
    assert max(file.stat().st_size for folder in FOLDERS for file in folder.iterdir()) < 10_000
