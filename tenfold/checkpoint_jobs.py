"""Compress and heal checkpoints from folder to folder; an interrupted job resumes.

While a job runs, its finished parts are in ``OUTPUT.partial``. The same call resumes after the last finished block, stage or
checkpoint. Several processes (``torchrun``) need a shared file system; the first one writes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from tenfold.models.atomic_io import RUN, atomic_directory, file_stamps, move_files, near, read_json, write_json
from tenfold.models.auto import load_tokenizer, read_config
from tenfold.models.checkpoint_format import check_plain
from tenfold.models.deepen import RECIPE, deepen
from tenfold.models.distillation_config import Heal
from tenfold.models.distributed import barrier, is_main_process
from tenfold.models.gguf import is_gguf
from tenfold.models.lazy_checkpoint import LazyCheckpoint, open_lazy
from tenfold.models.model_card import check_report, save_card, save_compressed
from tenfold.models.output_folder import check_output, claim_output, digest
from tenfold.models.precision import resolve_dtype
from tenfold.models.recipe import Recipe, load_recipe
from tenfold.models.sites import find_sites, group_by_block
from tenfold.models.weight_files import weight_files
from tenfold.train.checkpoints import last_checkpoint
from tenfold.train.run_manifest import differences


@contextmanager
def start_job(name: str | Path, output: Path, overwrite: bool, run: dict[str, Any]) -> Iterator[str | None]:
    """Claim ``output`` for a job on the checkpoint ``name``; yield the digest of ``run``, None if its result is there already."""
    check_plain(read_config(str(name)), name)
    with claim_output(output):
        barrier()  # until the first process has published what is complete
        finished = check_output(output, overwrite, digest(run))
        barrier()  # the first process must not write before the others have looked
        yield None if finished else digest(run)
        barrier()  # until no process reads the folder of the unfinished job any more
        if is_main_process():
            _discard(output, run)


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
    output, recipe = Path(output), load_recipe(recipe)
    files, heal_files = list_files(files), list_files(heal_files)
    if heal_files:
        recipe = api.with_healing(recipe, bool(files), heal_tokens)
    _check_texts(recipe, files, heal_files)
    asked = {"samples": num_samples, "dtype": str(dtype), "source": source, "max_shard_size": max_shard_size}
    settings = _fingerprint(recipe, [*files, *heal_files], name, **asked)
    how: dict[str, Any] = {"progress": progress, "announce": announce}
    with start_job(name, output, overwrite, settings) as run:
        if run is None:
            return read_report(output)
        if recipe.stages:
            shared = {"device": device, "dtype": dtype, "command": command}
            compress_stage = partial(
                compress_checkpoint, num_samples=num_samples, max_shard_size=max_shard_size, **shared, **how
            )
            heal_stage = partial(heal_checkpoint, teacher=name, files=heal_files, advance=advance, **shared)
            folder = _partial_folder(output, settings, overwrite, "*/config.json")
            return _run_stages(name, output, folder, recipe, files, compress_stage, heal_stage, command, run)
        checkpoint = tensors = None
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
            save_compressed(model, output, tokenizer, report, command, max_shard_size, tensors, run)
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
    heal_stage: Callable, command: str, run: str,
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
        reports.append(read_report(name))
    first = {key: reports[0][key] for key in ("parameters_dense", "flops_per_token_dense")}
    report = reports[-1] | first | {"recipe": recipe.model_dump(exclude_defaults=True), "stages": reports}
    barrier()  # until all processes have read the folder
    if is_main_process():
        with atomic_directory(output, run) as new:
            shutil.copytree(name, new, ignore=shutil.ignore_patterns("runs", RUN), dirs_exist_ok=True)
            save_card(new, None, report, command, output.absolute().name)
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
    output, files = Path(output), list_files(files)
    keys = ("window", "seed", "top_k", "store")
    asked = {key: str(options.get(key)) for key in keys} | {"dtype": str(dtype)}
    run = _fingerprint(settings, files, name, teacher, **asked)
    with start_job(name, output, overwrite, run) as running:
        checkpoints = near(output, "partial") / "checkpoints"
        if running is None:
            _move_logs(checkpoints, output)
            return read_report(output)["heal"]
        before = read_report(Path(name)) if (Path(name) / "tenfold.json").is_file() else {}
        model, tokenizer = api.load(name, device)
        saved_dtype = resolve_dtype(dtype, default=model.dtype)
        _partial_folder(output, run, overwrite, "checkpoints/checkpoint-*")
        try:
            report = api.heal(model.float(), teacher, tokenizer, files, settings, checkpoints=checkpoints, **options)
        except BaseException:
            if is_main_process() and last_checkpoint(checkpoints) is None:  # nothing to resume from
                _discard(output, run)
            raise
        if is_main_process():
            commands = f"{before.get('command', '')}\n{command}".strip()
            model = model.to(saved_dtype)
            save_compressed(model, output, tokenizer, before | {"heal": report}, commands, run=running)
            _move_logs(checkpoints, output)
        return report


def deepen_checkpoint(
    name: str | Path, output: str | Path, layers: int, recipe: Recipe | str | dict | None = None, *,
    device: str | None = None, dtype: torch.dtype | str | None = None, overwrite: bool = False, command: str = "",
    progress: Callable = iter,
) -> dict[str, Any]:  # fmt: skip
    """Make a model of ``layers`` layers from the checkpoint ``name``, write it to ``output`` and return its report."""
    output, asked = Path(output), {"layers": layers, "dtype": str(dtype), "recipe": recipe is not None}
    with start_job(name, output, overwrite, _fingerprint(load_recipe(recipe or RECIPE), (), name, **asked)) as run:
        if run is None:
            return read_report(output)
        model, tokenizer = api.load(name, device, dtype)
        model, report = deepen(model, layers, recipe, progress)
        if is_main_process():
            save_compressed(model, output, tokenizer, report, command, run=run)
        return report


def read_report(folder: Path) -> dict[str, Any]:
    """Return the ``tenfold.json`` of a checkpoint, checked."""
    report = read_json(folder / "tenfold.json", dict[str, Any])
    check_report(report, folder / "tenfold.json")
    return report


def _move_logs(checkpoints: Path, output: Path) -> None:
    if (checkpoints / "log.jsonl").is_file():
        (checkpoints / "log.jsonl").replace(output / "log.jsonl")
    if (checkpoints / "runs").is_dir():
        move_files(checkpoints / "runs", output / "runs")


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
    folder = near(output, "partial")
    if is_main_process():
        before = _noted(output)
        if folder.exists() and before != fingerprint:
            if not before and any(folder.iterdir()):
                raise FileExistsError(f"{folder} is there and is no unfinished work; move it, or choose another output")
            if not overwrite and any(folder.glob(finished)):
                other = ", ".join(sorted(differences(before, fingerprint)))
                raise FileExistsError(
                    f"{folder} holds what another run (other {other}) has finished; repeat that one's command, delete the "
                    "folder, or add --overwrite"
                )
            _discard(output, before)
            if folder.exists():  # and is empty
                folder.rmdir()
        if not folder.exists():
            begun = near(output, "begun")
            shutil.rmtree(begun, ignore_errors=True)
            (begun / "unfinished").mkdir(parents=True)
            write_json(begun / "unfinished" / "run.json", fingerprint)
            begun.rename(folder)  # which never is without the note that says whose it is
    barrier()
    return folder


class _Noted(BaseModel, extra="allow"):
    """What ``_fingerprint`` returns."""

    tenfold: str
    models: list[Any]
    text: list[Any]
    settings: dict[str, Any]


def _noted(output: Path) -> dict[str, Any]:
    """Return what the unfinished work on ``output`` was started with."""
    file = near(output, "partial") / "unfinished" / "run.json"
    return read_json(file, _Noted).model_dump() if file.is_file() else {}


def _discard(output: Path, run: dict[str, Any]) -> None:
    """Delete the unfinished work of ``run``; it is renamed first, so that no half of it is taken for unfinished work."""
    folder, discarded = near(output, "partial"), near(output, "discarded")
    for path in (discarded, near(output, "begun")):  # of a run that was killed here
        shutil.rmtree(path, ignore_errors=True)
    if (noted := _noted(output)) and noted == run:
        folder.rename(discarded)
        shutil.rmtree(discarded, ignore_errors=True)
