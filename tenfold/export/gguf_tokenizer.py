"""Tokenizers in GGUF: byte-level BPE, whose splitting of text llama.cpp knows by a name."""

from __future__ import annotations

import json
from typing import Any

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# what splits the text before the merges -> its name in llama.cpp
SPLITS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_WORDS + r"\p{N}{1,3}" + _REST, "ByteLevel"): "llama-bpe",
    (_WORDS + r"\p{N}" + _REST, "ByteLevel"): "qwen2",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    """Write ``tokenizer`` to a GGUFWriter, with tokens that are never used up to ``vocab_size``.

    Raises:
        ValueError: there is none, or it is not one that llama.cpp splits text like.
    """
    if tokenizer is None:
        raise ValueError(
            "gguf carries the tokenizer, and this model has none; copy tokenizer.json and tokenizer_config.json there"
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    split = SPLITS.get(_splits(state["pre_tokenizer"]))
    if state["model"]["type"] != "BPE" or split is None:
        raise ValueError(
            f"gguf holds byte-level BPE tokenizers that split text like {', '.join(SPLITS.values())}, and this "
            f"{state['model']['type']} is none; export to onnx"
        )
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {one["id"]: CONTROL if one["special"] else USER_DEFINED for one in state["added_tokens"]}
    types = [added.get(number, NORMAL if number in tokens else UNUSED) for number in range(vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(vocab_size)])
    writer.add_token_types(types)
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    )
    for kind in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    first = tokenizer("a").input_ids[0]
    writer.add_add_bos_token(first == tokenizer.bos_token_id)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _splits(state: dict | None) -> tuple[str, ...]:
    """Return the steps that split the text, an expression by itself."""
    steps = (state or {}).get("pretokenizers") or [state or {}]
    return tuple(step["pattern"]["Regex"] if step.get("type") == "Split" else step.get("type", "") for step in steps)
