"""Who did what in a climb with rollout workers: the learner and each worker, over its last updates."""

from collections.abc import Iterator

from mai_thinking.report.figures import Figure, Timeline, shade
from mai_thinking.report.reading import Run
from mai_thinking.training.ledger import CHECKPOINT, EVALUATION
from mai_thinking.training.metrics import read_records

UPDATES = 6
"""That are shown."""
LEARN, WAIT, GRADE = "learn", "wait for rollouts", "grade"
_COLOURS = {LEARN: "#3c4653", WAIT: "#dfe3e8", EVALUATION: "#8e99a6", CHECKPOINT: "#a9c4b0", GRADE: "#c23a5e"}


def timeline(run: Run) -> list[Figure]:
    """The figure, if there is something to show."""
    workers = int(run.config.get("rollouts", {}).get("workers") or 0)
    arrivals = [one for one in read_records(run.path / "rollouts" / "schedule-00000.jsonl") if "began" in one]
    updates = [record["step"] for record in run.steps if "groups_stale" in record][-UPDATES:]
    pieces = list(_learner(run, updates[0])) if workers and arrivals and updates else []
    if not pieces:
        return []
    begin, end = pieces[0][1], max(stop for _, _, stop in pieces)
    shown = [one for one in arrivals if begin < one["began"] + one["seconds"] and one["began"] < end]
    versions = sorted({one["weights"][0][1] for one in shown})
    colours = {f"weights {version}": shade(place, len(versions)) for place, version in enumerate(versions)}
    most = max(workers, *(one["worker"] + 1 for one in arrivals))  # there may have been more once
    makers = {number: f"worker {number}" for number in range(most)}
    makers |= {-1: "learner, in waiting"} if any(one["worker"] < 0 for one in shown) else {}
    graded = [(one["began"] + after, seconds) for one in arrivals for after, seconds in one.get("graded", ())]
    names = ("learner", *makers.values(), *(["graders"] if graded else []))
    # By lane and name, in the legend's order.
    lanes: dict[str, dict[str, list[tuple[float, float]]]] = {
        lane: {name: [] for name in (*_COLOURS, *colours)} for lane in names
    }
    spans = [("learner", *piece) for piece in pieces]
    spans += [
        (makers[one["worker"]], f"weights {one['weights'][0][1]}", one["began"], one["began"] + one["seconds"])
        for one in shown
    ]
    spans += [("graders", GRADE, start, start + seconds) for start, seconds in graded if begin <= start < end]
    for lane, name, start, stop in spans:
        start, stop = max(begin, start), min(end, stop)
        lanes[lane][name].append((start - begin, stop - start))
    found = {lane: {name: pieces for name, pieces in by_name.items() if pieces} for lane, by_name in lanes.items()}
    caption = (
        "At the top is what the learner did, below it the batches that have arrived, each worker's and those that the "
        "learner made rather than wait: generation with grading, in the colour of the weights that they were begun "
        "with (weights 3: those after three updates); at the bottom, when their answers were graded. Where a lane is "
        "white, none of this went on."
    )
    panel = Timeline(f"The last {len(updates)} updates", found, _COLOURS | colours)
    return [Figure("timeline", [panel], columns=1, size=(11, 1.1 + 0.45 * len(found)), caption=caption)]


def _learner(run: Run, first: int) -> Iterator[tuple[str, float, float]]:
    """What it did from step `first` to its last: (name, begin, end), in Unix time. Of a step that was computed again
    the first time counts, as in metrics.jsonl."""
    waited = {record["step"]: record["rollout_seconds"] for record in run.steps if record["step"] >= first}
    for event in run.events:
        begin, end = event["time"] - event.get("seconds", 0.0), event["time"]
        if event["event"] == "step" and event["step"] in waited:
            learns = begin + waited.pop(event["step"])
            yield WAIT, begin, learns
            yield LEARN, learns, end
        elif event["event"] == "span" and event["category"] in _COLOURS and waited and first not in waited:
            yield event["category"], begin, end
