"""A GPT-2 of toy size with its own tokenizer, and a text: the tests of the commands run on them."""

import random
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tenfold.train.tokenizer import train_tokenizer

WORDS = [
    "the", "old", "house", "stood", "at", "end", "of", "a", "long", "road", "and", "nobody", "had", "lived", "in", "it", "for",
    "many", "years", "but", "wind",
]  # fmt: skip


def text(words: int = 4000, seed: int = 0) -> str:
    choose = random.Random(seed)
    return " ".join(choose.choice(WORDS) for _ in range(words)) + ".\n"


def model(vocabulary: int = 300, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    config.initializer_range = 0.2  # large enough for logits to differ
    return GPT2LMHeadModel(config).eval()


def folder(path: Path) -> Path:
    """Save a model with a tokenizer, and ``text.txt``, into ``path``."""
    tokenizer = train_tokenizer([text()], 300, 32)
    model(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "text.txt").write_text(text(1500, seed=1))
    return path
