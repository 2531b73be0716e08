"""This page from what three turns on a card left: `python results/card/page.py FOLDER`.

In FOLDER: `a` and `b`, which scripts/card.py wrote, beside each other; `w/L6-think-grpo`, the RL run; and what a
step of L12 printed: `before.txt`, `after.txt` (bench/card.py's side "ours"), `flash-4.txt`.
"""

import json
import re
import sys
from pathlib import Path

from mai_thinking.report.thinking import write_thinking

FOLDER, HERE = Path(sys.argv[1]), Path(__file__).parent
NOISE = re.compile(r"Warning|/tmp/|site-packages|warn\(|warner|bringing up|exe_args")
STEP = re.compile(
    r"^ *(\w+) +(\d+) +\S+ \(\S+ … \S+\) +(\S+) \(\S+ … \S+\) +(\S+) \((\S+) … (\S+)\) +(\d+)", re.MULTILINE
)


def step_rows(name: str, what: list[str]) -> list[dict[str, object]]:
    """A row for each step of L12 that was timed in the file."""
    text = (FOLDER / f"{name}.txt").read_text()
    product = int(re.search(r"^product (\d+)", text, re.MULTILINE)[1])
    return [
        {
            "what": said, "rows at once": int(rows), "tokens/s": float(rate), "MFU %": float(mfu), "low": float(low),
            "high": float(high), "of TFLOP/s": product, "GiB": int(memory),
        }
        for said, (_, rows, rate, mfu, low, high, memory) in zip(what, STEP.findall(text), strict=True)
    ]  # fmt: skip


FOUND = """\
A first turn on a card found three faults that no CPU shows. The head asked whether autocast is on where it is switched
off, so that it computed in fp32: half of L12's step, and in RL another rounding than the engine's. The
router's product by bf16 parts lost more than it promised, since matrix units cut their sums off. A test
asked for the same last token of a nucleus. All are mended, and the second turn's figures are below.

- Code c0004aa for the step before, c1c3fba for all else; seed 0; torch 2.11.
- Utilisation is of the card's own product in the same process, which varies from turn to turn; tokens per
  second do not.
- FlashAttention-4 (4.0.0b36, in place of PyTorch's kernel through its operator registry) gives the same
  gradients to 0.3 % of their norm and is worth 1 %; more rows at once are worth nothing. 45 % was asked for.
- A step that was computed again after a checkpoint had the same loss, and a gradient norm that differed in its
  last bit: **not bit for bit** on a card, cause not found. Such a difference is told now and ends no run.
- The climb was ended by its time; its pass@1 was rising."""


def copied(source: Path, target: str) -> None:
    """Without that machine's folders and other people's warnings."""
    lines = (re.sub(r"/tmp/wb?(?=/|$)", "runs", line) for line in source.read_text().splitlines())
    kept = (line for line in lines if not NOISE.search(line))
    (HERE / target).write_text("\n".join(kept) + "\n")


def main() -> None:
    steps = [
        *step_rows("before", ["as it had become: the head in fp32"]),
        *step_rows("after", ["now: the head in bf16, experts' gradients added as they come, flex attention"]),
        *step_rows("flash-4", ["FlashAttention-4 for flex", "the same, 24 rows at once"]),
    ]
    parts = [part for side in "ab" for part in json.loads((FOLDER / side / "summary.json").read_text())["parts"]]
    machine = json.loads((FOLDER / "a" / "summary.json").read_text())["machine"] | {"card": "one NVIDIA H200"}
    write_thinking([FOLDER / "w" / "L6-think-grpo"], HERE)
    climb = json.loads((HERE / "summary.json").read_text())["seeds"][0]
    tests = re.findall(r"^(\d+ passed.*) in", (FOLDER / "b" / "tests.txt").read_text(), re.MULTILINE)[0]
    summary = {
        "machine": machine,
        "commits": ["c0004aa", "c1c3fba"],
        "L12": steps,
        "tests": tests,
        "climb": climb,
        "parts": parts,
    }
    plain = re.sub(r"/tmp/wb?(?=/)", "runs", json.dumps(summary, indent=1, ensure_ascii=False))
    (HERE / "summary.json").write_text(plain + "\n")
    parts, climb = json.loads(plain)["parts"], HERE / "L6-think-grpo-config.yaml"
    climb.write_text(re.sub(r"/tmp/w(?=/)", "runs", climb.read_text()))
    figure = (HERE / "summary.md").read_text().partition("\n\n")[2]
    lines = ["# A card's minutes", "", ", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    lines += [
        FOUND,
        "",
        "## A step of L12, 4 rounds",
        "",
        "| " + " | ".join(steps[0]) + " |",
        "|---" * len(steps[0]) + "|",
    ]
    lines += [
        "| " + " | ".join(f"{v:,}" if isinstance(v, float) else str(v) for v in row.values()) + " |" for row in steps
    ]
    lines += ["", "## Parts of `scripts/card.py`", "", "| part | state | seconds | figures |", "|---|---|---:|---|"]
    lines += [f"| {p['name']} | {p['state']} | {p['seconds']:.0f} | {json.dumps(p['figures'])} |" for p in parts]
    lines += ["", f"Tests that need a GPU: {tests}.", "", "## L6 learns to think", "", figure]
    for name, file in (("before", "step-before"), ("after", "step"), ("flash-4", "step-flash-4")):
        copied(FOLDER / f"{name}.txt", f"{file}.txt")
    for side, name in (("a", "base"), ("a", "climb"), ("b", "tests"), ("b", "resume")):
        copied(FOLDER / side / f"{name}.txt", f"{name}.txt")
    (HERE / "summary.md").write_text("\n".join(lines))


main()
