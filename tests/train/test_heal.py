"""Healing: chunks and caches don't change the loss, incomparable models are refused, and a healed model is an ordinary one."""

import copy
import json
import os
import weakref

import pytest
import small
import torch
import toy_tasks
import transformers
from losses import off_by
from models import toys
from runs import Killed, killed_at, same_weights
from safetensors import SafetensorError
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from tenfold import api
from tenfold.api import compress, evaluate, heal_settings
from tenfold.checkpoint_jobs import heal_checkpoint
from tenfold.evaluation.text_files import documents, token_stream
from tenfold.models.distillation_config import Heal
from tenfold.train.chunked_head import ChunkedHead
from tenfold.train.distillation import Distillation
from tenfold.train.heal import _default_batch, heal
from tenfold.train.teacher import check_teacher, check_vocabulary, eager_attention, pair_layers
from tenfold.train.tokenizer import train_tokenizer
from tenfold.train.trainer import DivergenceGuardTrainer, PackedDataset

CAPPED = {**toys.GEMMA, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
LOW = {"replace": [{"role": "mlp.in", "structure": {"kind": "low_rank", "rank": 4}}]}
TIED = {"replace": [{"role": "embed", "structure": {"kind": "low_rank", "rank": 7}}]}
ALL = {"cross_entropy": 0.3, "kl": 1.0, "reverse_kl": 0.5, "jensen_shannon": 2.0}


def build(name, seed=0):
    if name == "gemma2":
        torch.manual_seed(seed)
        return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**CAPPED)).eval()
    if name == "cohere":
        torch.manual_seed(seed)
        return transformers.CohereForCausalLM(transformers.CohereConfig(**toys.GROUPED, logit_scale=0.3)).eval()
    model = toys.build(name.removesuffix("-folded"), seed)
    return compress(model, TIED)[0] if name.endswith("-folded") else model


class OddHead(transformers.GPT2LMHeadModel):
    """A head whose logits depend on the position, so that it can't be applied to some states only."""

    def forward(self, *arguments, **keywords):
        out = super().forward(*arguments, **keywords)
        out.logits = out.logits * torch.arange(1, out.logits.shape[1] + 1)[:, None]
        return out


MODELS = ["gpt2", "gpt2-folded", "llama", "gemma3_text", "gemma2", "cohere", "opt-projected", "bert"]


