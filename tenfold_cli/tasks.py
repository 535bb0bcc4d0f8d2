"""The commands that know tasks: fine-tuning on one, and scoring models on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tenfold_cli.options import SEEDS, first
from tenfold_cli.output import counted, show_json, show_table, tracked


def finetune(
    model: Annotated[str, typer.Argument(help="A model folder, or a name on the hub; dense or folded.")],
    task: Annotated[str, typer.Option(help="cola, sst2, mrpc, stsb, qnli, rte, wnli, samsum or scitldr.")],
    data: Annotated[Path, typer.Option(help="The folder with the files of the task.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    train: Annotated[str, typer.Option(help="full, auxiliary (all but the central tensors) or lora.")] = "full",
    seed: Annotated[
        list[int] | None, typer.Option(min=0, max=SEEDS, help="Repeat it for several seeds; 0 unless given.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the examples; the best one is kept.")] = 3.0,
    learning_rate: Annotated[float | None, typer.Option(help="The peak; that of --train unless given.")] = None,
    batch: Annotated[int, typer.Option(help="Examples a step.")] = 32,
    length: Annotated[int | None, typer.Option(help="Tokens of an example at most.")] = None,
    limit: Annotated[int | None, typer.Option(help="Train on the first examples only.")] = None,
    dev_limit: Annotated[int | None, typer.Option(help="Score the first dev examples only.")] = None,
    rank: Annotated[int, typer.Option(help="Of --train lora.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Read a step's examples in so many parts: less memory.")] = 1,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Activations are computed again.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile: worth it for many steps.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Write into a folder that holds something already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; an accelerator where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the saved model.")] = "float32",
) -> None:
    """Fine-tune a model on a task, once for every seed; the best one is saved. Repeated, it goes on."""
    from tenfold import api

    api.checked_device(device)
    given = {"train": train, "epochs": epochs, "learning_rate": learning_rate, "batch": batch, "length": length}
    given |= {"limit": limit, "dev_limit": dev_limit, "rank": rank, "compile": compile}
    given |= {"accumulate": accumulate, "checkpointing": checkpointing}
    with counted("fine-tuning") as advance:
        report = api.finetune(
            model, task, data, output, seeds=seed or [0], device=device, dtype=api.checked_dtype(dtype), advance=advance,
            overwrite=overwrite, **given,
        )  # fmt: skip
    if not first():
        return None
    if as_json:
        return show_json(report)
    names = [*report["metrics"], "score"]
    rows = [
        [str(run["seed"]), *(f"{run[name]:.4f}" for name in names), f"{run['best_epoch']:g}"] for run in report["runs"]
    ]
    show_table(["seed", *names, "epoch"], rows)
    size, score = report["parameters"], report["score"]
    spread = "" if score["std"] is None else f" +- {score['std']:.4f} over {len(rows)} seeds"
    print(
        f"{task} dev {score['mean']:.4f}{spread}; {size['trainable']:,} of {size['total']:,} parameters trained "
        f"({size['share']:.1%}); seed {report['best_seed']} saved in {output}"
    )
    return None


def evaluate_tasks(
    models: list[str],
    task: str,
    data: Path | None,
    limit: int | None,
    output: Path | None,
    as_json: bool,
    device,
    dtype,
) -> None:
    """Score ``models`` on a task as they are."""
    from tenfold import api

    if data is None:
        raise ValueError(f"--task {task} needs the folder with its files: --data FOLDER")
    results = []
    for name in models:
        model, tokenizer = api.load(name, device, dtype)
        scores = api.evaluate_task(model, tokenizer, task, data, limit=limit, progress=tracked(name))
        results.append({"model": name} | scores)
    if not first():
        return None
    if output is not None:
        output.write_text(json.dumps(results, indent=1))
    if as_json:
        return show_json(results)
    metrics = [key for key, value in results[0].items() if isinstance(value, float)]
    show_table(["model", *metrics], [[r["model"], *(f"{r[name]:.4f}" for name in metrics)] for r in results])
    print(f"task {task}, {results[0]['data']}, {results[0]['examples']:,} examples")
    return None
