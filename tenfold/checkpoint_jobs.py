"""Compress and heal checkpoints from folder to folder; an interrupted job resumes.

While a job runs, its finished parts are in ``OUTPUT.partial``, which becomes ``OUTPUT`` at the end. The same call resumes after
the last finished block, stage or checkpoint. Several processes (``torchrun``) need a shared file system; the first one writes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tenfold import api
from tenfold.compression.activations import group_by_block
from tenfold.compression.calibration import Calibration
from tenfold.compression.compress import compress
from tenfold.compression.progress import Progress, no_progress
from tenfold.compression.resume_state import ResumeState, write_tensors
from tenfold.compression.weight_source import StreamedWeights
from tenfold.models.atomic_io import file_stamps, is_model_file, open_safetensors, read_json, write_json
from tenfold.models.auto import load_tokenizer, read_config
from tenfold.models.checkpoint_format import check_plain
from tenfold.models.cost import price
from tenfold.models.distillation_config import Heal
from tenfold.models.distributed import barrier, is_main_process
from tenfold.models.gguf import is_gguf
from tenfold.models.lazy_checkpoint import LazyCheckpoint, open_lazy
from tenfold.models.loading import INDEX, check_output, weight_files
from tenfold.models.model_card import save_card, save_compressed, save_config
from tenfold.models.recipe import Recipe, load_recipe
from tenfold.models.sites import find_sites
from tenfold.train.checkpoints import last_checkpoint
from tenfold.train.run_manifest import differences

ONE_FILE_BYTES = (
    2**30
)  # a compressed model of at most this size is saved as one file, a larger one as a shard per block


def check_job(name: str | Path, output: str | Path, overwrite: bool) -> Path:
    """Return the output folder after every process has checked it and that tenfold can read the checkpoint ``name``."""
    output = check_output(Path(output), overwrite)
    check_plain(read_config(str(name)), name)
    barrier()  # the first process must not write before the others have looked
    return output


@dataclass(frozen=True)
class CompressJob:
    """Arguments of ``compress_checkpoint``, which all ways to compress share."""

    name: str | Path
    output: Path
    recipe: Recipe
    files: Sequence[str | Path]
    num_samples: int | None
    device: str | None
    dtype: str | None
    overwrite: bool
    command: str
    max_shard_size: str
    progress: Progress
    announce: Callable[[list[dict]], None]

    def read_calibration(self, model, tokenizer, recipe: Recipe) -> Calibration:
        return api.read_calibration(model, tokenizer, self.files, recipe, self.num_samples)

    def in_memory(self, source: str) -> dict[str, Any]:
        """Compress the whole model at once."""
        model, tokenizer = api.load(self.name, self.device, self.dtype)
        text = self.read_calibration(model, tokenizer, self.recipe) if self.files else None
        model, report = compress(model, self.recipe, source, self.progress, text, self.announce)
        if is_main_process():
            save_compressed(model, self.output, tokenizer, report, self.command, self.max_shard_size)
        barrier()
        return report

    def by_block(self, checkpoint: LazyCheckpoint) -> dict[str, Any]:
        """Compress one block at a time, from disk to disk."""
        tokenizer = load_tokenizer(self.name)
        text = self.read_calibration(checkpoint.model, tokenizer, self.recipe)
        folder = _partial_folder(self.output, _fingerprint(checkpoint, self.recipe, text), self.overwrite)
        blocks = list(group_by_block(find_sites(checkpoint.model)))
        state = ResumeState(folder, len(blocks))
        checkpoint.load_outside(blocks)
        weights = StreamedWeights(
            checkpoint, lambda number, path: state.save_block(checkpoint.model, number, path, checkpoint.dtype)
        )
        model, report = compress(
            checkpoint.model, self.recipe, "weights", self.progress, text, self.announce, weights, state
        )
        barrier()  # until no process reads the folder any more
        if is_main_process():
            new = _assemble(state, _tensors_outside(model, blocks), self.max_shard_size)
            model.config.dtype = checkpoint.dtype
            save_config(model, new)
            save_card(new, tokenizer, report, self.command, self.output.name)
            _move(new, folder, self.output)
        barrier()
        return report

    def by_stage(self, heal_files: Sequence[str | Path], advance: Callable[[int, int], None] | None) -> dict[str, Any]:
        """Compress stage by stage; every finished stage is a whole checkpoint in ``output.partial``."""
        recipe_name = f"recipe {self.recipe.name}"
        for number, stage in enumerate(self.recipe.stages):
            if stage.heal and not heal_files:
                raise ValueError(f"stage {number} of {recipe_name} heals: give the text for it (--heal FILE)")
            if stage.calibrate and not self.files:
                raise ValueError(f"stage {number} of {recipe_name} goes by activations: give --calibrate FILE")
        fingerprint = {
            "tenfold": version("tenfold"),
            "model": str(self.name),
            "recipe": self.recipe.model_dump(mode="json"),
            "text": _file_sizes([*self.files, *heal_files]),
            "weights": _weight_stamps(self.name),
            "samples": self.num_samples,
            "dtype": self.dtype,
        }
        folder = _partial_folder(self.output, fingerprint, self.overwrite)
        teacher, tokenizer = api.load(self.name, self.device, "float32")
        saved_dtype = api.load(self.name, "cpu", self.dtype)[0].dtype
        dense, reports = price(teacher), []
        for number, recipe in enumerate(self.recipe.stage_recipes()):
            done, checkpoints = folder / f"stage-{number}", folder / f"healing-{number}"
            if not done.is_dir():
                before = folder / f"stage-{number - 1}" if number else self.name
                model = api.load(before, self.device, "float32")[0]
                text = self.read_calibration(model, tokenizer, recipe) if recipe.calibrate else None
                model, report = compress(model, recipe, "weights", self.progress, text, self.announce)
                if recipe.heal:
                    options = {"advance": advance, "checkpoints": checkpoints}
                    report["heal"] = api.heal(model, teacher, tokenizer, heal_files, recipe.heal, **options)
                if is_main_process():
                    new = folder / f"stage-{number}.new"
                    for old in (checkpoints, new):
                        shutil.rmtree(old, ignore_errors=True)
                    save_compressed(model.to(saved_dtype), new, tokenizer, report, self.command, self.max_shard_size)
                    new.rename(done)
            barrier()
            reports.append(json.loads((done / "tenfold.json").read_text()))
        report = reports[-1] | {
            "parameters_dense": dense["parameters"],
            "flops_per_token_dense": dense["flops_per_token"],
            "recipe": self.recipe.model_dump(exclude_defaults=True),
            "stages": reports,
        }
        barrier()  # until all processes have read the folder that moves now
        if is_main_process():
            save_card(done, tokenizer, report, self.command, self.output.name)
            _move(done, folder, self.output)
        barrier()
        return report


def compress_checkpoint(
    name: str | Path,
    output: str | Path,
    recipe: Recipe | str | dict = "recommended",
    files: Sequence[str | Path] = (),
    num_samples: int | None = None,
    *,
    heal_files: Sequence[str | Path] = (),
    source: str = "weights",
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    command: str = "",
    max_shard_size: str = "5GB",
    progress: Progress = no_progress,
    announce: Callable[[list[dict]], None] = lambda choices: None,
    advance: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compress the checkpoint ``name`` into the folder ``output`` and return the report.

    With calibration text and safetensors one block at a time is in memory. A recipe with stages (gradual compression) compresses
    in each one and heals where it says so.

    Args:
        name: a folder, a GGUF file, or a name on a hub.
        files: calibration text; none for recipes without activations.
        num_samples: windows, or documents, of the calibration text; default: as in the recipe.
        heal_files: text to heal on, after the compression or in the stages that heal.
        source: ``weights`` or ``noise``, as for ``tenfold.compress``.
        device, dtype: as for ``tenfold.api.load``.
        overwrite: replace ``output``, and what another job has left in ``output.partial``.
        command: the command line, for the model card.
        max_shard_size: size of the files of a model small enough to be assembled in memory.
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
    output = check_job(name, output, overwrite)
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if heal_files:
        recipe = api.with_healing(recipe, calibrated=bool(files))
    job = CompressJob(
        name, output, recipe, files, num_samples, device, dtype, overwrite, command, max_shard_size, progress, announce
    )
    if recipe.stages:
        return job.by_stage(heal_files, advance)
    whole_model = recipe.transform or recipe.squeeze or any(rule.share for rule in recipe.replace)
    if files and not whole_model:
        dtype = api.resolve_dtype(dtype)
        checkpoint = open_lazy(name, api.resolve_device(device), None if isinstance(dtype, str) else dtype)
        if checkpoint is not None:
            return job.by_block(checkpoint)
    return job.in_memory(source)


def heal_checkpoint(
    name: str | Path,
    teacher: str | Path | None,
    output: str | Path,
    files: Sequence[str | Path],
    settings: Heal,
    *,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    command: str = "",
    **options: Any,
) -> dict[str, Any]:
    """Heal the checkpoint ``name``, write it to the folder ``output`` and return the report of ``tenfold.heal``.

    Checkpoints are in ``output.partial``; the same call resumes from the last one.

    Args:
        options: further arguments of ``tenfold.heal``.
    """
    output = check_job(name, output, overwrite)
    model, tokenizer = api.load(name, device, "float32")
    saved_dtype = api.load(name, "cpu", dtype)[0].dtype
    fingerprint = {
        "model": str(name),
        "teacher": str(teacher),
        "heal": settings.model_dump(mode="json"),
        "text": _file_sizes(files),
        **{key: options.get(key) for key in ("window", "seed", "top_k")},
        "store": str(options.get("store")),
        "weights": _weight_stamps(name),
        "taught by": _weight_stamps(teacher),
    }
    folder = _partial_folder(output, fingerprint, overwrite, "checkpoints/checkpoint-*")
    checkpoints = folder / "checkpoints"
    try:
        report = api.heal(model, teacher, tokenizer, files, settings, checkpoints=checkpoints, **options)
    except BaseException:
        if is_main_process() and last_checkpoint(checkpoints) is None:  # nothing to resume from
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if is_main_process():
        compressed = Path(name) / "tenfold.json"
        before = read_json(compressed) if compressed.is_file() else {}
        new, commands = folder / output.name, f"{before.get('command', '')}\n{command}".strip()
        save_compressed(model.to(saved_dtype), new, tokenizer, before | {"heal": report}, commands)
        for log in ("log.jsonl", "runs"):
            if (checkpoints / log).exists():
                (checkpoints / log).rename(new / log)
        _move(new, folder, output)
    barrier()
    return report


def _file_sizes(files: Sequence[str | Path]) -> list[list[Any]]:
    return [[str(file), Path(file).stat().st_size] for file in files if Path(file).is_file()]


def _weight_stamps(name: str | Path | None) -> list[list[Any]]:
    """Return name, size and time of the weight files of a folder or a GGUF file: another model may replace them."""
    if name is not None and is_gguf(name):
        return file_stamps([Path(name)])
    return file_stamps(weight_files(name)) if name is not None and Path(name).is_dir() else []


def _fingerprint(checkpoint: LazyCheckpoint, recipe: Recipe, text: Calibration) -> dict[str, Any]:
    """Return everything that decides the result of a run by blocks: only a run with the same may be resumed."""
    digest = hashlib.sha256()
    for batch in text.batches:
        for value in batch.values():
            digest.update(value.numpy().tobytes())
    return {
        "tenfold": version("tenfold"),
        "weights": file_stamps(sorted({file for file, _ in checkpoint.files.values()})),
        "recipe": recipe.model_dump(mode="json"),
        "text": digest.hexdigest(),
        "dtype": str(checkpoint.dtype),
    }


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


def _tensors_outside(model, blocks: list[str]) -> dict[str, Tensor]:
    """Return the tensors to save that are in none of the ``blocks``."""
    inside, ties = tuple(f"{path}." for path in blocks), model.all_tied_weights_keys
    return {
        key: value.contiguous().clone()
        for key, value in model.state_dict().items()
        if not key.startswith(inside) and key not in ties
    }


def _assemble(state: ResumeState, outer: dict[str, Tensor], max_shard_size: str) -> Path:
    """Make one checkpoint of the block shards and the ``outer`` tensors, and return its folder."""
    assert state.unfinished is not None
    shards = [state.shard_path(number) for number in range(state.blocks + 1)]
    write_tensors(shards[0], outer)
    size = sum(shard.stat().st_size for shard in shards)
    if size <= ONE_FILE_BYTES:
        whole = state.unfinished / "whole"  # beside the shards, which must stay until everything is written
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()
        merged = outer | {key: value for shard in shards[1:] for key, value in load_file(shard).items()}
        try:
            save_torch_state_dict(merged, whole, max_shard_size=max_shard_size)
        except SafetensorError as reason:
            raise OSError(f"{whole} can't be written ({reason}); make room, then rerun to resume") from None
        return whole
    weight_map = {}
    for shard in shards:
        with open_safetensors(shard) as stored:
            weight_map |= dict.fromkeys(stored.keys(), shard.name)
    write_json(shards[0].with_name(INDEX), {"metadata": {"total_size": size}, "weight_map": weight_map})
    return shards[0].parent


def _move(new: Path, folder: Path, output: Path) -> None:
    """Rename the finished checkpoint to ``output`` and delete ``folder``; files in ``output`` that are no model's stay."""
    if new == folder:
        shutil.rmtree(folder / "unfinished")
    if output.exists():
        for file in output.iterdir():
            if not is_model_file(file) and not (new / file.name).exists():
                file.rename(new / file.name)
        shutil.rmtree(output)
    new.rename(output)
    shutil.rmtree(folder, ignore_errors=True)
