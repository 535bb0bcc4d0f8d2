"""Commands that measure or use a model as it is: evaluate, generate, bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tenfold_cli.options import (
    FORMATS,
    Device,
    Dtype,
    Json,
    Model,
    Seed,
    given,
    is_first,
    load_with_tokenizer,
    shows_defaults,
)
from tenfold_cli.output import PhaseProgress, show_json, show_layer_times, show_model_speeds, show_table

MODEL_ONLY = {
    "against",
    "batch_size",
    "length",
    "new_tokens",
    "training",
    "compile",
}  # options of bench without --layers


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Model folders or names.")],
    text: Annotated[list[str] | None, typer.Option(help=f"Text to score: {FORMATS}")] = None,
    task: Annotated[str | None, typer.Option(help="Instead of --text: a task such as cola or samsum.")] = None,
    data: Annotated[Path | None, typer.Option(help="With --task: the folder with its files.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per window; default: the context, at most 1024.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens from window to window; default: the window.")] = None,
    pretokenized: Annotated[bool, typer.Option("--pretokenized", help="The text is WikiText's .tokens.")] = False,
    word_perplexity: Annotated[bool, typer.Option("--word-perplexity", help="Perplexity per word, not token.")] = False,
    limit: Annotated[int | None, typer.Option(help="Score only the first tokens of the text, or examples.")] = None,
    against: Annotated[Path | None, typer.Option(help="A JSON file of this command to compare with.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the results to this JSON file.")] = None,
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure perplexity and bits per byte under a protocol that is printed with them, or score a task."""
    from tenfold import api

    if bool(text) == bool(task):
        raise ValueError("give either --text FILE, for the perplexity, or --task NAME with --data FOLDER")
    if task and data is None:
        raise ValueError(f"--task {task} needs the folder with its files: --data FOLDER")
    files, results = api.check_texts(text or ()), json.loads(against.read_text()) if against and text else []
    for name in models:
        progress = PhaseProgress(name)
        if task:
            model, tokenizer = api.load(name, device, dtype)
            scores = api.evaluate_task(model, tokenizer, task, data, limit=limit, progress=progress)
        else:
            model, tokenizer = load_with_tokenizer(name, device, dtype)
            protocol = {"text": "tokenised"} if pretokenized else {}
            protocol |= {"normaliser": "words"} if word_perplexity else {}
            scores = api.evaluate(model, tokenizer, files, window, stride, limit=limit, progress=progress, **protocol)
        results.append({"model": name} | scores)
    if text:
        api.comparable(results)
    if not is_first():
        return
    if output is not None:
        output.write_text(json.dumps(results, indent=1))
    if as_json:
        show_json(results)
    elif task:
        metrics = [key for key, value in results[0].items() if isinstance(value, float)]
        show_table(["model", *metrics], [[r["model"], *(f"{r[name]:.4f}" for name in metrics)] for r in results])
        print(f"task {task}, {results[0]['data']}, {results[0]['examples']:,} examples")
    else:
        rows = [
            [r["model"], f"{r['perplexity']:.3f}", f"{r['bits_per_byte']:.4f}", f"{r['tokens']:,}"] for r in results
        ]
        show_table(["model", "perplexity", "bits per byte", "tokens"], rows)
        print("protocol:", ", ".join(f"{key} {value}" for key, value in results[0]["protocol"].items()))


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The beginning of the text.")],
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens to generate at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature; 0 is greedy.")] = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Continue a text."""
    from tenfold import api

    loaded, tokenizer = load_with_tokenizer(model, device, dtype)
    sampling = given(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    print(api.generate(loaded, tokenizer, prompt, **sampling))


def bench(
    context: typer.Context,
    model: Model,
    against: Annotated[str | None, typer.Option(help="Another model; default: the dense twin.")] = None,
    batch_size: Annotated[list[int] | None, typer.Option(help="Sequences per batch; repeat for more sizes.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of the prompt; default: the context, at most 512.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens to generate one at a time; default: 16.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed repetitions.")] = None,
    training: Annotated[bool, typer.Option("--training", help="Also time training steps.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Under torch.compile, with a static cache.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Time each structure by itself, not the model.")] = False,
    dense_cache: Annotated[bool | None, typer.Option(help="Cache dense matrices where that is faster.")] = None,
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure tokens per second and memory against the dense twin or another model, alternating in one run."""
    from tenfold import api
    from tenfold.evaluation.bench_model import sizes
    from tenfold.evaluation.timing import check_counts

    options = [one for one in context.command.params if one.name in MODEL_ONLY]
    stated = [one.opts[0] for one in options if context.get_parameter_source(one.name).name == "COMMANDLINE"]
    if layers and stated:
        raise ValueError(f"--layers times layers by themselves, with 1 to 4,096 rows; leave {', '.join(stated)} out")
    batch_sizes = [given(batch_size=size) for size in batch_size or [None]]
    for size in batch_sizes:
        check_counts(**size, length=length, new_tokens=new_tokens, repeats=repeats)
    loaded, _ = api.load(model, device, dtype)
    progress, repeated = PhaseProgress("measuring"), given(repeats=repeats)
    if layers:
        cells = api.bench_layers(loaded, progress=progress, **repeated)
        if not cells:
            raise ValueError(f"no layer of {model} is structured; compress it first (tenfold compress)")
        return show_json(cells) if as_json else show_layer_times(cells)
    other = None if against is None else api.load(against, device, dtype)[0]
    sizes([loaded] if other is None else [loaded, other], length, new_tokens)  # refuse before a progress bar is there
    how = given(cache=dense_cache, length=length, new_tokens=new_tokens) | repeated
    how |= {"against": other, "training": training, "compiled": compile}
    results = [api.bench(loaded, **size, **how) for size in progress(batch_sizes)]
    if as_json:
        return show_json(results if len(results) > 1 else results[0])
    show_model_speeds(results, "dense" if against is None else "other")
    if results[0]["cached"]:
        print("cached W: layers that multiply by their dense matrix at these rows, as dense ones do")
    return None


COMMANDS = {
    evaluate: None,
    generate: shows_defaults("api.py:generate"),
    bench: shows_defaults("evaluation/bench_model.py:bench", dense_cache="cache"),
}
