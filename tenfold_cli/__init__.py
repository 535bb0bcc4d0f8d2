"""The command line: parse, call, print. A package of its own, so that ``tenfold --help`` does not import torch."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from typing import Annotated

import typer

from tenfold_cli import evaluation, exporting, serving, training
from tenfold_cli.interrupts import stops_with_a_sentence
from tenfold_cli.memory import reuse_freed_memory
from tenfold_cli.options import (
    FORMATS,
    Device,
    Dtype,
    Json,
    Model,
    Output,
    Overwrite,
    command_line,
    given,
    is_first,
    parse_count,
    shows_defaults,
)
from tenfold_cli.output import (
    Progress,
    format_counts,
    format_structure,
    say,
    show_choices,
    show_forecast,
    show_json,
    show_table,
)

app = typer.Typer(
    name="tenfold",
    help="Prune and factorise transformer language models, guided by activations, and heal them by distillation.",
    epilog="Add --debug to any command to see the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def recipes() -> None:
    """List the recipes that ship with tenfold."""
    from tenfold.models.recipe import load_recipe, recipe_names

    rows = [[name, recipe.base_model or "", recipe.source] for name in recipe_names() for recipe in [load_recipe(name)]]
    show_table(["recipe", "base model", "source"], rows)


@app.command()
def inspect(
    model: Model,
    recipe: Annotated[str | None, typer.Option(help="A recipe by name or file; default: the model as it is.")] = None,
    as_json: Json = False,
) -> None:
    """Count parameters and FLOPs of a model, or of what a recipe makes of it, without allocating weights."""
    from tenfold import api

    result = api.inspect(model, recipe)
    if as_json:
        return show_json(result)
    groups: dict[tuple, list[int]] = {}
    for site in result["sites"]:
        key = (site["role"], format_structure(site["structure"]), "x".join(map(str, site["shape"])))
        groups.setdefault(key, []).append(site["parameters"])
    table = [[*key, str(len(sizes)), f"{sum(sizes):,}"] for key, sizes in groups.items()]
    show_table(["role", "structure", "out x in", "sites", "parameters"], table)
    count = result["parameters"]
    say(
        f"parameters      {count['total']:>15,} with the head, {count['without_head']:,} without; trained {count['trainable']:,}"
    )
    say(f"dense           {count['dense']:>15,}")
    for rows, flops in result["flops_per_token"].items():
        dense = result["flops_per_token_dense"][rows]
        say(f"FLOPs per token {flops:>15,} at {int(rows):,} rows per call (dense {dense:,})")
    return None


@app.command(cls=shows_defaults("checkpoint_jobs:compress_checkpoint"))
def compress(
    model: Model,
    output: Output,
    recipe: Annotated[str | None, typer.Option(help="A recipe by name or file.")] = None,
    structure: Annotated[str | None, typer.Option(help="Instead of a recipe: one structure for all blocks.")] = None,
    keep: Annotated[float | None, typer.Option(help="The share of parameters to keep.")] = None,
    of: Annotated[
        str | None,
        typer.Option(
            help="What --keep is a share of: model, without_head, blocks, sites, flops or bytes; "
            "default: as in the recipe, else model."
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="free: every block gets widths of its own; stock: an ordinary model for any engine. Default: free."
        ),
    ] = None,
    align: Annotated[
        int | None, typer.Option(min=1, help="With stock shapes: what MLP widths are a multiple of.")
    ] = None,
    calibrate: Annotated[list[str] | None, typer.Option(help=f"Calibration text: {FORMATS}")] = None,
    num_samples: Annotated[int | None, typer.Option(help="Calibration windows; default: as in the recipe.")] = None,
    heal: Annotated[list[str] | None, typer.Option(help="Text to heal on: by distillation from the original.")] = None,
    heal_tokens: Annotated[
        int | None,
        typer.Option(parser=parse_count, metavar="COUNT", help="With --heal: tokens, such as 5M; default: all."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, with memory and time, and stop.")
    ] = False,
    roles: Annotated[str | None, typer.Option(help="With --structure: roles, for instance mlp.in,mlp.out.")] = None,
    source: Annotated[str | None, typer.Option(help="What factors start from: weights, or noise.")] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Largest size of a file of weights.")] = None,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Compress a model, guided by calibration text or without data. Rerun an interrupted command to resume it.

    Model and tokenizer come from the folder.
    """
    from tenfold import api
    from tenfold.checkpoint_jobs import compress_checkpoint

    if (recipe and structure) or not (recipe or keep) or not (recipe or structure or calibrate):
        raise ValueError(
            "give either --keep SHARE with --calibrate TEXT, or --recipe NAME, or --structure KIND with --keep SHARE"
        )
    if structure and keep:
        chosen = api.recipe_for(structure, keep, of or "model", roles.split(",") if roles else None)
    else:
        chosen = api.with_keep(recipe or api.recipe_of_shapes(shapes), keep, of, align)
    for name, idle in (
        ("--roles", roles and not structure),
        ("--shapes", shapes is not None and (recipe or structure)),
        ("--source", source not in (None, "weights") and calibrate),
        ("--num-samples", num_samples is not None and not calibrate),
        ("--heal-tokens", heal_tokens is not None and not heal),
    ):
        if idle:
            raise ValueError(f"{name} changes nothing here; leave it out, or see tenfold compress --help")
    texts, heal_texts = api.check_texts(calibrate or []), api.check_texts(heal or [])
    if dry_run:
        chosen = api.with_healing(chosen, bool(texts), heal_tokens) if heal else chosen
        stages = api.forecast(model, chosen, texts, num_samples, heal_texts, device)
        return show_forecast(stages, chosen) if is_first() else None
    report = compress_checkpoint(
        model, output, chosen, texts, num_samples,
        heal_files=heal_texts, heal_tokens=heal_tokens, device=device, dtype=dtype, overwrite=overwrite,
        command=command_line(), progress=Progress("compressing"), announce=show_choices,
        advance=Progress("healing").advance, **given(source=source, max_shard_size=max_shard_size),
    )  # fmt: skip
    if not is_first():
        return None
    rows = [
        [site["path"], format_structure(site["structure"]), f"{site['before']:,}", f"{site['after']:,}", error]
        for site in report["sites"]
        for error in ["" if site["error"] is None else f"{site['error']:.4f}"]
    ]
    show_table(["site", "structure", "before", "after", "relative error"], rows)
    say(f"{format_counts(report)}; {report['seconds']} s; saved in {output}")
    return None


for function, command_class in (
    evaluation.COMMANDS | training.COMMANDS | exporting.COMMANDS | serving.COMMANDS
).items():
    app.command(cls=command_class)(function)


def main() -> None:
    """Run a command; an error is one sentence on standard error and exit status 2."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")  # else MKL keeps hundreds of megabytes for later products
    reuse_freed_memory()
    if not debug:
        silence_libraries()
    try:
        with stops_with_a_sentence():
            app()
    except (ValueError, OSError, ImportError, NotImplementedError) as reason:
        if debug:
            raise
        say(f"tenfold: {' '.join(str(reason).split())}", file=sys.stderr)
        sys.exit(2)
    finally:
        distributed = sys.modules.get("torch.distributed")  # do not import torch for this
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def silence_libraries() -> None:
    """Hide the libraries' progress bars and notes, and print warnings as plain sentences."""
    threading.excepthook = lambda raised: None  # what threads of libraries raise, the command meets, too
    warnings.showwarning = lambda message, *where: say(str(message), sys.stderr)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    for name in ("torchao", "torch.utils._pytree"):  # torchao logs wherever transformers finds it
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
