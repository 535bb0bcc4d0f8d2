"""Metrics against their formulas, and tasks: reading, encoding, predicting and scoring."""

import json
import lzma
import math
import re

import pytest
import torch
import toy_tasks
from transformers import BertForSequenceClassification

from tenfold.evaluation import metrics
from tenfold.evaluation.metrics import METRICS, import_library
from tenfold.evaluation.task_kinds import Example
from tenfold.evaluation.tasks import TASKS, evaluate_task, example_length, find_task, set_padding

WANTED = [1, 0, 1, 1, 0, 0, 1, 0, 1, 1]
GUESSED = [1, 0, 0, 1, 1, 0, 1, 0, 0, 1]


def table(guessed, wanted):
    count = [[0, 0], [0, 0]]
    for guess, want in zip(guessed, wanted, strict=True):
        count[guess][want] += 1
    return count[1][1], count[1][0], count[0][1], count[0][0]


def test_metrics_of_labels_are_their_formulas():
    tp, fp, fn, tn = table(GUESSED, WANTED)
    assert (tp, fp, fn, tn) == (4, 1, 2, 3)
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert METRICS["accuracy"](GUESSED, WANTED) == pytest.approx((tp + tn) / 10)
    assert METRICS["f1"](GUESSED, WANTED) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert METRICS["matthews"](GUESSED, WANTED) == pytest.approx((tp * tn - fp * fn) / root)
    assert METRICS["matthews"]([1] * 10, WANTED) == 0.0 == METRICS["f1"]([0, 0], [0, 0])


def slow_pearson(a, b):
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    top = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return top / math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))


def slow_ranks(values):
    """Return the ranks; equal values have the mean of theirs."""
    return [sum(v < w for v in values) + (sum(v == w for v in values) + 1) / 2 for w in values]


def test_correlations_are_their_formulas():
    a, b = [0.3, 1.5, 1.5, -2.0, 4.0, 0.9], [1.0, 2.5, 2.0, 2.0, 30.0, 0.5]
    assert METRICS["pearson"](a, b) == pytest.approx(slow_pearson(a, b))
    assert METRICS["spearman"](a, b) == pytest.approx(slow_pearson(slow_ranks(a), slow_ranks(b)))
    assert METRICS["pearson"](a, a[::-1]) != pytest.approx(METRICS["spearman"](a, a[::-1]))
    assert METRICS["pearson"]([2.0] * 6, b) == 0.0 == METRICS["spearman"](a, [1.0] * 6)


def slow_rouge(text, reference, n):
    """Return the F-measure of the n-grams of words; short words have no stem."""

    def runs(words):
        return [tuple(words[k : k + n]) for k in range(len(words) - n + 1)]

    left, right = (runs(re.findall(r"[a-z0-9]+", t.lower())) for t in (text, reference))
    rest, common = list(right), 0
    for run in left:
        if run in rest:
            rest.remove(run)
            common += 1
    return 2 * common / (len(left) + len(right)) if common else 0.0


def slow_rouge_l(text, reference):
    a, b = text.lower().split(), reference.lower().split()
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best[i + 1][j + 1] = best[i][j] + 1 if x == y else max(best[i][j + 1], best[i + 1][j])
    return 2 * best[-1][-1] / (len(a) + len(b))


def test_rouge_is_its_formula_and_takes_the_best_reference():
    texts = ["the old dog sat on a red mat", "a cat"]
    given = [("the red dog sat on the mat", "no dog"), ("the dog ran", "a fat cat")]
    for n in (1, 2):
        slow = [max(slow_rouge(text, one, n) for one in more) for text, more in zip(texts, given, strict=True)]
        assert METRICS[f"rouge{n}"](texts, given) == pytest.approx(sum(slow) / 2)
    slow = [max(slow_rouge_l(text, one) for one in more) for text, more in zip(texts, given, strict=True)]
    assert METRICS["rougeL"](texts, given) == pytest.approx(sum(slow) / 2)


