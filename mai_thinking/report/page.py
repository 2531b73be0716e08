"""A run's folder as one HTML page (`scripts/view.py`): one file, nothing fetched, every word from outside escaped."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from mai_thinking.config.storage import atomic_file
from mai_thinking.errors import UsageError
from mai_thinking.launch.goodput import Account
from mai_thinking.provenance.record import Lineage
from mai_thinking.report.figures import MISSING, Figure, Grid, Panel, number, to_svg
from mai_thinking.report.goodput import COLOURS, summary, timeline
from mai_thinking.report.panels import curves, held_out, load, over_stages
from mai_thinking.report.reading import Climb, Run, read, then_and_now
from mai_thinking.rl.rewards import TERMS
from mai_thinking.rl.trace_report import printable
from mai_thinking.training.ledger import CATEGORIES

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_LOAD = (
    "Violation rate: the busiest expert's load over the mean load, less 1. Experts and entropy: over all MoE layers."
)


def write_page(path: Path, target: Path) -> None:
    """Write the page of the run or climb in the folder `path` to `target`. UsageError if there is neither."""
    subject = read(path)
    page = Page()
    body = page.climb(subject) if isinstance(subject, Climb) else page.run(subject)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as temporary:
            temporary.write_text(page.document(subject.name, body), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{target}: cannot be written ({error.strerror}); name another place with --output") from None


def text(value: Any) -> str:
    """Anything from outside as HTML text: markup escaped, control and direction characters spelled out."""
    return escape(printable(str(value)))


class Page:
    """HTML under construction; the charts' numbers are collected for the script at its end."""

    def __init__(self) -> None:
        self._data: dict[str, Any] = {}

    def document(self, title: str, body: str) -> str:
        """The whole file."""
        style, script = ((files("mai_thinking.report") / name).read_text("utf-8") for name in ("page.css", "page.js"))
        data = json.dumps(self._data, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<meta name="color-scheme" content="light dark">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            f"<title>{text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
            f'<div id="tip" role="status" hidden></div>\n<script type="application/json" id="data">{data}</script>\n'
            f"<script>\n{script}</script>\n</body>\n</html>\n"
        )

    def climb(self, climb: Climb) -> str:
        """A climb: its stages in a table and on one clock, then each as a run that opens."""
        rows = [
            f'<tr><td><a href="#stage-{index}">{text(stage.name)}</a></td><td>{stage.kind}</td>'
            f'<td class="n">{stage.steps_done:,}</td><td class="n">{stage.minutes:,.1f}</td>'
            f"<td>{_chip(stage.status)}</td></tr>"
            for index, stage in enumerate(climb.stages)
        ]
        heads = "<tr><th>stage</th><th>run</th><th class=n>steps</th><th class=n>minutes</th><th>state</th></tr>"
        stages = [
            f'<details class="stage" id="stage-{index}"><summary><h2>{text(stage.name)}</h2> '
            f"<span>{stage.kind}</span> {_chip(stage.status)}</summary>{self._sections(stage, heading='h3')}</details>"
            for index, stage in enumerate(climb.stages)
        ]
        done = sum(stage.status == "finished" for stage in climb.stages)
        tiles = [
            ("stages", f"{done} of {len(climb.stages)} finished"),
            ("minutes", number(sum(stage.minutes for stage in climb.stages))),
            *_best_now(climb.stages),
        ]
        return "\n".join(
            [
                f"<header><h1>{text(climb.name)}</h1><p>a whole climb · {text(climb.path)}</p>{_tiles(tiles)}</header>",
                *[_collapse(stage) for stage in climb.stages],
                _section("Stages", f'<div class="wide"><table>{heads}{"".join(rows)}</table></div>'),
                _section("The climb", self._charts(over_stages(climb)[:1])),
                _section("Where it came from", _lineage(climb.stages[-1].lineage)),
                *stages,
            ]
        )

    def run(self, run: Run) -> str:
        """A single run."""
        total = run.config.get("steps")
        tiles = [
            ("state", run.status),
            ("steps", f"{run.steps_done:,}" + (f" of {total:,}" if isinstance(total, int) else "")),
            *([("tokens", number(run.steps[-1]["tokens"]))] if run.steps and "tokens" in run.steps[-1] else []),
            *_best_now([run]),
            ("wall-clock", _duration(run.account.wall_clock)),
            ("goodput", f"{run.account.report_goodput:.1%}"),
        ]
        head = f"<header><h1>{text(run.name)}</h1><p>{run.kind} · {text(run.path)}</p>{_tiles(tiles)}</header>"
        return head + _collapse(run) + self._sections(run)

    def _sections(self, run: Run, heading: str = "h2") -> str:
        experts = self._charts(load(run))
        parts = [
            _section("Curves", self._charts([*held_out(run), curves(run)]), heading),
            _section("Expert load", experts and f'<p class="note">{text(_LOAD)}</p>{experts}', heading),
            _section("The same problem, from the first evaluation to the last", _stories(run), heading),
            _section("Samples", _samples(run), heading),
            _section("Goodput", self._goodput(run.account), heading),
            _section("Where it came from", _lineage(run.lineage), heading),
        ]
        config = text(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
        return "\n".join(parts) + f"<details><summary>config.yaml</summary><pre>{config}</pre></details>"

    def _charts(self, figures: Iterable[Figure]) -> str:
        cards = [self._chart(panel) for figure in figures for panel in figure.panels]
        if cards and not any(cards):
            return f'<p class="note">{MISSING}</p>'
        return f'<div class="charts">{"".join(cards)}</div>' if cards else ""

    def _chart(self, panel: Panel | Grid) -> str:
        drawn = to_svg(panel)
        if drawn is None:
            return ""
        name = f"k{len(self._data)}"
        svg, self._data[name] = drawn
        keys = "".join(
            f'<span class="key" style="--own: {colour}">{text(entry)}</span>' for entry, colour in panel.legend
        )
        last = f"<b>{text(panel.last)}</b>" if panel.last else ""
        return (
            f'<figure data-chart="{name}"><figcaption>{text(panel.title)}{last}</figcaption>'
            f"{f'<p class=keys>{keys}</p>' if keys else ''}{svg}</figure>"
        )

    def _goodput(self, account: Account) -> str:
        if not account.segments:
            return ""
        keys = "".join(
            f'<tr><td><span class="key" style="--own: {COLOURS[category]}">{category}</span></td>'
            f'<td class="n">{_duration(account.seconds[category])}</td>'
            f'<td class="n">{account.seconds[category] / max(account.wall_clock, 1e-9):.1%}</td></tr>'
            for category in CATEGORIES
            if account.seconds[category] > 0
        )
        facts = summary(account).replace("\n", "; ")
        return (
            f'<div class="strip">{self._chart(timeline(account))}</div>'
            f'<div class="wide"><table class="small">{keys}</table></div><p class="note">{text(facts)}</p>'
            '<p class="note">Slow steps are spread over the productive ones; slivers are left out of the picture.</p>'
        )


def _section(title: str, body: str, heading: str = "h2") -> str:
    return f"<section><{heading}>{title}</{heading}>{body}</section>" if body else ""


def _chip(status: str) -> str:
    mark = {"finished": "good", "collapsed": "bad"}.get(status, "plain")
    return f'<span class="chip {mark}">{status}</span>'


def _tiles(tiles: Sequence[tuple[str, str]]) -> str:
    shown = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in tiles)
    return f'<dl class="tiles">{shown}</dl>'


