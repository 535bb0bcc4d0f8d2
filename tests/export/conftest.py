"""The toys are those of the tests of models; every export is read once, in a process of its own."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "models"))

from exports import CASES, auto_class, compressed, in_plain_process

from tenfold.export.formats import export


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Return ``{case: (reference, logits or traceback, folder)}`` of all toys in the formats that transformers reads."""
    work, expected, jobs = tmp_path_factory.mktemp("exported"), {}, {}
    for case, (name, recipe, formats) in CASES.items():
        expected[case] = compressed(name, work / case / "compressed", recipe)
        for number, to in enumerate(formats):
            torch.manual_seed(number)
            folder = export(work / case / "compressed", to, work / case / f"{case}-{to}".replace("_", "-"))
            jobs[f"{case} {to}"] = (folder, "AutoModelForCausalLM" if to == "remote-code" else auto_class(name))
    found = in_plain_process(jobs, work)
    return {job: (expected[job.split()[0]], found[job], folder) for job, (folder, _) in jobs.items()}
