"""peft on compressed models: LoRA on factors, and on matrices that are only narrower, trains, saves, loads and merges."""

import pytest
import torch
from models import toys
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tenfold.compression.calibration import Calibration
from tenfold.compression.compress import compress
from tenfold.integrations.peft import lora_config

IDS = torch.randint(3, 94, (4, 2, 16), generator=torch.Generator().manual_seed(0))
WORDS = Calibration([{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in IDS], {"files": ["random"]})
LOW_RANK = [{"role": ["attn.q", "mlp.in"], "structure": {"kind": "low_rank"}, "keep": 0.5}]
NARROW = [{"prune": "mlp"}]


@pytest.mark.parametrize("rules", [LOW_RANK, NARROW], ids=["low_rank", "narrow"])
def test_lora_trains_saves_loads_and_merges(rules, tmp_path):
    pruned = rules is NARROW
    budget = {"budget": {"keep": 0.7}, "calibrate": {}} if pruned else {}
    model, _ = compress(toys.build("llama"), {"replace": rules, **budget}, text=WORDS if pruned else None)
    model.save_pretrained(tmp_path / "model")
    config = lora_config(model, r=2, task_type="CAUSAL_LM")
    compressed = {name.rpartition(".")[0] for name in config.target_parameters}
    assert len(compressed) == (6 if pruned else 4) and len(compressed) + len(config.target_modules) == 14
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), config)
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], 0.02)
    ids = torch.arange(3, 27).reshape(2, 12)
    losses = []
    for _ in range(4):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    tuned.eval().save_pretrained(tmp_path / "adapter")
    expected = toys.logits(tuned)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "adapter")
    torch.testing.assert_close(toys.logits(loaded.eval()), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(toys.logits(merged), expected, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(toys.logits(again.eval()), expected, atol=1e-5, rtol=1e-5)


def test_roles_choose_the_matrices():
    model = toys.build("gpt2")
    config = lora_config(model, ["attn.qkv"])
    assert sorted(config.target_modules) == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    assert config.fan_in_fan_out
    with pytest.raises(ValueError, match=r"no matrix of the blocks has one of the roles attn\.q"):
        lora_config(model, ["attn.q"])
