"""Progress bars around a compression."""

import plain
import pytest
from models import toys
from rich.progress import track
from tqdm import tqdm

from tenfold.compression.compress import compress
from tenfold_cli import output


@pytest.mark.parametrize("progress", [tqdm, track, output.Progress("compressing")])
def test_what_wraps_a_list_can_be_told_the_phase(progress):
    recipe = {"replace": [{"prune": "mlp"}], "budget": {"keep": 0.6, "of": "sites"}}
    _, report = compress(toys.build("llama"), recipe, text=plain.text(4), progress=progress)
    assert report["parameters"]["total"] < report["parameters"]["dense"]
