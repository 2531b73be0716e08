"""Does a cheap rung rank two mixes as the largest does? `python tests/experiments/scaling/write_crossing.py OUT
NAME=POINTS.json …`, the ladder with the largest rung first.

POINTS.json is what `scripts/ladder.py configs/ladders/diversity-crossing.yaml` leaves, with or without `target_tokens`
and at a learning rate of one's choice.
"""

import argparse
import shutil
from pathlib import Path
from statistics import fmean

from mai_thinking.bench.machine import describe
from mai_thinking.config.table import Cell, Table
from mai_thinking.experiments.scaling.points import PointSet, read_points
from mai_thinking.provenance.lineage import code_version
from mai_thinking.report.comparison import spread
from mai_thinking.report.document import Document


def differences(points: PointSet) -> dict[int, list[float]]:
    """Rung → the candidate's score less the baseline's, seed by seed."""
    (candidate,) = set(points.configs) - {points.baseline}
    scores = {(p.config, p.rung, p.seed): points.score(p, points.headline) for p in points.points}
    found: dict[int, list[float]] = {}
    for (config, rung, seed), score in scores.items():
        if config == candidate and rung is not None and (points.baseline, rung, seed) in scores:
            found.setdefault(rung, []).append(score - scores[points.baseline, rung, seed])
    return dict(sorted(found.items()))


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("ladders", nargs="+", metavar="NAME=POINTS.json")
    options = parser.parse_args()
    paths = {name: Path(path) for name, _, path in (text.partition("=") for text in options.ladders)}
    ladders = [(name, read_points(path, None)) for name, path in paths.items()]
    largest = differences(ladders[0][1])
    truth = fmean(largest[max(largest)]) < 0
    (candidate,) = set(ladders[0][1].configs) - {ladders[0][1].baseline}
    rows: list[list[Cell]] = []
    for name, points in ladders:
        for rung, found in differences(points).items():
            right = sum((value < 0) == truth for value in found)
            rows.append([name, f"L{rung}", len(found), spread(found), f"{right} of {len(found)}"])
    page = Document("diversity-crossing-again")
    page.add(
        f"`{candidate}` less `{ladders[0][1].baseline}`, held-out bits per byte of code, pair by pair: mean "
        f"(least–most). Below 0 `{candidate}` is ahead. *Right*: pairs ranked as the first "
        "ladder's largest rung ranks them."
    )
    page.add_table("rungs", Table(["ladder", "rung", "pairs", "difference", "right"], rows))
    machine = ", ".join(f"{name} {value}" for name, value in describe().items())
    page.add(
        "`python scripts/ladder.py configs/ladders/diversity-crossing.yaml`; *down-sampled* with "
        "`target_tokens=1975296`, the largest rung's, where nothing is cut and the runs are the first ladder's; "
        "*reduced rate* with `run.optimizer.learning_rate=1.0e-3`, a tenth; then "
        f"`python tests/experiments/scaling/write_crossing.py`; {machine}; commit {code_version().commit}.",
        heading="How it was made",
    )
    page.facts |= {"machine": describe(), "commit": code_version().commit}
    page.write(options.out)
    for name, path in list(paths.items())[1:]:
        shutil.copy(path, options.out / f"points-{name.replace(' ', '-')}.json")


if __name__ == "__main__":
    main()
