"""Calibration text: batches of tokens, cut the way the model reads text."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from tenfold.evaluation.text_files import HUB, documents, list_files, token_stream
from tenfold.models.config import Calibrate
from tenfold.models.distributed import all_reduce_number, is_main_process, num_processes
from tenfold.models.recipe import Recipe
from tenfold.models.text_mode import context_of, is_causal_lm

Batch = dict[str, Tensor]
BATCH_TOKENS = 1024  # no slower than twice as many, whose activations were a quarter of the peak memory
UNFAMILIAR = 2.0  # bits per byte
CHECKED_SAMPLES = 8  # whose loss shows whether the model knows the text
READ_AHEAD = 4  # times the samples are read, of a text that is too long to be read whole
READ_LEAST = {"tokens": 2**19, "lines": 2**16}  # of a file: seconds; a data set of a hub has to come first


@dataclass
class Calibration:
    """Batches ``{"input_ids": (samples, window), "attention_mask": ..}`` and their source."""

    batches: list[Batch]
    source: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return count_tokens(self.batches)


def settings_of(recipe: Recipe) -> Calibrate:
    """Return the ``calibrate`` section of ``recipe``, or the default one."""
    return recipe.calibrate or Calibrate.model_validate({})


def count_tokens(batches: Sequence[Batch]) -> int:
    """Return the number of tokens without padding."""
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def select_batches(batches: list[Batch], tokens: int) -> list[Batch]:
    """Return evenly spaced ``batches`` with about ``tokens`` tokens, at least one per process."""
    each = count_tokens(batches) / len(batches)
    count = min(len(batches), max(num_processes(), round(tokens / each)))
    return [batches[k * len(batches) // count] for k in range(count)]


def split_for_processes(batches: list[Batch]) -> list[Batch]:
    """Return ``batches``, cut into single samples where there are fewer batches than processes.

    Raises:
        ValueError: there are fewer samples than processes, too.
    """
    if len(batches) >= num_processes():
        return batches
    single = [
        {name: value[k : k + 1] for name, value in b.items()} for b in batches for k in range(len(b["input_ids"]))
    ]
    if len(single) < num_processes():
        raise ValueError(
            f"{num_processes()} processes can't share {len(single)} samples of calibration text; start fewer, or give more text"
        )
    return single


def load_calibration(
    model,
    tokenizer,
    files: str | Path | Sequence[str | Path],
    num_samples: int = 128,
    window: int | None = None,
    batch_size: int | None = None,
) -> Calibration:
    """Read ``num_samples`` samples of ``files``, evenly spread over the text.

    A causal model reads windows of ``window`` tokens cut from the text as one stream. For any other model a sample is one
    document (one line of a plain text file), truncated to the window and padded.

    Args:
        batch_size: samples per batch; as many as make ``BATCH_TOKENS`` tokens unless given.

    Raises:
        ValueError: there is no text, or too little for one window, or the tokenizer belongs to another model.
    """
    files, longest = list_files(files), context_of(model)
    window = min(window or min(longest, 1024), longest)
    if num_samples < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"{num_samples} samples in batches of {batch_size} can't be read; ask for one or more")
    cut = _cut_windows if is_causal_lm(model) else _cut_documents
    batches = cut(tokenizer, files, num_samples, window, batch_size)
    largest, known = max(int(b["input_ids"].max()) for b in batches), model.get_input_embeddings().weight.shape[0]
    if largest >= known:
        raise ValueError(
            f"the calibration text has token {largest} but the model knows {known}: use the tokenizer that the model was "
            "trained with"
        )
    pairs = zip(batches[0]["input_ids"], batches[0]["attention_mask"], strict=True)
    read = [ids[mask.bool()] for ids, mask in pairs]
    size = sum(len(text.encode()) for text in tokenizer.batch_decode(read, skip_special_tokens=True))
    source = {"files": [Path(f).name for f in files], "samples": num_samples, "window": window}
    return Calibration(batches, source | {"bytes_per_token": size / sum(map(len, read))})


def check_text(text: Calibration, nats: float | None) -> None:
    """Warn if the loss of the model, ``nats`` per token, shows that the text is unlike its training data.

    Text like the training data takes 0.8 to 1.6 bits per byte; another language, noise or the tokens of another tokenizer take
    2 and more, although their short tokens may have low perplexities.
    """
    bits = (nats or 0.0) / math.log(2) / text.source.get("bytes_per_token", math.inf)
    if nats is not None and bits > UNFAMILIAR and is_main_process():
        finding = f"the model's perplexity on the calibration text is {math.exp(min(nats, 700)):,.0f}, {bits:.1f} bits per byte"
        warnings.warn(f"{finding}; is it the right text, in a language that the model was trained on?", stacklevel=2)


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel, batches: Sequence[Batch], logits_of: Callable[[int, int, Batch], Tensor]
) -> float | None:
    """Return the mean loss of ``model`` per token of the first samples of every process; None if it predicts no next token.

    Args:
        logits_of: receives the numbers of a batch and of a sample in it, and that sample; returns its logits.
    """
    if not is_causal_lm(model) or model.get_output_embeddings() is None:
        return None
    device = next(p.device for p in model.parameters() if not p.is_meta)
    samples = [(k, row) for k, batch in enumerate(batches) for row in range(len(batch["input_ids"]))]
    loss, tokens = 0.0, 0
    for k, row in samples[:CHECKED_SAMPLES]:
        inputs = {name: value[row : row + 1].to(device) for name, value in batches[k].items()}
        mask = inputs["attention_mask"].bool()
        more, count = sum_losses(logits_of(k, row, inputs), inputs["input_ids"], mask[:, 1:] & mask[:, :-1])
        loss, tokens = loss + more, tokens + count
    return all_reduce_number(loss) / max(1.0, all_reduce_number(tokens))


def sum_losses(logits: Tensor, ids: Tensor, mask: Tensor) -> tuple[float, int]:
    """Return the summed cross entropy of the next tokens in ``mask (samples, tokens - 1)``, and how many they are."""
    losses = cross_entropy(logits[:, :-1][mask].float(), ids[:, 1:][mask], reduction="sum")
    return float(losses), int(mask.sum())


def _limit(files, count: int, unit: str) -> int:
    """Return how many tokens or lines to read for ``count`` that are wanted."""
    remote = any(str(file).startswith(HUB) for file in files)
    return READ_AHEAD * count if remote else max(READ_AHEAD * count, READ_LEAST[unit])


def _cut_windows(tokenizer, files, samples: int, window: int, batch: int | None) -> list[Batch]:
    stream = token_stream(documents(files, tokenizer), tokenizer, _limit(files, samples * window, "tokens"))
    tokens = torch.from_numpy(stream).long()
    whole = len(tokens) // window
    if whole == 0:
        raise ValueError(
            f"the calibration text {', '.join(map(str, files))} has {len(tokens)} tokens, fewer than one window of {window}: "
            "give more text, twice as many tokens as the widest matrix has inputs"
        )
    chosen = torch.linspace(0, whole - 1, min(samples, whole)).round().long()
    rows = tokens[: whole * window].reshape(whole, window)[chosen]
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part)}
        for part in rows.split(batch or max(1, BATCH_TOKENS // window))
    ]


def _cut_documents(tokenizer, files, samples: int, window: int, batch: int | None) -> list[Batch]:
    lines = (line for text in documents(files, tokenizer) for line in text.splitlines() if line.strip())
    texts = list(islice(lines, _limit(files, samples, "lines")))
    if not texts:
        raise ValueError(f"the calibration text {', '.join(map(str, files))} is empty; give some sentences")
    chosen = torch.linspace(0, len(texts) - 1, min(samples, len(texts))).round().long().tolist()
    rows = tokenizer([texts[k] for k in chosen], truncation=True, max_length=window)["input_ids"]
    rows.sort(key=len)  # samples of similar length need little padding
    groups: list[list[list[int]]] = []
    for row in rows:
        if not groups or len(groups[-1]) == (batch or max(1, BATCH_TOKENS // len(row))):
            groups.append([])
        groups[-1].append(row)
    return [dict(tokenizer.pad({"input_ids": group}, return_tensors="pt")) for group in groups]
