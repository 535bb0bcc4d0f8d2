"""Python equivalents of the commands: take models, names, folders and files; return models and plain dictionaries."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from transformers import PreTrainedModel

import tenfold.baselines  # noqa: F401 - registers them
from tenfold.compression import compress as _compress
from tenfold.compression import forecast as _forecast
from tenfold.compression.calibration import Calibration, load_calibration
from tenfold.compression.compress import recipe_for as recipe_for
from tenfold.compression.compress import with_keep as with_keep
from tenfold.evaluation import bench_model as _bench_model
from tenfold.evaluation import perplexity as _perplexity
from tenfold.evaluation import tasks as _tasks
from tenfold.evaluation.bench_layers import bench_layers as bench_layers
from tenfold.evaluation.perplexity import comparable as comparable
from tenfold.evaluation.text_files import HUB, check_tokenizer, documents, list_files, token_stream
from tenfold.models import deepen as _deepen
from tenfold.models import densify as _densify
from tenfold.models import model_card as _model_card
from tenfold.models.auto import load_model, load_tokenizer, meta_model, unwrap
from tenfold.models.checkpoint_format import check_plain
from tenfold.models.config import Calibrate
from tenfold.models.cost import inspect as inspect
from tenfold.models.cost import price as price
from tenfold.models.distillation_config import Heal
from tenfold.models.loading import from_pretrained as from_pretrained
from tenfold.models.output_folder import claim_output
from tenfold.models.plan import make_plan
from tenfold.models.precision import resolve_dtype
from tenfold.models.recipe import Recipe as Recipe
from tenfold.models.recipe import Rules, Stage, parse_recipe
from tenfold.models.recipe import load_recipe as load_recipe
from tenfold.models.text_mode import known_inputs, positions_of
from tenfold.nn.dense_cache import dense_cache as dense_cache
from tenfold.train.tokens import is_tokens

if TYPE_CHECKING:
    from tenfold.train.finetune import finetune as finetune
    from tenfold.train.pretrain import pretrain as pretrain

F = TypeVar("F", bound=Callable)


def __getattr__(name: str):
    """Import the training functions on first use: Trainer and its dependencies take a second or two."""
    if name not in ("finetune", "pretrain"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"tenfold.train.{name}"), name)


def load(
    name: str | Path, device: str | None = None, dtype: torch.dtype | str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Load a model of the class that its configuration names, in evaluation mode, and its tokenizer (None if it has none).

    Args:
        device: for instance ``cuda``; default: the accelerator if there is one, else the CPU.
        dtype: for instance ``bfloat16``; default: that of the checkpoint.
    """
    place = resolve_device(device)
    model: Any = load_model(name, resolve_dtype(dtype))
    return model.to(place).eval(), load_tokenizer(name)


def accepts_names(function: F, changes: bool = False) -> F:
    """Let the arguments ``model`` and ``against`` be folders or names, too; a tokenizer that is not given is the model's.

    Args:
        changes: the model is changed or saved, so that it is taken out of ``torch.compile``, and must have no adapter on it.
    """
    parameters = signature(function)

    @wraps(function)
    def call(*args, **kwargs):
        given = parameters.bind_partial(*args, **kwargs)
        for key in ("model", "against"):
            if isinstance(name := given.arguments.get(key), (str, Path)):
                given.arguments[key], tokenizer = load(name)
                if key == "model" and "tokenizer" in parameters.parameters and not given.arguments.get("tokenizer"):
                    given.arguments["tokenizer"] = tokenizer
        if changes:
            given.arguments["model"] = unwrap(given.arguments["model"])
        return function(*given.args, **given.kwargs)

    return cast(F, call)


bench = accepts_names(_bench_model.bench)
compress = accepts_names(_compress.compress, changes=True)
deepen = accepts_names(_deepen.deepen, changes=True)
densify = accepts_names(_densify.densify, changes=True)
evaluate = accepts_names(_perplexity.perplexity)
evaluate_task = accepts_names(_tasks.evaluate_task)
save = accepts_names(_model_card.save_compressed, changes=True)


@accepts_names
def plan(model: PreTrainedModel, recipe):
    """Return ``{site: structure}`` that ``recipe`` (a name, a file or a mapping) gives ``model``; change nothing."""
    return make_plan(model, load_recipe(recipe))


def heal(model, teacher, tokenizer=None, files=(), settings: Heal | None = None, *, output=None, **options):
    """Distil ``teacher`` into ``model``, in place, as ``tenfold.train.heal.heal`` describes, and return the report.

    Args:
        model: a model, or a folder or name, which is loaded in float32, healed and saved in ``output``.
        tokenizer: that of the folder unless given.
        options: further arguments of ``tenfold.train.heal.heal``.

    Raises:
        ValueError: ``model`` is a name and there is no ``output``.
    """
    train = import_module("tenfold.train.heal").heal
    if not isinstance(model, (str, Path)):
        return train(model, teacher, tokenizer, files, settings, **options)
    if output is None:
        raise ValueError(
            f"nothing would be left of the healed {model}; give output, a folder, or a model that is loaded"
        )
    with claim_output(output):
        loaded, found = load(model, dtype="float32")
        report = train(loaded, teacher, tokenizer or found, files, settings, **options)
        save(loaded, output, tokenizer or found, {"heal": report})
    return report


