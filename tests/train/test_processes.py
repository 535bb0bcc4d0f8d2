"""Parameters sharded over two processes (FSDP2), cores that layers share among them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from train import sharded


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_sharded_parameters_train_as_whole_ones(tmp_path, kind):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", sharded.__file__]
    tests = str(Path(__file__).parents[1])
    paths = os.pathsep.join([tests, str(Path(tests).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([*run, str(tmp_path / "losses.json"), kind], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "losses.json").read_text())
    np.testing.assert_allclose(found, sharded.losses(kind, False), rtol=1e-5 if kind == "adamw" else 1e-2)
    assert found[-1] < found[0]
