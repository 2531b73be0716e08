"""A mixture search's page: what was tried, how well it can be predicted, who won the finals."""

from mai_thinking.experiments.mixture import SCORE, Search
from mai_thinking.report.comparison import student
from mai_thinking.report.document import Cell, Document, Interval, Table


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
        f"Taken: {search.regression.kind}. `mean` predicts the mean of all. The proposal's score is predicted as "
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
        row: list[Cell] = [name]
        for score in scores:
            values = [result.scores[score] for result in results]
            row.append(Interval(sum(values) / len(values), min(values), max(values)))
        row.append(sum(result.bits["bits_per_byte"] for result in results) / len(results))
        for part in (_most_by_heart, lambda one: one["held_out"]):
            row.append(sum(part(result.memorised) for result in results) / len(results))
        rows.append(row)
    return Table(columns, rows, digits=4)


def _most_by_heart(memorised: dict[str, float]) -> float:
    return max(value for name, value in memorised.items() if name != "held_out")


def _differences(search: Search) -> Table:
    own = search.finals["proposed"]
    rows: list[list[Cell]] = []
    for name in ("start", "random-search"):
        for score in own[0].scores:
            pairs = zip(own, search.finals[name], strict=True)
            mean, low, high = student([a.scores[score] - b.scores[score] for a, b in pairs])
            rows.append([name, score, mean, low, high])
    return Table(["against", "score", "difference", "low", "high"], rows, digits=4)


def _mixtures(search: Search) -> Table:
    names = list(search.config.start)
    rows: list[list[Cell]] = [
        [name, *(100 * results[0].shares[source] for source in names)] for name, results in search.finals.items()
    ]
    return Table(["mixture", *names], rows, digits=1)


def _samples(search: Search) -> Table:
    names = list(search.config.start)
    rows: list[list[Cell]] = []
    for one in search.samples:
        by_heart = _most_by_heart(one.memorised), one.memorised["held_out"]
        shares = [one.shares[source] for source in names]
        rows.append([one.name, one.scores[SCORE], one.bits["bits_per_byte"], *by_heart, *shares])
    return Table(["run", "score", "bits per byte", "most by heart", "held-out by heart", *names], rows, digits=4)
