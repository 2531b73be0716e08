"""Tasks of a preparation's workers, which import them from here: a test wants the `conftest` of its own folder."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from mai_thinking.data.documents import Document, Documents, Writer
from mai_thinking.data.work import Arrays, Work


def bytes_of(shard: int, found: Documents) -> Arrays:
    return {"sizes": found.records["size"], "of": np.full(len(found), os.getpid())}


def die_once(marker: Path, shard: int, found: Documents) -> Arrays:
    """In the third shard, as if memory had run out."""
    if shard == 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return bytes_of(shard, found)


def stored(work: Work, texts: list[str]) -> Documents:
    writer = Writer(work.texts, 0)
    for place, text in enumerate(texts):
        writer.add(Document(str(place), text))
    return writer.close().sharded()


def loiter(marker: Path, shard: int, found: Documents) -> Arrays:
    (marker / str(os.getpid())).touch()
    time.sleep(600)
    return {}


def wait_on_a_worker(marker: Path, shard: int, found: Documents) -> Arrays:
    """Note who tries the shard, and wait until the machine that will die has one, which may start later than all would
    be done. Its workers wait for their end, which takes the whole machine along."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    with (marker / f"{shard} tried").open("a") as file:
        file.write(f"{node}\n")
    doomed = (marker / "doomed").read_text()
    while node == doomed or not any(doomed in path.read_text() for path in marker.glob("* tried")):
        time.sleep(0.05)
    return bytes_of(shard, found)
