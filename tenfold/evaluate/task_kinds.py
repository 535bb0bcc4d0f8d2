"""The kinds of tasks: how their examples are read, encoded, predicted and scored."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import pvariance
from typing import Any

import torch
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
)

from tenfold.evaluate.metrics import METRICS, library
from tenfold.evaluate.text_files import OPENERS

SPLITS = {"train": ("train",), "dev": ("dev", "validation"), "test": ("test",)}
IGNORED = -100  # the label of a token that does not count in the loss
PROMPT = "\nTL;DR:"  # what makes a decoder write a summary (GPT-2's paper)


@dataclass(frozen=True)
class Example:
    """One line of a task: ``texts`` to read, one or two, and what is wanted: a label, a number, or texts."""

    texts: tuple[str, ...]
    wanted: Any


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """What all tasks have.

    Args:
        name: as on the command line.
        folder: inside of the data folder; files may lie in the data folder itself, too.
        file: the name of a split's file, with ``{split}``; packed with xz or gz, too.
        metrics: names in :data:`tenfold.evaluate.metrics.METRICS`.
        libraries: what the metrics need.
    """

    name: str
    file: str
    metrics: tuple[str, ...]
    folder: str = "."
    libraries: tuple[str, ...] = ("sklearn", "scipy")

    def check(self) -> None:
        """Raise ImportError unless the libraries of the metrics are there: before a training, not after it."""
        for name in self.libraries:
            library(name)

    def find(self, data: str | Path, split: str) -> Path:
        """The file of a split under the folder ``data``.

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
        """The first ``limit`` examples of ``train``, ``dev`` or ``test``.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: a column is missing, a label is not known, or there is no example.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit {limit} leaves no example; give 1 or more")
        path, found = self.find(data, split), []
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig") as stream:
            for example in self._examples(stream, path):
                found.append(example)
                if len(found) == limit:
                    break
        if not found:
            raise ValueError(f"{path} holds no example; give a file with lines of task {self.name}")
        return found

    def score(self, predictions: Sequence, examples: Sequence[Example]) -> dict[str, float]:
        """Every metric, and ``score``, their mean."""
        wanted = [example.wanted for example in examples]
        values = {name: METRICS[name](predictions, wanted) for name in self.metrics}
        return values | {"score": sum(values.values()) / len(values)}

    def guess(self, examples: Sequence[Example]) -> float:
        """The mean loss of a model that knows nothing; 0 where that can't be told."""
        return 0.0

    @abstractmethod
    def _examples(self, stream: Iterable[str], path: Path) -> Iterator[Example]:
        """The examples of an open file."""

    @abstractmethod
    def encode(self, tokenizer, example: Example, length: int, train: bool = True) -> dict[str, Any]:
        """What the model reads: ``input_ids``, ``attention_mask``, and ``labels`` when it is trained."""

    @abstractmethod
    def predict(self, model, tokenizer, examples: Sequence[Example], length: int, batch: int, progress) -> list:
        """A prediction for every example, in their order."""

    @abstractmethod
    def check_model(self, model) -> None:
        """Raise ValueError unless ``model`` has the head that the task needs."""

    @abstractmethod
    def collator(self, tokenizer) -> Callable:
        """What pads examples to the longest of a batch."""

    @abstractmethod
    def loading(self) -> tuple[type, dict[str, Any]]:
        """The Auto class of a model for this task, and what it is told."""


