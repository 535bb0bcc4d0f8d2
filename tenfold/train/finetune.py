"""Fine-tuning on a task with several seeds, on transformers.Trainer, for dense and compressed models."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, set_seed

from tenfold.evaluation.task_kinds import Task
from tenfold.evaluation.tasks import example_length, find_task, set_padding
from tenfold.models.atomic_io import atomic_directory, write_json
from tenfold.models.auto import load_tokenizer, read_config
from tenfold.models.distributed import barrier, is_main_process
from tenfold.models.loading import check_folder, silent
from tenfold.models.precision import check_saved_dtype
from tenfold.models.suggestions import check_name
from tenfold.train.finetune_state import REPORT, finish_seed, load_finished, prepare_seed, resume_seed, seed_folder
from tenfold.train.methods import METHODS, unfreeze_head
from tenfold.train.run_manifest import versions
from tenfold.train.teacher import weights_digest
from tenfold.train.trainer import Advance, DivergenceGuardTrainer, processes_started, step_size, training_arguments

HEADS = ("classifier.", "score.")
LIBRARIES = ("tenfold", "torch", "transformers", "scikit-learn", "scipy", "rouge-score", "peft")


@dataclass(frozen=True)
class Settings:
    """Settings of a fine-tuning.

    Args:
        train: the method: ``full``, ``auxiliary`` or ``lora``; see ``tenfold.train.methods``.
        epochs: passes over the training examples; after each the dev examples are scored and a checkpoint is written.
        learning_rate: the peak of a linear schedule; the method's default unless given.
        batch: examples a step.
        warmup: the fraction of the steps in which the learning rate rises.
        length: tokens of an example at most; the model's context, 512 at most, unless given.
        limit, dev_limit: use only the first examples.
        rank: of ``lora``.
        accumulate: micro-batches that a step is split into, to save memory; the step is the same if all examples weigh alike.
        checkpointing: recompute activations between the blocks in backward.
        compile: use torch.compile.
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
        check_name(self.train, METHODS, "way to train")
        for name in ("epochs", "batch", "rank", "accumulate", "learning_rate"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name.replace('_', ' ')} {value} must be more than 0")


