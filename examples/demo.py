"""Run the main job on the small model that ships with tenfold: price, compress, measure, heal, generate, save, reload.

    make demo            everything, under five minutes on two cores
    make demo QUICK=1    less text and shorter healing, under two minutes

Text: tenfold/demo/*.jsonl, public-domain books and CC0 blogs. `tenfold pretrain` trained the model.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tenfold_cli
from tenfold_cli.output import Progress, show_table

KEEP = 0.8  # of all parameters: 0.75 of the matrices of the blocks, which hold 81 % of this model
STRUCTURES = [
    ("low rank", {"kind": "low_rank"}),
    ("Kronecker sum", {"kind": "kronecker", "parts": 2}),
    ("tensor train", {"kind": "tensor_train", "parts": 3}),
    ("block train (BTT)", {"kind": "block_train"}),
    ("block train + low rank", {"kind": "sum", "parts": [{"kind": "block_train"}, {"kind": "low_rank"}]}),
]
PRICED = ["ttm-64", "krony-81m", "tqcompressor", "kngpt2", "tensorgpt", "low-rank", "monarch"]
PROMPT = "The old house stood at the end of the"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--quick", action="store_true", help="less text, shorter healing")
parser.add_argument("--output", type=Path, help="folder for the healed model and demo.json; default: a temporary one")
quick, output = parser.parse_args().quick, parser.parse_args().output
if output is not None and output.exists():
    sys.exit(f"{output} is there already; choose another folder")
begun = time.perf_counter()
tenfold_cli.silence_libraries()
print("loading torch and transformers ...", file=sys.stderr)

import torch  # noqa: E402

import tenfold  # noqa: E402
from tenfold import api  # noqa: E402
from tenfold.models.distillation_config import Heal  # noqa: E402

demo = Path(tenfold.__file__).parent / "demo"
limit = 12_000 if quick else 40_000
steps = 24 if quick else 140

print("\n1. Published recipes on GPT-2 small, counted without allocating weights\n")
rows = []
for name in Progress("pricing")(PRICED):
    priced = tenfold.inspect("gpt2", tenfold.load_recipe(name))
    count, flops = priced["parameters"], priced["flops_per_token"]
    rows.append([name, f"{count['total']:,}", f"{count['without_head']:,}", *(f"{flops[k] / 1e6:,.0f}" for k in flops)])
show_table(["recipe", "parameters", "without head", "MFLOPs/token, 1 row", "1,024 rows"], rows)

print(f"\n2. The demo model, every matrix of its blocks factorised without data, {KEEP:.0%} of all parameters kept\n")
dense, tokenizer = api.load(demo, dtype="float32")


def measure(label: str, model, seconds: float) -> dict:
    """Return one row of the table."""
    scores = api.evaluate(model, tokenizer, [demo / "heldout.jsonl"], limit=limit, progress=Progress(label))
    speed = api.bench(model, repeats=7, new_tokens=4)
    return {"label": label, "seconds": seconds, "scores": scores, "speed": speed, **api.price(model)}


results = [measure("dense", dense, 0.0)]
models = {}
for label, structure in STRUCTURES:
    recipe = api.recipe_for(structure, KEEP, "model")
    model, report = api.compress(copy.deepcopy(dense), recipe, progress=Progress(f"compressing: {label}"))
    models[label] = model, report
    results.append(measure(label, model, report["seconds"]))

best = min(results[1:], key=lambda row: row["scores"]["perplexity"])["label"]
print(f"3. Healing the best one, {best}, by distillation from the dense model", file=sys.stderr)
healed, report = models[best]
settings = Heal(steps=steps, learning_rate=1e-3, tokens_per_step=2048)
advance = Progress("healing").advance
healing = api.heal(healed, dense, tokenizer, [demo / "healing.jsonl"], settings, advance=advance)
results.append(measure(f"{best}, healed", healed, report["seconds"] + healing["seconds"]))

print("   and the recommended recipe, guided by calibration text, without healing", file=sys.stderr)
recommended = api.with_keep("recommended", KEEP)
text = api.read_calibration(dense, tokenizer, [demo / "calibration.jsonl"], recommended, 32 if quick else 128)
model, calibrated = api.compress(copy.deepcopy(dense), recommended, progress=Progress("recommended"), text=text)
results.append(measure("recommended, calibrated", model, calibrated["seconds"]))

show_table(
    ["", "parameters", "without head", "MFLOPs/token", "perplexity", "bits/byte", "tokens/s", "of dense", "seconds"],
    [
        [
            row["label"],
            f"{row['parameters']['total']:,}",
            f"{row['parameters']['without_head']:,}",
            f"{row['flops_per_token']['1024'] / 1e6:.1f}",
            f"{row['scores']['perplexity']:.2f}",
            f"{row['scores']['bits_per_byte']:.3f}",
            f"{row['speed']['prefill']['tokens_per_second']:,.0f}",
            f"{row['speed']['prefill']['ratio']:.2f}x",
            f"{row['seconds']:.1f}",
        ]
        for row in results
    ],
)
protocol = results[0]["scores"]["protocol"]
print(
    f"\nPerplexity on heldout.jsonl: {results[0]['scores']['tokens']:,} tokens, windows of {protocol['window']}, stride "
    f"{protocol['stride']}. FLOPs at 1,024 rows a call; tokens/s reading a prompt of one window, alternating with the\n"
    "dense twin. Seconds: compression, and healing of the healed row. The head is tied: it has no parameters of its own."
)

print("\n4. A sentence from both\n")
print("dense :", api.generate(dense, tokenizer, PROMPT, 30).replace("\n", " "))
print("healed:", api.generate(healed, tokenizer, PROMPT, 30).replace("\n", " "))

print("\n5. Saved, and reloaded by plain transformers in a new process\n")
with tempfile.TemporaryDirectory() as scratch:
    folder = output or Path(scratch) / "healed"
    report |= {"heal": healing, "evaluation": results[-1]["scores"], "evaluation_dense": results[0]["scores"]}
    api.save(healed, folder, tokenizer, report, "python examples/demo.py")
    (folder / "demo.json").write_text(json.dumps(results, indent=1))
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.save(healed(input_ids=ids).logits, folder / "logits.pt")
    check = f"""
import tenfold, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}).eval()
with torch.no_grad():
    same = torch.equal(model(input_ids=torch.tensor({ids.tolist()})).logits, torch.load({str(folder / "logits.pt")!r}))
print(type(model).__name__, "reloaded, logits equal:", same)
raise SystemExit(not same)
"""
    reloaded = subprocess.run([sys.executable, "-c", check], check=False)
    (folder / "logits.pt").unlink()
print(f"\n{time.perf_counter() - begun:.0f} seconds in all")
sys.exit(reloaded.returncode)
