"""Fine-tuning on a task with several seeds, on transformers.Trainer, for dense and compressed models."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import BaseModel
from transformers import PreTrainedModel, set_seed

from tenfold.evaluation.task_kinds import Task
from tenfold.evaluation.tasks import example_length, find_task, set_padding
from tenfold.models.atomic_io import atomic_directory, read_json, write_json
from tenfold.models.auto import load_tokenizer, read_config
from tenfold.models.distributed import barrier, is_main_process
from tenfold.models.loading import load_with_head, silent
from tenfold.models.output_folder import check_output, claim_output, list_content
from tenfold.models.precision import saved_dtype
from tenfold.models.suggestions import check_name
from tenfold.models.weight_files import check_folder
from tenfold.train.checkpoints import last_checkpoint
from tenfold.train.methods import METHODS, unfreeze_head
from tenfold.train.run_manifest import check_same, versions
from tenfold.train.teacher import weights_digest
from tenfold.train.trainer import Advance, DivergenceGuardTrainer, split_step, step_size, training_arguments

REPORT = "finetune.json"
SAME = ("weights", "task", "data", "examples", "dtype")  # and the settings, of which compile may differ
HEADS = ("classifier.", "score.")
LIBRARIES = ("tenfold", "torch", "transformers", "scikit-learn", "scipy", "rouge-score", "peft")


@dataclass(frozen=True)
class Settings:
    """Settings of a fine-tuning.

    Args:
        method: what is trained: ``full``, ``auxiliary`` or ``lora``; see ``tenfold.train.methods``.
        epochs: passes over the training examples; after each the dev examples are scored and a checkpoint is written.
        learning_rate: the peak of a linear schedule; the method's default unless given.
        batch_size: examples at once, over all processes.
        gradient_accumulation_steps: batches in a step.
        warmup: the fraction of the steps in which the learning rate rises.
        length: tokens of an example at most; the model's context, 512 at most, unless given.
        limit, dev_limit: use only the first examples.
        rank: of ``lora``.
        gradient_checkpointing: recompute activations between the blocks in backward.
        compile: use torch.compile.
    """

    method: str = "full"
    epochs: float = 3
    learning_rate: float | None = None
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    warmup: float = 0.06
    weight_decay: float = 0.01
    length: int | None = None
    limit: int | None = None
    dev_limit: int | None = None
    rank: int = 8
    gradient_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self):
        check_name(self.method, METHODS, "method")
        for name in ("epochs", "batch_size", "gradient_accumulation_steps", "rank", "learning_rate"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} {value} must be more than 0")


def finetune(
    model: str | Path | PreTrainedModel,
    task: str,
    data: str | Path,
    output: str | Path,
    *,
    tokenizer: Any = None,
    seeds: Sequence[int] = (0,),
    device: str | None = None,
    dtype: torch.dtype | str = "float32",
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
        model: a folder, a name on a hub, or a model, dense or compressed.
        task: a name in ``tenfold.evaluation.tasks.TASKS``.
        data: the folder with the files of the task.
        tokenizer: of ``model``, if that is no folder or name.
        seeds: each one decides the new head and the order of the examples.
        device: ``cpu`` disables accelerators.
        dtype: of the saved model; training is in float32, on an accelerator in bfloat16 autocast.
        advance: called as ``advance(step, steps, tokens_per_second)``, over all seeds that are left.
        overwrite: overwrite ``output``, whatever is there.
        settings: those of ``Settings``.

    Returns:
        The contents of ``finetune.json``: ``score`` (``mean`` and sample standard deviation ``std`` of the dev scores over the
        seeds, None for one seed), ``runs`` (one for each seed, with its metrics, and ``[step, value]`` of its losses, ``curve``,
        and dev scores, ``scores``), ``parameters`` (``total``, ``trainable`` and their ratio, ``share``), ``settings`` and
        ``versions``.

    Raises:
        ValueError: task or method is not known, the data are wrong, the model does not suit them, ``output`` has runs with other
            settings, loss or weights are not finite, or the loss diverges.
        FileExistsError: ``output`` has something else.
        OSError: there is no room on the disk.
        FileNotFoundError: the model or a file of the task is missing.
        ImportError: a library of the extra ``tasks`` is missing.
    """
    kind, chosen, given = saved_dtype(dtype), find_task(task), Settings(**settings)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {list(seeds)} must be different numbers, one at least")
    split_step(given.batch_size, given.gradient_accumulation_steps, unit="examples")
    chosen.check_libraries()
    with claim_output(output), ExitStack() as temporary:
        barrier()
        if isinstance(model, PreTrainedModel):
            set_padding(model, tokenizer)
            name = Path(temporary.enter_context(TemporaryDirectory()))
            model.save_pretrained(name)
            tokenizer.save_pretrained(name)
        else:
            name = model
        read_config(name)
        if Path(name).is_dir():
            check_folder(Path(name))
        examples = {"train": chosen.read(data, "train", given.limit), "dev": chosen.read(data, "dev", given.dev_limit)}
        report: dict[str, Any] = {
            "model": type(model).__name__ if isinstance(model, PreTrainedModel) else str(model),
            "weights": weights_digest(name) if Path(name).is_dir() else str(name),
            "task": chosen.name,
            "data": str(data),
            "metrics": list(chosen.metrics),
            "examples": {split: len(some) for split, some in examples.items()},
            "settings": asdict(given) | {"learning_rate": given.learning_rate or METHODS[given.method].learning_rate},
            "dtype": str(kind).removeprefix("torch."),
            "versions": versions(LIBRARIES),
            "runs": [],
        }
        run_seed = partial(_run_seed, name, chosen, examples, given, device, Path(output), report)
        return _run_seeds(run_seed, seeds, kind, advance, Path(output), overwrite, report)


