"""Commands that measure or use a model as it is: evaluate, generate, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tenfold_cli.options import FORMATS, Device, Dtype, Json, Model, Seed, given, is_first, shows_defaults
from tenfold_cli.output import Progress, say, show_json, show_layer_times, show_model_speeds, show_table


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Model folders or names.")],
    text: Annotated[list[str] | None, typer.Option(help=f"Text to score: {FORMATS}")] = None,
    task: Annotated[str | None, typer.Option(help="Instead of --text: a task such as cola or samsum.")] = None,
    data: Annotated[Path | None, typer.Option(help="With --task: the folder with its files.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Instead of --text: tasks of lm-evaluation-harness, such as hellaswag,piqa.")
    ] = None,
    task_folder: Annotated[Path | None, typer.Option(help="With --tasks: a folder with further task files.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per window; default: the context, at most 1024.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens from window to window; default: the window.")] = None,
    pretokenized: Annotated[bool, typer.Option("--pretokenized", help="The text is WikiText's .tokens.")] = False,
    word_perplexity: Annotated[bool, typer.Option("--word-perplexity", help="Perplexity per word, not token.")] = False,
    limit: Annotated[int | None, typer.Option(help="Score only the first tokens of the text, or examples.")] = None,
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure perplexity and bits per byte under a protocol that is printed with them, or score a task."""
    from tenfold import api

    if sum(map(bool, (text, task, tasks))) != 1:
        raise ValueError(
            "give either --text FILE, for the perplexity, or --task NAME with --data FOLDER, or --tasks NAME,NAME"
        )
    if task_folder is not None and not tasks:
        raise ValueError(f"--task-folder {task_folder} changes nothing without --tasks; leave it out")
    if tasks:
        return _evaluate_harness(models, tasks.split(","), task_folder, limit, as_json, device, dtype)
    if task and data is None:
        raise ValueError(f"--task {task} needs the folder with its files: --data FOLDER")
    files, results = api.check_texts(text or ()), []
    for name in models:
        progress, (model, tokenizer) = Progress(name), api.load(name, device, dtype)
        if task and data:
            scores = api.evaluate_task(model, tokenizer, task, data, limit=limit, progress=progress)
        else:
            scores = api.evaluate(
                model, tokenizer, files, window, stride, "tokenised" if pretokenized else "raw",
                "words" if word_perplexity else "tokens", limit=limit, progress=progress,
            )  # fmt: skip
        results.append({"model": name} | scores)
    if text:
        api.comparable(results)
    if not is_first():
        return None
    if as_json:
        show_json(results)
    elif task:
        metrics = [key for key, value in results[0].items() if isinstance(value, float)]
        show_table(["model", *metrics], [[r["model"], *(f"{r[name]:.4f}" for name in metrics)] for r in results])
        say(f"task {task}, {results[0]['data']}, {results[0]['examples']:,} examples")
    else:
        rows = [
            [r["model"], f"{r['perplexity']:.3f}", f"{r['bits_per_byte']:.4f}", f"{r['tokens']:,}"] for r in results
        ]
        show_table(["model", "perplexity", "bits per byte", "tokens"], rows)
        say("protocol: " + ", ".join(f"{key} {value}" for key, value in results[0]["protocol"].items()))
    return None


def _evaluate_harness(models, tasks, folder, limit, as_json, device, dtype) -> None:
    from tenfold import api
    from tenfold.evaluation.harness import run_harness

    results = [
        {"model": name, "tasks": run_harness(*api.load(name, device, dtype), tasks, folder, limit)} for name in models
    ]
    if not is_first():
        return None
    if as_json:
        return show_json(results)
    rows = [
        [result["model"], task, metric, f"{value:.4f}"]
        for result in results
        for task, scores in result["tasks"].items()
        for metric, value in scores.items()
    ]
    show_table(["model", "task", "metric", "value"], rows)
    examples = "all examples" if limit is None else f"the first {limit} examples"
    return say(f"by lm-evaluation-harness, {examples}")


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

    loaded, tokenizer = api.load(model, device, dtype)
    sampling = given(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    say(api.generate(loaded, tokenizer, prompt, **sampling))


def bench(
    model: Model,
    against: Annotated[str | None, typer.Option(help="Another model; default: the dense twin.")] = None,
    batch_size: Annotated[list[int] | None, typer.Option(help="Sequences per batch; repeat for more sizes.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of the prompt; default: the context, at most 512.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens to generate one at a time; default: 16.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed repetitions.")] = None,
    training: Annotated[bool, typer.Option("--training", help="Also time training steps.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Under torch.compile, with a static cache.")] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Time each structure by itself at 1 to 4,096 rows, not the model.")
    ] = False,
    dense_cache: Annotated[bool, typer.Option(help="Cache dense matrices where that is faster.")] = True,
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure tokens per second and memory against the dense twin or another model, alternating in one run."""
    from tenfold import api

    loaded, _ = api.load(model, device, dtype)
    repeated = given(repeats=repeats)
    if layers:
        cells = api.bench_layers(loaded, progress=Progress("measuring"), **repeated)
        if not cells:
            raise ValueError(f"no layer of {model} is structured; compress it first (tenfold compress)")
        return show_json(cells) if as_json else show_layer_times(cells)
    other = None if against is None else api.load(against, device, dtype)[0]
    results = [
        api.bench(
            loaded, size, length, new_tokens, against=other, training=training, compiled=compile, cache=dense_cache,
            **repeated,
        )
        for size in batch_size or [1]
    ]  # fmt: skip
    if as_json:
        return show_json(results if len(results) > 1 else results[0])
    return show_model_speeds(results, "dense" if against is None else "other")


COMMANDS = {
    evaluate: None,
    generate: shows_defaults("api:generate"),
    bench: shows_defaults("evaluation.bench_model:bench"),
}
