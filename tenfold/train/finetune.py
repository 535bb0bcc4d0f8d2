"""Fine-tuning on a task, with several seeds: on transformers.Trainer, for dense and folded models."""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from tenfold.evaluate.task_kinds import Task
from tenfold.evaluate.tasks import longest, prepare, task_named
from tenfold.models.cost import read_config
from tenfold.models.files import whole_folder, write_json
from tenfold.models.hub import check_folder, silent
from tenfold.train.trainer import Progress, training_arguments, unwrapped
from tenfold.train.ways import free_head, way_named

LIBRARIES = ("tenfold", "torch", "transformers", "scikit-learn", "scipy", "rouge-score", "peft")


@dataclass(frozen=True)
class Settings:
    """How a fine-tuning trains.

    Args:
        train: ``full``, ``auxiliary`` or ``lora``; see :mod:`tenfold.train.ways`.
        epochs: passes over the training examples; after each the dev examples are scored.
        learning_rate: the peak of a linear schedule; that of ``train`` unless given.
        batch: examples a step.
        warmup: the share of the steps in which the rate rises.
        length: tokens of an example at most; the model's context, 512 at most, unless given.
        limit, dev_limit: only the first examples.
        rank: of ``lora``.
    """

    train: str = "full"
    epochs: float = 3
    learning_rate: float | None = None
    batch: int = 32
    warmup: float = 0.06
    weight_decay: float = 0.01
    length: int | None = None
    limit: int | None = None
    dev_limit: int | None = None
    rank: int = 8

    def __post_init__(self):
        for name in ("epochs", "batch", "rank"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name)} must be more than 0")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"learning rate {self.learning_rate} must be more than 0")


def finetune(
    model: str | Path,
    task: str,
    data: str | Path,
    output: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    device: str | None = None,
    dtype: torch.dtype | None = None,
    advance: Callable[[int, int], None] | None = None,
    **settings,
) -> dict[str, Any]:
    """Fine-tune ``model`` on ``task`` once for every seed; the best one is written to ``output``.

    The folder is an ordinary Hugging Face checkpoint, of the epoch with the best dev score, and holds ``finetune.json``.

    Args:
        model: a folder or a name on a hub, dense or folded.
        task: a name in :data:`tenfold.evaluate.tasks.TASKS`.
        data: the folder with the files of the task.
        seeds: each one draws the new head and the order of the examples.
        device: ``cpu`` keeps an accelerator out of it.
        dtype: of the saved model, float32 unless given; training is in float32, on an accelerator in bfloat16 autocast.
        advance: called as ``advance(step, steps)``, over all seeds.
        settings: those of :class:`Settings`.

    Returns:
        What ``finetune.json`` holds: ``score`` (``mean`` and ``std`` of the dev scores over the seeds, the standard
        deviation of a sample, None for one seed), ``runs`` (one for each seed, with its metrics and its curve),
        ``parameters`` (``total``, ``trainable`` and their ``share``), ``settings`` and ``versions``.

    Raises:
        ValueError: the task or the way to train is not known, the data are wrong, or the model does not suit them.
        FileNotFoundError: the model or a file of the task is missing.
        ImportError: a library of the extra ``tasks`` is missing.
    """
    chosen, given = task_named(task), Settings(**settings)
    way = way_named(given.train)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {list(seeds)} must be different numbers, one at least")
    chosen.check()
    read_config(str(model))
    if Path(model).is_dir():
        check_folder(Path(model))
    examples = chosen.read(data, "train", given.limit), chosen.read(data, "dev", given.dev_limit)
    report = {
        "model": str(model),
        "task": chosen.name,
        "metrics": list(chosen.metrics),
        "examples": dict(zip(("train", "dev"), map(len, examples), strict=True)),
        "settings": asdict(given) | {"learning_rate": given.learning_rate or way.learning_rate},
        "versions": versions(),
        "runs": [],
    }
    for number, seed in enumerate(seeds):
        told = advance and (lambda step, steps, done=number: advance(done * steps + step, len(seeds) * steps))
        trained, tokenizer, run, parameters = _run(model, chosen, examples, given, seed, device, told)
        best = max((old["score"] for old in report["runs"]), default=-float("inf"))
        report["runs"].append(run)
        report |= {"parameters": parameters} | _summary(report["runs"])
        if run["score"] > best:
            with silent(), whole_folder(output) as new:
                trained.to(dtype or torch.float32).save_pretrained(new)
                tokenizer.save_pretrained(new)
        write_json(Path(output) / "finetune.json", report)
    return report


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    scores = [run["score"] for run in runs]
    std = statistics.stdev(scores) if len(scores) > 1 else None
    return {
        "score": {"mean": statistics.mean(scores), "std": std},
        "best_seed": runs[scores.index(max(scores))]["seed"],
    }


