"""Exports for transformers: the same logits in a process where tenfold can't be imported, and sentences for what can't be."""

import pytest
import torch
from exports import CASES


@pytest.mark.parametrize("job", [f"{case} {to}" for case, (_, _, formats) in CASES.items() for to in formats])
def test_logits_are_the_same_without_tenfold(exported, job):
    expected, found, _ = exported[job]
    assert not isinstance(found, str), found
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_stock_is_smaller(exported):
    """The width is that of the widest block, and heads that no block needs are gone."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(exported["narrow-llama stock"][2])
    assert (config.intermediate_size, config.num_key_value_heads) == (40, 2)
    config = AutoConfig.from_pretrained(exported["fewer-heads stock"][2])
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (40, 2, 1)
