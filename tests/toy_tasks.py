"""Toy models with tokenizers, and tiny files of tasks that are easy to learn."""

import json
import random
from pathlib import Path

import small
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tenfold.api import compress, save
from tenfold.train.tokenizer import train_tokenizer

TRAIN = {"kind": "tensor_train", "parts": 3, "rank": "full"}
FOLDED = {
    "replace": [{"role": ["attn.q", "attn.qkv", "mlp.in", "mlp.gate", "mlp.out"], "structure": TRAIN, "start": "mpo"}]
}
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
GOOD, BAD = small.WORDS[:8], small.WORDS[8:16]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, and BERT's template for pairs."""
    words = {word: k for k, word in enumerate([*SPECIAL, *small.WORDS, ".", "it's"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", words["[SEP]"]), ("[CLS]", words["[CLS]"]))
    names = {
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
    }
    names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def bert():
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.1, **SIZES)
    return BertForMaskedLM(config), tokenizer


def gpt2():
    tokenizer = train_tokenizer([small.text()], 300, 32)
    return small.model(len(tokenizer)), tokenizer


def llama():
    torch.manual_seed(0)
    tokenizer = train_tokenizer([small.text()], 300, 32)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.1, **SIZES, **special
    )
    return LlamaForCausalLM(config), tokenizer


def folder(path: Path, kind: str, folded: bool) -> Path:
    """A toy in a folder of its own, dense or with tensor trains that cut nothing."""
    place = path / f"{kind}-{'folded' if folded else 'dense'}"
    model, tokenizer = {"bert": bert, "gpt2": gpt2, "llama": llama}[kind]()
    if folded:
        compress(model, FOLDED)
        save(model, place, tokenizer)
    else:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return place


def sentence(words: list[str], choose: random.Random) -> str:
    return " ".join(choose.choice(words) for _ in range(6))


def write_sst2(place: Path, train: int = 160, dev: int = 60) -> Path:
    """A sentence is positive if its words are the good ones."""
    choose = random.Random(0)
    for split, size in (("train", train), ("dev", dev)):
        rows = [(sentence((BAD, GOOD)[k % 2], choose), k % 2) for k in range(size)]
        (place / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    return place


def write_stsb(place: Path, train: int = 64, dev: int = 30) -> Path:
    """Two sentences are as near as the second one has good words."""
    choose = random.Random(1)
    for split, size in (("train", train), ("dev", dev)):
        rows = []
        for _ in range(size):
            good = choose.randrange(6)
            second = " ".join(choose.choice(GOOD if k < good else BAD) for k in range(5))
            rows.append(f"{sentence(GOOD, choose)}\t{second}\t{good:.3f}\n")
        (place / f"{split}.tsv").write_text("sentence1\tsentence2\tscore\n" + "".join(rows))
    return place


def write_summaries(place: Path, train: int = 32, dev: int = 6) -> Path:
    """The summary is always the same word."""
    choose = random.Random(2)
    for split, size in (("train", train), ("validation", dev)):
        rows = [{"document": sentence(GOOD, choose), "summary": "the wind"} for _ in range(size)]
        (place / f"samsum_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place