def _run(name, task: Task, examples, given: Settings, seed: int, device, advance):
    """One seed: the trained model, the tokenizer, what it scored, and the counts of its parameters."""
    set_seed(seed)
    way, (train, dev) = way_named(given.train), examples
    tokenizer = AutoTokenizer.from_pretrained(name)
    kind, told = task.loading()
    with silent(reports=False):  # the head is new, which the run reports
        model, loaded = kind.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **told)
    task.check_model(model)
    prepare(model, tokenizer)
    length, new = longest(model, given.length), set(loaded["missing_keys"])
    way.free(model, given.rank)
    free_head(model, new)
    parameters = counted(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            Path(folder),
            given.learning_rate or way.learning_rate,
            given.batch,
            num_train_epochs=given.epochs,
            warmup_steps=given.warmup,
            weight_decay=given.weight_decay,
            lr_scheduler_type="linear",
            eval_strategy="epoch",
            save_strategy="no",
            logging_strategy="epoch",
            remove_unused_columns=False,
            seed=seed,
            **_place(device),
        )
        best = Best()
        trainer = Scored(
            model=model,
            args=arguments,
            train_dataset=[task.encode(tokenizer, example, length) for example in train],
            eval_dataset=dev,
            data_collator=task.collator(tokenizer),
            processing_class=tokenizer,
            callbacks=[best, *([Progress(advance)] if advance else [])],
            scored=lambda model: task.score(
                task.predict(model, tokenizer, dev, length, 2 * given.batch, progress=iter), dev
            ),
        )
        trainer.remove_callback(PrinterCallback)
        begun = time.perf_counter()
        trainer.train()
    model = best.restored(unwrapped(trainer)).eval()
    way.finish(model)
    run = {"seed": seed, **best.scores, "best_epoch": best.epoch, "seconds": round(time.perf_counter() - begun, 1)}
    run |= {"steps": trainer.state.global_step, "new": sorted(new), "curve": _curve(trainer.state.log_history)}
    return model, tokenizer, run, parameters


def _place(device: str | None) -> dict[str, bool]:
    """On a processor in float32: its scores are then exactly those of the saved model."""
    cpu = device == "cpu" or not torch.accelerator.is_available()
    return {"use_cpu": cpu, "bf16": not cpu}


def counted(model: PreTrainedModel) -> dict[str, int | float]:
    """Parameters, each tensor once: in total, those that are trained, and their share."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"total": total, "trainable": trainable, "share": trainable / total}


def _curve(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The mean loss of every epoch and the dev score after it."""
    losses = {row["epoch"]: row["loss"] for row in history if "loss" in row}
    scores = {row["epoch"]: row["eval_score"] for row in history if "eval_score" in row}
    return [{"epoch": epoch, "loss": losses.get(epoch), "score": score} for epoch, score in scores.items()]


def versions() -> dict[str, str]:
    """Of Python and of the libraries that the scores depend on, those that are there."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class Scored(Trainer):
    """Trainer whose evaluation is the score of a task: the same code that scores a model without training."""

    def __init__(self, *args, scored: Callable[[PreTrainedModel], dict[str, float]], **kwargs):
        super().__init__(*args, **kwargs)
        self.scored = scored

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        was = self.model.training
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.scored(self.model.eval()).items()}
        self.model.train(was)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Best(TrainerCallback):
    """Keeps what is trained of the epoch with the best score, the first one of equals."""

    def __init__(self):
        self.scores, self.epoch, self.values = {"score": -float("inf")}, None, {}

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        if metrics["eval_score"] > self.scores["score"]:
            self.scores = {name.removeprefix("eval_"): value for name, value in metrics.items() if name != "epoch"}
            self.epoch = state.epoch
            self.values = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def restored(self, model: PreTrainedModel) -> PreTrainedModel:
        """``model`` as it was after that epoch."""
        for name, parameter in model.named_parameters():
            if name in self.values:
                parameter.copy_(self.values[name])
        return model
