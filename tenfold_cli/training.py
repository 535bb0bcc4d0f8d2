"""The commands that train, and the one that makes a deeper model to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tenfold_cli.options import SEEDS, Device, Dtype, Model, Output, Overwrite, command, first
from tenfold_cli.output import count_line, counted, tracked


def heal(
    model: Annotated[str, typer.Argument(help="The folded model.")],
    text: Annotated[
        list[str],
        typer.Option(
            "--text", "--data", help="Text: .txt, .jsonl, also .xz, .gz; hf://datasets/OWNER/NAME; repeat for more."
        ),
    ],
    output: Output,
    teacher: Annotated[
        str | None, typer.Option(help="The dense model that it came from; cross_entropy alone needs none.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="A file with a heal section: what is not given here is taken from there."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; one pass over the text unless given.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The peak of the schedule; 3e-4 unless given.")] = None,
    tokens_per_step: Annotated[
        int | None, typer.Option(help="Tokens in one step of all processes; 4096 unless given.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Windows at once; unless given a step's, or 1,024 tokens on a CPU.")
    ] = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=WEIGHT, repeatable: cross_entropy, kl, reverse_kl, jensen_shannon, hidden, attention, embedding; "
            "kl=1 unless given."
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of both distributions; 1 unless given.")] = None,
    store: Annotated[
        Path | None, typer.Option(help="Keep the teacher's predictions in this folder; if they are there, read them.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="With --store: how many tokens are kept of every prediction.")] = 64,
    window: Annotated[int | None, typer.Option(help="Tokens at once.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=SEEDS, help="Of the order of windows.")] = 0,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="Of the saved model.")] = None,
) -> None:
    """Distil the dense model into the folded one and save it; repeat the command after an interruption and it goes on."""
    from tenfold import api
    from tenfold.checkpoint_jobs import heal_checkpoint

    files = api.texts(text)
    given = {"steps": steps, "learning_rate": learning_rate, "tokens_per_step": tokens_per_step, "batch": batch}
    settings = api.heal_settings(loss or (), recipe, temperature=temperature, **given)
    more = {"window": window, "seed": seed, "store": store, "top_k": top_k, "progress": tracked("asking the teacher")}
    with counted("healing") as advance:
        report = heal_checkpoint(
            model, teacher, output, files, settings, device=device, dtype=dtype, overwrite=overwrite, command=command(),
            advance=advance, **more,
        )  # fmt: skip
    if first():
        print(f"{report['steps']} steps, {report['tokens']:,} tokens, {report['seconds']} s; saved in {output}")


def pretrain(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A recipe with model (a configuration, or from: DIR), tokenizer and train sections, by name or file."
        ),
    ],
    data: Annotated[list[str], typer.Option(help="Text to train on, or the folder of tokens of another run.")],
    output: Output,
    teacher: Annotated[
        str | None, typer.Option(help="A trained model with the same tokenizer, to learn from, too.")
    ] = None,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="Of the saved model.")] = "float16",
) -> None:
    """Train a model from scratch, dense or structured from noise, and its tokenizer, or train one on; a run that stopped goes on.

    With --overwrite what a run has left in the folder is deleted, and it begins anew.

    torchrun and accelerate launch start it on several processes: accelerate launch -m tenfold pretrain ...
    """
    from tenfold import api

    api.checked_device(device)
    if first() and not (output / "run.json").is_file():  # a run that is there goes on
        api.check_output(output, overwrite)
    wanted = api.with_teacher(recipe, teacher)
    with counted("training") as advance:
        report = api.pretrain(wanted, api.texts(data), output, api.checked_dtype(dtype), advance, device, overwrite)
    if not first():
        return
    loss = report["curve"][-1][1]
    print(f"{report['parameters']:,} parameters, {report['tokens']:,} tokens, last loss {loss:.3f}; saved in {output}")


def deepen(
    model: Model,
    output: Output,
    layers: Annotated[int, typer.Option(help="How many layers the result has.")],
    recipe: Annotated[str | None, typer.Option(help="What is shared, by name or file; deepen unless given.")] = None,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Make a deeper model whose layers share the central tensors of their matrices (MPOBERT), to be trained on."""
    import tenfold
    from tenfold import api
    from tenfold.models.distributed import barrier

    api.check_output(output, overwrite)
    barrier()  # until all of several processes have looked: the first one writes
    loaded, tokenizer = api.load(model, device, dtype)
    deeper, report = tenfold.deepen(loaded, layers, recipe, tracked("fitting") if first() else iter)
    if not first():
        return
    api.save(deeper, output, tokenizer, report, command())
    print(f"{report['layers'][0]} to {layers} layers, {count_line(report)}; saved in {output}")
