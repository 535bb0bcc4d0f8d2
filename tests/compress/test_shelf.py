"""What is large goes back to the system when it is dropped."""

import subprocess
import sys

import pytest

CODE = """
import torch
from tenfold.compress.shelf import hold_little
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) // 1024
{}
pins = []
def rounds():
    for _ in range(2):
        large = []
        for _ in range(12):
            large.append(torch.ones(3 * 2**20))  # 12 MB
            pins.append(torch.ones(2000))  # small ones that stay lie between and behind them
        del large
before = resident()
rounds()
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_large_tensors_are_given_back():
    def kept(line: str) -> int:
        done = subprocess.run([sys.executable, "-c", CODE.format(line)], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert kept("hold_little()") < 20
    assert kept("") > 20, "hold_little is not needed any more"
