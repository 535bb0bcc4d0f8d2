"""Fine-tuning on a task, with several seeds: on transformers.Trainer, for dense and folded models."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from tenfold.evaluate.task_kinds import Task
from tenfold.evaluate.tasks import longest, prepare, task_named
from tenfold.models.atomic_io import atomic_directory, disk_full_errors, write_json
from tenfold.models.auto import load_tokenizer, read_config
from tenfold.models.distributed import barrier, is_main_process
from tenfold.models.loading import check_folder, silent
from tenfold.models.precision import check_saved_dtype
from tenfold.train.checkpoints import last_checkpoint
from tenfold.train.finetune_state import begin, finish, finished, kept, partial
from tenfold.train.fsdp import UnshardedShell
from tenfold.train.methods import free_head, way_named
from tenfold.train.teacher import weights_digest
from tenfold.train.trainer import (
    DivergenceGuard,
    DivergenceGuardTrainer,
    Log,
    Progress,
    step_size,
    training_arguments,
    unwrapped,
)

HEADS = ("classifier.", "score.")
LIBRARIES = ("tenfold", "torch", "transformers", "scikit-learn", "scipy", "rouge-score", "peft")


@dataclass(frozen=True)
class Settings:
    """How a fine-tuning trains.

    Args:
        train: ``full``, ``auxiliary`` or ``lora``; see :mod:`tenfold.train.methods`.
        epochs: passes over the training examples; after each the dev examples are scored, and a checkpoint is written.
        learning_rate: the peak of a linear schedule; that of ``train`` unless given.
        batch: examples a step.
        warmup: the share of the steps in which the rate rises.
        length: tokens of an example at most; the model's context, 512 at most, unless given.
        limit, dev_limit: only the first examples.
        rank: of ``lora``.
        accumulate: parts that the examples of a step are read in, one after the other: less memory, and the same step where all
            examples count alike.
        checkpointing: activations between the blocks are computed again in the backward pass.
        compile: torch.compile.
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
    accumulate: int = 1
    checkpointing: bool = False
    compile: bool = False

    def __post_init__(self):
        for name in ("epochs", "batch", "rank", "accumulate"):
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
    advance: Callable[[int, int, float], None] | None = None,
    overwrite: bool = False,
    **settings,
) -> dict[str, Any]:
    """Fine-tune ``model`` on ``task`` once for every seed; the best one is written to ``output``.

    The folder is an ordinary Hugging Face checkpoint, of the epoch with the best dev score. ``finetune.json`` in it has the runs,
    ``log-SEED.jsonl`` a line every few steps. The same call goes on behind the last epoch, whose checkpoint is in
    ``seed-SEED.partial`` until the seed is finished, and with other seeds adds them. Several processes (``torchrun``) share
    every batch, and the first one writes.

    Args:
        model: a folder or a name on a hub, dense or folded.
        task: a name in :data:`tenfold.evaluate.tasks.TASKS`.
        data: the folder with the files of the task.
        seeds: each one draws the new head and the order of the examples.
        device: ``cpu`` keeps an accelerator out of it.
        dtype: of the saved model, float32 unless given; training is in float32, on an accelerator in bfloat16 autocast.
        advance: called as ``advance(step, steps, tokens_per_second)``, over all seeds that are left.
        overwrite: write over ``output``, whatever is there.
        settings: those of :class:`Settings`.

    Returns:
        What ``finetune.json`` holds: ``score`` (``mean`` and ``std`` of the dev scores over the seeds, the standard
        deviation of a sample, None for one seed), ``runs`` (one for each seed, with its metrics and its curve),
        ``parameters`` (``total``, ``trainable`` and their ``share``), ``settings`` and ``versions``.

    Raises:
        ValueError: the task or the way to train is not known, the data are wrong, the model does not suit them, ``output`` has
            runs with other settings, loss or weights are no longer finite, or the loss runs away.
        FileExistsError: ``output`` holds something else.
        OSError: there is no room on the disk.
        FileNotFoundError: the model or a file of the task is missing.
        ImportError: a library of the extra ``tasks`` is missing.
    """
    check_saved_dtype(dtype or torch.float32)
    chosen, given = task_named(task), Settings(**settings)
    way = way_named(given.train)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {list(seeds)} must be different numbers, one at least")
    _shared_out(given)
    chosen.check()
    read_config(model)
    if Path(model).is_dir():
        check_folder(Path(model))
    examples = chosen.read(data, "train", given.limit), chosen.read(data, "dev", given.dev_limit)
    report = {
        "model": str(model),
        "weights": weights_digest(model) if Path(model).is_dir() else None,
        "task": chosen.name,
        "data": str(data),
        "metrics": list(chosen.metrics),
        "examples": dict(zip(("train", "dev"), map(len, examples), strict=True)),
        "settings": asdict(given) | {"learning_rate": given.learning_rate or way.learning_rate},
        "dtype": str(dtype or torch.float32).removeprefix("torch."),
        "versions": versions(),
        "runs": [],
    }
    folder = Path(output)
    if not overwrite:
        report |= finished(folder, report)
    left = [seed for seed in seeds if seed not in {run["seed"] for run in report["runs"]}]
    for seed in left:
        begin(partial(folder, seed), report, overwrite)
    barrier()
    for number, seed in enumerate(left):
        told = advance and (
            lambda step, steps, *speed, done=number: advance(done * steps + step, len(left) * steps, *speed)
        )
        trained, tokenizer, run, parameters = _run(model, chosen, examples, given, seed, device, told, folder, report)
        best = max((old["score"] for old in report["runs"]), default=-float("inf"))
        report["runs"].append(run)
        report |= {"parameters": parameters} | _summary(report["runs"])
        if is_main_process() and run["score"] > best:
            with silent(), atomic_directory(folder) as new:
                trained.to(dtype or torch.float32).save_pretrained(new)
                tokenizer.save_pretrained(new)
                write_json(new / "finetune.json", report)
        elif is_main_process():
            write_json(folder / "finetune.json", report)
        if is_main_process():
            finish(partial(folder, seed), folder)
        barrier()
    return report


