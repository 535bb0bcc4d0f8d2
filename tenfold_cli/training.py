"""Commands that train: heal, finetune, pretrain; and deepen, which makes a deeper model to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tenfold_cli.options import (
    FORMATS,
    MAX_SEED,
    Device,
    Dtype,
    Model,
    Output,
    Overwrite,
    SavedDtype,
    Seed,
    command_line,
    given,
    is_first,
    shows_defaults,
)
from tenfold_cli.output import Progress, format_counts, say, show_table


def heal(
    model: Annotated[str, typer.Argument(help="The compressed model.")],
    text: Annotated[list[str], typer.Option("--text", "--data", help=f"Text to train on: {FORMATS}")],
    output: Output,
    teacher: Annotated[str | None, typer.Option(help="The original model; cross_entropy alone needs none.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A recipe whose heal section replaces the defaults.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; default: one pass over the text.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak of the learning rate schedule.")] = None,
    tokens_per_step: Annotated[int | None, typer.Option(help="Tokens per step of all processes together.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Windows at once; default: all of a step (fewer on CPUs).")
    ] = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=WEIGHT, repeatable: cross_entropy, kl, reverse_kl, jensen_shannon, hidden, attention, embedding; "
            "default: kl=1."
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Temperature of both distributions.")] = None,
    store: Annotated[Path | None, typer.Option(help="Folder that caches the teacher's predictions.")] = None,
    top_k: Annotated[int | None, typer.Option(help="With --store: predictions to store per token.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per window; default: the context, at most 1024.")] = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Distil the original model into the compressed one. Rerun an interrupted command to resume it."""
    from tenfold import api
    from tenfold.checkpoint_jobs import heal_checkpoint

    files = api.check_texts(text)
    settings = api.heal_settings(
        loss or (), recipe, temperature=temperature, steps=steps, learning_rate=learning_rate,
        tokens_per_step=tokens_per_step, batch_size=batch_size,
    )  # fmt: skip
    report = heal_checkpoint(
        model, teacher, output, files, settings, device=device, dtype=dtype, overwrite=overwrite,
        command=command_line(), advance=Progress("healing").advance, progress=Progress("asking the teacher"),
        **given(window=window, seed=seed, store=store, top_k=top_k),
    )  # fmt: skip
    if is_first():
        say(f"{report['steps']} steps, {report['tokens']:,} tokens, {report['seconds']} s; saved in {output}")


def finetune(
    model: Model,
    task: Annotated[str, typer.Option(help="cola, sst2, mrpc, stsb, qnli, rte, wnli, samsum or scitldr.")],
    data: Annotated[Path, typer.Option(help="The folder with the files of the task.")],
    output: Output,
    method: Annotated[str | None, typer.Option(help="full, auxiliary (all but central tensors) or lora.")] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, max=MAX_SEED, help="Repeat for several; default: 0.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the examples; the best is saved.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate; default: that of --method.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples at once.")] = None,
    gradient_accumulation_steps: Annotated[int | None, typer.Option(help="Batches in a step.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per example; default: the context, at most 512.")] = None,
    limit: Annotated[int | None, typer.Option(help="Train on the first examples only.")] = None,
    dev_limit: Annotated[int | None, typer.Option(help="Score the first dev examples only.")] = None,
    rank: Annotated[int | None, typer.Option(help="With --method lora: the rank.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations: less memory.")
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile; pays off over many steps.")] = False,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: SavedDtype = None,
) -> None:
    """Fine-tune a model on a task, once per seed, and save the best. Rerun an interrupted command to resume it."""
    from tenfold import api

    api.resolve_device(device)
    report = api.finetune(
        model, task, data, output, device=device, advance=Progress("fine-tuning").advance, overwrite=overwrite,
        gradient_checkpointing=gradient_checkpointing, compile=compile,
        **given(
            seeds=seed, dtype=dtype, method=method, epochs=epochs, learning_rate=learning_rate, batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps, length=length, limit=limit, dev_limit=dev_limit,
            rank=rank,
        ),
    )  # fmt: skip
    if not is_first():
        return
    names = [*report["metrics"], "score"]
    rows = [
        [str(run["seed"]), *(f"{run[name]:.4f}" for name in names), f"{run['best_epoch']:g}"] for run in report["runs"]
    ]
    show_table(["seed", *names, "epoch"], rows)
    size, score = report["parameters"], report["score"]
    spread = "" if score["std"] is None else f" +- {score['std']:.4f} over {len(rows)} seeds"
    say(
        f"{task} dev {score['mean']:.4f}{spread}; {size['trainable']:,} of {size['total']:,} parameters trained "
        f"({size['share']:.1%}); seed {report['best_seed']} saved in {output}"
    )


def pretrain(
    recipe: Annotated[str, typer.Argument(help="A recipe with model, tokenizer and train sections, by name or file.")],
    data: Annotated[list[str], typer.Option(help="Text to train on, or the folder of tokens of another run.")],
    output: Output,
    teacher: Annotated[str | None, typer.Option(help="A model with the same tokenizer to distil from, too.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an earlier run in the folder.")] = False,
    device: Device = None,
    dtype: SavedDtype = None,
) -> None:
    """Train a model and its tokenizer from scratch, or train one on. Rerun an interrupted command to resume it.

    torchrun and accelerate launch start it on several processes: accelerate launch -m tenfold pretrain ...
    """
    from tenfold import api
    from tenfold.models.output_folder import check_output

    api.resolve_device(device)
    if is_first() and not (output / "run.json").is_file():  # resume a run
        check_output(output, overwrite)
    report = api.pretrain(
        api.with_teacher(recipe, teacher), api.check_texts(data), output, advance=Progress("training").advance,
        device=device, overwrite=overwrite, **given(dtype=dtype),
    )  # fmt: skip
    if is_first():
        size, tokens, loss = report["parameters"], report["tokens"], report["curve"][-1][1]
        say(f"{size:,} parameters, {tokens:,} tokens, last loss {loss:.3f}; saved in {output}")


def deepen(
    model: Model,
    output: Output,
    layers: Annotated[int, typer.Option(help="Layers of the result.")],
    recipe: Annotated[str | None, typer.Option(help="What is shared, by name or file; default: deepen.")] = None,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Make a deeper model whose layers share the central tensors of their matrices (MPOBERT), to be trained on."""
    from tenfold.checkpoint_jobs import deepen_checkpoint

    report = deepen_checkpoint(
        model, output, layers, recipe, device=device, dtype=dtype, overwrite=overwrite, command=command_line(),
        progress=Progress("fitting"),
    )  # fmt: skip
    if is_first():
        say(f"{report['layers'][0]} to {layers} layers, {format_counts(report)}; saved in {output}")


COMMANDS = {
    heal: shows_defaults("models.distillation_config:Heal", "train.heal:heal"),
    finetune: shows_defaults("train.finetune:finetune", "train.finetune:Settings"),
    pretrain: shows_defaults("train.pretrain:pretrain"),
    deepen: None,
}