@dataclass(frozen=True, kw_only=True)
class Sentences(Task):
    """A label or a number for a sentence or a pair of sentences, in a file with tabs between the columns, without quoting.

    Args:
        texts: the columns of the sentences: names in the first line, or numbers from 0 where it is no header.
        label: the column of the label.
        labels: what stands in that column, in the order of their numbers, each with its name; empty for a number.
    """

    texts: tuple[str | int, ...]
    label: str | int
    labels: dict[str, str]
    file: str = "{split}.tsv"

    def _examples(self, stream, path):
        lines = (line.rstrip("\r\n").split("\t") for line in stream)
        wanted, first = (*self.texts, self.label), 1
        if isinstance(self.label, str):
            header, first = next(lines, []), 2
            for name in wanted:
                if name not in header:
                    raise ValueError(
                        f"{path} has no column {name!r}, only {', '.join(header)}; task {self.name} needs it"
                    )
            wanted = tuple(header.index(name) for name in wanted)
        for number, row in enumerate(lines, first):
            if len(row) <= max(wanted):
                raise ValueError(
                    f"{path}, line {number}, has {len(row)} columns, fewer than the {max(wanted) + 1} of task {self.name}"
                )
            *texts, label = (row[column] for column in wanted)
            yield Example(tuple(texts), self._wanted(label, f"{path}, line {number},"))

    def _wanted(self, label: str, where: str) -> int | float:
        if self.labels and label not in self.labels:
            raise ValueError(f"{where} has label {label!r}; task {self.name} knows {', '.join(self.labels)}")
        try:
            return list(self.labels).index(label) if self.labels else float(label)
        except ValueError:
            raise ValueError(f"{where} has {label!r}; task {self.name} needs a number there") from None

    def guess(self, examples):
        """The logarithm of how many labels there are, or the variance of the numbers."""
        return math.log(len(self.labels)) if self.labels else pvariance([example.wanted for example in examples])

    def loading(self):
        names = list(self.labels.values()) or ["score"]
        kind = "single_label_classification" if self.labels else "regression"
        told = {"id2label": dict(enumerate(names)), "label2id": {name: k for k, name in enumerate(names)}}
        return AutoModelForSequenceClassification, {"num_labels": len(names), "problem_type": kind} | told

    def encode(self, tokenizer, example, length, train=True):
        """Two sentences go through the tokenizer's template of pairs; without one, its end-of-text token joins them."""
        texts, end = example.texts, tokenizer.eos_token
        if len(texts) == 2 and not _has_pairs(tokenizer):
            if end is None:
                raise ValueError("the tokenizer has neither a template of pairs nor an end-of-text token to join them")
            texts = (end.join(texts),)
        read = dict(tokenizer(*texts, truncation=True, max_length=length))
        return read | ({"labels": example.wanted} if train else {})

    def collator(self, tokenizer):
        return DataCollatorWithPadding(tokenizer)

    def check_model(self, model):
        size = max(1, len(self.labels))
        if "SequenceClassification" not in type(model).__name__ or model.config.num_labels != size:
            raise ValueError(
                f"a {type(model).__name__} with {model.config.num_labels} labels has no head for task {self.name}, which "
                f"needs {size}; fine-tune it first: tenfold finetune MODEL --task {self.name}"
            )

    @torch.no_grad()
    def predict(self, model, tokenizer, examples, length, batch, progress):
        read = [self.encode(tokenizer, example, length, train=False) for example in examples]
        order = sorted(range(len(read)), key=lambda k: len(read[k]["input_ids"]))  # little padding
        made, pad = [None] * len(read), self.collator(tokenizer)
        for part in progress([order[k : k + batch] for k in range(0, len(order), batch)]):
            logits = model(**pad([read[k] for k in part]).to(model.device)).logits.float()
            values = logits.argmax(-1) if self.labels else logits[:, 0]
            for k, value in zip(part, values.tolist(), strict=True):
                made[k] = value
        return made


def _has_pairs(tokenizer) -> bool:
    return tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)


@dataclass(frozen=True, kw_only=True)
class Summary(Task):
    """A summary by a decoder, from JSON lines with ``document`` and ``summary``, or several ``summaries``.

    The model reads the document and :data:`PROMPT`; it is trained on the summary alone, and writes greedily up to the
    end-of-text token, ``new_tokens`` at most. What it writes counts up to the first line break.
    """

    new_tokens: int
    metrics: tuple[str, ...] = ("rouge1", "rouge2", "rougeL")
    libraries: tuple[str, ...] = ("rouge_score",)

    def _examples(self, stream, path):
        for number, line in enumerate(stream, 1):
            try:
                row = json.loads(line)
                yield Example((row["document"],), tuple(row.get("summaries") or [row["summary"]]))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f'{path}, line {number}, is not a JSON object with "document" and "summary", which task '
                    f"{self.name} needs"
                ) from None

    def loading(self):
        return AutoModelForCausalLM, {}

    def encode(self, tokenizer, example, length, train=True):
        """``document PROMPT`` and, in training, the first summary and the end-of-text token; the document is cut to fit."""
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-text token to end a summary with; give it an eos_token")
        room, target = self.room(length), []
        if train:
            target = tokenizer(f" {example.wanted[0].strip()}", add_special_tokens=False)["input_ids"][: room - 1]
            target = [*target, tokenizer.eos_token_id]
        prompt = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
        document = tokenizer(example.texts[0], verbose=False)["input_ids"][: max(1, length - room - len(prompt))]
        ids = document + prompt + target
        labels = {"labels": [IGNORED] * (len(ids) - len(target)) + target} if train else {}
        return {"input_ids": ids, "attention_mask": [1] * len(ids)} | labels

    def room(self, length: int) -> int:
        """Tokens that are kept free for the summary."""
        return min(self.new_tokens, length // 2)

    def collator(self, tokenizer):
        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def check_model(self, model):
        encodes = type(model.config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(model.config, "is_decoder", False)
        if encodes or model.config.is_encoder_decoder or not model.can_generate():
            raise ValueError(f"task {self.name} needs a decoder such as gpt2 or llama, not a {type(model).__name__}")

    @torch.no_grad()
    def predict(self, model, tokenizer, examples, length, batch, progress):
        read = [self.encode(tokenizer, example, length, train=False) for example in examples]
        order = sorted(range(len(read)), key=lambda k: len(read[k]["input_ids"]))
        made, room = [""] * len(read), self.room(length)
        how = {"max_new_tokens": room, "do_sample": False, "pad_token_id": tokenizer.pad_token_id, "use_cache": True}
        for part in progress([order[k : k + batch] for k in range(0, len(order), batch)]):
            ids = tokenizer.pad([read[k] for k in part], padding_side="left", return_tensors="pt").to(model.device)
            written = model.generate(**ids, eos_token_id=tokenizer.eos_token_id, **how)[:, ids["input_ids"].shape[1] :]
            for k, text in zip(part, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
                made[k] = (text.strip().splitlines() or [""])[0].strip()
        return made
