"""The kinds of tasks: how their examples are read, encoded, predicted and scored."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
)

from tenfold.evaluation.metrics import METRICS, import_library
from tenfold.evaluation.text_files import OPENERS
from tenfold.models.text_mode import known_inputs

SPLITS = {"train": ("train",), "dev": ("dev", "validation"), "test": ("test",)}
IGNORED = -100  # the label of a token that does not count in the loss
PROMPT = "\nTL;DR:"  # makes a decoder write a summary (GPT-2's paper)


@dataclass(frozen=True)
class Example:
    """One line of a task: one or two ``texts``, and the ``target``: a label, a number, or texts."""

    texts: tuple[str, ...]
    target: Any


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A task.

    Args:
        name: as on the command line.
        folder: inside of the data folder; files may be in the data folder itself, too.
        file: the name of a split's file, with ``{split}``; xz and gz are read, too.
        metrics: names in ``tenfold.evaluation.metrics.METRICS``.
        libraries: required by the metrics.
    """

    name: str
    file: str
    metrics: tuple[str, ...]
    folder: str = "."
    libraries: tuple[str, ...] = ("sklearn", "scipy")

    def check_libraries(self) -> None:
        """Raise ImportError if a library of the metrics is missing: before training, not after it."""
        for name in self.libraries:
            import_library(name)

    def find(self, data: str | Path, split: str) -> Path:
        """Return the file of a split under the folder ``data``.

        Raises:
            FileNotFoundError: it is not there; the message names the files that are.
        """
        names = [self.file.format(split=word) + end for word in SPLITS[split] for end in ("", *OPENERS)]
        folders = list(dict.fromkeys((Path(data) / self.folder, Path(data))))
        for path in (folder / name for folder in folders for name in names):
            if path.is_file():
                return path
        there = sorted(path.name for folder in folders if folder.is_dir() for path in folder.iterdir())
        raise FileNotFoundError(
            f"task {self.name} has no {names[0]} (also .xz, .gz) in {' or '.join(map(str, folders))}, which holds "
            f"{', '.join(there[:8]) or 'nothing'}; give the folder with that file by --data"
        )

    def read(self, data: str | Path, split: str, limit: int | None = None) -> list[Example]:
        """Return the first ``limit`` examples of ``train``, ``dev`` or ``test``.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: a column is missing, a label is not known, or there is no example.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit {limit} leaves no example; give 1 or more")
        path, found = self.find(data, split), []
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig") as stream:
            for example in self._parse(stream, path):
                found.append(example)
                if len(found) == limit:
                    break
        if not found:
            raise ValueError(f"{path} holds no example; give a file with lines of task {self.name}")
        return found

    def score(self, predictions: Sequence, examples: Sequence[Example]) -> dict[str, float]:
        """Return every metric, and ``score``, their mean."""
        targets = [example.target for example in examples]
        values = {name: METRICS[name](predictions, targets) for name in self.metrics}
        return values | {"score": sum(values.values()) / len(values)}

    @torch.no_grad()
    def predict(
        self,
        model,
        tokenizer,
        examples: Sequence[Example],
        length: int,
        batch: int,
        progress: Callable[[list], Iterable],
    ) -> list:
        """Return a prediction for every example; examples of similar length share a batch, which saves padding."""
        rows = [self.encode(tokenizer, example, length, train=False) for example in examples]
        order = sorted(range(len(rows)), key=lambda k: len(rows[k]["input_ids"]))
        predictions = [None] * len(rows)
        for part in progress([order[k : k + batch] for k in range(0, len(order), batch)]):
            found = self._predict_batch(model, tokenizer, [rows[k] for k in part], length)
            for k, prediction in zip(part, found, strict=True):
                predictions[k] = prediction
        return predictions

    @abstractmethod
    def _parse(self, stream: Iterable[str], path: Path) -> Iterator[Example]:
        """Yield the examples of an open file."""

    @abstractmethod
    def encode(self, tokenizer, example: Example, length: int, train: bool = True) -> dict[str, Any]:
        """Return ``input_ids`` and ``attention_mask``, and ``labels`` for training."""

    @abstractmethod
    def _predict_batch(self, model, tokenizer, rows: list[dict], length: int) -> list:
        """Return the predictions for encoded examples."""

    @abstractmethod
    def model_class(self) -> tuple[Any, dict[str, Any]]:
        """Return the class that loads a model for the task, and its arguments."""

    @abstractmethod
    def collator(self, tokenizer) -> Callable:
        """Return the collator of encoded examples."""

    @abstractmethod
    def check_model(self, model) -> None:
        """Raise ValueError unless the model can carry out the task."""


@dataclass(frozen=True, kw_only=True)
class Sentences(Task):
    """A label or number for a sentence or a pair, in a file of tab-separated columns without quoting.

    Args:
        texts: the columns of the sentences.
        label: the column of the label.
        labels: ``{value in that column: name}``, in the order of the label numbers; empty for a number.
        header: names of the columns of a file without a header.
    """

    texts: tuple[str, ...]
    label: str
    labels: dict[str, str]
    header: tuple[str, ...] | None = None
    file: str = "{split}.tsv"

    def _parse(self, stream, path):
        rows = csv.DictReader(stream, self.header, delimiter="\t", quoting=csv.QUOTE_NONE)
        columns = (*self.texts, self.label)
        if missing := [name for name in columns if name not in (rows.fieldnames or ())]:
            known = ", ".join(rows.fieldnames or ())
            raise ValueError(f"{path} has no column {missing[0]!r}, only {known}; task {self.name} needs it")
        for row in rows:
            *texts, label = (row[name] for name in columns)
            where = f"{path}, line {rows.line_num},"
            if label is None or None in texts:
                raise ValueError(f"{where} has too few columns; task {self.name} needs {', '.join(columns)}")
            try:
                target = list(self.labels).index(label) if self.labels else float(label)
            except ValueError:
                known = " or ".join(self.labels) or "a number"
                raise ValueError(f"{where} has {label!r} for its label; task {self.name} needs {known}") from None
            yield Example(tuple(texts), target)

    def model_class(self):
        names = list(self.labels.values()) or ["score"]
        problem = "single_label_classification" if self.labels else "regression"
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: k for k, name in enumerate(names)}}
        return AutoModelForSequenceClassification, {"num_labels": len(names), "problem_type": problem} | labels

    def encode(self, tokenizer, example, length, train=True):
        """Encode one or two sentences; without a template of pairs, the end-of-text token joins two."""
        texts, special = example.texts, tokenizer.num_special_tokens_to_add
        if len(texts) == 2 and special(pair=True) == special(pair=False):
            if tokenizer.eos_token is None:
                raise ValueError("the tokenizer has neither a template of pairs nor an end-of-text token to join them")
            texts = (tokenizer.eos_token.join(texts),)
        row = dict(tokenizer(*texts, truncation=True, max_length=length))
        return row | ({"labels": example.target} if train else {})

    def _predict_batch(self, model, tokenizer, rows, length):
        batch: Any = self.collator(tokenizer)(rows)
        logits = model(**known_inputs(model, batch.to(model.device))).logits.float()
        return (logits.argmax(-1) if self.labels else logits[:, 0]).tolist()

    def collator(self, tokenizer):
        return DataCollatorWithPadding(tokenizer)

    def check_model(self, model):
        size = max(1, len(self.labels))
        if "SequenceClassification" not in type(model).__name__ or model.config.num_labels != size:
            raise ValueError(
                f"a {type(model).__name__} with {model.config.num_labels} labels has no head for task {self.name}, which "
                f"needs {size}; fine-tune it first: tenfold finetune MODEL --task {self.name}"
            )


@dataclass(frozen=True, kw_only=True)
class Summary(Task):
    """A summary by a decoder, in JSON lines with ``document`` and ``summary``, or several ``summaries``.

    The model reads the document and ``PROMPT``; it is trained on the summary alone, and writes greedily up to the end-of-text
    token, ``new_tokens`` at most. Its text counts up to the first line break.
    """

    new_tokens: int
    metrics: tuple[str, ...] = ("rouge1", "rouge2", "rougeL")
    libraries: tuple[str, ...] = ("rouge_score",)

    def _parse(self, stream, path):
        for number, line in enumerate(stream, 1):
            try:
                row = json.loads(line)
                yield Example((row["document"],), tuple(row.get("summaries") or [row["summary"]]))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f'{path}, line {number}, is not a JSON object with "document" and "summary", which task '
                    f"{self.name} needs"
                ) from None

    def model_class(self):
        return AutoModelForCausalLM, {}

    def encode(self, tokenizer, example, length, train=True):
        """Encode ``document PROMPT``, and for training the first summary and the end-of-text token; truncate the document."""
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-text token to end a summary with; give it an eos_token")
        room, target = self.summary_length(length), []
        if train:
            target = tokenizer(f" {example.target[0].strip()}", add_special_tokens=False)["input_ids"][: room - 1]
            target = [*target, tokenizer.eos_token_id]
        prompt = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
        document = tokenizer(example.texts[0], verbose=False)["input_ids"][: max(1, length - room - len(prompt))]
        ids = document + prompt + target
        labels = {"labels": [IGNORED] * (len(ids) - len(target)) + target} if train else {}
        return {"input_ids": ids, "attention_mask": [1] * len(ids)} | labels

    def summary_length(self, length: int) -> int:
        """Return the tokens that are reserved for the summary."""
        return min(self.new_tokens, length // 2)

    def _predict_batch(self, model, tokenizer, rows, length):
        ids = tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(model.device)
        new = model.generate(
            **ids,
            max_new_tokens=self.summary_length(length),
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            use_cache=True,
        )[:, ids["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        return [(text.strip().splitlines() or [""])[0].strip() for text in texts]

    def collator(self, tokenizer):
        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def check_model(self, model):
        encodes = type(model.config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(model.config, "is_decoder", False)
        if encodes or model.config.is_encoder_decoder or not model.can_generate():
            raise ValueError(f"task {self.name} needs a decoder such as gpt2 or llama, not a {type(model).__name__}")
