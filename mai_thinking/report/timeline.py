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
_Stretches = dict[str, list[tuple[float, float]]]


def timeline(run: Run) -> list[Figure]:
    """The figure, if there is something to show."""
    workers = int(run.config.get("rollouts", {}).get("workers") or 0)
    arrivals = [one for one in read_records(run.path / "rollouts" / "schedule-00000.jsonl") if "began" in one]
    updates = [record["step"] for record in run.steps if "groups_stale" in record][-UPDATES:]
    pieces = list(_learner(run, updates[0])) if workers and arrivals and updates else []
    if not pieces:
        return []
    begin, end = pieces[0][1], max(stop for _, _, stop in pieces)
    batches = [
        (one["worker"], one["weights"][0][1], max(begin, one["began"]), min(end, one["began"] + one["seconds"]))
        for one in arrivals
    ]
    batches = [batch for batch in batches if batch[2] < batch[3]]
    versions = sorted({version for _, version, _, _ in batches})
    colours = {f"weights {v}": shade(place / max(1, len(versions) - 1)) for place, v in enumerate(versions)}
    lanes: dict[str, _Stretches] = {"learner": {name: [] for name in _COLOURS}}
    most = max(workers, *(one["worker"] + 1 for one in arrivals))  # there may have been more once
    makers = {number: f"worker {number}" for number in range(most)}
    if any(batch[0] < 0 for batch in batches):
        makers[-1] = "learner, in waiting"
    lanes |= {maker: {name: [] for name in colours} for maker in makers.values()}
    named = [("learner", *piece) for piece in pieces]
    named += [(makers[worker], f"weights {version}", *span) for worker, version, *span in batches]
    graded = [(one["began"] + after, seconds) for one in arrivals for after, seconds in one.get("graded", ())]
    if graded:
        lanes["graders"] = {GRADE: []}
    named += [("graders", GRADE, start, min(end, start + s)) for start, s in graded if begin <= start < end]
    for lane, name, start, stop in named:
        lanes[lane][name].append((start - begin, stop - start))
    found = {lane: {name: spans for name, spans in by_name.items() if spans} for lane, by_name in lanes.items()}
    panel = Timeline(f"The last {len(updates)} updates", found, _COLOURS | colours)
    caption = (
        "At the top is what the learner did, below it the batches that have arrived, each worker's and those that the "
        "learner made rather than wait: generation with grading, in the colour of the weights that they were begun "
        "with (weights 3: those after three updates); at the bottom, when their answers were graded. Where a lane is "
        "white, none of this went on."
    )
    return [Figure("timeline", [panel], columns=1, size=(11, 1.1 + 0.45 * len(found)), caption=caption)]


def _learner(run: Run, first: int) -> Iterator[tuple[str, float, float]]:
    """What it did from step `first` to its last: (name, begin, end), in Unix time. Of a step that was computed again
    the first time counts, as in metrics.jsonl."""
    waited = {record["step"]: record["rollout_seconds"] for record in run.steps if record["step"] >= first}
    for event in read_records(run.path / "events.jsonl"):
        begin, end = event["time"] - event.get("seconds", 0.0), event["time"]
        if event["event"] == "step" and event["step"] in waited:
            learns = begin + waited.pop(event["step"])
            yield WAIT, begin, learns
            yield LEARN, learns, end
        elif event["event"] == "span" and event["category"] in _COLOURS and waited and first not in waited:
            yield event["category"], begin, end
