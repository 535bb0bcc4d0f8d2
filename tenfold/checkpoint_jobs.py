"""Compressing a checkpoint from one folder into another, at once or in stages; an interrupted run goes on.

While the run lasts, what it has finished lies in ``OUTPUT.partial``; only at its end that becomes ``OUTPUT``. The same command
goes on where the last one was stopped: behind the last finished block. Of several processes (``torchrun``), which need one
file system, the first one writes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tenfold import api
from tenfold.compress.activations import blocks_of
from tenfold.compress.calibration import Calibration
from tenfold.compress.progress import Progress, untold
from tenfold.compress.resume_state import ResumeState, write_tensors
from tenfold.compress.weight_source import StreamedWeights
from tenfold.models.atomic_io import file_stamps, is_model_file, open_safetensors, read_json, write_json
from tenfold.models.auto import read_config
from tenfold.models.checkpoint_format import check_plain
from tenfold.models.distillation_config import Heal
from tenfold.models.distributed import barrier, is_main_process
from tenfold.models.gguf import is_gguf
from tenfold.models.lazy_checkpoint import INDEX, LazyCheckpoint, open_lazy, weight_files
from tenfold.models.model_card import save_card, save_config
from tenfold.models.recipe import Recipe, load_recipe
from tenfold.models.sites import find_sites
from tenfold.train.checkpoints import last_checkpoint
from tenfold.train.run_manifest import differences

TOGETHER = 2**30  # bytes: a compressed model of at most this size is written as one file, others block by block


def compress_checkpoint(
    name: str | Path,
    output: str | Path,
    recipe: Recipe | str | dict,
    files: Sequence[str | Path],
    samples: int | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    command: str = "",
    max_shard_size: str = "5GB",
    progress: Progress = untold,
    announce: Callable[[list[dict]], None] = lambda choices: None,
) -> dict[str, Any]:
    """Compress the checkpoint ``name`` into the folder ``output``, guided by the text in ``files``; returns the report.

    Args:
        name: a folder, or a name on a hub.
        samples: how many windows, or documents, are read; what the recipe says unless given.
        device, dtype: as for :func:`tenfold.api.load`.
        max_shard_size: where the result is small enough to be put together again.
        overwrite: write over ``output``, and over what another run has left in ``output.partial``.
        command: the exact command, for the model card.
        progress, announce: as for :func:`tenfold.compress`.

    Raises:
        FileExistsError: ``output`` is there, or ``output.partial`` belongs to another run.
        OSError: there is no room on the disk; what is finished stays, and the same call goes on.
        ValueError: what :func:`tenfold.compress` raises.
    """
    output = api.check_output(Path(output), overwrite)
    check_plain(read_config(name), name)
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    kind = api.checked_dtype(dtype)
    whole = bool(loaded.first or loaded.squeeze) or any(rule.share for rule in loaded.replace)  # not block by block
    lazy = None if whole else open_lazy(name, api.checked_device(device), None if isinstance(kind, str) else kind)
    if lazy is None:
        return _at_once(
            name, output, loaded, files, samples, device, dtype, command, max_shard_size, progress, announce
        )
    tokenizer = api.load_tokenizer(name)
    text = api.read_calibration(lazy.model, tokenizer, files, loaded, samples)
    folder = _partial(output, _fingerprint(lazy, loaded, text), overwrite)
    blocks = list(blocks_of(find_sites(lazy.model)))
    journal = ResumeState(folder, len(blocks))
    lazy.load_outside(blocks)
    weights = StreamedWeights(lazy, blocks, lambda number, path: journal.keep(lazy.model, number, path, lazy.dtype))
    model, report = api.compress(lazy.model, loaded, "weights", progress, text, announce, weights, journal)
    barrier()  # until no one has anything in the folder any more
    if is_main_process():
        made = _assemble(journal, _outside(model, blocks), max_shard_size)
        model.config.dtype = lazy.dtype
        save_config(model, made)
        save_card(made, tokenizer, report, command, output.name)
        _move(made, folder, output)
    barrier()
    return report


def _outside(model, blocks: list[str]) -> dict[str, Tensor]:
    """What is to be saved of what lies in none of the ``blocks``."""
    inside, ties = tuple(f"{path}." for path in blocks), model.all_tied_weights_keys
    return {
        key: value.contiguous().clone()
        for key, value in model.state_dict().items()
        if not key.startswith(inside) and key not in ties
    }


def _at_once(
    name, output, recipe, files, samples, device, dtype, command, max_shard_size, progress, announce
) -> dict[str, Any]:
    """The whole model in memory: its checkpoint is not simply its tensors by name."""
    model, tokenizer = api.load(name, device, dtype)
    text = api.read_calibration(model, tokenizer, files, recipe, samples)
    model, report = api.compress(model, recipe, "weights", progress, text, announce)
    if is_main_process():
        api.save(model, output, tokenizer, report, command, max_shard_size)
    barrier()
    return report


def compress_in_stages(
    name: str | Path,
    output: str | Path,
    recipe: Recipe | str | dict,
    files: Sequence[str | Path] = (),
    healing: Sequence[str | Path] = (),
    samples: int | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    command: str = "",
    max_shard_size: str = "5GB",
    progress: Progress = untold,
    announce: Callable[[list[dict]], None] = lambda choices: None,
    advance: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Gradual compression: the stages of ``recipe`` one after another, each healed by distillation where it says so.

    Every finished stage is a whole checkpoint in ``output.partial``; the same call goes on behind the last one.

    Args:
        files: calibration text, for the stages that go by activations.
        healing: text for the stages that heal.
        advance: is told ``(step, steps)`` of a healing.
        other arguments: as for :func:`compress_checkpoint`.

    Returns:
        The report of the last stage with the parameters of the model that came in, and ``stages``, the reports of all.

    Raises:
        ValueError: a stage needs a text that is not given, and what :func:`tenfold.compress` raises.
    """
    output = api.check_output(Path(output), overwrite)
    check_plain(read_config(name), name)
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    for number, stage in enumerate(loaded.stages):
        if stage.heal and not healing:
            raise ValueError(f"stage {number} of recipe {loaded.name} heals: give the text for it (--heal FILE)")
        if stage.calibrate and not files:
            raise ValueError(f"stage {number} of recipe {loaded.name} goes by activations: give --calibrate FILE")
    stated = [[str(file), Path(file).stat().st_size] for file in (*files, *healing) if Path(file).is_file()]
    same = {"tenfold": version("tenfold"), "model": str(name), "recipe": loaded.model_dump(mode="json"), "text": stated}
    same |= {"weights": _stamps(name)}
    folder = _partial(output, same | {"samples": samples, "dtype": dtype}, overwrite)
    teacher, tokenizer = api.load(name, device, "float32")
    usual = api.load(name, "cpu", dtype)[0].dtype
    before, reports, report = api.price(teacher), [], {}
    for number, step in enumerate(loaded.stage_recipes()):
        done = folder / f"stage-{number}"
        if not done.is_dir():
            model = api.load(folder / f"stage-{number - 1}" if number else name, device, "float32")[0]
            text = api.read_calibration(model, tokenizer, files, step, samples) if step.calibrate else None
            model, report = api.compress(model, step, "weights", progress, text, announce)
            if step.heal:
                kept = folder / f"healing-{number}"
                given = {"advance": advance, "checkpoints": kept}
                report["heal"] = api.heal(model, teacher, tokenizer, healing, step.heal, **given)
            if is_main_process():
                shutil.rmtree(folder / f"healing-{number}", ignore_errors=True)
                new = folder / f"stage-{number}.new"
                shutil.rmtree(new, ignore_errors=True)
                api.save(model.to(usual), new, tokenizer, report, command, max_shard_size)
                new.rename(done)
        barrier()
        reports.append(json.loads((done / "tenfold.json").read_text()))
    report = reports[-1] | {
        "parameters_dense": before["parameters"],
        "flops_per_token_dense": before["flops_per_token"],
    }
    report |= {"recipe": loaded.model_dump(exclude_defaults=True), "stages": reports}
    barrier()  # until all have read what is moved now
    if is_main_process():
        save_card(done, tokenizer, report, command, output.name)
        _move(done, folder, output)
    barrier()
    return report


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
    **given: Any,
) -> dict[str, Any]:
    """Heal the checkpoint ``name`` and write it to the folder ``output``; returns the report of :func:`tenfold.heal`.

    Checkpoints are in ``output.partial``, and the same call goes on behind the last one.

    Args:
        given: what :func:`tenfold.heal` takes beside these.
    """
    output = api.check_output(Path(output), overwrite)
    check_plain(read_config(name), name)
    model, tokenizer = api.load(name, device, "float32")
    usual = api.load(name, "cpu", dtype)[0].dtype
    stated = [[str(file), Path(file).stat().st_size] for file in files if Path(file).is_file()]
    same = {"model": str(name), "teacher": str(teacher), "heal": settings.model_dump(mode="json"), "text": stated}
    same |= {key: given.get(key) for key in ("window", "seed", "top_k")} | {"store": str(given.get("store"))}
    same |= {"weights": _stamps(name), "taught by": _stamps(teacher)}
    folder = _partial(output, same, overwrite, "checkpoints/checkpoint-*")
    try:
        report = api.heal(model, teacher, tokenizer, files, settings, checkpoints=folder / "checkpoints", **given)
    except BaseException:
        if is_main_process() and last_checkpoint(folder / "checkpoints") is None:  # refused, or nothing to go on from
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if is_main_process():
        known = Path(name) / "tenfold.json"
        before = read_json(known) if known.is_file() else {}
        new = folder / output.name
        told = f"{before.get('command', '')}\n{command}".strip()
        api.save(model.to(usual), new, tokenizer, before | {"heal": report}, told)
        for left in ("log.jsonl", "runs"):  # what was told on the way, for people and for TensorBoard
            if (folder / "checkpoints" / left).exists():
                (folder / "checkpoints" / left).rename(new / left)
        _move(new, folder, output)
    barrier()
    return report


