"""The page of the mixture searches: `python tests/experiments/write_mixture.py OUT START=FOLDER …`.

FOLDER is a finished search's, START what its start is called. Three searches of one start that differ in their seed are
its three repetitions.
"""

import argparse
import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from mai_thinking.bench.machine import describe
from mai_thinking.config.table import Cell, Interval, Table
from mai_thinking.provenance.lineage import code_version
from mai_thinking.report.comparison import student
from mai_thinking.report.document import Document

SCORES = ("unseen", "normalised")
OTHERS = ("start", "random-search")
REGRESSIONS = ("linear", "boosted", "both", "mean")


def read(folder: Path) -> dict[str, Any]:
    """A search's page as numbers, with its config's seed."""
    facts: dict[str, Any] = json.loads((folder / "report" / "summary.json").read_text())
    return facts | {"seed": yaml.safe_load((folder / "config.yaml").read_text()).get("seed", 0)}


def difference(search: dict[str, Any], against: str, score: str) -> Interval:
    """The proposal's less another's, over the pairs of finals."""
    row = next(row for row in search["differences"] if (row["against"], row["score"]) == (against, score))
    return Interval(row["difference"], row["low"], row["high"])


def rows_of(name: str, searches: list[dict[str, Any]]) -> list[list[Cell]]:
    """A row a repetition."""
    return [
        [name, one["seed"], *(difference(one, other, score) for score in SCORES for other in OTHERS)]
        for one in searches
    ]


def verdicts(name: str, searches: list[dict[str, Any]]) -> list[Cell]:
    """How often the proposal won on unseen text; over the repetitions, the mean of the differences."""
    won: list[Cell] = [name, len(searches)]
    for other in OTHERS:
        found = [difference(one, other, "unseen") for one in searches]
        won += [sum(d.value < 0 for d in found), sum(d.high < 0 for d in found)]
        mean = fmean(d.value for d in found)
        won.append(Interval(*student([d.value for d in found])) if len(found) > 1 else mean)
    return won


def mixtures(name: str, searches: list[dict[str, Any]], columns: list[str]) -> list[list[Cell]]:
    """What was proposed and what random search found, percent; sources that are only there to be scored on left out."""
    return [[name, one["seed"], *(row[column] for column in columns)] for one in searches for row in one["mixtures"]]


def errors(name: str, searches: list[dict[str, Any]]) -> list[list[Cell]]:
    """Of each regression on mixtures that it had not seen; the best score of a small model."""
    rows: list[list[Cell]] = []
    for one in searches:
        best = min(row["score"] for row in one["samples"])
        error = {row["regression"]: row["held-out error"] for row in one["regression"]}
        rows.append([name, one["seed"], *map(error.get, REGRESSIONS), best])
    return rows


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("searches", nargs="+", metavar="START=FOLDER")
    options = parser.parse_args()
    by_start: dict[str, list[dict[str, Any]]] = {}
    folders = [(name, Path(folder)) for name, _, folder in (text.partition("=") for text in options.searches)]
    for name, folder in folders:
        by_start.setdefault(name, []).append(read(folder))
    page = Document("mixture")
    page.add(
        "Mixture searches. *Equal*: from as much of each source, where one begins who knows nothing, small models "
        "scored on held-out text of these sources. *Tuned*: the same from the quick start's weights. *Apart*: from "
        "equal shares, scored on packages of which nothing is read. Scores are Eq. 3's, by the small start's model; "
        "below 0 the proposal is better. *Unseen*: held-out text of seven more packages, which have no part in the "
        "search. In *equal* and *tuned* the regression with the lower held-out error proposed alone, in *apart* the "
        "mean of both."
    )
    columns = ["start", "searches"]
    for other in OTHERS:
        columns += [f"better than {other}", "outside the interval", f"mean difference to {other}"]
    page.add_table("verdicts", Table(columns, [verdicts(*one) for one in by_start.items()], 4), "On unseen text")
    columns = ["start", "seed", *(f"{score}, to {other}" for score in SCORES for other in OTHERS)]
    rows = [row for one in by_start.items() for row in rows_of(*one)]
    page.add_table("differences", Table(columns, rows, 4), "Each search's finals, pair by pair")
    page.add("Student's 95 % intervals over the pairs of a search; `normalised` is the score on the search's own sets.")
    tables: list[dict[str, Cell]] = [one[0]["mixtures"][0] for one in by_start.values()]
    shortest = min(tables, key=len)
    columns = [*shortest]
    rows = [row for one in by_start.items() for row in mixtures(*one, columns)]
    page.add_table("mixtures", Table(["start", "seed", *columns], rows, 1), "Percent")
    columns = ["start", "seed", *REGRESSIONS, "best small model"]
    page.add_table("regression", Table(columns, [r for o in by_start.items() for r in errors(*o)], 4), "Held-out error")
    machine = ", ".join(f"{name} {value}" for name, value in describe().items())
    page.add(
        "`python scripts/mixture.py configs/nano-mixture.yaml seed=…` for each search (*equal*, *tuned*: without the "
        f"sources of weight 1e-6), then `python tests/experiments/write_mixture.py`; {machine}; commit "
        f"{code_version().commit}. The [config](config.yaml) of the last.",
        heading="How it was made",
    )
    page.facts |= {"machine": describe(), "commit": code_version().commit}
    page.write(options.out)
    shutil.copy(folders[-1][1] / "config.yaml", options.out / "config.yaml")


if __name__ == "__main__":
    main()
