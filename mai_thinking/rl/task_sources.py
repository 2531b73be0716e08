"""What a run's tasks are made of: for records of lineage, and to know them again when it goes on."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from mai_thinking.config.tasks import TaskSection
from mai_thinking.errors import UsageError
from mai_thinking.provenance.lineage import Source, hash_file


def source_of(task: TaskSection) -> Source:
    """A task as a record of lineage names it: by its section, and a file by its content."""
    content = task.model_dump_json() + (hash_file(Path(task.path)).sha256 if task.path else "")
    made = "procedural" if task.path is None else "human"
    return Source(name=task.name, licence="", provenance=made, content=hashlib.sha256(content.encode()).hexdigest())


def task_contents(tasks: Sequence[TaskSection]) -> list[str | None]:
    """The SHA-256 of each task's file, if it has one."""
    return [hash_file(Path(task.path)).sha256 if task.path else None for task in tasks]


def check_same_tasks(
    before: Sequence[str | None] | None, now: Sequence[str | None], tasks: Sequence[TaskSection]
) -> None:
    """UsageError if a task's file is another than when the run began, by `task_contents` then and now."""
    for old, new, task in zip(now if before is None else before, now, tasks, strict=True):
        if old != new:
            raise UsageError(
                f"tasks: {task.path} has changed since this run began; restore it, or start under another name"
            )
