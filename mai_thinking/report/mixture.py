"""A mixture search's page: what was tried, how well it can be predicted, who won the finals."""

from statistics import fmean

from mai_thinking.config.table import Cell, Table
from mai_thinking.experiments.mixture import SCORE, Result, Search
from mai_thinking.report.comparison import spread, student
from mai_thinking.report.document import Document


def write_report(search: Search) -> str:
    """`summary.md` and `summary.json` in the search's `report/`; returns the page."""
    config, errors = search.config, search.regression.errors
    page = Document(config.name)
    page.add(
        f"{len(search.samples)} small models of {config.steps} steps, finals of {config.final_steps} over "
        f"{config.final_seeds} seeds. Scores are Eq. 3's, normalised by the small start's model: lower is better."
    )
    page.add_table("finals", _finals(search), "Finals")
    page.add_table("differences", _differences(search), "The proposal against the others, pair by pair")
    page.add("Student's 95 % interval over the pairs; below 0 the proposal is better.")
    rows: list[list[Cell]] = [[name, error] for name, error in errors.items()]
    page.add_table("regression", Table(["regression", "held-out error"], rows, digits=5), "Score by mixture")
    page.add(
        "`both`, the mean of the two, proposes; `mean` predicts the mean of all. The proposal's score is predicted as "
        f"{search.predicted:.4f}; the best small model had {min(one.scores[SCORE] for one in search.samples):.4f}."
    )
    page.add_table("mixtures", _mixtures(search), "Mixtures, percent")
    page.add_table("samples", _samples(search), "Small models")
    return page.write(config.folder / "report")


def _finals(search: Search) -> Table:
    scores = list(search.finals["start"][0].scores)
    columns = ["mixture", *scores, "bits per byte", "most by heart of a source", "held-out text by heart"]
    rows: list[list[Cell]] = []
    for name, results in search.finals.items():
        spans = [spread([result.scores[score] for result in results]) for score in scores]
        bits = fmean(result.bits["bits_per_byte"] for result in results)
        by_heart = (fmean(values) for values in zip(*map(_by_heart, results), strict=True))
        rows.append([name, *spans, bits, *by_heart])
    return Table(columns, rows, digits=4)


def _by_heart(one: Result) -> tuple[float, float]:
    """The most of a source, and of held-out text."""
    return max(value for name, value in one.memorised.items() if name != "held_out"), one.memorised["held_out"]


def _differences(search: Search) -> Table:
    own = search.finals["proposed"]
    rows: list[list[Cell]] = []
    for name in ("start", "random-search"):
        for score in own[0].scores:
            pairs = zip(own, search.finals[name], strict=True)
            rows.append([name, score, *student([a.scores[score] - b.scores[score] for a, b in pairs])])
    return Table(["against", "score", "difference", "low", "high"], rows, digits=4)


def _mixtures(search: Search) -> Table:
    names = list(search.config.start)
    rows: list[list[Cell]] = [
        [name, *(100 * results[0].shares[source] for source in names)] for name, results in search.finals.items()
    ]
    return Table(["mixture", *names], rows, digits=1)


def _samples(search: Search) -> Table:
    names = list(search.config.start)
    rows: list[list[Cell]] = [
        [one.name, one.scores[SCORE], one.bits["bits_per_byte"], *_by_heart(one), *(one.shares[n] for n in names)]
        for one in search.samples
    ]
    return Table(["run", "score", "bits per byte", "most by heart", "held-out by heart", *names], rows, digits=4)
