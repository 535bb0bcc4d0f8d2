"""The command line: parse, call, print. A module of its own, so that ``tenfold --help`` does not import torch."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from tenfold_cli import tasks, training
from tenfold_cli.memory import keep_freed
from tenfold_cli.options import SEEDS, TEXT, Device, Dtype, Json, Model, Output, Overwrite, command, first, stated
from tenfold_cli.output import (
    count_line,
    counted,
    error,
    phased,
    short,
    show_cells,
    show_choices,
    show_json,
    show_speeds,
    show_table,
    tracked,
)

WHOLE = ("--against", "--batch", "--length", "--new-tokens", "--train", "--compile")  # what bench measures models with

app = typer.Typer(
    name="tenfold",
    help="Fold the weight matrices of transformer language models into small tensors.",
    epilog="--debug, anywhere, shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the recipes that ship with tenfold."""
    from tenfold.models.recipe import load_recipe, recipe_names

    rows = [(name, load_recipe(name)) for name in recipe_names()]
    if as_json:
        return show_json([{"name": name, "on": recipe.on, "source": recipe.source} for name, recipe in rows])
    return show_table(["recipe", "on", "source"], [[name, recipe.on or "", recipe.source] for name, recipe in rows])


@app.command()
def inspect(
    model: Model,
    recipe: Annotated[str | None, typer.Option(help="A recipe by name or file; without it the model as it is.")] = None,
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Count parameters and FLOPs of a model, and of what a recipe makes of it; no weights are allocated."""
    from tenfold.models.cost import inspect
    from tenfold.models.recipe import load_recipe

    result = inspect(model, load_recipe(recipe) if recipe else None)
    if as_json:
        return show_json(result)
    rows: dict[tuple, list[int]] = {}
    for site in result["sites"]:
        key = (site["role"], short(site["structure"]), "x".join(map(str, site["shape"])))
        rows.setdefault(key, [0, 0])[0] += 1
        rows[key][1] += site["parameters"]
    table = [[*key, str(number), f"{size:,}"] for key, (number, size) in rows.items()]
    show_table(["role", "structure", "out x in", "sites", "parameters"], table)
    count, flops = result["parameters"], result["flops_per_token"]
    print(
        f"parameters      {count['total']:>15,} with the head, {count['without_head']:,} without; trained {count['trainable']:,}"
    )
    print(f"dense           {count['dense']:>15,}")
    for rows_a_call, number in flops.items():
        dense = result["flops_per_token_dense"][rows_a_call]
        print(f"FLOPs a token   {number:>15,} at {int(rows_a_call):,} rows a call (dense {dense:,})")
    return None


@app.command()
def compress(
    model: Model,
    output: Output,
    recipe: Annotated[str | None, typer.Option(help="A recipe by name or file; recommended with --calibrate.")] = None,
    structure: Annotated[str | None, typer.Option(help="Instead of a recipe: one structure for all blocks.")] = None,
    keep: Annotated[float | None, typer.Option(help="The share of parameters that stays.")] = None,
    of: Annotated[
        str | None,
        typer.Option(
            help="What --keep is a share of: model, without_head, blocks, sites, flops or bytes; the model "
            "unless the recipe says otherwise."
        ),
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            help="Text whose activations guide the fits: .txt, .jsonl, .xz, .gz; hf://datasets/OWNER/NAME; repeat for more."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="With --calibrate: how many windows are read.")] = None,
    heal: Annotated[
        list[str] | None,
        typer.Option(help="Text to heal with behind the compression, or where stages say so."),
    ] = None,
    roles: Annotated[str | None, typer.Option(help="With --structure: roles, for instance mlp.in,mlp.out.")] = None,
    source: Annotated[str, typer.Option(help="Factors from weights, or from noise.")] = "weights",
    max_shard_size: Annotated[str, typer.Option(help="Split the weights into files of at most this size.")] = "5GB",
    overwrite: Overwrite = False,
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Compress a model, guided by a calibration text or without data, and save it."""
    from tenfold import api
    from tenfold.checkpoint_jobs import compress_checkpoint, compress_in_stages
    from tenfold.compress.progress import untold
    from tenfold.models.auto import read_config
    from tenfold.models.checkpoint_format import check_plain
    from tenfold.models.distributed import barrier

    api.check_output(output, overwrite)
    barrier()  # until all of several processes have looked: the first one writes
    if (recipe and structure) or not (recipe or keep) or (not calibrate and not (recipe or structure)):
        raise ValueError(
            "give either --keep SHARE with --calibrate TEXT, or --recipe NAME, or --structure KIND with --keep SHARE"
        )
    if structure:
        chosen = api.recipe_for(structure, keep, of or "model", roles.split(",") if roles else None)
    else:
        chosen = api.with_keep(recipe or "recommended", keep, of)
    useless = {
        "--roles": roles and not structure,
        "--source": source != "weights" and calibrate,
        "--samples": samples is not None and not calibrate,
    }
    if idle := [name for name, value in useless.items() if value]:
        raise ValueError(f"{idle[0]} changes nothing here; leave it out, or see tenfold compress --help")
    if heal:
        chosen = api.with_healing(chosen, calibrated=bool(calibrate))
    given = {"device": device, "dtype": dtype, "overwrite": overwrite, "max_shard_size": max_shard_size}
    announce, progress = (show_choices, phased("compressing")) if first() else (lambda choices: None, untold)
    if chosen.stages:
        with counted("healing") as advance:
            report = compress_in_stages(
                model, output, chosen, api.texts(calibrate or []), api.texts(heal or []), samples, **given,
                command=command(), progress=progress, announce=announce, advance=advance,
            )  # fmt: skip
    elif calibrate:
        report = compress_checkpoint(
            model, output, chosen, api.texts(calibrate), samples, **given,
            command=command(), progress=progress, announce=announce,
        )  # fmt: skip
    else:
        check_plain(read_config(model), model)
        loaded, tokenizer = api.load(model, device, dtype)
        folded, report = api.compress(loaded, chosen, source, progress)
        if first():
            api.save(folded, output, tokenizer, report, command(), max_shard_size)
    if not first():
        return None
    if as_json:
        return show_json(report)
    rows = [
        [s["path"], short(s["structure"]), f"{s['before']:,}", f"{s['after']:,}", error(s["error"])]
        for s in report["sites"]
    ]
    show_table(["site", "structure", "before", "after", "relative error"], rows)
    print(f"{count_line(report)}; {report['seconds']} s; saved in {output}")
    return None


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Model folders or names.")],
    text: Annotated[list[str] | None, TEXT] = None,
    task: Annotated[str | None, typer.Option(help="Instead of a text: a task such as cola or samsum.")] = None,
    data: Annotated[Path | None, typer.Option(help="With --task: the folder with its files.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens at once; the model's context, 1024 at most.")] = None,
    stride: Annotated[int | None, typer.Option(help="How far the window moves; the window unless given.")] = None,
    tokenised: Annotated[bool, typer.Option(help="The text is tokenised (WikiText's .tokens), not raw.")] = False,
    per_word: Annotated[bool, typer.Option(help="Perplexity a word instead of a token.")] = False,
    limit: Annotated[int | None, typer.Option(help="Score only the first tokens, or examples.")] = None,
    against: Annotated[Path | None, typer.Option(help="A JSON file that this command wrote, to compare with.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the figures to this JSON file.")] = None,
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Perplexity and bits per byte, under a protocol that is printed with them; or the score of a task."""
    from tenfold import api

    if bool(text) == bool(task):
        raise ValueError("give either --text FILE, for the perplexity, or --task NAME with --data FOLDER")
    if task:
        return tasks.evaluate_tasks(models, task, data, limit, output, as_json, device, dtype)
    files, results = api.texts(text), json.loads(against.read_text()) if against else []
    for name in models:
        model, tokenizer = api.load(name, device, dtype)
        if tokenizer is None:
            raise ValueError(f"{name} has no tokenizer; copy tokenizer.json and tokenizer_config.json there")
        kinds = {"text": "tokenised" if tokenised else "raw", "normaliser": "words" if per_word else "tokens"}
        scores = api.evaluate(model, tokenizer, files, window, stride, limit=limit, progress=tracked(name), **kinds)
        results.append({"model": name} | scores)
    api.comparable(results)
    if not first():
        return None
    if output is not None:
        output.write_text(json.dumps(results, indent=1))
    if as_json:
        return show_json(results)
    show_table(
        ["model", "perplexity", "bits per byte", "tokens"],
        [[r["model"], f"{r['perplexity']:.3f}", f"{r['bits_per_byte']:.4f}", f"{r['tokens']:,}"] for r in results],
    )
    print("protocol:", ", ".join(f"{key} {value}" for key, value in results[0]["protocol"].items()))
    return None


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The beginning of the text.")],
    tokens: Annotated[int, typer.Option(help="How many tokens to add at most.")] = 40,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=SEEDS, help="Of the drawing.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Continue a text."""
    from tenfold import api

    loaded, tokenizer = api.load(model, device, dtype)
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer; copy tokenizer.json and tokenizer_config.json there")
    print(api.generate(loaded, tokenizer, prompt, tokens, temperature, seed))


@app.command()
def bench(
    context: typer.Context,
    model: Model,
    against: Annotated[str | None, typer.Option(help="Another model; its dense twin unless given.")] = None,
    batch: Annotated[list[int], typer.Option(help="Sequences at once; may be given several times.")] = [1],  # noqa: B006
    length: Annotated[int | None, typer.Option(help="Tokens of the prompt.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens written one at a time; 16 unless given.")] = None,
    repeats: Annotated[int, typer.Option(help="Counted turns.")] = 5,
    train: Annotated[bool, typer.Option(help="Also steps of training.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Under torch.compile, with a static cache.")] = False,
    layers: Annotated[bool, typer.Option(help="Instead of the model: every structure in it, layer by layer.")] = False,
    dense_cache: Annotated[
        bool, typer.Option(help="Let layers cache their dense matrix where that is faster and takes no more memory.")
    ] = True,
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure tokens per second and memory against the dense twin or another model, in turns, in one run."""
    from tenfold import api
    from tenfold.evaluate.bench_model import sizes
    from tenfold.evaluate.timing import check_counts

    if layers and (unused := [name for name in stated(context) if name in WHOLE]):
        raise ValueError(f"--layers times layers by themselves, with 1 to 4,096 rows; leave {', '.join(unused)} out")
    for one in batch:
        check_counts(batch=one, length=length, new_tokens=new_tokens, repeats=repeats)
    loaded, _ = api.load(model, device, dtype)
    other = None if against is None else api.load(against, device, dtype)[0]
    if layers:
        cells = api.bench_layers(loaded, repeats=repeats, progress=tracked("measuring"))
        if not cells:
            raise ValueError(f"no layer of {model} is structured; fold it first (tenfold compress)")
        return show_json(cells) if as_json else show_cells(cells)
    sizes([loaded] if other is None else [loaded, other], length, new_tokens)  # before a progress bar is there
    turns = tracked("measuring")(batch)
    results = [api.bench(loaded, one, length, new_tokens, repeats, other, train, compile, dense_cache) for one in turns]
    if as_json:
        return show_json(results if len(results) > 1 else results[0])
    show_speeds(results, "dense" if against is None else "other")
    if results[0]["cached"]:
        print("cached W: layers that multiply by their dense matrix at these rows, as dense ones do")
    return None


for trains in (training.heal, tasks.finetune, training.pretrain, training.deepen):
    app.command()(trains)


@app.command()
def densify(
    model: Model, output: Output, overwrite: Overwrite = False, device: Device = None, dtype: Dtype = None
) -> None:
    """Turn a folded model into a plain checkpoint that needs no tenfold."""
    import tenfold
    from tenfold import api
    from tenfold.models.atomic_io import atomic_directory
    from tenfold.models.distributed import barrier

    api.check_output(output, overwrite)
    barrier()  # until all of several processes have looked: the first one writes
    if not first():
        return
    loaded, tokenizer = api.load(model, device, dtype)
    with atomic_directory(output) as new:
        tenfold.densify(loaded).save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
    (output / "tenfold.json").unlink(missing_ok=True)  # where a folded model was
    print(f"saved in {output}; it loads without tenfold")


def main() -> None:
    """Run a command; what went wrong is one sentence on standard error and exit status 2."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")  # MKL would keep hundreds of megabytes for later products
    keep_freed()
    if not debug:
        _quiet()
    try:
        app()
    except (ValueError, OSError, ImportError, NotImplementedError) as reason:
        if debug:
            raise
        print(f"tenfold: {' '.join(str(reason).split())}", file=sys.stderr)
        sys.exit(2)
    finally:
        distributed = sys.modules.get("torch.distributed")  # not imported for this: torch takes seconds
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def _quiet() -> None:
    """transformers' own bars and notes are not for users of this command, and warnings are sentences."""
    warnings.showwarning = lambda message, *where: print(message, file=sys.stderr)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    for name in ("torchao", "torch.utils._pytree"):  # what torchao says of itself wherever transformers finds it
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
