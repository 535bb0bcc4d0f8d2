"""Python equivalents of the commands: take names, folders and files; return models and plain dictionaries."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

import tenfold.baselines  # noqa: F401 - registers them
from tenfold.compression.calibration import Calibration, load_calibration
from tenfold.compression.compress import compress as compress
from tenfold.compression.compress import recipe_for as recipe_for
from tenfold.evaluation.bench_layers import bench_layers as bench_layers
from tenfold.evaluation.bench_model import bench as bench
from tenfold.evaluation.perplexity import comparable as comparable
from tenfold.evaluation.perplexity import perplexity as evaluate
from tenfold.evaluation.tasks import evaluate_task as evaluate_task
from tenfold.evaluation.text_files import HUB
from tenfold.models.auto import load_model, load_tokenizer
from tenfold.models.config import Calibrate
from tenfold.models.cost import inspect as inspect
from tenfold.models.cost import price as price
from tenfold.models.distillation_config import Heal
from tenfold.models.model_card import save_compressed as save
from tenfold.models.plan import make_plan
from tenfold.models.recipe import Recipe, Rules, Stage, check_keep, load_recipe, parse_recipe
from tenfold.models.text_mode import positions_of
from tenfold.nn.dense_cache import dense_cache
from tenfold.train.tokens import is_tokens

if TYPE_CHECKING:
    from tenfold.train.finetune import finetune
    from tenfold.train.heal import heal
    from tenfold.train.pretrain import pretrain


def __getattr__(name: str):
    """Import the training functions on first use: Trainer and its dependencies take a second or two."""
    if name not in ("finetune", "heal", "pretrain"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"tenfold.train.{name}"), name)


def plan(model: PreTrainedModel, recipe):
    """Return ``{site: structure}`` that ``recipe`` (a name, a file or a mapping) gives ``model``; change nothing."""
    return make_plan(model, load_recipe(recipe))


def load(name: str | Path, device: str | None = None, dtype: str | None = None) -> tuple[PreTrainedModel, Any]:
    """Load a model of the class that its configuration names, in evaluation mode, and its tokenizer (None if it has none).

    Args:
        device: for instance ``cuda``; default: the accelerator if there is one, else the CPU.
        dtype: for instance ``bfloat16``; default: that of the checkpoint.
    """
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    return load_model(name, dtype).to(device).eval(), load_tokenizer(name)


def resolve_dtype(dtype: str | None) -> torch.dtype | str:
    """Return the torch dtype of this name, or ``auto``."""
    if dtype in (None, "auto"):
        return "auto"
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is not one of float32, bfloat16, float16, auto")
    return found


def resolve_device(device: str | None) -> torch.device:
    """Return the torch device of this name; without one, the accelerator if there is one, else the CPU."""
    if device is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as reason:
        raise ValueError(
            f"device {device!r} can't be used here ({str(reason).splitlines()[0]}); try --device cpu"
        ) from None


def with_keep(recipe, keep: float | None, of: str | None = None) -> Recipe:
    """Return ``recipe`` (a name, a file or a mapping) with the budget ``keep``, unless that is None.

    Args:
        of: what ``keep`` is a share of; default: as in the recipe's own budget, else the ``model``.
    """
    recipe = load_recipe(recipe)
    if keep is None:
        return recipe
    if recipe.stages:
        raise ValueError(
            f"recipe {recipe.name} has stages, each with sizes of its own; leave --keep out, or write them there"
        )
    of = of or (recipe.budget.of if recipe.budget else "model")
    budget = parse_recipe({"budget": {"keep": check_keep(keep), "of": of}}, "the budget").budget
    return recipe.model_copy(update={"budget": budget})


def with_healing(recipe: Recipe, calibrated: bool) -> Recipe:
    """Return ``recipe`` as one stage that compresses and heals; a recipe with stages stays as it is.

    Args:
        calibrated: whether a calibration text guides the stage.
    """
    if recipe.stages:
        return recipe
    stage = {key: getattr(recipe, key) for key in Rules.model_fields}
    stage["heal"] = recipe.heal or Heal()
    stage["calibrate"] = recipe.calibrate or (Calibrate() if calibrated else None)
    return Recipe(name=recipe.name, source=recipe.source, note=recipe.note, stages=[Stage(**stage)])


def with_teacher(recipe, teacher: str | None) -> Recipe:
    """Return the pre-training ``recipe`` (a name, a file or a mapping) that also distils from ``teacher``, if given."""
    recipe = load_recipe(recipe)
    if teacher is None or recipe.train is None:
        return recipe
    train = recipe.train.model_dump(exclude_unset=True) | {"teacher": teacher}
    return recipe.model_copy(update={"train": parse_recipe({"train": train}, recipe.name).train})


def heal_settings(losses: Sequence[str] = (), recipe: str | dict | None = None, **settings: Any) -> Heal:
    """Return settings for ``tenfold.heal``: those given, else the recipe's ``heal`` section, else the defaults.

    Args:
        losses: ``NAME=WEIGHT``, for instance ``kl=1.0``.
        settings: fields of ``Heal``; None counts as not given.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    base: dict[str, Any] = {}
    if recipe is not None:
        loaded = load_recipe(recipe)
        if loaded.heal is None:
            raise ValueError(
                f"recipe {recipe if isinstance(recipe, str) else loaded.name} has no heal section; write one"
            )
        base = loaded.heal.model_dump(exclude_unset=True)
        if given.keys() & {"steps", "epochs"}:  # replaces the recipe's length, in either unit
            base = {name: value for name, value in base.items() if name not in ("steps", "epochs")}
    weights: dict[str, Any] = {}
    for loss in losses:
        name, equals, weight = loss.partition("=")
        if not equals:
            raise ValueError(f"loss {loss!r} has no weight; write {loss}=1.0")
        weights[name] = weight
    return parse_recipe({"heal": base | given | ({"losses": weights} if weights else {})}, "the settings").heal


