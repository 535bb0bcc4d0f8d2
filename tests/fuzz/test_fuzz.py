"""Damaged files are refused in a sentence that names them, or are read rightly: a sample of what ``make fuzz`` tries."""

import json

import pytest
from campaign import campaign
from readers import readers
from run import SEED

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import strategies as st  # noqa: E402

from tenfold.evaluation.text_files import documents  # noqa: E402
from tenfold.models.checkpoint_format import read_structures  # noqa: E402
from tenfold.models.quantization_config import TenfoldConfig  # noqa: E402
from tenfold.models.recipe import load_recipe, parse_recipe  # noqa: E402

steady = hypothesis.settings(max_examples=150, derandomize=True, database=None, deadline=None)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
FIELDS = (
    "kind",
    "out_features",
    "in_features",
    "rank",
    "outs",
    "ins",
    "ranks",
    "terms",
    "parts",
    "base",
    "factors",
    "sizes",
)
PARTS = (
    "replace",
    "budget",
    "calibrate",
    "heal",
    "stages",
    "train",
    "model",
    "tokenizer",
    "squeeze",
    "untie",
    "name",
    "source",
)
KINDS = (
    "low_rank",
    "kronecker",
    "tensor_train",
    "block_train",
    "sum",
    "stacked",
    "placed",
    "diagram",
    "cola",
)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return readers(tmp_path_factory.mktemp("good"))


# name: (inputs here, what goes wrong today)
READERS = {
    "recipe values": (500, ""),
    "recipe files": (100, ""),
    "structures": (800, ""),
    "json lines": (400, ""),
    "plain text": (200, ""),
    "xz": (100, ""),
    "gz": (100, ""),
    "tokenizer": (20, ""),
    "tokens": (100, ""),
    "run note": (100, ""),
    "resume state": (100, ""),
    "trainer state": (100, ""),
    "index": (100, ""),
    "config": (20, ""),
    "model": (40, ""),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.xfail(strict=True, reason=wrong)] if wrong else [])
        for name, (_, wrong) in READERS.items()
    ],
)
def test_damaged_files_are_refused_in_a_sentence(known, tmp_path, name):
    assert not campaign(known[name], tmp_path / "try", SEED, READERS[name][0])


@steady
@hypothesis.given(st.sampled_from(PARTS), values)
def test_any_value_in_a_recipe_is_right_or_refused(key, value):
    try:
        parse_recipe({"name": "toy", key: value}, "recipe-7")
    except ValueError as reason:
        assert "recipe-7" in str(reason)


@steady
@hypothesis.given(values)
def test_a_recipe_that_is_written_is_read_again(value):
    recipe = {"name": "toy", "source": json.dumps(value)}
    assert load_recipe(recipe).source == recipe["source"]


@steady
@hypothesis.given(st.sampled_from(KINDS), st.dictionaries(st.sampled_from(FIELDS), values, max_size=4))
def test_any_structure_in_a_checkpoint_is_right_or_refused(kind, fields):
    try:
        read_structures(TenfoldConfig({"a.b": {"structure": {**fields, "kind": kind}, "bias": False}}))
    except ValueError as reason:
        assert "a.b" in str(reason)


@steady
@hypothesis.given(st.lists(texts, min_size=1, max_size=4), st.booleans())
def test_text_in_json_lines_comes_back_as_it_was(tmp_path_factory, rows, plain):
    file = tmp_path_factory.getbasetemp() / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": row}, ensure_ascii=plain) + "\n" for row in rows), encoding="utf-8")
    assert list(documents([file])) == [row for row in rows if row.strip()]
