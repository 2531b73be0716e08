"""The page of a run: well-formed, of one piece, true to the folder, safe whatever a model wrote; and in a browser."""

import base64
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from mai_thinking.errors import UsageError
from mai_thinking.report import write_page, write_summary
from mai_thinking.report.figures import MOST_POINTS
from mai_thinking.report.goodput import report as report_goodput
from mai_thinking.report.goodput import timeline
from mai_thinking.report.panels import curves, figures_of, load
from mai_thinking.report.reading import Run
from mai_thinking.report.timeline import timeline as who_did_what
from mai_thinking.rl.traces import FOLDER, Trace, TraceStore
from mai_thinking.training.metrics import read_records

HOSTILE = (
    '</pre></script><script>document.title="taken"</script><img src=x onerror="document.title=1">\u202e&amp;\x1b[2J'
)
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Parsed(HTMLParser):
    """The elements of a page, and its text; AssertionError for a tag that is not closed in its order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.pieces: set[str] = set()
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        self.pieces.add(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def rl_run(folder: Path, *, steps: int = 300, words: str = "Answer: 7") -> Path:
    """A climb's folder as far as a page reads it, with `words` wherever a name or a model's words stand."""
    folder.mkdir(parents=True)
    config = {
        "name": f"run {words}",
        "steps": steps,
        "tasks": [{"name": words}],
        "objective": {"target_entropy": 0.3},
        "reward": {"w_language": 0.5, "w_length": 0.25},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    records: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step % 100 == 0:
            share = 0.1 + step / 1000
            of_task = {f"pass@1/{words}": share, f"pass@1_low/{words}": share - 0.05, f"pass@1_high/{words}": 0.9}
            records.append({"kind": "evaluation", "step": step, "tokens": step, "pass@1": share, **of_task})
        if step:
            numbers = {"loss": 1 / step, "entropy": 0.4, "grad_norm": 0.5, "violation": [2.0, step / 100, 0.5]}
            records.append({"step": step, "tokens": 10 * step, **numbers, "dead_experts": 3, "router_entropy": 2.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    events = [{"event": "attempt", "time": 1000.0, "world": 1}]
    events += [
        {"event": "step", "time": 1003.0 + 2 * step, "step": step, "seconds": 2.0, "data_wait": 0.0}
        for step in range(1, steps + 1)
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    TraceStore(folder / FOLDER).append(0, [trace(number, words) for number in range(6)])
    return folder


def trace(number: int, words: str) -> Trace:
    right = number % 2
    return Trace(
        step=4, engine_version=2, request_id=number, group_id=number, task=words, problem_id=f"p{number}",
        prompt=f"Question {number}: {words}", prompt_ids=[1, 2], response=f"response {number} {words}",
        response_ids=[3, 4, 5], logprobs=[-0.1, -0.2, -0.3], finished=bool(right), answer=words if right else None,
        reference="7", reward=right + 0.5 * 0.875, reward_task=float(right), reward_language=0.875, reward_length=0.0,
        reward_calls=0.0, reward_waste=0.0,
        passed=bool(right),
        pass_rate=0.5, verdict="kept", checkpoint="x/step-00000004", lineage="runs/base/final",
    )  # fmt: skip


def page_of(folder: Path, target: Path) -> str:
    write_page(folder, target)
    return target.read_text(encoding="utf-8")


def assert_of_one_piece(page: str) -> Parsed:
    """Nothing is fetched, by any attribute or style, and nothing is run."""
    parsed = Parsed(page)
    assert not {"link", "script", "iframe", "object", "base", "a"} & {tag for tag, _ in parsed.elements}
    for tag, attributes in parsed.elements:
        assert not {"srcset", "action", "data", "href"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert tag == "img" or "src" not in attributes
    for image in parsed.all("img"):
        content = (image["src"] or "").removeprefix("data:image/png;base64,")
        assert base64.b64decode(content, validate=True).startswith(b"\x89PNG")
    assert "url(" not in page
    assert "@import" not in page
    assert "://" not in page.replace(HOSTILE, "")
    policy = next(meta["content"] for meta in parsed.all("meta") if meta.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return parsed


def test_a_pre_training_run(tiny_run: Path, tmp_path: Path) -> None:
    page = page_of(tiny_run, tmp_path / "page.html")
    parsed = assert_of_one_piece(page)
    for words in ("Goodput", "Where it came from", "finished", "random-weights", "as recorded; python scripts/lineage"):
        assert words.lower() in parsed.text.lower()
    assert {"bits_per_byte", "loss", "expert_load", "goodput"} <= {image["alt"] for image in parsed.all("img")}
    last = read_records(tiny_run / "metrics.jsonl")
    bits = [record["bits_per_byte"] for record in last if "bits_per_byte" in record]
    assert f"{bits[-1]:.4f}" in parsed.text
    assert (tiny_run / "config.yaml").read_text().splitlines()[0] in parsed.text
    assert "Rollouts" not in parsed.text  # it has no traces


def test_an_rl_run(tmp_path: Path) -> None:
    parsed = assert_of_one_piece(page_of(rl_run(tmp_path / "run"), tmp_path / "page.html"))
    assert "under way, or killed, 300 of 300 steps" in parsed.text
    assert {"0.100 (0.050–0.900)", "0.400 (0.350–0.900)"} <= parsed.pieces
    for number in range(6):
        assert f"response {number}" in parsed.text
    assert {"R task", "R language", "R length", "reward"} <= parsed.pieces
    assert {"1.438", "0.438", "0.875"} <= parsed.pieces
    assert "reward = task + 0.5 · language − 0.25 · length" in parsed.text


def test_a_long_curve_is_drawn_by_its_means_and_ranges(tmp_path: Path) -> None:
    run = Run(rl_run(tmp_path / "run"))
    loss = curves(run).panels[0].series[0]
    assert len(loss.x) == len(loss.y) == len(loss.low) == len(loss.high) == MOST_POINTS
    assert (loss.x[-1], loss.high[0]) == (300, 1.0)
    assert all(low <= mean <= high for low, mean, high in zip(loss.low, loss.y, loss.high, strict=True))
    layers = load(run)[0].panels[0].series
    assert [layer.name for layer in layers] == ["MoE 1", "MoE 2", "MoE 3"]
    assert set(layers[0].y) == {2.0}
    assert list(layers[1].y) == sorted(layers[1].y)


def test_the_timeline_covers_the_run(tmp_path: Path) -> None:
    lanes = timeline(Run(rl_run(tmp_path / "run")).account).lanes
    assert lanes[""] == {"productive steps 99.5%": [(3.0, 600.0)], "start-up 0.5%": [(0.0, 3.0)]}


def test_who_did_what_in_the_last_updates(tmp_path: Path) -> None:
    """Steps end at 1005, 1007, …; each third fills the buffer, in its first half second."""
    folder = rl_run(tmp_path / "run", steps=30)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"rollouts": {"workers": 3}}))
    records = read_records(folder / "metrics.jsonl")
    for record in records:
        filling = {"groups_stale": 0, "idle/workers": 0.25} if record["step"] % 3 == 1 else {}
        record |= {"rollout_seconds": 0.5 if filling else 0.0, "idle/learner": 0.1} | filling
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    begin = 1003 + 2 * 12  # of step 13, the first of the last six updates
    batches = [(0, 2, -50, 20), (0, 3, -5, 7), (2, 4, 3, 4), (-1, 4, 30, 100)]  # worker, version, begin, seconds
    lines = [{"version": 0, "begun": {"number": 0}}, {"version": 0, "arrived": 9, "weights": [[0, 0]]}]  # one without
    lines += [
        {"version": 5, "arrived": 0, "weights": [[0, version], [3, version + 1]], "worker": worker,
         "began": begin + start, "seconds": seconds, "graded": [[1.5, 0.25], [seconds - 0.5, 0.5]]}
        for worker, version, start, seconds in batches
    ]  # fmt: skip
    (folder / "rollouts").mkdir()
    (folder / "rollouts" / "schedule-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (figure,) = who_did_what(Run(folder))
    lanes = figure.panels[0].lanes
    assert lanes["learner"]["wait for rollouts"] == [(2.0 * step, 0.5 if step % 3 == 0 else 0.0) for step in range(18)]
    assert lanes["learner"]["learn"][:2] == [(0.5, 1.5), (2.0, 2.0)]
    assert {lane: dict(named) for lane, named in lanes.items() if lane != "learner"} == {
        "worker 0": {"weights 3": [(0.0, 2.0)]},
        "worker 1": {},
        "worker 2": {"weights 4": [(3.0, 4.0)]},
        "learner, in waiting": {"weights 4": [(30.0, 6.0)]},
        "graders": {"grade": [(1.5, 0.5), (4.5, 0.25), (6.5, 0.5), (31.5, 0.25)]},
    }
    parsed = assert_of_one_piece(page_of(folder, tmp_path / "page.html"))
    assert "timeline" in {image["alt"] for image in parsed.all("img")}
    assert figure.caption in parsed.text
    titles = {panel.title for panel in curves(Run(folder)).panels}
    assert {"Share of a step that the learner waits", "Share of the time that workers are idle"} <= titles


def test_words_of_a_model_stay_words(tmp_path: Path) -> None:
    page = page_of(rl_run(tmp_path / "run", words=HOSTILE), tmp_path / "page.html")
    parsed = assert_of_one_piece(page)
    assert "\u202e" not in page
    assert "\x1b" not in page
    assert '<img src=x onerror="document.title=1">\\u202e&amp;\\x1b[2J' in parsed.text


def test_a_collapse_is_told_first(tmp_path: Path) -> None:
    folder = rl_run(tmp_path / "run")
    sign = {"value": 0.02, "usual": 0.5, "since": 290}
    verdict = {"step": 300, "last_good_step": 288, "verdict": "collapsed", "evidence": {"solved": sign}}
    (folder / "collapse.json").write_text(json.dumps(verdict))
    text = Parsed(page_of(folder, tmp_path / "page.html")).text
    assert "solved 0.02 where 0.5 is usual, since step 290. Last good step: 288" in text
    assert text.index("Last good step") < text.index("Goodput")


def think(folder: Path) -> Path:
    """Add what an RL run's evaluations say of its thoughts, and a response to each held-out problem."""
    records = read_records(folder / "metrics.jsonl")
    for record in records:
        if record.get("kind") == "evaluation":
            share = record["step"] / 300
            record |= {"pass@1_emptied": 0.1, "pass@1_other_thought": 0.11, "pass@1_half_thought": 0.2 + share / 10}
            record |= {"thought_share": share, "pass@1": record["pass@1"]}
            for size in (2, 12):
                record |= {f"pass@1_size/sums/{size}": share / size, f"response_length_size/sums/{size}": size * share}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = []
    for step in (0, 100, 200, 300):
        samples = [
            {"task": "sums", "size": size, "question": f"sum of {size}?", "answer": "7", "passed": step > 100,
             "response": f"{HOSTILE} after {step} steps of {size}"}
            for size in (2, 12)
        ]  # fmt: skip
        lines.append(json.dumps({"kind": "samples", "step": step, "samples": samples}) + "\n")
    (folder / "samples.jsonl").write_text("".join(lines))
    return folder