def finetune(
    model: str | Path,
    task: str,
    data: str | Path,
    output: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    device: str | None = None,
    dtype: torch.dtype | None = None,
    advance: Advance | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Fine-tune ``model`` on ``task`` once for every seed, and write the best model to ``output``.

    The folder is an ordinary Hugging Face checkpoint, of the epoch with the best dev score. ``finetune.json`` in it has the runs,
    ``log-SEED.jsonl`` a line every few steps. The same call resumes from the last epoch, whose checkpoint is in
    ``seed-SEED.partial`` until the seed is finished; with other seeds it adds them. Several processes (``torchrun``) share every
    batch, and the first one writes.

    Args:
        model: a folder or a name on a hub, dense or compressed.
        task: a name in ``tenfold.evaluation.tasks.TASKS``.
        data: the folder with the files of the task.
        seeds: each one decides the new head and the order of the examples.
        device: ``cpu`` disables accelerators.
        dtype: of the saved model, float32 unless given; training is in float32, on an accelerator in bfloat16 autocast.
        advance: called as ``advance(step, steps, tokens_per_second)``, over all seeds that are left.
        overwrite: overwrite ``output``, whatever is there.
        settings: those of ``Settings``.

    Returns:
        The contents of ``finetune.json``: ``score`` (``mean`` and sample standard deviation ``std`` of the dev scores over the
        seeds, None for one seed), ``runs`` (one for each seed, with its metrics and its curve), ``parameters`` (``total``,
        ``trainable`` and their ratio, ``share``), ``settings`` and ``versions``.

    Raises:
        ValueError: task or method is not known, the data are wrong, the model does not suit them, ``output`` has runs with other
            settings, loss or weights are not finite, or the loss diverges.
        FileExistsError: ``output`` has something else.
        OSError: there is no room on the disk.
        FileNotFoundError: the model or a file of the task is missing.
        ImportError: a library of the extra ``tasks`` is missing.
    """
    check_saved_dtype(dtype or torch.float32)
    chosen, given = find_task(task), Settings(**settings)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {list(seeds)} must be different numbers, one at least")
    _process_batch(given)
    chosen.check_libraries()
    read_config(model)
    if Path(model).is_dir():
        check_folder(Path(model))
    examples = {"train": chosen.read(data, "train", given.limit), "dev": chosen.read(data, "dev", given.dev_limit)}
    rate = given.learning_rate or METHODS[given.train].learning_rate
    report = {
        "model": str(model),
        "weights": weights_digest(model) if Path(model).is_dir() else None,
        "task": chosen.name,
        "data": str(data),
        "metrics": list(chosen.metrics),
        "examples": {split: len(some) for split, some in examples.items()},
        "settings": asdict(given) | {"learning_rate": rate},
        "dtype": str(dtype or torch.float32).removeprefix("torch."),
        "versions": versions(LIBRARIES),
        "runs": [],
    }
    folder = Path(output)
    if not overwrite:
        report |= load_finished(folder, report)
    left = [seed for seed in seeds if seed not in {run["seed"] for run in report["runs"]}]
    for seed in left:
        prepare_seed(seed_folder(folder, seed), report, overwrite)
    barrier()
    for done, seed in enumerate(left):
        trained, tokenizer, run, parameters = _run_seed(
            model, chosen, examples, given, seed, device, _add_offset(advance, done, len(left)), folder, report
        )
        best = max((old["score"] for old in report["runs"]), default=-float("inf"))
        report["runs"].append(run)
        report |= {"parameters": parameters} | _summarize(report["runs"])
        if is_main_process() and run["score"] > best:
            with silent(), atomic_directory(folder) as new:
                trained.to(dtype or torch.float32).save_pretrained(new)
                tokenizer.save_pretrained(new)
                write_json(new / REPORT, report)
        elif is_main_process():
            write_json(folder / REPORT, report)
        if is_main_process():
            finish_seed(seed_folder(folder, seed), folder)
        barrier()
    return report


def _add_offset(advance: Advance | None, done: int, seeds: int) -> Advance | None:
    """Count the steps of all ``seeds``, of which ``done`` are finished."""
    return advance and (lambda step, steps, speed: advance(done * steps + step, seeds * steps, speed))


def _process_batch(given: Settings) -> int:
    """Return the examples in a micro-batch of each process."""
    processes = processes_started()
    parts = processes * given.accumulate
    if given.batch % parts:
        multiple = -(-given.batch // parts) * parts
        split = f" in {given.accumulate} parts" if given.accumulate > 1 else ""
        raise ValueError(
            f"{processes} processes can't share {given.batch} examples a step{split} evenly; give --batch-size {multiple}"
        )
    return given.batch // parts


def _summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    scores = [run["score"] for run in runs]
    std = statistics.stdev(scores) if len(scores) > 1 else None
    best = runs[scores.index(max(scores))]
    return {"score": {"mean": statistics.mean(scores), "std": std}, "best_seed": best["seed"]}


def _run_seed(name, task: Task, examples, given: Settings, seed: int, device, advance, folder: Path, report):
    """Return the trained model of one seed, the tokenizer, its report, and the counts of its parameters."""
    set_seed(seed)
    method, place = METHODS[given.train], seed_folder(folder, seed)
    model, tokenizer, new = _load(name, task)
    length = example_length(model, given.length)
    method.prepare(model, given.rank)
    unfreeze_head(model, new)
    parameters = count_parameters(model)
    encoded = [task.encode(tokenizer, example, length) for example in examples["train"]]
    arguments = _arguments(place, given, report["settings"]["learning_rate"], seed, device)
    trainer = TaskTrainer(
        model=model,
        args=arguments,
        train_dataset=encoded,
        eval_dataset=examples["dev"],
        data_collator=task.collator(tokenizer),
        processing_class=tokenizer,
        callbacks=[LogFrequently()],
        guess=task.guess_loss(examples["train"]),
        score_model=lambda model: task.score(
            task.predict(model, tokenizer, examples["dev"], length, 2 * given.batch, progress=iter), examples["dev"]
        ),
        log=folder / f"log-{seed}.jsonl",
        advance=advance,
        tokens_per_step=step_size(arguments) * sum(len(row["input_ids"]) for row in encoded) / max(1, len(encoded)),
    )
    begun = time.perf_counter()
    with resume_seed(place, report) as checkpoint:
        model = trainer.train_and_unwrap(checkpoint)
    method.finish(model)
    state = trainer.state
    best = next(row for row in state.log_history if row["step"] == state.best_global_step and "eval_score" in row)
    run = {"seed": seed} | {key.removeprefix("eval_"): best[key] for key in best if key.startswith("eval_")}
    run |= {"best_epoch": best["epoch"], "seconds": round(time.perf_counter() - begun, 1)}
    run |= {"steps": state.global_step, "new": sorted(new), "curve": _epoch_curve(state.log_history)}
    return model, tokenizer, run, parameters


def _load(name, task: Task):
    """Return the model with a head for ``task``, the tokenizer, and the names of the parameters that are new."""
    tokenizer, (auto_class, settings) = load_tokenizer(name), task.model_class()
    settings |= {
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }  # a head of another task has another size
    with silent(reports=False):  # of a new head, which is in the report
        model, loaded = auto_class.from_pretrained(name, dtype=torch.float32, **settings)
    task.check_model(model)
    set_padding(model, tokenizer)
    resized = {key for key, *_ in loaded["mismatched_keys"]}
    if other := sorted(key for key in resized if not key.startswith(HEADS)):
        raise ValueError(f"{name} has tensors of another size than its config.json says: {', '.join(other[:4])}")
    return model, tokenizer, set(loaded["missing_keys"]) | resized


def _arguments(place: Path, given: Settings, rate: float, seed: int, device: str | None):
    cpu = device == "cpu" or not torch.accelerator.is_available()
    return training_arguments(
        place,
        rate,
        _process_batch(given),
        gradient_accumulation_steps=given.accumulate,
        activation_checkpointing=given.checkpointing,
        num_train_epochs=given.epochs,
        warmup_steps=given.warmup,
        weight_decay=given.weight_decay,
        lr_scheduler_type="linear",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,  # the best and the last one; with a limit of 1 Trainer deletes the last one at the end
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        logging_strategy="epoch",
        remove_unused_columns=False,
        torch_compile=given.compile,
        seed=seed,
        use_cpu=cpu,
        bf16=not cpu,  # on a CPU scores are exactly those of the saved model
    )


def count_parameters(model: PreTrainedModel) -> dict[str, int | float]:
    """Count all and trainable parameters, each tensor once, and return their ratio as ``share``."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"total": total, "trainable": trainable, "share": trainable / total}


def _epoch_curve(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the mean loss of every epoch and the dev score after it."""
    curve, total, steps, last = [], 0.0, 0, 0
    for row in history:
        if "loss" in row:  # the mean since the last row
            new = row["step"] - last
            total, steps, last = total + new * row["loss"], steps + new, row["step"]
        if "eval_score" in row:
            curve.append({"epoch": row["epoch"], "loss": total / steps if steps else None, "score": row["eval_score"]})
            total, steps = 0.0, 0
    return curve


class TaskTrainer(DivergenceGuardTrainer):
    """Trainer that evaluates by the score of a task, computed as for a model that is not trained.

    The loss of a task may have any size: it has diverged at ``FACTOR`` times the loss of a ``guess``, or of the first step.
    Steps have few examples, the last one of an epoch perhaps one: at the end of a short run all steps are averaged.
    """

    FACTOR = 2.0
    MIN_FRACTION = 1
    UNIT = "examples"

    def __init__(self, *args, score_model: Callable[[PreTrainedModel], dict[str, float]], guess: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.score_model, self.guess = score_model, guess

    def initial_best(self, loss):
        self.guess = max(self.guess, loss)
        return self.guess

    def divergence_limit(self):
        return self.FACTOR * self.guess

    def good_limit(self):
        return self.guess

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        training = self.model.training
        self.check_losses()
        self.check_weights()
        self._check_last_step()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.score_model(self.model.eval()).items()}
        self.model.train(training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _check_last_step(self) -> None:
        """Raise ValueError if the loss is not finite after the last step, whose effect no training loss has shown yet."""
        rows = [self.train_dataset[k] for k in range(min(len(self.train_dataset), self.args.train_batch_size))]
        with self.compute_loss_context_manager():
            loss = self.model.eval()(**self._prepare_inputs(self.data_collator(rows))).loss
        if not loss.isfinite():
            step = self.state.global_step
            self._stop(f"the loss is {loss.item()} after step {step} ({self._locate(step - 1)})")


class LogFrequently(TrainerCallback):
    """Log between the ends of the epochs, too."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % max(1, min(50, state.max_steps // 10)) == 0:
            control.should_log = True
