"""Run by each of two processes in the test of sharded commands: torchrun sharded_commands.py FILE, lists of arguments.

accelerate shards parameters (FSDP2) on accelerators only; here it does so on CPUs, too.
"""

import json
import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from tenfold_cli import app

SETTINGS = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
plain = AcceleratorState.__init__


def anywhere(self, *arguments, fsdp_plugin=None, **keywords):
    plain(self, *arguments, fsdp_plugin=fsdp_plugin, **keywords)
    if fsdp_plugin is not None:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    os.environ |= SETTINGS
    AcceleratorState.__init__ = anywhere
    for command in json.loads(Path(sys.argv[1]).read_text()):
        app(command, standalone_mode=False)
    os._exit(0)  # threads of gloo may still be there when the interpreter is taken down, and abort it
