"""What a rank that is left can save for one that died: what all have alike, and each one's own, pending work too."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mai_thinking.training.jit_checkpoint import JitCheckpoint
from mai_thinking.training.state import PerRank


class Place:
    """A rank's own number."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "tensor": torch.full((2,), float(self.value))}


class Pending:
    """A queue of numbers."""

    def __init__(self) -> None:
        self.items: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"items": list(self.items)}


class Saved:
    """In the place of a checkpointer of two ranks."""

    world = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.calls: list[tuple[int, Any, Any]] = []

    def save_jit(self, step: int, shared: Any, own: Any) -> bool:
        self.calls.append((step, shared, own))
        return True


class Rank:
    def __init__(self, rank: int, folder: Path) -> None:
        self.place, self.pending, self.step = Place(), Pending(), 0
        self.checkpointer = Saved(rank)
        self.announced: list[bool] = []
        self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        self.jit = JitCheckpoint(
            self.checkpointer,  # type: ignore[arg-type]
            self.optimizer,
            lambda: {"place": PerRank(self.place), "pending": PerRank(self.pending), "progress": {"step": self.step}},
            folder,
            self.announced.append,
        )

    def prepare(self) -> None:
        """A step up to its last reduction: every second one fills the queue, each takes one of it."""
        if self.step % 2 == 0:
            self.pending.items += [100 * self.checkpointer.rank + self.step + n for n in range(3)]
        self.pending.items.pop(0)
        self.place.value = self.step + 1
        self.jit.before_reduction(self.step + 1)

    def update(self) -> None:
        self.optimizer.step()
        self.step += 1
        self.jit.completed(self.step)

    def fail(self, seen: list[int], *, updated: bool = False) -> None:
        """In a step, at its last reduction or when the optimiser has begun."""
        with self.jit.watching(seen.append):
            self.prepare()
            if updated:
                self.optimizer.step()
            raise RuntimeError("connection closed by peer")


@pytest.fixture
def ranks(tmp_path: Path) -> list[Rank]:
    return [Rank(rank, tmp_path / "ranks") for rank in (0, 1)]


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_the_last_complete_step_is_saved_for_both(ranks: list[Rank], steps: int) -> None:
    """Rank 1 dies in the step after, when it has left its state of that too; the queue may have grown in it."""
    expected = []
    for _ in range(steps):
        for rank in ranks:
            rank.prepare()
        expected = [(rank.place.value, list(rank.pending.items)) for rank in ranks]
        for rank in ranks:
            rank.update()
    ranks[1].prepare()
    seen: list[int] = []
    with pytest.raises(RuntimeError, match="peer"):
        ranks[0].fail(seen)
    ((step, shared, own),) = ranks[0].checkpointer.calls
    assert (step, shared, seen) == (steps, {"progress": {"step": steps}}, [steps])
    assert [(one["place"]["value"], one["pending"]["items"]) for one in own] == expected
    assert [one["place"]["tensor"].tolist() for one in own] == [[float(steps)] * 2] * 2
    assert ranks[0].announced == [True, False]


def test_nothing_is_saved_of_half_an_update(ranks: list[Rank]) -> None:
    for rank in ranks:
        rank.prepare()
        rank.update()
    with pytest.raises(RuntimeError, match="peer"):
        ranks[0].fail([], updated=True)
    assert ranks[0].checkpointer.calls == []


def test_a_rank_that_left_another_step_is_no_help(ranks: list[Rank], capsys: pytest.CaptureFixture[str]) -> None:
    """The negative control: without what the other had after this step there is no checkpoint of it."""
    ranks[1].prepare()
    for _ in range(3):
        ranks[0].prepare()
        ranks[0].update()
    with pytest.raises(RuntimeError, match="peer"):
        ranks[0].fail([])
    assert ranks[0].checkpointer.calls == []
    assert "rank 1 left its state of step 1, not of 3" in capsys.readouterr().err
