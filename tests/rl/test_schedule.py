"""The record of who made what when."""

import os
from dataclasses import replace
from pathlib import Path

from mai_thinking.rl.rollout_worker import RolloutBatch
from mai_thinking.rl.schedule import Schedule, Spool


def test_what_is_on_record_comes_again_in_its_order(tmp_path: Path) -> None:
    """From the version on that a checkpoint does not have yet; a line that was cut off takes no other along."""
    path = tmp_path / "rollouts" / "schedule-00000.jsonl"
    first, second, third = (RolloutBatch(number, 4 * number, 8, True) for number in range(3))
    batch = replace(first, switches=[(7, 1)])
    schedule = Schedule(path)
    schedule.add_begun(0, first)
    schedule.add_begun(1, second)
    schedule.add_arrival(1, batch)
    schedule.add_begun(1, third)
    path.write_bytes(path.read_bytes()[:-9])  # a machine's death
    again = Schedule(path)
    again.add_begun(2, third)
    last = Schedule(path)
    assert last.next_of(1) == {"version": 1, "begun": second.asked}
    assert last.ahead
    arrival = last.next_of(1)
    assert arrival is not None
    assert (arrival["arrived"], arrival["weights"]) == (0, [[0, 0], [7, 1]])
    assert last.next_of(1) is None
    assert last.next_of(2) == {"version": 2, "begun": third.asked}
    assert not last.ahead
    assert last.forget_before(2) == [0]
    assert last.forget_before(2) == []


def test_a_batch_is_readable_by_whom_the_umask_lets(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 0)
    before = os.umask(0o022)
    try:
        spool.write(RolloutBatch(0, 0, 8, True))
    finally:
        os.umask(before)
    assert spool.path(0).stat().st_mode & 0o777 == 0o644
