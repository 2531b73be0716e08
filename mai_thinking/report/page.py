"""A run's folder as one HTML page (`scripts/view.py`): one file without a script that fetches nothing."""

from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from mai_thinking.config.storage import atomic_file
from mai_thinking.config.table import Cell, Table
from mai_thinking.errors import UsageError, printable
from mai_thinking.report.document import Document, fenced
from mai_thinking.report.goodput import figure, summary, table_of
from mai_thinking.report.lineage import as_recorded
from mai_thinking.report.reading import Climb, Run, read
from mai_thinking.report.summary import add_run, climb_page
from mai_thinking.rl.rewards import TERMS
from mai_thinking.rl.trace_report import parts_of

_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def write_page(path: Path, target: Path) -> None:
    """Write the page of the run or climb in the folder `path` to `target`. UsageError if there is neither."""
    subject = read(path)
    body = of_climb(subject) if isinstance(subject, Climb) else of_run(subject).html()
    style = (files("mai_thinking.report") / "page.css").read_text("utf-8")
    page = _FRAME.format(title=escape(printable(subject.name)), style=style, body=body)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{target}: cannot be written ({error.strerror}); name another place with --output") from None


def of_climb(climb: Climb) -> str:
    """A climb, then each of its stages as a run that opens."""
    stages = [
        f"<details><summary>{escape(printable(stage.name))}: {stage.status}</summary>\n{of_run(stage).html()}</details>"
        for stage in climb.stages
    ]
    return climb_page(climb, as_recorded(climb.stages[-1].lineage)).html() + "\n".join(stages)


def of_run(run: Run) -> Document:
    """A run: its summary, where its time went, rollouts with their rewards by part, lineage, config."""
    page = Document(run.name)
    total = run.config.get("steps")
    steps = f"{run.steps_done:,}" + (f" of {total:,}" if isinstance(total, int) else "")
    page.add(f"{run.kind.capitalize()}, {run.status}, {steps} steps, in `{run.path}`.")
    add_run(page, run)
    if run.account.segments:
        page.add(heading="Goodput")
        page.add_figures([figure(run.account)])
        page.add(table_of(run.account).markdown(), *summary(run.account).split("\n"))
    if rollouts := run.rollouts():
        page.add(_rule(run.config.get("reward", {})), heading="Rollouts")
        for title, traces in rollouts.items():
            page.add(f"### {title}", *map(_rollout, traces))
    page.add(as_recorded(run.lineage), heading="Where it came from")
    page.add(fenced(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)), heading="config.yaml")
    return page


def _rule(weights: Mapping[str, float]) -> str:
    sums = [f"{'−' if sign < 0 else '+'} {weights.get(f'w_{name}', 0):g} · {name}" for name, (sign, _) in TERMS.items()]
    return f"reward = task {' '.join(sums)}; no length term in the last length stage, unless the config asks for it"


def _rollout(trace: Mapping[str, Any]) -> str:
    """Prompt, response, and what became of it."""
    facts: dict[str, Cell] = {
        "step": trace["step"],
        "tokens": f"{len(trace['response_ids'])}{'' if trace['finished'] else ', cut off'}",
        "answer": printable(str(trace["answer"])),
        "reference": printable(str(trace["reference"])),
        "": "right" if trace["passed"] else "wrong",
        "pass rate": trace["pass_rate"],
        "group": trace["verdict"].replace("_", " "),
        "reward": trace["reward"],
    }
    facts |= {f"R {name}": trace[f"reward_{name}"] for name in ("task", *TERMS)}
    words = [fenced(printable(trace["prompt"]))]
    for place, part in enumerate(parts_of(trace)):
        words += ["what the calls gave:"] * (place % 2) + [fenced(printable(part))]
    return "\n\n".join([*words, Table(list(facts), [list(facts.values())]).markdown()])
