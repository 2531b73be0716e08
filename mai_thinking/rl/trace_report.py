"""Rollouts for people to read: `scripts/traces.py`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.text import Text

from mai_thinking.config.names import nearest_name
from mai_thinking.errors import UsageError, printable
from mai_thinking.rl.rewards import TERMS
from mai_thinking.rl.traces import FOLDER, SCHEMA, Trace, TraceStore

Ranking = Literal["best", "worst", "longest", "newest"]


def report_traces(
    run: Path, ranking: Ranking, count: int, console: Console, *, step: int | None, task: str | None
) -> None:
    """Print the `count` first rollouts of the run in the folder `run` by `ranking`. UsageError if there are none."""
    if not run.is_dir():
        raise UsageError(f"{run}: there is no such run; give a run's output_dir, such as runs/nano-grpo")
    if count < 1:
        raise UsageError(f"{count} traces asked for; ask for at least 1")
    for trace in choose(TraceStore(run / FOLDER), ranking, count, step=step, task=task):
        show(trace, console)


def choose(
    store: TraceStore, ranking: Ranking, count: int, *, step: int | None = None, task: str | None = None
) -> list[Trace]:
    """The `count` first traces by reward, by response tokens or by age, the older first among equals; the newest come
    in the order of their generation. UsageError if there is no such trace, naming what there is."""
    where = [(name, "==", value) for name, value in (("step", step), ("task", task)) if value is not None]
    top = SCHEMA.empty_table()
    for part in store.parts(where):
        # Of all that is read, no more than `count` rows are kept.
        table = pa.concat_tables([top, part])
        if ranking == "newest":
            top = table.slice(max(0, len(table) - count))
            continue
        key = pc.list_value_length(table["response_ids"]) if ranking == "longest" else table["reward"]
        direction = "ascending" if ranking == "worst" else "descending"
        indices = pc.sort_indices(pa.table({"key": key}), sort_keys=[("key", direction)])  # a stable sort
        top = table.take(indices.slice(0, count))
    if not len(top):
        raise UsageError(_nothing(store, step, task))
    return list(top.to_pylist())


def show(trace: Trace, console: Console) -> None:
    """One rollout: what it is, its reward by part, prompt, response, answer. Control characters are spelled out, so
    that nothing a model wrote can steer the terminal."""
    console.rule(Text(f"step {trace['step']} · {trace['task']} · reward {trace['reward']:.3f}"), align="left")
    how = "finished" if trace["finished"] else "cut off"
    earned = {name: trace[f"reward_{name}"] for name in ("task", *TERMS)}  # None: written before there was such a term
    parts = " · ".join(f"{name} {value:.3f}" for name, value in earned.items() if value is not None)
    answer = "none" if trace["answer"] is None else repr(trace["answer"])
    logprobs = trace["logprobs"]
    surprise = f"{-sum(logprobs) / len(logprobs):.3f} nats per token" if logprobs else "no tokens"
    lines = [
        f"{parts} · pass rate {trace['pass_rate']:.2f} · group {trace['verdict']}",
        f"{len(trace['response_ids'])} tokens, {how} · {surprise}",
        f"problem {trace['problem_id']} · group {trace['group_id']} · request {trace['request_id']}",
        f"checkpoint {trace['checkpoint']} · engine version {trace['engine_version']} · lineage {trace['lineage']}",
    ]
    for line in lines:
        console.print(Text(printable(line), style="dim"))
    shown = [(printable(part), "yellow" if place % 2 else "") for place, part in enumerate(parts_of(trace))]
    console.print(Text.assemble((printable(trace["prompt"]), "cyan"), *shown))
    right = "green" if trace["passed"] else "red"
    console.print(Text(printable(f"answer {answer}, reference {trace['reference']!r}"), style=right), end="\n\n")


def parts_of(trace: Mapping[str, Any]) -> list[str]:
    """A response, in turn what the policy wrote and what its calls gave."""
    return list(json.loads(trace["parts"])) if trace.get("parts") else [trace["response"]]


def _nothing(store: TraceStore, step: int | None, task: str | None) -> str:
    keys = store.read(columns=["step", "task"])
    if not keys.num_rows:
        return f"{store.folder}: holds no traces; scripts/grpo.py writes them while it runs"
    known = keys["task"].unique().to_pylist()
    if task is not None and task not in known:
        return f"{store.folder}: has no traces of task {task!r}; {nearest_name(task, known)}"
    of_task = "" if task is None else f" of task {task!r}"
    steps = sorted({row["step"] for row in keys.to_pylist() if task in (None, row["task"])})
    near = min(steps, key=lambda at: abs(at - (step or 0)))
    return f"{store.folder}: has no traces{of_task} at step {step}, but from {steps[0]} to {steps[-1]}; take {near}"