def _run_seeds(
    run_seed: Callable, seeds: Sequence[int], dtype, advance: Advance | None, folder: Path, overwrite: bool,
    report: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Run the seeds that are left, and save the model of each one that is better than those before."""
    if not overwrite:
        report |= _finished_runs(folder, report)
        if is_main_process():
            for run in report["runs"]:
                _clean_up(folder, run["seed"])
    left = [seed for seed in seeds if seed not in {run["seed"] for run in report["runs"]}]
    for place in (_checkpoints(folder, seed) for seed in left):
        if not overwrite and last_checkpoint(place):
            _check_same(place, report)
        elif is_main_process():
            shutil.rmtree(place, ignore_errors=True)
    barrier()
    for done, seed in enumerate(left):

        def told(step: int, steps: int, speed: float, done: int = done) -> None:
            if advance is not None:
                advance(done * steps + step, len(left) * steps, speed)

        trained, tokenizer, run, parameters = run_seed(seed, told)
        report["runs"].append(run)
        scores = {one["seed"]: one["score"] for one in report["runs"]}
        spread = statistics.stdev(scores.values()) if len(scores) > 1 else None
        best = max(scores, key=lambda one: scores[one])
        report |= {"score": {"mean": statistics.mean(scores.values()), "std": spread}, "best_seed": best}
        report["parameters"] = parameters
        if is_main_process():
            if best == seed:
                with silent(), atomic_directory(folder) as new:
                    trained.to(dtype).save_pretrained(new)
                    tokenizer.save_pretrained(new)
                    write_json(new / REPORT, report)
            else:
                write_json(folder / REPORT, report)
            _clean_up(folder, seed)
        barrier()
    return report


def _checkpoints(folder: Path, seed: int) -> Path:
    """Return the folder of a seed's checkpoints until it is finished."""
    return folder / f"seed-{seed}.partial"


def _clean_up(folder: Path, seed: int) -> None:
    """Delete the checkpoints of a finished seed, but for TensorBoard's curves."""
    for curves in _checkpoints(folder, seed).glob("runs/*"):
        (folder / "runs").mkdir(exist_ok=True)
        curves.replace(folder / "runs" / f"seed-{seed}-{curves.name}")
    shutil.rmtree(_checkpoints(folder, seed), ignore_errors=True)


class _Run(BaseModel, extra="allow"):
    seed: int
    score: float


class _Report(BaseModel, extra="allow"):
    weights: str
    task: str
    data: str
    examples: dict[str, int]
    dtype: str
    settings: dict[str, Any]
    runs: list[_Run]
    parameters: dict[str, Any] = {}
    score: dict[str, Any] = {}
    best_seed: int | None = None


def _finished_runs(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Return the finished runs in ``folder`` and their summary; refuse those with other settings, and anything else."""
    if not (folder / REPORT).is_file():
        if not all(path.match("log-*.jsonl") or path.match("seed-*.partial") for path in list_content(folder)):
            check_output(folder, False)
        return {}
    before = _check_same(folder, report)
    return {key: before[key] for key in ("runs", "parameters", "score", "best_seed")}


def _check_same(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    before = read_json(folder / REPORT, _Report).model_dump()
    then, now = ({key: one[key] for key in SAME} | one["settings"] | {"compile": None} for one in (before, report))
    problem = f"{folder} holds a fine-tuning with other settings"
    check_same(then, now, problem, "repeat that one, give another folder, or add --overwrite")
    return before


def _run_seed(name, task: Task, examples, given: Settings, device, folder: Path, report, seed: int, advance: Advance):
    """Return the trained model of one seed, the tokenizer, its report, and the counts of its parameters."""
    set_seed(seed)
    place = _checkpoints(folder, seed)
    model, tokenizer, new = _load(name, task)
    length = example_length(model, given.length)
    finish = METHODS[given.method].prepare(model, given.rank)
    unfreeze_head(model, new)
    parameters = count_parameters(model)
    encoded = [task.encode(tokenizer, example, length) for example in examples["train"]]
    arguments = _arguments(place, given, report["settings"]["learning_rate"], seed, device)

    def score(model: PreTrainedModel) -> dict[str, float]:
        predictions = task.predict(model, tokenizer, examples["dev"], length, 2 * given.batch_size, progress=iter)
        return task.score(predictions, examples["dev"])

    trainer = TaskTrainer(
        model=model,
        args=arguments,
        train_dataset=encoded,
        eval_dataset=examples["dev"],
        data_collator=task.collator(tokenizer),
        processing_class=tokenizer,
        score_model=score,
        log=folder / f"log-{seed}.jsonl",
        advance=advance,
        tokens_per_step=step_size(arguments) * sum(len(row["input_ids"]) for row in encoded) / max(1, len(encoded)),
    )
    if is_main_process():
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / REPORT, report)
    begun = time.perf_counter()
    model = trainer.train_and_unwrap(last_checkpoint(place))
    finish()
    state = trainer.state
    best = next(row for row in state.log_history if row["step"] == state.best_global_step and "eval_score" in row)
    run = {"seed": seed} | {key.removeprefix("eval_"): best[key] for key in best if key.startswith("eval_")}
    run |= {"best_epoch": best["epoch"], "seconds": round(time.perf_counter() - begun, 1), "steps": state.global_step}
    run |= {"new": sorted(new), "curve": trainer.curve(), "scores": trainer.curve("eval_score")}
    return model, tokenizer, run, parameters


def _load(name: str | Path, task: Task) -> tuple[PreTrainedModel, Any, set[str]]:
    """Return the model with a head for ``task``, the tokenizer, and the names of the parameters that are new."""
    tokenizer, (auto_class, settings) = load_tokenizer(name), task.model_class()
    with silent():
        model, new = load_with_head(name, auto_class, HEADS, dtype=torch.float32, **settings)
    task.check_model(model)
    set_padding(model, tokenizer)
    return model, tokenizer, set(new)


def _arguments(place: Path, given: Settings, rate: float, seed: int, device: str | None):
    cpu = device == "cpu" or not torch.accelerator.is_available()
    batch, accumulate = split_step(given.batch_size, given.gradient_accumulation_steps, unit="examples")
    return training_arguments(
        place,
        rate,
        batch,
        gradient_accumulation_steps=accumulate,
        activation_checkpointing=given.gradient_checkpointing,
        num_train_epochs=given.epochs,
        warmup_steps=given.warmup,
        weight_decay=given.weight_decay,
        lr_scheduler_type="linear",
        logging_steps=0.02,  # of all steps
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,  # the best and the last one; with a limit of 1 Trainer deletes the last one at the end
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
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


class TaskTrainer(DivergenceGuardTrainer):
    """Trainer that evaluates by the score of a task, computed as for a model that is not trained.

    Steps have few examples, the last one of an epoch perhaps one: at the end of a short run all steps are averaged.
    """

    MIN_FRACTION = 1
    UNIT = "examples"

    def __init__(self, *args, score_model: Callable[[PreTrainedModel], dict[str, float]], **kwargs):
        super().__init__(*args, **kwargs)
        self.score_model = score_model

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        model: Any = self.model
        self.check_losses()
        self.check_weights()
        training = model.training
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.score_model(model.eval()).items()}
        model.train(training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