def _fingerprint(lazy: LazyCheckpoint, recipe: Recipe, text: Calibration) -> dict[str, Any]:
    """What makes two runs the same."""
    digest = hashlib.sha256()
    for batch in text.batches:
        for value in batch.values():
            digest.update(value.numpy().tobytes())
    stored = sorted({file for file, _ in lazy.files.values()})
    return {
        "tenfold": version("tenfold"),
        "weights": file_stamps(stored),
        "recipe": recipe.model_dump(mode="json"),
        "text": digest.hexdigest(),
        "dtype": str(lazy.dtype),
    }


def _stamps(name: str | Path | None) -> list[list[Any]]:
    """Of the weights in a folder or a GGUF file, which may become others under the same name."""
    if name is not None and is_gguf(name):
        return file_stamps([Path(name)])
    return file_stamps(weight_files(name)) if name is not None and Path(name).is_dir() else []


def _partial(output: Path, fingerprint: dict[str, Any], overwrite: bool, begun: str = "*") -> Path:
    """The folder of an unfinished run: this very one's, or a new one, which the first process makes.

    ``begun``: what is there once something is finished; of a run that was refused before, nothing is kept.
    """
    folder = output.with_name(f"{output.name}.partial")
    known = folder / "unfinished" / "run.json"
    if is_main_process():
        before = read_json(known) if known.is_file() else {}
        if folder.exists() and before != json.loads(json.dumps(fingerprint)):
            foreign = not known.is_file() and any(folder.iterdir())
            if foreign:
                raise FileExistsError(f"{folder} is there and is no unfinished work; move it, or choose another output")
            if not overwrite and any(folder.glob(begun)):
                other = ", ".join(sorted(differences(before, fingerprint))) if before else "nothing is noted of it"
                raise FileExistsError(
                    f"{folder} holds what another run (other {other}) has finished; repeat that one's command, delete the "
                    "folder, or add --overwrite"
                )
            shutil.rmtree(folder)
        known.parent.mkdir(parents=True, exist_ok=True)
        write_json(known, fingerprint)
    barrier()
    return folder


