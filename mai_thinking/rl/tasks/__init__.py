"""Problems with answers that a program can check. MAI-Thinking-1 report §3.1. Nothing here imports torch."""

from mai_thinking.data.questions import Split, split_of
from mai_thinking.rl.tasks.base import WRONG, Grade, Problem, Task
from mai_thinking.rl.tasks.sampler import TaskSampler, make_task

__all__ = ["WRONG", "Grade", "Problem", "Split", "Task", "TaskSampler", "make_task", "split_of"]
