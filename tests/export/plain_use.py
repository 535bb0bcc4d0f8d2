"""Run in a process of its own, where tenfold can't be imported: generate with an exported model, save it, train it a step."""

import sys

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

sys.modules["tenfold"] = None  # importing it raises
folder, work = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.arange(3, 15).reshape(1, 12)
generated = model.generate(ids, max_new_tokens=6, do_sample=False)
assert torch.equal(generated, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))

# vLLM's transformers backend: the base model, from a configuration alone, with an attention that can be exchanged
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_config(config, trust_remote_code=True)
assert base._supports_attention_backend
prefix = model.base_model_prefix + "."
assert base.state_dict().keys() == {key.removeprefix(prefix) for key in model.state_dict() if key.startswith(prefix)}
base.load_state_dict(model.base_model.state_dict())
torch.testing.assert_close(base.eval()(ids)[0], model.base_model(ids)[0])

model.save_pretrained(f"{work}/saved")
again = AutoModelForCausalLM.from_pretrained(f"{work}/saved", trust_remote_code=True).eval()
assert torch.equal(again(ids).logits, model(ids).logits)

before = {name: value.clone() for name, value in model.named_parameters()}
arguments = TrainingArguments(
    f"{work}/run", max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, learning_rate=0.1
)
data = [{"input_ids": ids[0], "labels": ids[0]}] * 4
Trainer(model, arguments, train_dataset=data).train()
changed = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
assert len(changed) > 0.8 * len(before), sorted(before.keys() - set(changed))
torch.save(generated, f"{work}/generated.pt")
