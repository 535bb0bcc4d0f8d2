"""Compress and heal checkpoints from folder to folder; an interrupted job resumes.

While a job runs, its finished parts are in ``OUTPUT.partial``. The same call resumes after the last finished block, stage or
checkpoint. Several processes (``torchrun``) need a shared file system; the first one writes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from tenfold import api
from tenfold.compression.calibration import Calibration
from tenfold.compression.compress import compress
from tenfold.compression.progress import Progress, no_progress
from tenfold.compression.resume_state import ResumeState
from tenfold.compression.stock_shapes import DROPPED
from tenfold.compression.weight_source import StreamedWeights
from tenfold.evaluation.text_files import list_files
from tenfold.models.atomic_io import atomic_directory, file_stamps, read_json, write_json
from tenfold.models.auto import load_tokenizer, read_config
from tenfold.models.checkpoint_format import check_plain
from tenfold.models.distillation_config import Heal
from tenfold.models.distributed import barrier, is_main_process
from tenfold.models.gguf import is_gguf
from tenfold.models.lazy_checkpoint import LazyCheckpoint, open_lazy
from tenfold.models.loading import check_output
from tenfold.models.model_card import save_card, save_compressed
from tenfold.models.precision import resolve_dtype
from tenfold.models.recipe import Recipe, load_recipe
from tenfold.models.sites import find_sites, group_by_block
from tenfold.models.weight_files import weight_files
from tenfold.train.checkpoints import last_checkpoint
from tenfold.train.run_manifest import differences


def check_job(name: str | Path, output: str | Path, overwrite: bool) -> Path:
    """Return the output folder after every process has checked it and that tenfold can read the checkpoint ``name``."""
    output = check_output(Path(output), overwrite)
    check_plain(read_config(str(name)), name)
    barrier()  # the first process must not write before the others have looked
    return output


def compress_checkpoint(
    name: str | Path,
    output: str | Path,
    recipe: Recipe | str | dict = "recommended",
    files: str | Path | Sequence[str | Path] = (),
    num_samples: int | None = None,
    *,
    heal_files: str | Path | Sequence[str | Path] = (),
    heal_tokens: int | None = None,
    source: str = "weights",
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    command: str = "",
    max_shard_size: str = "5GB",
    progress: Progress = no_progress,
    announce: Callable[[list[dict]], None] = lambda choices: None,
    advance: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
    """Compress the checkpoint ``name`` into the folder ``output`` and return the report.

    With calibration text and safetensors one block at a time is in memory. A recipe with stages (gradual compression) compresses
    in each one and heals where it says so.

    Args:
        name: a folder, a GGUF file, or a name on a hub.
        files: calibration text; none for recipes without activations.
        num_samples: windows, or documents, of the calibration text; default: as in the recipe.
        heal_files: text to heal on, after the compression or in the stages that heal.
        heal_tokens: of it; by default as in the recipe, else all of it once.
        source: ``weights`` or ``noise``, as for ``tenfold.compress``.
        device, dtype: as for ``tenfold.api.load``.
        overwrite: replace ``output``, and what another job has left in ``output.partial``.
        command: the command line, for the model card.
        max_shard_size: largest size of a file of weights.
        progress, announce: as for ``tenfold.compress``.
        advance: called as ``advance(step, steps, tokens_per_second)`` while healing.

    Returns:
        The report of ``tenfold.compress``. With stages: that of the last one, the dense model's counts, and ``stages``, the
        reports of all.

    Raises:
        FileExistsError: ``output`` is not empty, or ``output.partial`` belongs to another job.
        OSError: the disk is full; what is finished stays, and the same call resumes.
        ValueError: a stage needs text that is missing, or ``tenfold.compress`` refuses the job.
    """
    output, recipe = check_job(name, output, overwrite), load_recipe(recipe)
    files, heal_files = list_files(files), list_files(heal_files)
    if heal_files:
        recipe = api.with_healing(recipe, bool(files), heal_tokens)
    settings = _fingerprint(recipe, [*files, *heal_files], name, samples=num_samples, dtype=str(dtype))
    how: dict[str, Any] = {"progress": progress, "announce": announce}
    if recipe.stages:
        _check_texts(recipe, files, heal_files)
        shared = {"device": device, "dtype": dtype, "command": command}
        compress_stage = partial(
            compress_checkpoint, num_samples=num_samples, max_shard_size=max_shard_size, **shared, **how
        )
        heal_stage = partial(heal_checkpoint, teacher=name, files=heal_files, advance=advance, **shared)
        folder = _partial_folder(output, settings, overwrite, "*/config.json")
        return _run_stages(name, output, folder, recipe, files, compress_stage, heal_stage, command)
    checkpoint = folder = tensors = None
    if files and not (recipe.transform or recipe.squeeze or any(rule.share for rule in recipe.replace)):
        checkpoint = open_lazy(name, api.resolve_device(device), resolve_dtype(dtype, default=None))
    if checkpoint is None:
        model, tokenizer = api.load(name, device, dtype)
    else:
        model, tokenizer = checkpoint.model, load_tokenizer(name)
    text = api.read_calibration(model, tokenizer, files, recipe, num_samples) if files else None
    if checkpoint is None:
        model, report = compress(model, recipe, source, text=text, **how)
    else:
        folder = _partial_folder(output, settings, overwrite)
        model, report, tensors = _compress_blocks(checkpoint, recipe, text, folder, how)
    barrier()  # until no process reads the folder any more
    if is_main_process():
        save_compressed(model, output, tokenizer, report, command, max_shard_size, tensors)
        _remove(folder)
    barrier()
    return report


def _compress_blocks(
    checkpoint: LazyCheckpoint, recipe: Recipe, text: Calibration | None, folder: Path, how: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any], dict[str, Tensor]]:
    """Compress one block at a time, from disk to disk; return the model, the report and the tensors, still on disk."""
    blocks = list(group_by_block(find_sites(checkpoint.model)))
    state = ResumeState(folder, len(blocks))
    checkpoint.load_outside(blocks)
    weights = StreamedWeights(
        checkpoint, lambda number, path: state.save_block(checkpoint.model, number, path, checkpoint.dtype)
    )
    model, report = compress(checkpoint.model, recipe, text=text, weights=weights, state=state, **how)
    barrier()  # until the first process has written all blocks
    tensors, inside = model.state_dict(), tuple(f"{path}." for path in blocks)
    tensors = {key: value for key, value in tensors.items() if not key.startswith(inside)}
    left = [number for number, path in enumerate(blocks) if state.chosen.get(path) != DROPPED]
    for place, number in enumerate(left):  # blocks move up where others go
        found = load_file(state.shard_path(number + 1))
        tensors |= {blocks[place] + key.removeprefix(blocks[number]): value for key, value in found.items()}
    return model, report, tensors


def _check_texts(recipe: Recipe, files: Sequence[str | Path], heal_files: Sequence[str | Path]) -> None:
    for number, stage in enumerate(recipe.stages):
        if stage.heal and not heal_files:
            raise ValueError(f"stage {number} of recipe {recipe.name} heals: give the text for it (--heal FILE)")
        if stage.calibrate and not files:
            raise ValueError(f"stage {number} of recipe {recipe.name} goes by activations: give --calibrate FILE")


def _run_stages(
    name: str | Path, output: Path, folder: Path, recipe: Recipe, files: Sequence[str | Path], compress_stage: Callable,
    heal_stage: Callable, command: str,
) -> dict[str, Any]:  # fmt: skip
    """Compress and heal stage by stage, from checkpoint to checkpoint in ``folder``."""
    reports = []
    for number, stage in enumerate(recipe.stage_recipes()):
        compressed, healed = folder / f"stage-{number}", folder / f"healed-{number}"
        if not compressed.exists():
            compress_stage(name, compressed, stage, files if stage.calibrate else ())
        if stage.heal and not healed.exists():
            heal_stage(compressed, output=healed, settings=stage.heal)
        name = healed if stage.heal else compressed
        reports.append(read_json(name / "tenfold.json"))
    first = {key: reports[0][key] for key in ("parameters_dense", "flops_per_token_dense")}
    report = reports[-1] | first | {"recipe": recipe.model_dump(exclude_defaults=True), "stages": reports}
    barrier()  # until all processes have read the folder
    if is_main_process():
        with atomic_directory(output) as new:
            shutil.copytree(name, new, ignore=shutil.ignore_patterns("runs"), dirs_exist_ok=True)
            save_card(new, None, report, command, output.name)
        _remove(folder)
    barrier()
    return report


def heal_checkpoint(
    name: str | Path,
    teacher: str | Path | None,
    output: str | Path,
    files: str | Path | Sequence[str | Path],
    settings: Heal,
    *,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    command: str = "",
    **options: Any,
) -> dict[str, Any]:
    """Heal the checkpoint ``name``, write it to the folder ``output`` and return the report of ``tenfold.heal``.

    Checkpoints are in ``output.partial``; the same call resumes from the last one.

    Args:
        options: further arguments of ``tenfold.heal``.
    """
    output, files = check_job(name, output, overwrite), list_files(files)
    model, tokenizer = api.load(name, device)
    saved_dtype = resolve_dtype(dtype, default=model.dtype)
    asked = {key: str(options.get(key)) for key in ("window", "seed", "top_k", "store")}
    folder = _partial_folder(
        output, _fingerprint(settings, files, name, teacher, **asked), overwrite, "checkpoints/checkpoint-*"
    )
    checkpoints = folder / "checkpoints"
    try:
        report = api.heal(model.float(), teacher, tokenizer, files, settings, checkpoints=checkpoints, **options)
    except BaseException:
        if is_main_process() and last_checkpoint(checkpoints) is None:  # nothing to resume from
            _remove(folder)
        raise
    if is_main_process():
        compressed = Path(name) / "tenfold.json"
        before = read_json(compressed) if compressed.is_file() else {}
        commands = f"{before.get('command', '')}\n{command}".strip()
        save_compressed(model.to(saved_dtype), output, tokenizer, before | {"heal": report}, commands)
        for log in filter(Path.exists, (checkpoints / "log.jsonl", checkpoints / "runs")):
            _remove(output / log.name)
            log.rename(output / log.name)
        _remove(folder)
    barrier()
    return report


def _fingerprint(
    settings: BaseModel, files: Sequence[str | Path], *models: str | Path | None, **more: Any
) -> dict[str, Any]:
    """Return everything that decides the result of a job: only a job with the same may be resumed."""
    weights = []
    for name in filter(None, models):  # the files of a folder may be replaced by another model's
        found = [Path(name)] if is_gguf(name) else weight_files(name) if Path(name).is_dir() else []
        weights.append([str(name), file_stamps(found)])
    texts = [[str(file), file_stamps([Path(file)]) if Path(file).is_file() else None] for file in files]
    about = {"tenfold": version("tenfold"), "models": weights, "text": texts}
    return about | {"settings": settings.model_dump(mode="json")} | more


def _partial_folder(output: Path, fingerprint: dict[str, Any], overwrite: bool, finished: str = "*") -> Path:
    """Return the folder of the unfinished job, which the first process creates unless it is there.

    Args:
        finished: pattern of files that show that something is finished; without any, another job's folder is replaced.
    """
    folder = output.with_name(f"{output.name}.partial")
    file = folder / "unfinished" / "run.json"
    if is_main_process():
        before = read_json(file) if file.is_file() else {}
        if folder.exists() and before != json.loads(json.dumps(fingerprint)):
            if not file.is_file() and any(folder.iterdir()):
                raise FileExistsError(f"{folder} is there and is no unfinished work; move it, or choose another output")
            if not overwrite and any(folder.glob(finished)):
                other = ", ".join(sorted(differences(before, fingerprint))) if before else "nothing is noted of it"
                raise FileExistsError(
                    f"{folder} holds what another run (other {other}) has finished; repeat that one's command, delete the "
                    "folder, or add --overwrite"
                )
            shutil.rmtree(folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, fingerprint)
    barrier()
    return folder


def _remove(path: Path | None) -> None:
    if path is not None and path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path is not None:
        path.unlink(missing_ok=True)