def _best_now(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The last held-out figure of the last run that has one."""
    for run in reversed(runs):
        for name, shown in (("pass@1", "held-out pass@1"), ("bits_per_byte", "held-out bits per byte")):
            told = [record[name] for record in run.evaluations if name in record]
            if told:
                return [(shown, f"{told[-1]:.3f}" if len(told) < 2 else f"{told[0]:.3f} → {told[-1]:.3f}")]
    return []


def _collapse(run: Run) -> str:
    if run.collapse is None:
        return ""
    return f'<p class="alarm"><b>{text(run.name)}</b> {text(run.collapse)}</p>'


def _stories(run: Run) -> str:
    cards = []
    for story in then_and_now(run.samples):
        first = story[0]
        told = "".join(
            f'<p class="head"><b>after {sample["step"]:,} steps</b>{_mark(sample["passed"])}</p>'
            f"<pre>{text(sample['response'])}</pre>"
            for sample in story
        )
        answer = f'<p class="answer">{text(first["task"])}; the answer is {text(first["answer"])}</p>'
        cards.append(f'<article><pre class="prompt">{text(first["question"])}</pre>{answer}{told}</article>')
    return f'<div class="samples">{"".join(cards)}</div>' if cards else ""


def _samples(run: Run) -> str:
    weights = run.config.get("reward", {})
    parts = []
    for title, traces in run.rollouts().items():
        cards = "".join(_sample(trace) for trace in traces)
        parts.append(f'<h4>{title}</h4><div class="samples">{cards}</div>')
    if not parts:
        return ""
    sums = [f"{'−' if term.sign < 0 else '+'} {weights.get(f'w_{name}', 0):g} · {name}" for name, term in TERMS.items()]
    rule = f"reward = task {' '.join(sums)}; no length term in the last length stage, unless the config asks for it"
    return f'<p class="note">{text(rule)}</p>' + "".join(parts)


def _sample(trace: Mapping[str, Any]) -> str:
    answer = "no answer" if trace["answer"] is None else f"answer {trace['answer']!r}"
    facts = [
        f"step {trace['step']}",
        f"{len(trace['response_ids'])} tokens{'' if trace['finished'] else ', cut off'}",
        f"pass rate {trace['pass_rate']:.2f}",
        f"group {trace['verdict'].replace('_', ' ')}",
    ]
    bars = "".join(
        _bar(name, trace[f"reward_{name}" if name != "reward" else name]) for name in ("task", *TERMS, "reward")
    )
    return (
        f'<article><p class="head"><b>{text(trace["task"])}</b>{_mark(trace["passed"])}</p>'
        f'<pre><span class="prompt">{text(trace["prompt"])}</span>{text(trace["response"])}</pre>'
        f'<p class="answer">{text(answer)}, reference {text(repr(trace["reference"]))}</p>'
        f'<div class="parts">{bars}</div><p class="note">{text(" · ".join(facts))}</p></article>'
    )


def _mark(right: bool) -> str:
    return f'<span class="chip {"good" if right else "bad"}">{"right" if right else "wrong"}</span>'


def _bar(name: str, value: float) -> str:
    long = min(100.0, abs(value) / 1.5 * 100)
    kind = "total" if name == "reward" else "part"
    way = "minus" if value < 0 or (name in TERMS and TERMS[name].sign < 0) else "plus"
    return (
        f'<span>{name}</span><i class="{kind}"><u class="{way}" style="width:{long:.0f}%"></u></i>'
        f'<span class="n">{value:.3f}</span>'
    )


def _lineage(lineage: Lineage | str) -> str:
    if isinstance(lineage, str):
        return f'<p class="note">{text(lineage)}</p>'
    return (
        f'<ul class="tree">{_ancestors(lineage, lineage.id, set())}</ul><p class="note">As recorded; '
        "<code>python scripts/lineage.py</code> checks every file against its hash.</p>"
    )


def _ancestors(lineage: Lineage, id: str, drawn: set[str]) -> str:
    record, place = lineage.records[id], lineage.places.get(id)
    facts = [] if place is None else [str(place)]
    facts += [] if record.steps is None else [f"{record.steps:,} steps"]
    facts += [] if record.seed is None else [f"seed {record.seed}"]
    if record.architecture is not None and record.kind == "random-weights":
        sizes = record.architecture
        facts.append(f"{sizes.get('num_hidden_layers')} layers of {sizes.get('hidden_size')}")
    facts += [f"code {(code.commit or code.sha256)[:9]}" for code in record.code]
    label = f"<b>{record.kind}</b> <code>{text(id[:12])}</code> {text(', '.join(facts))}"
    marks = "".join(f'<li class="override">override: {text(mark)}</li>' for mark in record.overrides)
    if id in drawn:
        return f"<li>{label} <i>as above</i></li>"
    drawn.add(id)
    data = ""
    if record.data is not None and record.data.sources:
        told = "".join(
            f"<li>{text(source.name)} <i>{text(', '.join(filter(None, (source.licence, source.provenance))))}</i></li>"
            for source in record.data.sources
        )
        data = f"<li><details><summary>data ({len(record.data.sources)})</summary><ul>{told}</ul></details></li>"
    parents = "".join(_ancestors(lineage, parent, drawn) for parent in record.parents)
    return f"<li>{label}<ul>{marks}{data}{parents}</ul></li>"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {seconds % 60:.0f} s"
    return f"{int(seconds // 3600)} h {seconds % 3600 / 60:.0f} min"