def _shared_out(given: Settings) -> int:
    """The examples that each of several processes reads at once."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    parts = processes * given.accumulate
    if given.batch % parts:
        more = -(-given.batch // parts) * parts
        said = f" in {given.accumulate} parts" if given.accumulate > 1 else ""
        raise ValueError(
            f"{processes} processes can't share {given.batch} examples a step{said} evenly; give --batch-size {more}"
        )
    return given.batch // parts


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    scores = [run["score"] for run in runs]
    std = statistics.stdev(scores) if len(scores) > 1 else None
    return {
        "score": {"mean": statistics.mean(scores), "std": std},
        "best_seed": runs[scores.index(max(scores))]["seed"],
    }


def _run(name, task: Task, examples, given: Settings, seed: int, device, advance, folder: Path, report):
    """One seed: the trained model, the tokenizer, what it scored, and the counts of its parameters."""
    set_seed(seed)
    way, (train, dev) = way_named(given.train), examples
    tokenizer = load_tokenizer(name)
    kind, told = task.loading()
    with silent(reports=False):  # the head is new, which the run reports
        told |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # a head of another task's
        model, loaded = kind.from_pretrained(name, dtype=torch.float32, **told)
    task.check_model(model)
    prepare(model, tokenizer)
    length, new = longest(model, given.length), set(loaded["missing_keys"]) | _resized(loaded, name)
    way.free(model, given.rank)
    free_head(model, new)
    parameters = counted(model)
    read = [task.encode(tokenizer, example, length) for example in train]
    arguments = training_arguments(
        partial(folder, seed),
        given.learning_rate or way.learning_rate,
        _shared_out(given),
        gradient_accumulation_steps=given.accumulate,
        activation_checkpointing=given.checkpointing,
        num_train_epochs=given.epochs,
        warmup_steps=given.warmup,
        weight_decay=given.weight_decay,
        lr_scheduler_type="linear",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,  # the best one and the last one; of one only, Trainer deletes the last at the end
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        logging_strategy="epoch",
        remove_unused_columns=False,
        torch_compile=given.compile,
        seed=seed,
        **_place(device),
    )
    trainer = Scored(
        model=model,
        args=arguments,
        train_dataset=read,
        eval_dataset=dev,
        data_collator=task.collator(tokenizer),
        processing_class=tokenizer,
        callbacks=[LogFrequently()],
        guess=task.guess(train),
        scored=lambda model: task.score(
            task.predict(model, tokenizer, dev, length, 2 * given.batch, progress=iter), dev
        ),
    )
    tokens = step_size(arguments) * sum(len(example["input_ids"]) for example in read) / max(1, len(read))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(DivergenceGuard(trainer))
    trainer.add_callback(Log(folder / f"log-{seed}.jsonl", tokens))
    if advance:
        trainer.add_callback(Progress(advance, tokens))
    whole, clock = UnshardedShell(model) if trainer.is_fsdp_enabled else None, time.perf_counter()
    with silent(), disk_full_errors(folder), kept(partial(folder, seed), report) as last:
        trainer.train(resume_from_checkpoint=last)
    if whole is not None:
        whole.fill()
    model = unwrapped(trainer).eval()
    way.finish(model)
    best = next(
        row
        for row in trainer.state.log_history
        if row["step"] == trainer.state.best_global_step and "eval_score" in row
    )
    run = {"seed": seed} | {name.removeprefix("eval_"): best[name] for name in best if name.startswith("eval_")}
    run |= {"best_epoch": best["epoch"], "seconds": round(time.perf_counter() - clock, 1)}
    run |= {"steps": trainer.state.global_step, "new": sorted(new), "curve": _curve(trainer.state.log_history)}
    return model, tokenizer, run, parameters


def _resized(loaded: dict[str, Any], name) -> set[str]:
    """The tensors of a head for other labels, which is drawn anew.

    Raises:
        ValueError: others have another size, too.
    """
    resized = {key for key, *_ in loaded["mismatched_keys"]}
    if other := sorted(key for key in resized if not key.startswith(HEADS)):
        raise ValueError(f"{name} has tensors of another size than its config.json says: {', '.join(other[:4])}")
    return resized


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
    curve, total, steps, last = [], 0.0, 0, 0
    for row in history:
        if "loss" in row:  # the mean since the last one
            new = row["step"] - last
            total, steps, last = total + new * row["loss"], steps + new, row["step"]
        if "eval_score" in row:
            curve.append({"epoch": row["epoch"], "loss": total / steps if steps else None, "score": row["eval_score"]})
            total, steps = 0.0, 0
    return curve


def versions() -> dict[str, str]:
    """Of Python and of the libraries that the scores depend on, those that are there."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class Scored(DivergenceGuardTrainer):
    """Trainer whose evaluation is the score of a task: the same code that scores a model without training.

    Nothing that is not finite is scored, nor therefore saved. Losses of tasks are of all sizes: one has run away that is ``AWAY``
    times as large as that of a ``guess``, or the first step's. Steps have few examples, the last one of an epoch perhaps a single
    one: of a short run all count.
    """

    AWAY = 2.0
    ENDS = 1

    def __init__(self, *args, scored: Callable[[PreTrainedModel], dict[str, float]], guess: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.scored, self.guess = scored, guess
        self.model_accepts_loss_kwargs = False  # heads of classes don't: Trainer would count their loss once a process

    def at_first(self, loss):
        self.guess = max(self.guess, loss)
        return self.guess

    def away(self):
        return self.AWAY * self.guess

    def near(self):
        return self.guess

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        self.check()
        was = self.model.training
        self._check_update()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.scored(self.model.eval()).items()}
        self.model.train(was)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _check_update(self) -> None:
        """What the last step has made is in no loss of training yet."""
        rows = [self.train_dataset[k] for k in range(min(len(self.train_dataset), self.args.train_batch_size))]
        with self.compute_loss_context_manager():
            loss = self.model.eval()(**self._prepare_inputs(self.data_collator(rows))).loss
        if not all(bool(value.isfinite().all()) for value in (loss, *self.model.parameters())):
            step = self.state.global_step
            raise ValueError(
                f"loss or weights are not finite after step {step} ({self._where(step - 1)}); {self._good()}; lower the "
                "learning rate"
            )

    def _where(self, step: int) -> str:
        each, size = step_size(self.args), len(self.train_dataset)
        done, step = divmod(step, -(-size // each))
        return (
            f"examples {step * each} to {min(size, (step + 1) * each)} of epoch {done + 1}, in the order of seed "
            f"{self.args.seed}; learning rate {self.args.learning_rate:g}"
        )

    def _good(self) -> str:
        return super()._good() if last_checkpoint(Path(self.args.output_dir)) else "nothing of this seed is saved"


class LogFrequently(TrainerCallback):
    """Logs in between, too, not only at the end of every epoch."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % max(1, min(50, state.max_steps // 10)) == 0:
            control.should_log = True
