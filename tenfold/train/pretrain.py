"""Pre-training: a model from a configuration, dense or structured from noise, and its tokenizer, on transformers.Trainer."""

from __future__ import annotations

import json
import math
import platform
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from tenfold.evaluate.text import documents, token_stream
from tenfold.train.optimizer import MuonAdamW

END = "<|endoftext|>"


class Windows(torch.utils.data.Dataset):
    """A token stream cut into windows of ``length`` that do not overlap; the last, shorter one is left out."""

    def __init__(self, tokens: np.ndarray, length: int):
        if len(tokens) < length:
            raise ValueError(f"the text has {len(tokens)} tokens, fewer than one window of {length}: give more text")
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.tokens[index * self.length :][: self.length].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


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
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=length, clean_up_tokenization_spaces=False
    )


def tokens_on_disk(data, tokenizer, limit: int, folder: Path) -> np.ndarray:
    """The first ``limit`` tokens of ``data``, kept in ``folder/tokens.npy`` so that a resumed run finds them."""
    path = folder / "tokens.npy"
    if not path.exists():
        kind = np.uint16 if len(tokenizer) <= 2**16 else np.int32
        np.save(path, token_stream(documents(data), tokenizer, limit).astype(kind))
    return np.load(path, mmap_mode="r")


def training_arguments(folder: Path, settings: dict, **more) -> TrainingArguments:
    """Trainer's arguments from a recipe's ``train`` section; ``more`` wins."""
    accelerated = torch.accelerator.is_available()
    return TrainingArguments(
        **{
            "output_dir": str(folder / "checkpoints"),
            "use_cpu": not accelerated,
            "bf16": True,
            "lr_scheduler_type": settings.get("schedule", "linear"),
            "warmup_steps": settings.get("warmup", 0.03),
            "learning_rate": settings["learning_rate"],
            "weight_decay": settings.get("weight_decay", 0.1),
            "max_grad_norm": 1.0,
            "per_device_train_batch_size": settings["batch"],
            "gradient_accumulation_steps": settings.get("accumulate", 1),
            "torch_compile": settings.get("compile", False),
            "logging_steps": settings.get("log_every", 50),
            "save_steps": settings.get("save_every", 200),
            "save_total_limit": 1,
            "report_to": "none",
            "seed": settings.get("seed", 0),
            **more,
        }
    )


def pretrain(recipe: dict, data: list, output: str | Path) -> dict:
    """Train the recipe's model on ``data`` and write a Hugging Face folder; an interrupted run resumes.

    Returns:
        What ``training.json`` in the folder holds: the settings, the loss curve, the time, the versions.
    """
    folder, settings = Path(output), recipe["train"]
    folder.mkdir(parents=True, exist_ok=True)
    length = recipe["model"]["n_positions"]
    if (folder / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    else:
        sample = islice(documents(data), recipe["tokenizer"]["documents"])
        tokenizer = train_tokenizer(sample, recipe["tokenizer"]["vocab_size"], length)
        tokenizer.save_pretrained(folder)
    tokens = tokens_on_disk(data, tokenizer, settings["tokens"], folder)
    torch.manual_seed(settings.get("seed", 0))
    config = AutoConfig.for_model(
        **recipe["model"], vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    model = AutoModelForCausalLM.from_config(config)
    arguments = training_arguments(folder, settings, num_train_epochs=1)
    make = {"learning_rate": settings["learning_rate"], "weight_decay": settings.get("weight_decay", 0.1)}
    optimizer = MuonAdamW(model, lr=make["learning_rate"], weight_decay=make["weight_decay"], betas=(0.9, 0.95))
    trainer = Trainer(model=model, args=arguments, train_dataset=Windows(tokens, length), optimizers=(optimizer, None))
    begun = time.perf_counter()
    trainer.train(resume_from_checkpoint=any((folder / "checkpoints").glob("checkpoint-*")) or None)
    seconds = time.perf_counter() - begun
    model.to(torch.float16).save_pretrained(folder)
    report = {
        "recipe": recipe,
        "tokens": len(tokens) // length * length,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds_of_last_run": round(seconds, 1),
        "curve": [[row["step"], row["loss"]] for row in trainer.state.log_history if "loss" in row],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
    }
    (folder / "training.json").write_text(json.dumps(report, indent=1))
    return report
