"""The tasks, as data: where their files are, which columns and labels they have, and which metrics score them.

Add a task by an entry in ``TASKS``. The score of a task is the mean of its metrics: one for most, two where GLUE gives two.

Reference: arXiv 1804.07461 (GLUE); arXiv 1911.12237 (SAMSum); arXiv 2004.15011 (SciTLDR).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tenfold.evaluation.task_kinds import Sentences, Summary, Task
from tenfold.evaluation.text_files import check_tokenizer
from tenfold.models.suggestions import check_name
from tenfold.models.text_mode import context_of

MAX_LENGTH = 512  # tokens of an example at most, unless a length is given
YES_NO = {"entailment": "entailment", "not_entailment": "not_entailment"}
GLUE = [
    Sentences(name="cola", folder="CoLA", texts=("sentence",), label="label", metrics=("matthews",),
              labels={"0": "unacceptable", "1": "acceptable"}, header=("source", "label", "mark", "sentence")),
    Sentences(name="sst2", folder="SST-2", texts=("sentence",), label="label", metrics=("accuracy",),
              labels={"0": "negative", "1": "positive"}),
    Sentences(name="mrpc", folder="MRPC", texts=("#1 String", "#2 String"), label="Quality", metrics=("f1", "accuracy"),
              labels={"0": "not_equivalent", "1": "equivalent"}),
    Sentences(name="stsb", folder="STS-B", texts=("sentence1", "sentence2"), label="score",
              metrics=("pearson", "spearman"), labels={}),
    Sentences(name="qnli", folder="QNLI", texts=("question", "sentence"), label="label", metrics=("accuracy",),
              labels=YES_NO),
    Sentences(name="rte", folder="RTE", texts=("sentence1", "sentence2"), label="label", metrics=("accuracy",),
              labels=YES_NO),
    Sentences(name="wnli", folder="WNLI", texts=("sentence1", "sentence2"), label="label", metrics=("accuracy",),
              labels={"0": "not_entailment", "1": "entailment"}),
]  # fmt: skip
SUMMARIES = [
    Summary(name="samsum", file="samsum_{split}.jsonl", new_tokens=64),
    Summary(name="scitldr", file="scitldr_{split}.jsonl", new_tokens=64),
]
TASKS: dict[str, Task] = {task.name: task for task in (*GLUE, *SUMMARIES)}


def find_task(name: str) -> Task:
    """Return the task of this name.

    Raises:
        ValueError: there is none; the message suggests the nearest one.
    """
    check_name(name, TASKS, "task")
    return TASKS[name]


def set_padding(model, tokenizer) -> None:
    """Use the tokenizer's padding token in both, or its end-of-text token if it has none.

    Raises:
        ValueError: there is no tokenizer, or it has neither of the two.
    """
    check_tokenizer(tokenizer)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither a padding nor an end-of-text token; give it a pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def example_length(model, length: int | None = None) -> int:
    """Return the tokens of an example at most: ``length``, or the model's context, ``MAX_LENGTH`` at most."""
    context = context_of(model)
    if length is not None and not 8 <= length <= context:
        raise ValueError(f"length {length} must be from 8 to the model's context of {context}")
    return length or min(context, MAX_LENGTH)


def evaluate_task(
    model: PreTrainedModel,
    tokenizer: Any,
    task: str | Task,
    data: str | Path,
    split: str = "dev",
    limit: int | None = None,
    length: int | None = None,
    batch_size: int = 32,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Any]:
    """Score ``model`` on a split of ``task``, without training.

    Args:
        model: with a fine-tuned classification head, or for summaries any decoder.
        data: the folder with the files of the task.
        limit: use only the first examples.
        length: tokens of an example at most.

    Returns:
        The metrics, ``score`` (their mean), ``task``, ``split``, ``examples``, and ``data``, the file's name.

    Raises:
        ValueError: the task is not known, its data are wrong, or the model has no head for it.
        FileNotFoundError: the file of the split is missing.
        ImportError: a library of the metrics is missing.
    """
    task = find_task(task) if isinstance(task, str) else task
    task.check_libraries()
    task.check_model(model)
    set_padding(model, tokenizer)
    examples, training = task.read(data, split, limit), model.training
    predictions = task.predict(model.eval(), tokenizer, examples, example_length(model, length), batch_size, progress)
    model.train(training)
    about = {"task": task.name, "split": split, "examples": len(examples), "data": task.find(data, split).name}
    return task.score(predictions, examples) | about
