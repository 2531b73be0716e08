"""The page of a run: well-formed, of one piece, true to the folder, safe whatever a model wrote; and in a browser."""

import base64
import json
import shutil
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
from mai_thinking.report.goodput import report as report_goodput
from mai_thinking.rl.traces import FOLDER, Trace, TraceStore
from mai_thinking.training.metrics import read_records

HOSTILE = (
    '</pre></script><script>document.title="taken"</script><img src=x onerror="document.title=1">\u202e&amp;\x1b[2J'
)
VOID = {"meta", "link", "img", "br", "hr", "input"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

SWITCHES = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=3000",
    "--window-size=1280,900",
]  # fmt: skip


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
    events = [{"event": "attempt", "time": 1000.0, "world": 1, "cause": None}]
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
        passed=bool(right),
        pass_rate=0.5, verdict="kept", checkpoint="x/step-00000004", lineage="runs/base/final",
    )  # fmt: skip


def page_of(folder: Path, target: Path) -> str:
    write_page(folder, target)
    return target.read_text(encoding="utf-8")


def charts_of(page: str) -> list[dict[str, Any]]:
    """What the page tells under the pointer, chart by chart."""
    charts: dict[str, dict[str, Any]] = json.loads(page.split('id="data">')[1].split("</script>")[0])
    return list(charts.values())


def assert_of_one_piece(page: str) -> Parsed:
    """Nothing is fetched, by any attribute, style or script."""
    parsed = Parsed(page)
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in parsed.elements}
    for _, attributes in parsed.elements:
        assert not {"src", "srcset", "action", "data"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in page
    assert "@import" not in page
    assert "://" not in page.replace(HOSTILE, "")
    policy = next(meta["content"] for meta in parsed.all("meta") if meta.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    return parsed


def test_a_pre_training_run(tiny_run: Path, tmp_path: Path) -> None:
    page = page_of(tiny_run, tmp_path / "page.html")
    parsed = assert_of_one_piece(page)
    for heading in ("Curves", "Expert load", "Goodput", "Where it came from", "finished", "random-weights"):
        assert heading in parsed.text
    last = read_records(tiny_run / "metrics.jsonl")
    bits = [record["bits_per_byte"] for record in last if "bits_per_byte" in record]
    assert f"{bits[-1]:.3f}" in parsed.text
    assert (tiny_run / "config.yaml").read_text().splitlines()[0] in parsed.text
    assert "Samples" not in parsed.text  # it has no traces


def test_an_rl_run(tmp_path: Path) -> None:
    page = page_of(rl_run(tmp_path / "run"), tmp_path / "page.html")
    parsed = assert_of_one_piece(page)
    assert {"0.100 → 0.400", "under way, or killed", "300 of 300"} <= parsed.pieces
    for number in range(6):
        assert f"response {number}" in parsed.text
    assert {"task", "language", "length", "reward"} <= parsed.pieces
    assert {"1.438", "0.438", "0.875"} <= parsed.pieces
    assert "reward = task + 0.5 · language − 0.25 · length" in parsed.text
    charts = charts_of(page)
    loss = next(c["lines"][0] for c in charts if "lines" in c and c["lines"][0]["name"] == "Loss")
    assert len(loss["x"]) == len(loss["y"]) == len(loss["value"]) == 240
    assert loss["value"][0] == "1"
    assert loss["at"][-1] == "300"
    heat = next(c for c in charts if "cells" in c)
    assert heat["rows"] == ["MoE 1", "MoE 2", "MoE 3"]
    assert [float(column[1]) for column in heat["cells"]] == sorted(float(column[1]) for column in heat["cells"])
    assert {column[0] for column in heat["cells"]} == {"2"}


def test_the_timeline_covers_the_run(tmp_path: Path) -> None:
    page = page_of(rl_run(tmp_path / "run"), tmp_path / "page.html")
    timeline = next(chart for chart in charts_of(page) if chart["x"] == "seconds")
    categories = [category for (category,) in timeline["cells"]]
    assert list(dict.fromkeys(categories)) == ["start-up", "productive steps"]  # without gaps between
    assert categories.count("start-up") / len(categories) == pytest.approx(3 / 603, abs=1 / len(categories))
    assert timeline["at"][-1] == "603"


def test_words_of_a_model_stay_words(tmp_path: Path) -> None:
    page = page_of(rl_run(tmp_path / "run", words=HOSTILE), tmp_path / "page.html")
    parsed = assert_of_one_piece(page)
    assert len(parsed.all("script")) == 2
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
    assert text.index("Last good step") < text.index("Curves")


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
    page = page_of(folder, tmp_path / "page.html")
    parsed = assert_of_one_piece(page)
    lines = {line["name"]: line for chart in charts_of(page) if "lines" in chart for line in chart["lines"]}
    assert lines["its thought emptied"]["value"] == ["0.1"] * 4
    assert lines["half of its thought"]["value"][-1] == "0.3"
    assert lines["all"]["value"][-1] == "1"  # the share of responses with a thought
    sizes = [line["value"][-1] for chart in charts_of(page) for line in chart.get("lines", ()) if line["name"] == "12"]
    assert sizes == ["0.0833", "12"]  # pass@1, then tokens
    assert len({line["colour"] for line in lines.values() if line["name"] in ("2", "12")}) == 2
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
    links = {attributes["href"] for attributes in parsed.all("a")}
    assert links == {f"#{a['id']}" for a in parsed.all("details") if "id" in a} == {"#stage-0", "#stage-1"}
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


# ------------------------------------------------------------------------------------------------------ in a browser

PROBE = """<script>
addEventListener("load", () => {
  document.documentElement.style.width = "WIDTHpx";  // headless windows are no narrower than 500
  const out = { title: document.title, wide: document.body.scrollWidth, told: [] };
  for (const figure of document.querySelectorAll("figure")) {
    const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
    const at = { clientX: box.left + box.width * 0.97, clientY: box.top + box.height * 0.3, bubbles: true };
    svg.dispatchEvent(new PointerEvent("pointermove", at));
    out.told.push([figure.querySelector("figcaption").firstChild.textContent, tip.innerText, tip.hidden]);
    svg.dispatchEvent(new PointerEvent("pointerleave"));
  }
  out.left = tip.hidden;
  const seen = document.createElement("output");
  seen.textContent = btoa(JSON.stringify(out).replace(/[^ -~]/g, "?"));
  document.body.append(seen);
});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [400, 1280])
def test_in_a_browser(tmp_path: Path, width: int) -> None:
    page = page_of(rl_run(tmp_path / "run", words=HOSTILE), tmp_path / "page.html")
    (tmp_path / "probed.html").write_text(page.replace("</body>", PROBE.replace("WIDTH", str(width))), encoding="utf-8")
    command = [str(CHROMIUM), *SWITCHES, f"--user-data-dir={tmp_path / 'profile'}"]
    ended = subprocess.run(
        [*command, "--dump-dom", f"file://{tmp_path / 'probed.html'}"], capture_output=True, text=True, timeout=200
    )
    seen = ended.stdout.split("<output>")[1].split("</output>")[0]
    out = json.loads(base64.b64decode(seen))
    assert out["title"].startswith("run </pre>")
    assert out["wide"] <= width
    told = {title: text for title, text, hidden in out["told"] if not hidden}
    assert len(told) == len(out["told"]) > 5
    assert told["Loss"].startswith("step ")
    assert "0.003" in told["Loss"]
    assert "MoE" in told["Violation rate by layer"]
    assert out["left"]