# task -> its folder, the lines of a file, and what must be read: texts and label of GLUE
LINES = {
    "cola": ("CoLA", 'gj04\t1\t\t"A b.\ngj04\t0\t*\tc d\n', [(('"A b.',), 1), (("c d",), 0)]),
    "sst2": ("SST-2", "sentence\tlabel\na fine film \t1\nno\t0\n", [(("a fine film ",), 1), (("no",), 0)]),
    "mrpc": (
        "MRPC",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tx\ty\n0\t7\t8\tu\tv\n",
        [(("x", "y"), 1), (("u", "v"), 0)],
    ),
    "stsb": (
        "STS-B",
        "index\tgenre\tsentence1\tsentence2\tscore\n0\tm\ta plane\tan air plane\t4.750\n",
        [(("a plane", "an air plane"), 4.75)],
    ),
    "qnli": (
        "QNLI",
        "index\tquestion\tsentence\tlabel\n0\tq\ts\tentailment\n1\tp\tr\tnot_entailment\n",
        [(("q", "s"), 0), (("p", "r"), 1)],
    ),
    "rte": (
        "RTE",
        "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n1\tc\td\tentailment\n",
        [(("a", "b"), 1), (("c", "d"), 0)],
    ),
    "wnli": (
        "WNLI",
        "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n1\tc\td\t0\n",
        [(("a", "b"), 1), (("c", "d"), 0)],
    ),
}
METRIC = {
    "cola": "matthews", "sst2": "accuracy", "mrpc": "f1 accuracy", "stsb": "pearson spearman", "qnli": "accuracy",
    "rte": "accuracy", "wnli": "accuracy", "samsum": "rouge1 rouge2 rougeL", "scitldr": "rouge1 rouge2 rougeL",
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_columns_and_labels(tmp_path, name):
    folder, lines, wanted = LINES[name]
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "dev.tsv").write_text(lines, encoding="utf-8")
    (tmp_path / folder / "train.tsv.xz").write_bytes(lzma.compress(lines.encode()))
    for place, split in ((tmp_path, "dev"), (tmp_path, "train"), (tmp_path / folder, "dev")):
        assert [(e.texts, e.target) for e in TASKS[name].read(place, split)] == wanted
    assert len(TASKS[name].read(tmp_path, "dev", limit=1)) == 1


def test_metrics_and_labels_of_all_tasks():
    assert {name: " ".join(task.metrics) for name, task in TASKS.items()} == METRIC
    for name, (labels, kind) in {"rte": (2, "single_label_classification"), "stsb": (1, "regression")}.items():
        told = TASKS[name].model_class()[1]
        assert told["num_labels"] == labels and told["problem_type"] == kind
    assert TASKS["rte"].model_class()[1]["id2label"] == {0: "entailment", 1: "not_entailment"}


def test_the_score_is_the_mean_of_the_metrics(tmp_path):
    (tmp_path / "dev.tsv").write_text(LINES["mrpc"][1] + "1\t1\t1\ta\tb\n", encoding="utf-8")
    examples = TASKS["mrpc"].read(tmp_path, "dev")
    found = TASKS["mrpc"].score([1, 1, 0], examples)  # wanted 1, 0, 1
    assert found == pytest.approx({"f1": 0.5, "accuracy": 1 / 3, "score": 5 / 12})


