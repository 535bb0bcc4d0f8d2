"""ONNX: onnxruntime computes the same logits, for other batches and lengths than the traced ones, with and without a cache."""

import numpy as np
import pytest
import torch
import toys
from exports import EVERY_STRUCTURE, compressed

from tenfold.export.formats import export

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.engines  # minutes: torch.export traces every model

CASES = {"gpt2": EVERY_STRUCTURE, "llama": ((24, 40), (1, 2)), "bert": None}


def run(session, ids, past=None):
    """Return logits and cache; every row of ``ids`` is whole."""
    feed, known = {"input_ids": ids.numpy()}, [value.name for value in session.get_inputs()]
    before = 0 if not past else past[0].shape[2]
    feed["attention_mask"] = np.ones((len(ids), before + ids.shape[1]), dtype=np.int64)
    if "position_ids" in known:
        feed["position_ids"] = np.arange(before, before + ids.shape[1])[None].repeat(len(ids), 0)
    for number, name in enumerate(name for name in known if name.startswith("past")):
        shape = session.get_inputs()[known.index(name)].shape
        feed[name] = past[number] if past else np.zeros((len(ids), int(shape[1]), 0, int(shape[3])), dtype=np.float32)
    logits, *cache = session.run(None, feed)
    return torch.from_numpy(logits), cache


@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_computes_the_same(name, tmp_path):
    expected = compressed(name, tmp_path / "compressed", CASES[name])
    folder = export(tmp_path / "compressed", "onnx", tmp_path / "onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    ids = toys.inputs(toys.build(name))["input_ids"]
    torch.testing.assert_close(run(session, ids)[0], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run(session, ids[:1])[0], expected[:1], atol=1e-4, rtol=1e-4)
    if name == "bert":
        return
    torch.testing.assert_close(run(session, ids[:, :5])[0], expected[:, :5], atol=1e-4, rtol=1e-4)
    first, cache = run(session, ids[:, :1])
    pieces = [first]
    for start, stop in ((1, 2), (2, 7), (7, 12)):
        logits, cache = run(session, ids[:, start:stop], cache)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-4, rtol=1e-4)
