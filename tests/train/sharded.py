"""Run by each of two processes in the test of sharded parameters: torchrun sharded.py FILE."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import toys
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tenfold.api import compress
from tenfold.models.distillation_config import Heal
from tenfold.train.distillation import Distillation
from tenfold.train.optimizer import optimizer_for

RULE = {"role": ["mlp.in", "mlp.out"], "structure": {"kind": "tensor_train", "parts": 3, "rank": 6}}
RULE |= {"share": {"factors": ["core_1"]}}
TOLERANCE = {"adamw": 1e-5, "muon": 1e-2, "healed": 1e-5}
OPTIMIZER = {"adamw": "adamw", "muon": "muon", "healed": "adamw"}
LOSSES = Heal(losses={"kl": 1.0, "cross_entropy": 0.5}, chunk=5)


def losses(kind: str, shard: bool, rank: int = 0, ranks: int = 1) -> list[float]:
    model = toys.build("llama").double()
    compress(model, {"replace": [RULE]})
    model.train()
    if shard:
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer, found = optimizer_for(model, OPTIMIZER[kind], "one", 1e-2, 0.1), []
    if kind == "healed":
        model.forward = Distillation(model, toys.build("llama", 1).double(), LOSSES)
    for step in range(4):
        ids = torch.randint(0, 90, (4, 12), generator=torch.Generator().manual_seed(step % 2))
        mine = ids.chunk(ranks)[rank]
        loss = model(input_ids=mine, labels=mine)["loss"]
        loss.backward()
        optimizer.step()
        model.zero_grad()
        whole = loss.detach().clone()
        if shard:
            dist.all_reduce(whole)
        found.append(float(whole) / ranks)
        if shard and step == 1:
            optimizer = saved_and_loaded(model, optimizer, kind)
    return found


def saved_and_loaded(model, optimizer, kind: str):
    """Return another optimizer that resumes from this one's state, as accelerate's checkpoints of sharded models store it."""
    folder = Path(sys.argv[1]).with_suffix(f".{kind}")
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
    other = optimizer_for(model, OPTIMIZER[kind], "one", 9.9, 0.9)
    state = {"optimizer": get_optimizer_state_dict(model, other)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, other, optim_state_dict=state["optimizer"])
    return other


if __name__ == "__main__":
    dist.init_process_group("gloo")
    result = {kind: losses(kind, True, dist.get_rank(), dist.get_world_size()) for kind in TOLERANCE}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo may still be there when the interpreter is taken down, and abort it