def resolve_device(device: str | None) -> torch.device:
    """Return the torch device of this name; without one, the accelerator if there is one, else the CPU."""
    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as reason:
        raise ValueError(
            f"device {device!r} can't be used here ({str(reason).splitlines()[0]}); try --device cpu"
        ) from None


def recipe_of_shapes(shapes: str | None) -> Recipe:
    """Return the recipe to recommend for ``free`` or ``stock`` shapes."""
    recipes = {None: "recommended", "free": "recommended", "stock": "stock"}
    if shapes not in recipes:
        raise ValueError(f"shapes is {shapes!r}; it must be free or stock")
    return load_recipe(recipes[shapes])


def with_healing(recipe: Recipe, calibrated: bool, tokens: int | None = None) -> Recipe:
    """Return ``recipe`` as one stage that compresses (by activations if ``calibrated``) and heals, unless it has stages.

    Args:
        tokens: to heal on; by default as the recipe says, else one pass over the text.
    """
    if recipe.stages:
        if tokens is not None:
            raise ValueError(f"the stages of recipe {recipe.name} say how long each heals; leave --heal-tokens out")
        return recipe
    stage = {key: getattr(recipe, key) for key in Rules.model_fields}
    heal = recipe.heal or heal_settings()
    if tokens is not None:
        heal = heal.model_copy(update={"steps": max(1, round(tokens / heal.tokens_per_step)), "epochs": None})
    stage["heal"] = heal
    stage["calibrate"] = recipe.calibrate or (Calibrate.model_validate({}) if calibrated else None)
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
            raise ValueError(f"recipe {loaded.name} has no heal section; write one")
        replaced = ("steps", "epochs") if given.keys() & {"steps", "epochs"} else ()  # the length, in either unit
        base = loaded.heal.model_dump(exclude_unset=True, exclude={*replaced})
    weights: dict[str, Any] = {}
    for loss in losses:
        name, equals, weight = loss.partition("=")
        if not equals:
            raise ValueError(f"loss {loss!r} has no weight; write {loss}=1.0")
        weights[name] = weight
    parsed = parse_recipe({"heal": base | given | ({"losses": weights} if weights else {})}, "the settings").heal
    assert parsed is not None
    return parsed


@accepts_names
def read_calibration(
    model, tokenizer, files, recipe: Recipe | None = None, num_samples: int | None = None
) -> Calibration:
    """Read the calibration text: ``num_samples`` windows of ``files``, or as many as ``recipe`` says."""
    check_tokenizer(tokenizer)
    settings = (recipe and recipe.calibrate) or Calibrate.model_validate({})
    samples = settings.num_samples if num_samples is None else num_samples
    return load_calibration(model, tokenizer, files, samples, settings.window)


def forecast(
    name: str | Path,
    recipe: Recipe | str | dict,
    files: str | Path | Sequence[str | Path] = (),
    num_samples: int | None = None,
    heal_files: str | Path | Sequence[str | Path] = (),
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Return what every stage of compressing the checkpoint ``name`` would do, and the memory and time that it needs.

    Nothing is written, and no weights are read. See ``tenfold.compression.forecast`` for the keys.
    """
    model, tokenizer, place = meta_model(name), load_tokenizer(name), resolve_device(device)
    check_plain(model.config, name)
    text = read_calibration(model, tokenizer, files, load_recipe(recipe), num_samples) if files else None
    once = 0 if not heal_files else len(token_stream(documents(heal_files, tokenizer), tokenizer))
    found = []
    for stage in load_recipe(recipe).stage_recipes():
        heal, healed = stage.heal, 0
        if heal is not None:
            healed = heal.steps * heal.tokens_per_step if heal.steps else round((heal.epochs or 1) * once)
        found.append(_forecast.forecast(model, stage, text if stage.calibrate else None, place, healed))
    return found


@accepts_names
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
    check_tokenizer(tokenizer)
    ids = tokenizer(prompt, return_tensors="pt").to(next(model.parameters()).device)
    if ids["input_ids"].shape[1] == 0:
        raise ValueError("the prompt is empty; give it at least one word")
    context, length = positions_of(model), ids["input_ids"].shape[1]
    if context is not None and length + max_new_tokens > context:
        reason = f"the prompt has {length} tokens and the model's context is {context}"
        if length >= context:
            raise ValueError(f"{reason}; give a shorter one")
        warnings.warn(f"{reason}: {context - length} more fit instead of {max_new_tokens}", stacklevel=2)
        max_new_tokens = context - length
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    known = known_inputs(model, ids)
    with dense_cache(model):
        output = model.generate(**known, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def check_texts(files: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """Return ``files`` as paths, or as hub data set names; raise FileNotFoundError for a missing one."""
    found = [file if str(file).startswith(HUB) else Path(file) for file in list_files(files)]
    for file in found:
        if isinstance(file, Path) and not file.is_file() and not is_tokens(file):
            raise FileNotFoundError(f"there is no file {file}; check the path (now in {Path.cwd()})")
    return found
