"""Points of a ladder: what a run cost and what loss it came to, from our own runs or from any program's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mai_thinking.config.base import Section
from mai_thinking.config.loading import validate
from mai_thinking.config.names import nearest_name
from mai_thinking.data.jsonl import read_json
from mai_thinking.errors import UsageError

WEIGHTED = "weighted"
"""The name of the weighted score among the categories."""
Positive = Annotated[float, Field(gt=0)]
_SAME_RUNG = 1.02
"""Runs of one config whose FLOPs differ by less than this factor stand on one rung."""


class Point(Section):
    """A finished run."""

    config: str = Field(min_length=1)
    seed: int
    flops: Positive
    """Of the whole run."""
    seconds: Positive | None = None
    """Of training; null where nobody measured it."""
    wall: Positive | None = None
    """Seconds of the whole run, with start, evaluation and saves: what planning the next ones reckons with."""
    loss: dict[str, Positive] = Field(min_length=1)
    """Category → held-out loss in any unit that is the same for all points; one number is taken as {"loss": number}."""
    rung: int | None = None
    """The depth, where it is known; said in the page and otherwise without meaning."""

    @model_validator(mode="before")
    @classmethod
    def _one_number(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and isinstance(tree.get("loss"), int | float):
            return tree | {"loss": {"loss": tree["loss"]}}
        return tree


class PointSet(Section):
    """All points of a ladder, and how to read them. The content of POINTS.json."""

    baseline: str
    """The config that the others are measured against."""
    points: tuple[Point, ...] = Field(min_length=1)
    weights: dict[str, Positive] = Field(default_factory=dict)
    """Category → weight in the score. Empty: the report's weights if it knows all the categories, else equal ones."""
    difference: float = Field(0.03, gt=0, lt=1)
    """The gain that is worth having; see the rule on the page."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.baseline not in self.configs:
            raise ValueError(
                f"baseline: no point has the config {self.baseline!r}; {nearest_name(self.baseline, self.configs)}"
            )
        if WEIGHTED in self.categories:
            raise ValueError("points: no category may be called 'weighted', which is reckoned; give it another name")
        for point in self.points:
            if set(point.loss) != set(self.categories):
                raise ValueError(
                    f"points: config {point.config!r}, seed {point.seed} has the categories {sorted(point.loss)}, the "
                    f"first point {sorted(self.categories)}; give all points the same"
                )
        if self.weights and set(self.weights) != set(self.categories):
            raise ValueError(f"weights: give each of {sorted(self.categories)} a positive weight")
        return self

    def once_each(self) -> tuple["PointSet", list[Point]]:
        """The first point of each config, seed and FLOPs, and those that give the same again."""
        first: dict[tuple[str, int, float], Point] = {}
        again = [p for p in self.points if first.setdefault((p.config, p.seed, p.flops), p) is not p]
        return self.model_copy(update={"points": tuple(first.values())}), again

    @property
    def configs(self) -> list[str]:
        """Names, in the order in which they come, the baseline first."""
        names = list(dict.fromkeys(point.config for point in self.points))
        return sorted(names, key=lambda name: name != self.baseline)

    @property
    def categories(self) -> list[str]:
        """As the first point has them."""
        return list(self.points[0].loss)

    @property
    def scores(self) -> list[str]:
        """The categories, and the weighted score where there is more than one."""
        return [*self.categories, WEIGHTED] if len(self.categories) > 1 else self.categories

    @property
    def headline(self) -> str:
        """The score that verdicts are about."""
        return self.scores[-1]

    @property
    def costs(self) -> list[str]:
        """What a run can be charged for: `flops`, and `seconds` where all points have them."""
        return ["flops", "seconds"] if all(point.seconds is not None for point in self.points) else ["flops"]

    def score(self, point: Point, score: str) -> float:
        """A category's loss, or the weighted mean of all."""
        if score != WEIGHTED:
            return point.loss[score]
        weights = self.weights or report_weights(self.categories)
        return sum(weights[name] * value for name, value in point.loss.items()) / sum(weights.values())

    def rungs(self, config: str) -> list[list[Point]]:
        """The config's runs, rung by rung, cheapest first."""
        ordered = sorted((point for point in self.points if point.config == config), key=lambda point: point.flops)
        rungs: list[list[Point]] = []
        for point in ordered:
            if rungs and point.flops <= _SAME_RUNG * rungs[-1][0].flops:
                rungs[-1].append(point)
            else:
                rungs.append([point])
        return rungs


def report_weights(categories: Sequence[str]) -> Mapping[str, float]:
    """The report's weights (§2.3), or equal ones where a category is not the report's."""
    from mai_thinking.training.evaluation import CATEGORY_WEIGHTS  # brings torch

    if set(categories) <= set(CATEGORY_WEIGHTS):
        return {category: CATEGORY_WEIGHTS[category] for category in categories}
    return dict.fromkeys(categories, 1.0)


class TableSection(Section):
    """Rows that another program wrote, and which of their columns mean what: DataDecide's tables and marin's sweeps
    have a row for each evaluation of each run."""

    columns: dict[Literal["config", "flops", "seed", "rung", "seconds"], str]
    loss: tuple[str, ...] = Field(min_length=1)
    """Columns of losses, each a category."""
    rows: tuple[dict[str, Any], ...] = Field(min_length=1)

    def points(self, where: str) -> list[dict[str, Any]]:
        """The last evaluation of each run. Seeds and sizes that are words are numbered in the order in which they come;
        `UsageError` for a row that lacks a column."""
        last: dict[tuple[Any, ...], dict[str, Any]] = {}
        numbers: dict[str, dict[str, int]] = {"seed": {}, "rung": {}}
        for place, row in enumerate(self.rows):
            missing = [column for column in (*self.columns.values(), *self.loss) if column not in row]
            if missing:
                raise UsageError(f"{where}: rows.{place} has no column {missing[0]!r}; it has {', '.join(row)}")
            point = {"seed": 0} | {name: row[column] for name, column in self.columns.items()}
            for name, known in numbers.items():
                if isinstance(point.get(name), str):
                    point[name] = known.setdefault(point[name], len(known))
            point["loss"] = {column: row[column] for column in self.loss}
            run = point["config"], point["seed"], point.get("rung", point["flops"])
            if run not in last or point["flops"] >= last[run]["flops"]:
                last[run] = point
        return list(last.values())


def read_points(path: Path, baseline: str | None) -> PointSet:
    """POINTS.json: `{"baseline": …, "points": […], "weights": {…}}`, or a bare list with `baseline` from elsewhere, or
    a `TableSection` with `baseline`.

    Raises `UsageError` with the key that is wrong.
    """
    tree = read_json(path)
    if isinstance(tree, dict) and "rows" in tree:
        names = {name: tree.pop(name) for name in TableSection.model_fields if name in tree}
        tree["points"] = validate(TableSection, names, str(path)).points(str(path))
    if isinstance(tree, list):
        tree = {"points": tree}
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: give a list of points, or an object with `baseline` and `points`")
    if baseline is not None:
        tree["baseline"] = baseline
    if "baseline" not in tree:
        raise UsageError(f"{path}: which config is the baseline? add --baseline NAME, or the key `baseline`")
    return validate(PointSet, tree, str(path))