def read_calibration(
    model, tokenizer, files, recipe: Recipe | None = None, num_samples: int | None = None
) -> Calibration:
    """Read the calibration text: ``num_samples`` windows of ``files``, or as many as ``recipe`` says."""
    if tokenizer is None:
        raise ValueError("the model has no tokenizer to read the calibration text with; copy tokenizer.json there")
    for file in files:
        if not str(file).startswith(HUB) and is_tokens(Path(file)):
            raise ValueError(f"{file} holds tokens for pre-training; give the text that they were made of")
    settings = (recipe and recipe.calibrate) or Calibrate()
    samples = settings.num_samples if num_samples is None else num_samples
    return load_calibration(model, tokenizer, files, samples, settings.window)


def generate(model, tokenizer, prompt: str, max_new_tokens: int = 40, temperature: float = 0.0, seed: int = 0) -> str:
    """Continue ``prompt``: greedily at temperature 0, else by sampling with ``seed``; return prompt and continuation.

    Raises:
        ValueError: the model generates no text, or the prompt is empty or fills the model's context.

    Warns:
        UserWarning: fewer than ``max_new_tokens`` fit into the context after the prompt.
    """
    if not model.can_generate():
        raise ValueError(
            f"a {type(model).__name__} writes no text; take a causal language model, such as a GPT-2 or a Llama"
        )
    ids = tokenizer(prompt, return_tensors="pt").to(next(model.parameters()).device)
    if ids["input_ids"].shape[1] == 0:
        raise ValueError("the prompt is empty; give it at least one word")
    max_new_tokens = _limit_to_context(model, ids["input_ids"].shape[1], max_new_tokens)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with dense_cache(model):
        output = model.generate(**ids, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def _limit_to_context(model, prompt_tokens: int, new_tokens: int) -> int:
    context = positions_of(model)
    if context is None or prompt_tokens + new_tokens <= context:
        return new_tokens
    reason = f"the prompt has {prompt_tokens} tokens and the model's context is {context}"
    if prompt_tokens >= context:
        raise ValueError(f"{reason}; give a shorter one")
    left = context - prompt_tokens
    warnings.warn(f"{reason}: {left} more fit instead of {new_tokens}", stacklevel=3)
    return left


def check_texts(files: Sequence[str | Path]) -> list[str | Path]:
    """Return ``files`` as paths, or as hub data set names; raise FileNotFoundError for a missing one."""
    found = [file if str(file).startswith(HUB) else Path(file) for file in files]
    for file in found:
        if isinstance(file, Path) and not file.is_file() and not is_tokens(file):
            raise FileNotFoundError(f"there is no file {file}; check the path (now in {Path.cwd()})")
    return found


__all__ = [
    "bench", "bench_layers", "check_texts", "comparable", "compress", "evaluate", "evaluate_task", "finetune", "generate",
    "heal", "inspect", "load", "plan", "pretrain", "price", "read_calibration", "recipe_for", "save", "with_keep",
    "with_teacher",
]  # fmt: skip
