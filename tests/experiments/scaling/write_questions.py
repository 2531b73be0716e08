"""The page of the architecture questions: `python tests/experiments/scaling/write_questions.py LADDER OUT SIM.json …`.

LADDER is the folder of `configs/ladders/architecture-questions.yaml` when it is done. OUT gets the ladder's page with
the questions in words, the plan that the tool made, and simulations of verdicts, each as `simulation.py` prints it.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from mai_thinking.bench.machine import describe
from mai_thinking.config.table import Interval, Table
from mai_thinking.experiments.scaling.analysis import Analysis, analyse
from mai_thinking.experiments.scaling.points import read_points
from mai_thinking.provenance.lineage import code_version
from mai_thinking.report.document import plain
from mai_thinking.report.ladder import write_report

QUESTIONS = {
    "MoE in every layer, or in every other?": ["every-layer"],
    "512 experts, or 128?": ["experts-512"],
    "Experts at full width or a quarter of it, or at half?": ["latent-full", "latent-quarter"],
    "A norm inside the latent path?": ["latent-norm"],
    "One shared expert?": ["shared-expert"],
    "Balance by micro-batch, or by a bias, in place of the global batch's loss?": [
        "micro-batch-balance",
        "bias-balance",
    ],
    "An ordinary start of attention, or from zero?": ["ordinary-start"],
    "Dropout of 0.15?": ["dropout"],
}
"""What is asked, and the candidates that answer it."""


def question(analysis: Analysis, name: str, candidates: list[str]) -> dict[str, Any]:
    """One entry of `questions`: undecided as long as one of its candidates is; otherwise adopt if one is adopted, and
    `gain` is that one's, or the first's."""
    arms = [arm(analysis, candidate) for candidate in candidates]
    verdicts = [one["verdict"] for one in arms]
    verdict = next((v for v in ("undecided", "adopt") if v in verdicts), "reject")
    told = next((one for one in arms if one["verdict"] == verdict), arms[0])
    minutes = sum(one["minutes"] for one in arms)
    return {"name": name, "verdict": verdict, "gain": told["gain"], "minutes": minutes, "candidates": arms}


def arm(analysis: Analysis, candidate: str) -> dict[str, Any]:
    """What is known of one candidate."""
    e, points = analysis.gain(candidate), analysis.points
    own = [p for p in points.points if p.config == candidate]
    return {
        "candidate": candidate,
        "verdict": e.verdict[0],
        "reason": e.verdict[1],
        "by_time": analysis.gain(candidate, "seconds").verdict[0],
        "gain": [{"flops": g.cost, "value": g.value, "low": g.low, "high": g.high, "pairs": g.pairs} for g in e.gains],
        "mean": e.mean._asdict(),
        "trend": e.trend._asdict(),
        "mean_by_time": analysis.gain(candidate, "seconds").mean._asdict(),
        "pairs_take_off": None if e.kept_variance is None else 1 - e.kept_variance,
        "minutes": sum(p.wall or p.seconds or 0.0 for p in own) / 60,
    }


def table(found: list[dict[str, Any]]) -> Table:
    """The answers."""
    rows = [
        [
            *(one["name"], a["candidate"], a["verdict"], Interval(**a["mean"]), Interval(**a["trend"])),
            *(a["by_time"], Interval(**a["mean_by_time"]), a["minutes"]),
        ]
        for one in found
        for a in one["candidates"]
    ]
    names = ["question", "candidate", "verdict", "mean EG_FLOPs", "× a decade", "by time", "mean EG_Time", "minutes"]
    return Table(names, rows)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ladder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("simulations", type=Path, nargs="+", help="what simulation.py printed, this ladder's first")
    options = parser.parse_args()
    points = read_points(options.ladder / "points.json", None)
    page = write_report(points, options.out, options.ladder.name)
    found = [question(analyse(points), name, candidates) for name, candidates in QUESTIONS.items()]
    simulations = {name: one for path in options.simulations for name, one in json.loads(path.read_text()).items()}
    plan = json.loads((options.ladder / "plan.json").read_text())
    facts = json.loads((options.out / "summary.json").read_text()) | {
        "questions": found,
        "simulation": next(iter(simulations.values())) | {"by_ladder": simulations},
        "plan": plan,
        "minutes": sum(p.wall or 0.0 for p in points.points) / 60,
        "machine": describe(),
        "commit": code_version().commit,
    }
    (options.out / "summary.json").write_text(json.dumps(plain(facts), indent=1) + "\n")
    heading, _, rest = page.partition("\n\n")
    sides = [(name, one, side) for name, one in simulations.items() for side in ("now", "before")]
    rows = [
        [name, side, ", ".join(f"L{rung}: {n}" for rung, n in one["seeds"].items())]
        + [(one if side == "now" else one["before"])[key] for key in ("right", "undecided", "false_adopt")]
        for name, one, side in sides
    ]
    columns = ["noise of", "way", "seeds", "right of the decided", "undecided", "false adopt"]
    chosen = plan["deciding"] or plan["best"]
    machine = ", ".join(f"{name} {value}" for name, value in describe().items())
    parts = [
        heading,
        "## Answers",
        table(found).markdown(),
        f"Adopt: take the candidate. Reject: keep the recipe. {facts['minutes']:.0f} minutes of one core in all, "
        "beside other work on it: little is to be read from its seconds.",
        "## The plan that the tool made",
        f"{plan['minutes']:g} minutes given; from {sum(p['freedom'] for p in plan['pilots'])} degrees of freedom of "
        f"pilot runs: seeds {chosen['seeds']}, {chosen['seconds'] / 60:.1f} minutes, which decide a gain of "
        f"{chosen['least']:.1%} with a power of 90 %.",
        "## Simulated ladders with known truth",
        Table(columns, rows).markdown(),
        f"{facts['simulation']['draws']:,} draws at a gain of 1.05, as many at 1/1.05 and at none, with the rungs and "
        "seeds that the planner asks for. *before*: both sides fitted, nothing paired; a fifth of the draws.",
        rest.strip(),
        "## How it was made",
        "`python scripts/ladder.py configs/ladders/architecture-questions.yaml` with the plan's rungs and seeds, then "
        f"`python tests/experiments/scaling/write_questions.py`; {machine}; "
        f"commit {code_version().commit}. The [config](ladder.yaml) and the [points](points.json).",
    ]
    (options.out / "summary.md").write_text("\n\n".join(parts) + "\n")
    for name in ("ladder.yaml", "points.json", "plan.json"):
        shutil.copy(options.ladder / name, options.out / name)


if __name__ == "__main__":
    main()
