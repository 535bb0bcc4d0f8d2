"""Pre-training: a model from a configuration, dense or structured from noise, and its tokenizer, on transformers.Trainer."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer
from transformers.trainer_callback import PrinterCallback

from tenfold.evaluate.text import documents, token_stream
from tenfold.models.plan import make_plan
from tenfold.models.recipe import Recipe, load_recipe
from tenfold.models.replace import replace
from tenfold.train.optimizer import MuonAdamW
from tenfold.train.trainer import Progress, Windows, training_arguments, unwrapped

END = "<|endoftext|>"


def pretrain(
    recipe: Recipe | str | dict,
    data: Sequence[str | Path],
    output: str | Path,
    dtype: torch.dtype = torch.float16,
    advance: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train the recipe's model on ``data`` and write a Hugging Face folder; an interrupted run resumes.

    The recipe has ``model`` (a ``model_type`` and arguments of its configuration), ``tokenizer`` (``vocab_size`` of a
    byte-level BPE that is trained on the first ``documents``), ``train`` (see :class:`tenfold.models.recipe.Train`), and
    may have ``replace``: then the model is folded from noise before it is trained.

    Args:
        dtype: in which the result is written.
        advance: called as ``advance(step, steps)``.

    Returns:
        What ``training.json`` in the folder holds: the recipe, the loss curve, the time, the versions.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if recipe.model is None or recipe.train is None or recipe.tokenizer is None:
        raise ValueError(f"recipe {recipe.name!r} has no model, tokenizer or train section, which pre-training needs")
    folder, settings = Path(output), recipe.train
    folder.mkdir(parents=True, exist_ok=True)
    length = recipe.model["n_positions"] if "n_positions" in recipe.model else recipe.model["max_position_embeddings"]
    tokenizer = _tokenizer(folder, data, recipe, length)
    tokens = _tokens(folder, data, tokenizer, settings.tokens)
    windows = Windows(tokens, length)
    steps = len(windows) // (settings.batch * settings.accumulate)
    torch.manual_seed(settings.seed)
    model = new_model(recipe, tokenizer)
    arguments = training_arguments(
        folder / "checkpoints",
        settings.learning_rate,
        settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        torch_compile=settings.compile,
        num_train_epochs=1,
        logging_steps=max(1, min(50, steps // 10)),
        save_steps=200,
        seed=settings.seed,
    )
    optimizer = MuonAdamW(model, lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.95))
    trainer = Trainer(model=model, args=arguments, train_dataset=windows, optimizers=(optimizer, None))
    trainer.remove_callback(PrinterCallback)
    if advance is not None:
        trainer.add_callback(Progress(advance))
    begun = time.perf_counter()
    trainer.train(resume_from_checkpoint=any((folder / "checkpoints").glob("checkpoint-*")) or None)
    unwrapped(trainer).to(dtype).save_pretrained(folder)
    report = {
        "recipe": recipe.model_dump(exclude_defaults=True),
        "tokens": len(tokens) // length * length,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds_of_last_run": round(time.perf_counter() - begun, 1),
        "curve": [[row["step"], row["loss"]] for row in trainer.state.log_history if "loss" in row],
        "versions": versions(),
    }
    (folder / "training.json").write_text(json.dumps(report, indent=1))
    return report


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}


def new_model(recipe: Recipe, tokenizer):
    """The recipe's model with random weights, folded from noise where the recipe says so."""
    config = AutoConfig.for_model(
        **recipe.model,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    if recipe.replace:
        plan = make_plan(model, recipe)
        replace(model, plan, source="noise")
    return model


def train_tokenizer(texts, vocab_size: int, length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``vocab_size`` entries, the end-of-text token first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        model_max_length=length,
        clean_up_tokenization_spaces=False,
    )


def _tokenizer(folder: Path, data, recipe: Recipe, length: int) -> PreTrainedTokenizerFast:
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    sample = islice(documents(data), recipe.tokenizer.documents)
    tokenizer = train_tokenizer(sample, recipe.tokenizer.vocab_size, length)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _tokens(folder: Path, data, tokenizer, limit: int | None) -> np.ndarray:
    """The first ``limit`` tokens of ``data``, kept in ``tokens.npy`` so that a resumed run finds them."""
    path = folder / "tokens.npy"
    if not path.exists():
        kind = np.uint16 if len(tokenizer) <= 2**16 else np.int32
        np.save(path, token_stream(documents(data, tokenizer), tokenizer, limit).astype(kind))
    return np.load(path, mmap_mode="r")