def healed(folder, settings, teacher=None, rules=LOW, **more):
    """Compress the model in ``folder`` by ``rules`` and heal it; return the report and the model."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    compress(model, rules)
    return heal(model, teacher, tokenizer, [folder / "text.txt"], settings, **more), model


def batch_of(length=11):
    ids = torch.randint(3, 97, (2, length))
    labels, mask = ids.clone(), torch.ones_like(ids)
    mask[1, 8:], labels[1, 9:], labels[0, :3] = 0, -100, -100  # one token is padding by its mask alone
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def plain(student, teacher, batch, weights, temperature, causal, masked=False):
    """Return the loss from the logits of the whole batch."""
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    q, p, labels, there = student(**given).logits, teacher(**given).logits.detach(), batch["labels"], given
    there = batch["attention_mask"].bool()
    if causal:
        q, p, labels, there = q[:, :-1], p[:, :-1], labels[:, 1:], there[:, 1:]
    labelled = (labels != -100) & there
    kept = labelled if causal or masked else there
    crossed = -torch.log_softmax(q, -1)[labelled].gather(-1, labels[labelled][:, None]).mean()
    p, q = (torch.softmax(values[kept] / temperature, -1) for values in (p, q))
    m, heat = (p + q) / 2, temperature**2
    parts = {
        "cross_entropy": crossed,
        "kl": heat * (p * (p / q).log()).sum(-1).mean(),
        "reverse_kl": heat * (q * (q / p).log()).sum(-1).mean(),
        "jensen_shannon": heat * (p * (p / m).log() + q * (q / m).log()).sum(-1).mean() / 2,
    }
    return sum(weight * parts[name] for name, weight in weights.items())


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_chunks_change_neither_loss_nor_gradients(name):
    student, teacher = build(name).double(), build(name, 1).double()
    causal, batch = name != "bert", batch_of()
    settings = Heal(losses=ALL, temperature=1.7, chunk=5)
    expected = plain(student, teacher, batch, ALL, 1.7, causal)
    expected.backward()
    wanted = gradients(student)
    distillation = Distillation(student, teacher, settings, causal)
    loss = distillation(**batch)["loss"]
    (2 * loss).backward()  # a power of two: norms of some round to single precision
    assert not distillation.student.whole and not distillation.teacher.whole
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    got = gradients(student)
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.allclose(got[key], 2 * value, rtol=1e-10, atol=1e-10), key


def test_a_head_that_can_not_be_asked_for_some_positions_is_asked_for_all():
    torch.manual_seed(0)
    config = toys.config("gpt2")
    student, teacher = OddHead(config).double().eval(), OddHead(config).double().eval()
    batch = batch_of()
    distillation = Distillation(student, teacher, Heal(losses=ALL, chunk=5))
    loss = distillation(**batch)["loss"]
    assert distillation.student.whole and distillation.teacher.whole
    assert loss.item() == pytest.approx(plain(student, teacher, batch, ALL, 1.0, True).item(), rel=1e-10)


class Widest(TorchDispatchMode):
    """Record the most rows of any tensor as wide as the vocabulary, except for views of weights."""

    def __init__(self, vocabulary, but):
        super().__init__()
        self.vocabulary, self.but, self.rows = vocabulary, but, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[-1] == self.vocabulary:
                rows = value.numel() // self.vocabulary
                self.rows = max(self.rows, rows if rows not in self.but else 0)
        return out


@pytest.mark.parametrize("name", ["gpt2", "gpt2-folded", "gemma2", "bert"])
@pytest.mark.parametrize("stored", [False, True])
def test_no_more_logits_than_a_chunk_are_ever_held(name, stored):
    student, teacher, batch = build(name), build(name, 1), batch_of()
    if stored:
        batch |= {"ids": torch.randint(0, 97, (2, 11, 1)), "log_probabilities": torch.randn(2, 11, 2)}
        teacher = None
    for chunk, most in ((4, 4), (1000, 22)):
        distillation, held = Distillation(student, teacher, Heal(losses=ALL, chunk=chunk), name != "bert"), []
        with Widest(97, {32, 7}) as widest:
            pack = lambda x, held=held: held.append(weakref.ref(x)) or x  # noqa: E731
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                loss = distillation(**batch)["loss"]
            left = [x for x in (one() for one in held) if x is not None]
            loss.backward()
        assert widest.rows <= most
        assert left and not [x for x in left if x.shape[-1:] == (97,) and x.shape[0] not in (32, 7)], (
            "kept for backward"
        )
    assert widest.rows > 4, "one chunk holds all"


def test_divergences_of_masked_models_are_at_all_positions_or_at_the_masked_ones():
    student, teacher, batch = build("bert").double(), build("bert", 1).double(), batch_of()
    for positions in ("all", "masked"):
        settings = Heal(losses={"kl": 1.0}, positions=positions)
        expected = plain(student, teacher, batch, {"kl": 1.0}, 1.0, False, masked=positions == "masked").item()
        got = Distillation(student, teacher, settings, False)(**batch)["loss"]
        assert got.item() == pytest.approx(expected, rel=1e-10)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = Distillation(student, teacher, settings, False)(**batch)["loss"]
    loss.backward()
    assert loss.item() == 0, "nothing masked is nothing to learn, and no error"


def test_states_are_compared_layer_by_layer_on_what_is_there():
    student, teacher, batch = build("llama").double(), build("llama", 1).double(), batch_of()
    weights = {"hidden": 1.0, "embedding": 10.0, "attention": 100.0}
    with eager_attention([student, teacher]):
        given = {key: batch[key] for key in ("input_ids", "attention_mask")}
        h, g = (m(**given, output_hidden_states=True, output_attentions=True) for m in (student, teacher))
        got = Distillation(student, teacher, Heal(losses=weights, layers=[(0, 1)]))(**batch)["loss"]
    assert student.config._attn_implementation == teacher.config._attn_implementation == "sdpa"
    there = batch["attention_mask"].bool()
    expected = 0.0
    for weight, a, b in ((1.0, h.hidden_states[1], g.hidden_states[2]), (10.0, h.hidden_states[0], g.hidden_states[0])):
        expected += weight * (((a - b)[there] ** 2).mean() / (b[there] ** 2).mean()).item()
    a, b = g.attentions[1].transpose(1, 2)[there], h.attentions[0].transpose(1, 2)[there]
    expected += 100 * torch.where(a > 0, a * (a / b.clamp(min=1e-30)).log(), 0.0).sum(-1).mean().item()
    assert got.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("own", "other", "expected"),
    [
        (2, 2, [[0, 0], [1, 1]]),
        (6, 12, [[0, 1], [1, 3], [2, 5], [3, 7], [4, 9], [5, 11]]),
        (3, 2, [[0, 0], [1, 0], [2, 1]]),
        (5, 1, [[0, 0], [1, 0], [2, 0], [3, 0], [4, 0]]),
    ],
)
def test_layers_of_one_relative_depth(own, other, expected):
    models = [
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=n, n_embd=8, n_head=1, vocab_size=9, n_positions=8)
        )
        for n in (own, other)
    ]
    assert pair_layers(None, *models) == expected
    assert pair_layers([(0, 0)], *models) == [[0, 0]]
    with pytest.raises(ValueError, match=rf"the pair \[{own}, 0\], but the student's layers are 0 to {own - 1}"):
        pair_layers([(own, 0)], *models)


@pytest.mark.parametrize("losses", [{"kl": 1.0}, {"jensen_shannon": 1.0, "hidden": 0.1, "attention": 1.0}])
def test_healing_brings_the_model_nearer_to_its_teacher(folder, tokenizer, tmp_path, losses):
    teacher, student = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    compress(student, {"replace": [{"role": "mlp.in", "structure": {"kind": "low_rank", "rank": 1}}]})
    frozen, seen = {name: value.clone() for name, value in teacher.state_dict().items()}, []
    settings = Heal(steps=12, learning_rate=5e-3, tokens_per_step=256, losses=losses, chunk=100)
    report = heal(student, teacher, tokenizer, [folder / "text.txt"], settings, advance=lambda *told: seen.append(told))
    student.save_pretrained(tmp_path / "healed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    assert torch.equal(*(m(input_ids=torch.arange(8)[None]).logits for m in (student, again))), "still in autocast"
    assert student.config.use_cache, "Trainer turned the cache off"
    assert student.config._attn_implementation == teacher.config._attn_implementation == "sdpa"
    assert "forward" not in student.__dict__ and report["losses"] == losses
    assert (
        report["steps"] == 12
        and 11 * 256 < report["tokens"] <= 12 * 256
        and seen[-1][:2] == (12, 12)
        and seen[-1][2] > 0
    )
    assert report["curve"][-1][1] < 0.6 * report["curve"][0][1] or report["curve"][-1][1] < 1e-3
    assert all(torch.equal(value, frozen[name]) for name, value in teacher.state_dict().items())


def test_cross_entropy_needs_no_teacher(folder):
    settings = Heal(steps=8, learning_rate=5e-3, tokens_per_step=256, losses={"cross_entropy": 1.0})
    curve = healed(folder, settings)[0]["curve"]
    assert curve[-1][1] < curve[0][1]


def test_masked_language_models_heal(tmp_path):
    teacher, tokenizer = toys.build("bert"), toy_tasks.word_tokenizer()
    student = copy.deepcopy(teacher)
    compress(student, LOW)
    words = small.text(1500).split()
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(words[k : k + 3 + k % 90]) for k in range(0, len(words), 40)))
    settings = Heal(steps=20, learning_rate=5e-3, tokens_per_step=256, losses={"kl": 1.0, "cross_entropy": 0.1})
    report = heal(student, teacher, tokenizer, [text], settings, window=32)
    assert report["curve"][-1][1] < report["curve"][0][1] and 0 < report["tokens"] < 20 * 256
    with pytest.raises(ValueError, match="masked anew each time, so that predictions can't be stored"):
        heal(student, teacher, tokenizer, [text], settings, window=32, store=tmp_path / "store")


def test_a_loss_that_is_not_finite_stops(folder, tokenizer):
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    where = r"loss is nan at step 2 \(windows 2 to 4 of epoch 1, in the order of seed 0; learning rate 1e\+30\); there is no"
    for rate, sentence in ((1e30, where), (1e38, "")):
        settings = Heal(steps=4, learning_rate=rate, tokens_per_step=64, schedule="constant", warmup=0.0)
        with pytest.raises(ValueError, match=rf"{sentence}.*; lower the learning rate"):
            heal(student, teacher, tokenizer, [folder / "text.txt"], settings)
    assert not {"forward", "_original_forward"} & student.__dict__.keys(), "forward is the class's again"


def test_a_loss_that_runs_away_is_stopped_at_a_checkpoint(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(DivergenceGuardTrainer, "STEPS", 3)
    off_by(monkeypatch, {0: 0.0, 4: 50.0})
    settings = Heal(steps=6, tokens_per_step=64, save_steps=3, losses={"cross_entropy": 1.0})
    with pytest.raises(ValueError, match=r"the loss has run away to .* the last good checkpoint is .*checkpoint-3"):
        healed(folder, settings, checkpoints=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert rows[0]["tokens"] == 64 and rows[0]["tokens_per_second"] > 0 and rows[0]["seconds_left"] >= 0


def test_checkpoints_are_models_with_their_tokenizer(folder, tmp_path):
    student, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    compress(student, LOW)
    tokenizer.pad_token = tokenizer.eos_token  # which is no business of the model's
    settings = Heal(steps=2, tokens_per_step=64, save_steps=2)
    heal(student, folder, tokenizer, [folder / "text.txt"], settings, checkpoints=tmp_path)
    model, known = api.load(tmp_path / "checkpoint-2")
    assert evaluate(model, known, [folder / "text.txt"], limit=320)["perplexity"] > 1
    assert model.config.pad_token_id is None and known.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("each", [10, 1000])
def test_the_last_step_of_a_pass_is_a_whole_one(folder, each):
    """So it is with several processes, and for a text shorter than one step."""
    settings = Heal(epochs=1, tokens_per_step=each * 32, losses={"cross_entropy": 1.0})
    report = healed(folder, settings)[0]
    assert report["tokens"] == report["steps"] * each * 32


def test_passes_over_the_text_are_counted(folder, tokenizer):
    student = AutoModelForCausalLM.from_pretrained(folder)
    windows = len(PackedDataset(token_stream(documents([folder / "text.txt"], tokenizer), tokenizer), 32))
    steps, saw = -(-windows // 40), []

    def spoil(step, *rest):
        saw.append(step)
        if step == steps:
            student.lm_head.weight.data.fill_(torch.nan)

    settings = Heal(steps=3 * steps, tokens_per_step=40 * 32, losses={"cross_entropy": 1.0})
    with pytest.raises(ValueError, match=rf"at step {steps + 1} \(windows 0 to 40 of epoch 2, in the order"):
        heal(student, None, tokenizer, [folder / "text.txt"], settings, advance=spoil)


@pytest.mark.parametrize(
    "reason", [SafetensorError("No space left"), RuntimeError("[enforce fail at inline_container.cc:672]")]
)
def test_a_full_disk_is_told_and_the_same_call_goes_on(folder, tokenizer, tmp_path, monkeypatch, reason):
    student = AutoModelForCausalLM.from_pretrained(folder)
    settings = Heal(steps=4, tokens_per_step=64, save_steps=2, losses={"cross_entropy": 1.0})

    def full(*arguments, **keywords):
        raise reason

    def call(**given):
        return heal(student, None, tokenizer, [folder / "text.txt"], settings, checkpoints=tmp_path, **given)

    where = (transformers.PreTrainedModel, "save_pretrained") if "space" in str(reason) else (torch, "save")
    with monkeypatch.context() as patch:
        patch.setattr(*where, full)
        with pytest.raises(OSError, match=r"can't be written \(.*\); make room, and repeat the command"):
            call()
    assert not list(tmp_path.glob("*/trainer_state.json"))
    assert call()["steps"] == 4


def test_a_step_that_can_not_be_shared_is_refused(folder, tokenizer, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    settings = Heal(steps=1, losses={"cross_entropy": 1.0}, tokens_per_step=288, batch_size=3)
    with pytest.raises(
        ValueError, match=r"8 processes can't share 3 batches of 3 windows evenly; make the number of batches"
    ):
        heal(AutoModelForCausalLM.from_pretrained(folder), None, tokenizer, [folder / "text.txt"], settings)


def test_settings_of_a_recipe(tmp_path):
    recipe = tmp_path / "heal.yaml"
    recipe.write_text("heal: {losses: {kl: 1, hidden: 2}, layers: [[0, 1]], epochs: 2, schedule: constant, chunk: 7}\n")
    section = {
        "losses": {"kl": 1.0, "hidden": 2.0},
        "layers": [(0, 1)],
        "epochs": 2,
        "schedule": "constant",
        "chunk": 7,
    }
    assert heal_settings((), recipe, steps=None) == Heal(**section)
    assert heal_settings((), recipe, schedule="linear") == Heal(**section | {"schedule": "linear"})
    other = {key: value for key, value in section.items() if key != "epochs"} | {"losses": {"kl": 0.5}, "steps": 3}
    assert heal_settings(["kl=0.5"], recipe, steps=3) == Heal(**other)  # steps in the place of epochs
    recipe.write_text("heal: {steps: 7}\n")
    assert heal_settings((), recipe, epochs=2.0) == Heal(epochs=2.0)
    recipe.write_text("replace: []\n")
    with pytest.raises(ValueError, match="has no heal section"):
        heal_settings((), recipe)


CROSS = Heal(steps=1, losses={"cross_entropy": 1.0})


@pytest.mark.parametrize(
    ("settings", "more", "sentence"),
    [
        (Heal(positions="masked"), {}, "positions masked is for masked language models, and a GPT2LMHeadModel is causal"),
        (Heal(), {"window": 64}, "window 64 must be from 2 to the model's context of 32"),
        (Heal(), {"tokenizer": None}, "has no tokenizer"),
        (Heal(), {"model": toys.build("t5")}, "T5ForConditionalGeneration reads one text and writes another"),
        (Heal(), {"teacher": small.model(301)}, "the student predicts 300 tokens and the teacher 301: .* compressed from"),
        (Heal(losses={"kl": 1, "hidden": 1}), {"teacher": None}, "the loss hidden, kl needs a teacher: give one, or cross"),
        (CROSS, {"store": "answers"}, "cross_entropy needs no teacher: leave the store answers out"),
        (CROSS, {"model": toys.build("bert")}, "has no mask token"),
    ],
)  # fmt: skip
def test_what_has_no_effect_or_does_not_fit_is_refused(folder, tokenizer, settings, more, sentence):
    student = AutoModelForCausalLM.from_pretrained(folder)
    given = {
        "model": student,
        "teacher": student,
        "tokenizer": tokenizer,
        "files": [folder / "text.txt"],
        "settings": settings,
    }
    with pytest.raises(ValueError, match=sentence):
        heal(**given | more)


def test_what_can_not_be_compared_is_refused(folder, tokenizer, tmp_path):
    other = train_tokenizer(["quite another text with other words " * 9], 300, 32)
    small.model(300).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    student = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"token .* is number \d+ for the student and .* their tokenizers differ"):
        check_vocabulary(student, tmp_path / "other", tokenizer)
    check_vocabulary(student, folder, tokenizer)
    own, wide = (
        toys.build("gpt2"),
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**toys.GPT | {"n_embd": 48, "n_head": 3})),
    )
    check_teacher(own, wide, ["kl"])
    for student, teacher, losses, sentence in [
        (toys.build("bert"), toys.build("llama"), ["kl"], "the student is a BertForMaskedLM and the teacher a LlamaForCausalLM"),
        (own, wide, ["kl", "hidden", "embedding"], "32 dimensions and the teacher's 48, which embedding and hidden can't"),
        (own, wide, ["attention"], "4 attention heads and the teacher 3"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            check_teacher(student, teacher, losses)


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        (["reversed_kl=1"], "there is no loss 'reversed_kl'; did you mean 'reverse_kl'?"),
        (["kl"], "loss 'kl' has no weight; write kl=1.0"),
        (["kl=-1"], "the weight of kl is -1.0, but must be above 0"),
        (["kl=much"], "heal.losses.kl"),
    ],
)
def test_losses_as_words(losses, sentence):
    with pytest.raises(ValueError) as raised:
        heal_settings(losses)
    assert sentence in str(raised.value)
    assert heal_settings(["kl=0.5", "hidden=2"], steps=3) == Heal(losses={"kl": 0.5, "hidden": 2.0}, steps=3)
    assert heal_settings().losses == {"kl": 1.0}


def test_a_killed_healing_goes_on_exactly_where_it_was(tmp_path):
    dense, folded = small.folder(tmp_path / "dense"), tmp_path / "folded"
    student = AutoModelForCausalLM.from_pretrained(dense)
    compress(student, LOW)
    student.save_pretrained(folded)
    AutoTokenizer.from_pretrained(dense).save_pretrained(folded)
    settings = Heal(steps=9, learning_rate=5e-3, tokens_per_step=128, batch_size=2, save_steps=3)

    def call(name, **given):
        return heal_checkpoint(folded, dense, tmp_path / name, [dense / "text.txt"], settings, **given)

    whole, seen = call("whole"), []
    with pytest.raises(Killed):
        call("run", advance=killed_at(5))
    assert not (tmp_path / "run").exists()
    with pytest.raises(
        FileExistsError,
        match=r"run.partial holds what another run \(other settings.batch_size, settings.learning_rate, set",
    ):
        heal_checkpoint(folded, dense, tmp_path / "run", [dense / "text.txt"], Heal(steps=4))
    weights = (folded / "model.safetensors").stat()
    os.utime(folded / "model.safetensors", ns=(0, 0))  # as of another student under the same name
    with pytest.raises(FileExistsError, match=r"other models\) has finished"):
        call("run")
    os.utime(folded / "model.safetensors", ns=(weights.st_atime_ns, weights.st_mtime_ns))
    report = call("run", advance=lambda step, *rest: seen.append(step))
    assert (
        seen == [4, 5, 6, 7, 8, 9]
        and report["curve"] == whole["curve"]
        and report["tokens"] == whole["tokens"] == 9 * 128
    )
    assert not (tmp_path / "run.partial").exists() and report["seed"] == 0 and report["versions"]["torch"]
    assert same_weights(tmp_path / "whole", tmp_path / "run")


def test_what_else_is_in_an_output_that_is_written_over_stays(tmp_path):
    folder, settings = small.folder(tmp_path / "dense"), Heal(steps=1, tokens_per_step=64)
    (folder / "notes.txt").write_text("mine")
    (folder / "data.bin").touch()
    (folder / "pytorch_model.bin").touch()  # of the model that was there
    text = (folder / "text.txt").read_text()
    heal_checkpoint(folder, folder, folder, [folder / "text.txt"], settings, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "text.txt").read_text() == text
    told = json.loads((folder / "tenfold.json").read_text())["heal"]
    assert (told["steps"], told["window"], told["teacher"], told["text"]) == (
        1,
        32,
        str(folder),
        [str(folder / "text.txt")],
    )
    assert Heal(**told["settings"]) == settings and told["settings"]["schedule"] == "cosine"
    assert not (folder / "pytorch_model.bin").exists() and (folder / "data.bin").exists()
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_folder_beside_the_output_that_is_not_ours_stays(tmp_path):
    folder, settings = small.folder(tmp_path / "dense"), Heal(steps=1, tokens_per_step=64)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match=r"out.partial is there and is no unfinished work; move it"):
        heal_checkpoint(folder, folder, tmp_path / "out", [folder / "text.txt"], settings, overwrite=True)
    assert (tmp_path / "out.partial" / "mine.txt").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"steps": -3}, {"epochs": 0}, {"epochs": -1.0}, {"learning_rate": 0.0}, {"weight_decay": -1.0},
        {"schedule": "warmup_stable_decay"}, {"steps": 2, "epochs": 1.0},
    ],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}"):
        heal_settings(**wrong)
    with pytest.raises(ValueError, match=r"temperature 3 is of .*kl.*, and the losses are cross_entropy; leave it out"):
        heal_settings(["cross_entropy=1"], temperature=3.0)


def test_a_finished_healing_is_not_trained_on(folder, tmp_path):
    settings = Heal(epochs=1, tokens_per_step=128, batch_size=2, schedule="constant", learning_rate=5e-3)
    seen, states = [], []
    for _ in range(2):
        told = {"advance": lambda step, *rest: seen.append(step), "checkpoints": tmp_path / "kept"}
        report, model = healed(folder, settings, folder, **told)
        states.append(model.state_dict())
    assert seen == list(range(1, report["steps"] + 1))
    assert all(torch.equal(value, states[0][name]) for name, value in states[1].items())


def test_what_was_refused_before_it_began_stands_in_nobodys_way(tmp_path):
    folder, settings = small.folder(tmp_path / "dense"), Heal(steps=2, tokens_per_step=64)
    for teacher in (tmp_path / "none", folder / "text.txt"):
        with pytest.raises((OSError, ValueError)):
            heal_checkpoint(folder, teacher, tmp_path / "out", [folder / "text.txt"], settings)
        assert not (tmp_path / "out.partial").exists()
    assert heal_checkpoint(folder, folder, tmp_path / "out", [folder / "text.txt"], settings)["steps"] == 2


def test_activations_may_be_computed_again(folder, monkeypatch):
    calls, curves, forward = [], [], transformers.models.gpt2.modeling_gpt2.GPT2MLP.forward
    counted = lambda *given, **named: calls.append(1) or forward(*given, **named)  # noqa: E731
    monkeypatch.setattr(transformers.models.gpt2.modeling_gpt2.GPT2MLP, "forward", counted)
    for again in (False, True):
        calls.clear()
        settings = Heal(steps=3, tokens_per_step=64, losses={"cross_entropy": 1.0}, gradient_checkpointing=again)
        curves.append((healed(folder, settings)[0]["curve"], len(calls)))
    (plain, once), (computed, twice) = curves
    torch.testing.assert_close(plain, computed, rtol=1e-4, atol=1e-4)
    assert twice == once + 2 * 3, "once more in every step and block"


@pytest.mark.traced
@pytest.mark.parametrize("whole", [False, True])
def test_student_and_teacher_may_be_compiled(tmp_path, monkeypatch, whole):
    """Compile the base models, or whole models if the head can't be applied by itself (inductor takes a minute)."""
    folder, curves, calls, compile = small.folder(tmp_path), [], [], torch.compile

    def counted(model):
        traced = compile(model, backend="eager")
        return lambda **inputs: calls.append(1) or traced(**inputs)

    monkeypatch.setattr(torch, "compile", counted)
    if whole:
        monkeypatch.setattr(ChunkedHead, "_agrees", lambda *_: False)
    losses = {"kl": 1.0, "cross_entropy": 0.1, "hidden": 0.1}
    for wanted in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder)
        compress(model, LOW)
        settings = Heal(steps=3, tokens_per_step=64, losses=losses, precision="float32", compile=wanted)
        text = [folder / "text.txt"]
        curves.append(heal(model.eval(), folder, AutoTokenizer.from_pretrained(folder), text, settings)["curve"])
        assert len(calls) == (6 if wanted else 0), "of both, in every step"
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=1e-5, atol=0)


