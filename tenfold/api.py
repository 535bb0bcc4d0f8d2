"""The twins of the commands: names, folders and files in, models and plain dictionaries out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial, update_wrapper
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

import tenfold.baselines  # noqa: F401 - registers them
from tenfold.compress.calibration import Batch, Calibration, calibration
from tenfold.compress.compress import compress as compress
from tenfold.compress.compress import recipe_for as recipe_for
from tenfold.evaluate.bench_layers import bench_layers as bench_layers
from tenfold.evaluate.bench_model import bench as bench
from tenfold.evaluate.perplexity import comparable as comparable
from tenfold.evaluate.perplexity import perplexity
from tenfold.evaluate.tasks import evaluate_task as evaluate_task
from tenfold.evaluate.text_files import HUB
from tenfold.models.auto import load_model
from tenfold.models.auto import load_tokenizer as load_tokenizer
from tenfold.models.config import Calibrate
from tenfold.models.cost import inspect as inspect
from tenfold.models.cost import price as price
from tenfold.models.distillation_config import Heal
from tenfold.models.loading import check_output
from tenfold.models.model_card import save_compressed
from tenfold.models.plan import make_plan
from tenfold.models.recipe import Recipe, Stage, check_keep, load_recipe, parse_recipe
from tenfold.models.text_mode import positions_of
from tenfold.nn.dense_cache import dense_cache
from tenfold.train.tokens import is_tokens

if TYPE_CHECKING:
    from tenfold.train.finetune import finetune
    from tenfold.train.heal import heal
    from tenfold.train.pretrain import pretrain

save = save_compressed
evaluate = perplexity


def __getattr__(name: str):
    """What trains is imported when it is first asked for: Trainer and what comes with it take a second or two."""
    if name not in ("finetune", "heal", "pretrain"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"tenfold.train.{name}"), name)
    return found if name != "pretrain" else update_wrapper(partial(found, compress=_fold), found)


def _fold(model, recipe: Recipe, batches: list[Batch]) -> dict[str, Any]:
    """Fold ``model`` in place as ``recipe`` says, guided by ``batches`` where it goes by activations."""
    about = {"samples": sum(len(batch["input_ids"]) for batch in batches), "window": batches[0]["input_ids"].shape[1]}
    text, report = Calibration(batches, {"files": ["the run's own"]} | about), {}
    for step in recipe.stage_recipes():
        report = compress(model, step, text=step.calibrate and text)[1]
    return report


def plan(model: PreTrainedModel, recipe):
    """What ``recipe`` (a name, a file or a mapping) becomes on ``model``: ``{site: structure}``; nothing is changed."""
    return make_plan(model, load_recipe(recipe))


def load(name: str | Path, device: str | None = None, dtype: str | None = None) -> tuple[PreTrainedModel, Any]:
    """A model of the class that its configuration names, in evaluation mode, and its tokenizer (None if it has none).

    Args:
        device: for instance ``cuda``; an accelerator where there is one, unless given.
        dtype: for instance ``bfloat16``; that of the checkpoint unless given.
    """
    place, kind = checked_device(device), checked_dtype(dtype)
    model = load_model(name, kind).to(place).eval()
    return model, load_tokenizer(name)


def checked_dtype(dtype: str | None) -> torch.dtype | str:
    if dtype in (None, "auto"):
        return "auto"
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is not one of float32, bfloat16, float16, auto")
    return found


def checked_device(device: str | None) -> torch.device:
    if device is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as reason:
        raise ValueError(
            f"device {device!r} can't be used here ({str(reason).splitlines()[0]}); try --device cpu"
        ) from None


def with_keep(recipe, keep: float | None, of: str | None = None) -> Recipe:
    """``recipe`` (a name, a file or a mapping) with another budget, if ``keep`` is given.

    Args:
        of: what it is a share of; what the recipe's own budget is, or the ``model``, unless given.
    """
    loaded = load_recipe(recipe)
    if keep is not None and loaded.stages:
        raise ValueError(
            f"recipe {loaded.name} has stages, each with sizes of its own; leave --keep out, or write them there"
        )
    if keep is None:
        return loaded
    of = of or (loaded.budget.of if loaded.budget else "model")
    budget = parse_recipe({"budget": {"keep": check_keep(keep), "of": of}}, "the budget").budget
    return loaded.model_copy(update={"budget": budget})


def with_healing(recipe: Recipe, calibrated: bool) -> Recipe:
    """Return ``recipe`` with a healing behind it: one stage that compresses and heals; a recipe of stages says itself where.

    Args:
        calibrated: whether there is a calibration text, which guides the stage then.
    """
    if recipe.stages:
        return recipe
    stage = {key: getattr(recipe, key) for key in Stage.model_fields if key in Recipe.model_fields}
    stage["heal"] = recipe.heal or Heal()
    stage["calibrate"] = recipe.calibrate or (Calibrate() if calibrated else None)
    return Recipe(name=recipe.name, source=recipe.source, note=recipe.note, stages=[Stage(**stage)])


def heal_settings(losses: Sequence[str] = (), recipe: Recipe | str | dict | None = None, **settings: Any) -> Heal:
    """``settings`` of a healing with ``losses`` written as ``kl=1.0``.

    Those that are None are the recipe's ``heal`` section's, and where there is none :class:`Heal`'s.
    """
    known: dict[str, Any] = {}
    if recipe is not None:
        loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        if loaded.heal is None:
            raise ValueError(
                f"recipe {recipe if isinstance(recipe, str) else loaded.name} has no heal section; write one"
            )
        known = loaded.heal.model_dump(exclude_unset=True)
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            if settings.get(one) is not None:  # in the place of the recipe's length, whichever that is
                known.pop(other, None)
    weights: dict[str, Any] = {}
    for loss in losses:
        name, equals, weight = loss.partition("=")
        if not equals:
            raise ValueError(f"loss {loss!r} has no weight; write {loss}=1.0")
        weights[name] = weight
    settings = known | {name: value for name, value in settings.items() if value is not None}
    return parse_recipe({"heal": settings | ({"losses": weights} if weights else {})}, "the settings").heal


def read_calibration(model, tokenizer, files, recipe: Recipe | None = None, samples: int | None = None) -> Calibration:
    """The calibration text that ``recipe`` asks for, or ``samples`` windows of ``files``."""
    if tokenizer is None:
        raise ValueError("the model has no tokenizer to read the calibration text with; copy tokenizer.json there")
    for file in files:
        if not str(file).startswith(HUB) and is_tokens(Path(file)):
            raise ValueError(f"{file} holds tokens for pre-training; give the text that they were made of")
    settings = (recipe and recipe.calibrate) or Calibrate()
    return calibration(model, tokenizer, files, settings.samples if samples is None else samples, settings.window)


def generate(model, tokenizer, prompt: str, tokens: int = 40, temperature: float = 0.0, seed: int = 0) -> str:
    """``prompt`` and up to ``tokens`` more: the likeliest ones at temperature 0, drawn at random above it.

    Raises:
        ValueError: the model writes no text, or the prompt is empty or fills the model's context.

    Warns:
        UserWarning: fewer than ``tokens`` fit into the context behind the prompt.
    """
    if not model.can_generate():
        raise ValueError(
            f"a {type(model).__name__} writes no text; take a causal language model, such as a GPT-2 or a Llama"
        )
    ids = tokenizer(prompt, return_tensors="pt").to(next(model.parameters()).device)
    if ids["input_ids"].shape[1] == 0:
        raise ValueError("the prompt is empty; give it at least one word")
    tokens = _fitting(model, ids["input_ids"].shape[1], tokens)
    torch.manual_seed(seed)
    how = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with dense_cache(model):
        written = model.generate(**ids, max_new_tokens=tokens, pad_token_id=tokenizer.eos_token_id, **how)
    return tokenizer.decode(written[0], skip_special_tokens=True)


def _fitting(model, prompt: int, tokens: int) -> int:
    """How many ``tokens`` behind a prompt fit into the model's context."""
    context = positions_of(model)
    if context is None or prompt + tokens <= context:
        return tokens
    if prompt >= context:
        raise ValueError(f"the prompt has {prompt} tokens, and the model's context is {context}; give a shorter one")
    warnings.warn(
        f"the prompt has {prompt} tokens and the model's context is {context}: {context - prompt} more fit instead of {tokens}",
        stacklevel=3,
    )
    return context - prompt


def with_teacher(recipe, teacher: str | None) -> Recipe:
    """``recipe`` (a name, a file or a mapping) that learns from ``teacher``, if one is given."""
    loaded = load_recipe(recipe)
    if teacher is None or loaded.train is None:
        return loaded
    train = loaded.train.model_dump(exclude_unset=True) | {"teacher": teacher}
    return loaded.model_copy(update={"train": parse_recipe({"train": train}, loaded.name).train})


def texts(files: Sequence[str | Path]) -> list[str | Path]:
    """``files``, all of which exist, or are data sets of a hub."""
    found = [file if str(file).startswith(HUB) else Path(file) for file in files]
    for file in found:
        if isinstance(file, Path) and not file.is_file() and not is_tokens(file):
            raise FileNotFoundError(f"there is no file {file}; check the path (now in {Path.cwd()})")
    return found


__all__ = [
    "bench", "bench_layers", "check_output", "comparable", "compress", "evaluate", "evaluate_task", "finetune",
    "generate", "heal", "inspect", "load", "plan", "pretrain", "price", "read_calibration", "recipe_for", "save", "texts",
    "with_keep", "with_teacher",
]  # fmt: skip
