from transformers import AutoModelForCausalLM

import tenfold

model, tokenizer = tenfold.load("tenfold/demo")  # a folder, or a name on the hub such as gpt2
recipe = {"replace": [{"role": ["mlp.in", "mlp.out"], "keep": 0.7, "structure": {"kind": "low_rank"}}]}
model, report = tenfold.compress(model, recipe)
print(report["parameters"])
print(tenfold.evaluate(model, tokenizer, ["tenfold/demo/heldout.jsonl"], limit=10_000)["perplexity"])
tenfold.save(model, "out/folded", tokenizer, report)

again = AutoModelForCausalLM.from_pretrained("out/folded")
print(again.transformer.h[0].mlp.c_fc)
