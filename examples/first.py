from transformers import AutoModelForCausalLM

import tenfold

model, tokenizer = tenfold.load("tenfold/demo", dtype="float32")  # a folder, or a name on the hub such as gpt2
text = tenfold.read_calibration(model, tokenizer, ["tenfold/demo/calibration.jsonl"], num_samples=16)
model, report = tenfold.compress(model, "recommended", text=text)  # keep=0.8 unless given
print(report["parameters"])
print(tenfold.evaluate(model, tokenizer, ["tenfold/demo/heldout.jsonl"], limit=10_000)["perplexity"])
tenfold.save(model, "out/small", tokenizer, report)

again = AutoModelForCausalLM.from_pretrained("out/small")
print(again.transformer.h[0].mlp.c_fc)