def _assemble(journal: ResumeState, outer: dict[str, Tensor], max_shard_size: str) -> Path:
    """The shards of the blocks and what is outside of them become an ordinary checkpoint; the folder that it is in."""
    assert journal.notes is not None
    shards = [journal.shard(number) for number in range(journal.blocks + 1)]
    write_tensors(shards[0], outer)
    size = sum(shard.stat().st_size for shard in shards)
    if size <= TOGETHER:
        whole = journal.notes / "whole"  # beside the shards: until all is written none of them may go
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()
        merged = outer | {key: value for shard in shards[1:] for key, value in load_file(shard).items()}
        try:
            save_torch_state_dict(merged, whole, max_shard_size=max_shard_size)
        except SafetensorError as reason:
            raise OSError(
                f"{whole} can't be written ({reason}); make room, and the same command goes on from there"
            ) from None
        return whole
    where = {}
    for shard in shards:
        with open_safetensors(shard) as stored:
            where |= dict.fromkeys(stored.keys(), shard.name)
    write_json(shards[0].with_name(INDEX), {"metadata": {"total_size": size}, "weight_map": where})
    return shards[0].parent


def _move(made: Path, folder: Path, output: Path) -> None:
    """The finished checkpoint takes its name, and the rest of ``folder`` goes; what else is in ``output`` stays there."""
    if made == folder:
        shutil.rmtree(folder / "unfinished")
    if output.exists():
        for file in output.iterdir():
            if not is_model_file(file) and not (made / file.name).exists():
                file.rename(made / file.name)
        shutil.rmtree(output)
    made.rename(output)
    shutil.rmtree(folder, ignore_errors=True)
