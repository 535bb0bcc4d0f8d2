"""Tasks of lm-evaluation-harness, from local files, against a score that is computed here."""

import json
import sys
from importlib.util import find_spec

import pytest
import small
import torch

import tenfold
import tenfold_cli

TASK = """
task: toy-choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def folder(tmp_path):
    rows = [
        {"text": f"the old {one}", "choices": [" road", " wind"], "label": k % 2} for k, one in enumerate(small.WORDS)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "toy.yaml").write_text(TASK.format(data=data))
    return tmp_path


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["tenfold", "evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        tenfold_cli.main()
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


@pytest.mark.skipif(not find_spec("lm_eval"), reason="lm_eval is not installed")
def test_scores_are_those_of_the_likelier_choice(monkeypatch, capsys, folder):
    small.folder(folder / "dense")
    rules = {"replace": [{"role": "mlp.in", "structure": {"kind": "low_rank", "rank": 4}}]}
    tenfold.save(tenfold.compress(folder / "dense", rules)[0], folder / "small", tenfold.load(folder / "dense")[1])
    given = ("--tasks", "toy-choice", "--task-folder", folder / "tasks", "--limit", 12, "--json", "--device", "cpu")
    status, out, err = run(monkeypatch, capsys, folder / "small", *given)
    assert status == 0, err
    model, tokenizer = tenfold.load(folder / "small", "cpu")

    @torch.no_grad()
    def likelihood(text: str, choice: str) -> float:
        ids, begin = tokenizer(text + choice, return_tensors="pt").input_ids, len(tokenizer(text).input_ids)
        log = model(input_ids=ids).logits[0].log_softmax(-1)
        return float(sum(log[k - 1, ids[0, k]] for k in range(begin, ids.shape[1])))

    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()][:12]
    right = [max((0, 1), key=lambda k: likelihood(row["text"], row["choices"][k])) == row["label"] for row in rows]
    scores = json.loads(out[out.index("[") :])[0]["tasks"]["toy-choice"]
    assert scores["acc,none"] == pytest.approx(sum(right) / 12)
    status, out, err = run(monkeypatch, capsys, folder / "small", "--tasks", "toy-choise", "--device", "cpu")
    assert status == 2 and "has no task 'toy-choise'" in err


def test_a_missing_harness_is_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    status, _, err = run(monkeypatch, capsys, small.folder(tmp_path), "--tasks", "piqa", "--device", "cpu")
    assert status == 2 and err.splitlines()[-1].endswith("pip install 'tenfold[harness]'")


@pytest.mark.parametrize("given", [("--text", "a", "--tasks", "b"), ("--task-folder", "x", "--text", "a")])
def test_options_that_do_not_go_together(monkeypatch, capsys, given):
    status, _, err = run(monkeypatch, capsys, "m", *given)
    assert status == 2 and ("give either --text" in err or "changes nothing" in err)
