"""A run's tasks are known again by the content of their files."""

from pathlib import Path

import pytest

from mai_thinking.config.loading import validate
from mai_thinking.config.tasks import TaskSection
from mai_thinking.errors import UsageError
from mai_thinking.rl.policy_model import check_same_tasks, source_of, task_contents


def test_a_changed_file_is_refused_and_a_moved_one_is_not(tmp_path: Path) -> None:
    content = {"old": "a", "moved": "a", "other": "b"}
    tasks = {}
    for name, text in content.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(f'{{"question": "{text}", "answer": "1"}}\n')
        tasks[name] = [validate(TaskSection, {"name": "q", "kind": "jsonl", "path": str(path)}, "tasks")]
    before = task_contents(tasks["old"])
    check_same_tasks(before, task_contents(tasks["moved"]), tasks["moved"])
    with pytest.raises(UsageError, match=r"other\.jsonl has changed since this run began"):
        check_same_tasks(before, task_contents(tasks["other"]), tasks["other"])
    assert source_of(tasks["old"][0]).provenance == "human"