def test_what_the_thoughts_are_worth(tmp_path: Path) -> None:
    folder = think(rl_run(tmp_path / "run"))
    parsed = assert_of_one_piece(page_of(folder, tmp_path / "page.html"))
    figures = {figure.name: figure.panels for figure in figures_of(Run(folder))}
    lines = {line.name: line.y for panel in figures["thought"] for line in panel.series}
    assert lines["its thought emptied"] == [0.1] * 4
    assert lines["half of its thought"][-1] == pytest.approx(0.3)
    assert lines["all"][-1] == 1  # the share of responses with a thought
    sizes = [{line.name: line for line in panel.series} for panel in figures["size"]]
    assert [lines["12"].y[-1] for lines in sizes] == [pytest.approx(1 / 12), 12]  # pass@1, then tokens
    assert sizes[0]["2"].colour != sizes[0]["12"].colour
    assert {"thought", "size"} <= {image["alt"] for image in parsed.all("img")}
    for step in (0, 200, 300):
        assert f"after {step} steps of 12" in parsed.text
    assert "after 100 steps of 12" not in parsed.text  # at first, in the middle and at last
    write_summary(folder)
    summary = (folder / "report" / "summary.md").read_text()
    for figure in ("climb", "thought", "size", "training"):
        assert f"({figure}.png)" in summary
    assert "after 200 steps of 12" in summary
    assert "\x1b" not in summary
    numbers = json.loads((folder / "report" / "summary.json").read_text())
    assert numbers["last_evaluation"]["pass@1_emptied"] == 0.1