def test_batches_add_up_to_a_step(folder):
    curves = []
    for batch in (None, 1):
        settings = Heal(steps=4, tokens_per_step=128, batch_size=batch, learning_rate=1e-3)
        report = healed(folder, settings, folder)[0]
        assert report["tokens"] == 4 * 128
        curves.append([loss for _, loss in report["curve"]])
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=0.03, atol=0)


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_a_cpu_reads_some_windows_of_a_step_at_once(monkeypatch, processes):
    """A batch has 1,024 tokens at most, or one window; all processes have equally many batches."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    for windows in (8, 24, 40, 104):
        for window in (16, 100, 384, 1024, 4096):
            found = _default_batch(windows, window)
            rounds = [windows / n for n in range(1, windows + 1) if n == 1 or n * window <= 1024]
            assert windows / found == min(r for r in rounds if r == int(r) and r % processes == 0)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert _default_batch(24, 1024) == 24


def test_weights_that_are_no_numbers_are_not_kept(folder, tokenizer, tmp_path):
    """Otherwise the same call would resume from them."""
    student = AutoModelForCausalLM.from_pretrained(folder)
    settings = Heal(steps=4, tokens_per_step=64, save_steps=2, losses={"cross_entropy": 1.0})

    def spoil(step, *rest):
        if step == 1:
            student.transformer.h[0].mlp.c_fc.bias.register_hook(lambda gradient: gradient * torch.nan)

    with pytest.raises(ValueError, match="lower the learning rate"):
        heal(student, None, tokenizer, [folder / "text.txt"], settings, advance=spoil, checkpoints=tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))
    assert healed(folder, settings, rules={"replace": []}, checkpoints=tmp_path)[0]["steps"] == 4
