"""The README's program is examples/first.py, and prints what the README shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def test_the_program_prints_what_the_readme_shows(tmp_path):
    readme = (ROOT / "README.md").read_text()
    program, shown = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", readme, re.S).groups()
    lines = [sorted(text.split()) for text in (program, (ROOT / "examples/first.py").read_text())]
    assert lines[0] == lines[1]  # only the order of the imports may differ
    assert len([line for line in program.splitlines() if line]) <= 12
    (tmp_path / "tenfold").symlink_to(ROOT / "tenfold")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, ROOT / "examples/first.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    for got, expected in zip(ran.stdout.splitlines(), shown.splitlines(), strict=True):
        assert NUMBER.sub("#", got) == NUMBER.sub("#", expected)
        for one, other in zip(NUMBER.findall(got), NUMBER.findall(expected), strict=True):  # devices round differently
            assert abs(float(one) / float(other) - 1) < 1e-2