def test_summaries_are_read(tmp_path):
    rows = [{"document": "a", "summary": "s"}, {"document": "b", "summary": "t", "summaries": ["t", "u"]}]
    (tmp_path / "scitldr_dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = TASKS["scitldr"].read(tmp_path, "dev")
    assert [(e.texts, e.target) for e in found] == [(("a",), ("s",)), (("b",), ("t", "u"))]


def test_pairs_by_template_or_joined_by_the_end_of_text():
    pair = TASKS["rte"]
    example = pair._parse(iter(["sentence1\tsentence2\tlabel\n", "the old house\ta road\tentailment\n"]), "x")
    example = next(example)
    template, plain = toy_tasks.word_tokenizer(), toy_tasks.gpt2()[1]
    read = pair.encode(template, example, 64)
    assert template.decode(read["input_ids"]) == "[CLS] the old house [SEP] a road [SEP]" and read["labels"] == 0
    assert read["token_type_ids"] == [0] * 5 + [1] * 3
    joined = pair.encode(plain, example, 64)["input_ids"]
    parts = [plain(text)["input_ids"] for text in example.texts]
    assert joined == [*parts[0], plain.eos_token_id, *parts[1]]
    assert len(pair.encode(template, example, 5)["input_ids"]) == 5


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_loss_of_a_summary_ignores_the_prompt(tmp_path, kind):
    model, tokenizer = getattr(toy_tasks, kind)()
    task = TASKS["samsum"]
    set_padding(model, tokenizer)
    examples = task.read(toy_tasks.write_summaries(tmp_path, dev=3), "dev")
    rows = [task.encode(tokenizer, example, length) for example, length in zip(examples, (32, 30, 20), strict=True)]
    batch = task.collator(tokenizer)([dict(row) for row in rows])
    with torch.no_grad():
        loss = float(model.eval()(**batch).loss)
        nats, count = 0.0, 0
        for example, row in zip(examples, rows, strict=True):
            target = [*tokenizer(" " + example.target[0])["input_ids"], tokenizer.eos_token_id]
            ids = row["input_ids"]
            begin = len(ids) - len(target)
            assert ids[begin:] == target and tokenizer.decode(ids[:begin]).endswith("\nTL;DR:")
            chances = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
            nats -= sum(float(chances[k - 1, ids[k]]) for k in range(begin, len(ids)))
            count += len(target)
    assert loss == pytest.approx(nats / count, rel=1e-5)


def test_a_long_document_leaves_room_for_the_summary(tmp_path):
    _, tokenizer = toy_tasks.gpt2()
    row = {"document": "the old house " * 50, "summary": "a road " * 50}
    (tmp_path / "samsum_dev.jsonl").write_text(json.dumps(row))
    (example,) = TASKS["samsum"].read(tmp_path, "dev")
    read, asked = (TASKS["samsum"].encode(tokenizer, example, 32, train=train) for train in (True, False))
    assert len(read["input_ids"]) == 32 and len(asked["input_ids"]) == 16
    assert tokenizer.decode(asked["input_ids"]).endswith("\nTL;DR:") and read["input_ids"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_summaries_in_a_batch_are_those_written_one_by_one(tmp_path, kind):
    model, tokenizer = getattr(toy_tasks, kind)()
    found = evaluate_task(model, tokenizer, "samsum", toy_tasks.write_summaries(tmp_path), limit=4)
    assert found["examples"] == 4 and found["data"] == "samsum_validation.jsonl" and 0 <= found["score"] <= 1
    task, examples, length = TASKS["samsum"], TASKS["samsum"].read(tmp_path, "dev"), example_length(model)
    together = task.predict(model.eval(), tokenizer, examples, length, 6, iter)
    for example, text in zip(examples, together, strict=True):
        ids = task.encode(tokenizer, example, length, train=False)["input_ids"]
        written = []
        for _ in range(task.summary_length(length)):
            with torch.no_grad():
                written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
            if written[-1] == tokenizer.eos_token_id:
                break
        alone = tokenizer.decode(written, skip_special_tokens=True).strip()
        assert text == (alone.splitlines() or [""])[0].strip()


@torch.no_grad()
def test_predictions_are_those_of_one_example_at_a_time(tmp_path):
    model, tokenizer = toy_tasks.bert()
    model.config.num_labels = 1
    judge = BertForSequenceClassification(model.config).eval()
    task, examples = TASKS["stsb"], TASKS["stsb"].read(toy_tasks.write_stsb(tmp_path), "dev")
    examples = [  # of all lengths, the long ones first
        Example((example.texts[0], " ".join(example.texts[1].split()[: 5 - k // 6])), example.target)
        for k, example in enumerate(examples)
    ]
    slow = [float(judge(**tokenizer(*example.texts, return_tensors="pt")).logits) for example in examples]
    assert task.predict(judge, tokenizer, examples, 64, 7, iter) == pytest.approx(slow, abs=1e-5)
    assert len(set(slow)) > 20
    score = evaluate_task(judge.train(), tokenizer, "stsb", tmp_path)
    assert judge.training and score["score"] == pytest.approx((score["pearson"] + score["spearman"]) / 2)


WRONG = {
    "unknown label": ("sst2", "sentence\tlabel\na\tgood\n", "line 2, has 'good' for its label; task sst2 needs 0 or 1"),
    "no such column": ("rte", "index\tsentence1\tlabel\n", "has no column 'sentence2', only index, sentence1, label"),
    "short line": ("sst2", "sentence\tlabel\na\t1\nb\n", "line 3, has too few columns"),
    "no number": (
        "stsb",
        "sentence1\tsentence2\tscore\na\tb\thigh\n",
        "has 'high' for its label; task stsb needs a number",
    ),
    "no example": ("sst2", "sentence\tlabel\n", "holds no example"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data(tmp_path, case):
    name, lines, message = WRONG[case]
    (tmp_path / "dev.tsv").write_text(lines)
    with pytest.raises(ValueError, match=re.escape(message)):
        TASKS[name].read(tmp_path, "dev")


def test_wrong_summaries_files_names_and_limits(tmp_path):
    (tmp_path / "samsum_test.jsonl").write_text('{"document": "a"}')
    with pytest.raises(ValueError, match="line 1, is not a JSON object with"):
        TASKS["samsum"].read(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match=r"has no samsum_train\.jsonl .* which holds samsum_test\.jsonl"):
        TASKS["samsum"].read(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"has no dev\.tsv .* holds nothing"):
        TASKS["cola"].read(tmp_path / "none", "dev")
    with pytest.raises(ValueError, match="did you mean 'mrpc'"):
        find_task("mprc")
    with pytest.raises(ValueError, match="limit 0"):
        TASKS["samsum"].read(tmp_path, "test", 0)


def test_models_without_the_head(tmp_path):
    model, tokenizer = toy_tasks.bert()
    toy_tasks.write_summaries(toy_tasks.write_sst2(tmp_path))
    with pytest.raises(ValueError, match="a BertForMaskedLM with 2 labels has no head for task sst2"):
        evaluate_task(model, tokenizer, "sst2", tmp_path)
    with pytest.raises(ValueError, match="needs a decoder such as gpt2"):
        evaluate_task(model, tokenizer, "samsum", tmp_path)
    with pytest.raises(ValueError, match="no tokenizer"):
        set_padding(model, None)
    with pytest.raises(ValueError, match="length 999"):
        example_length(model, 999)


def test_a_missing_library_names_the_extra(monkeypatch):
    with pytest.raises(ImportError, match=r"tasks need nothing_here, .* pip install 'tenfold\[tasks\]'"):
        import_library("nothing_here.metrics")
    monkeypatch.setattr(metrics, "import_module", lambda name: (_ for _ in ()).throw(ImportError))
    with pytest.raises(ImportError, match="tasks need rouge_score"):
        TASKS["samsum"].check_libraries()
