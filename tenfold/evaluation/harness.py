"""Tasks of lm-evaluation-harness on a model in memory, which its own command line could not load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    folder: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Return ``{task: {metric: value}}`` by lm-evaluation-harness.

    Args:
        model: a causal language model.
        tasks: names of tasks.
        folder: of further task files (YAML).
        limit: examples per task; all unless given.

    Raises:
        ValueError: lm_eval is not installed, or a task is not known.
    """
    try:
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("these tasks need lm-evaluation-harness: pip install 'tenfold[harness]'") from None
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(
            f"lm-evaluation-harness has no task {unknown[0]!r}; check its name, or give the folder of its file"
        )
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(wrapped, tasks=list(tasks), task_manager=manager, limit=limit)
    return {
        task: {name: value for name, value in scores.items() if isinstance(value, int | float)}
        for task, scores in found["results"].items()
    }