def test_a_run_that_is_written_torn_or_moved_is_shown_as_far_as_it_is_whole(tmp_path: Path) -> None:
    """What a kill, a full disk or a reader at the wrong moment leaves; and nothing there is touched."""
    folder = think(rl_run(tmp_path / "climb" / "run"))
    for name in ("metrics.jsonl", "events.jsonl", "samples.jsonl"):
        lines = (folder / name).read_bytes().split(b"\n")
        lines[1] = b"\0" * 40  # a page that the disk never got
        (folder / name).write_bytes(b"\n".join(lines)[:-20])
    for name in ("collapse.json", "notes.json", "final.lineage", "../stages.json"):
        (folder / name).write_text('{"run": ')
    (folder / "checkpoints" / "step-00000300").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000300" / "lineage.json").write_text("{")
    (folder / "checkpoints" / "step-00000400.tmp").mkdir()
    (part,) = (folder / FOLDER).glob("*.parquet")
    part.write_bytes(part.read_bytes()[:-40])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    text = Parsed(page_of(folder, tmp_path / "page.html")).text
    assert "298 of 300" in text or "299 of 300" in text
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    (folder / "config.yaml").write_text("name: [")
    with pytest.raises(UsageError, match=r"config\.yaml: cannot be read"):
        write_page(folder, tmp_path / "page.html")


def climb_of(folder: Path) -> Path:
    for name in ("second", "first"):
        rl_run(folder / name, steps=100, words=name)
    (folder / "config.yaml").write_text("name: whole\n")
    (folder / "stages.json").write_text(json.dumps({"first": {}, "second": {}, "not-begun": {}}))
    return folder


def test_a_whole_climb(tmp_path: Path) -> None:
    parsed = assert_of_one_piece(page_of(climb_of(tmp_path / "climb"), tmp_path / "page.html"))
    assert len(parsed.all("details")) == 2
    assert parsed.text.index("run first") < parsed.text.index("run second")


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    folder = rl_run(tmp_path / "run")
    (folder / "report").write_text("a file where the page's folder should be")
    with pytest.raises(UsageError, match=r"cannot be written .*; name another place with --output") as caught:
        write_page(folder, folder / "report" / "view.html")
    assert "\n" not in str(caught.value)
    console = Console(record=True, width=120)
    report_goodput(folder, console)
    assert "wall-clock" in console.export_text(clear=False)
    assert "no timeline:" in console.export_text()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run"):
        write_page(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_without_matplotlib_one_line_says_so(tmp_path: Path) -> None:
    folder = rl_run(tmp_path / "run")
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path; from mai_thinking.report import write_page, write_summary\n"
        "write_summary(Path(sys.argv[1])); write_page(Path(sys.argv[1]), Path(sys.argv[1], 'page.html'))"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    assert ended.stdout == "no figures: install matplotlib, or mai_thinking[plots]\n"
    assert "![" not in (folder / "report" / "summary.md").read_text()
    parsed = assert_of_one_piece((folder / "page.html").read_text(encoding="utf-8"))
    assert "no figures: install matplotlib" in parsed.text
    assert "Goodput" in parsed.text
