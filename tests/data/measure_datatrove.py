"""Near duplicates by datatrove's MinHash and by ours, on the same text in one process: `measure_datatrove.py MB` prints
JSON. Needs `pip install datatrove orjson`. Both read JSONL and write what is kept; both have the same words, so that
the tokenizer of datatrove does not count. Seconds are of the processor.
"""

import json
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datatrove.pipeline.dedup.minhash as minhash
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig
from loguru import logger
from measure_speed import texts

from mai_thinking.config.data import CleaningSection
from mai_thinking.data.cleaning import with_words
from mai_thinking.data.documents import Document, Writer
from mai_thinking.data.duplicates import near_duplicates
from mai_thinking.data.jsonl import read_jsonl
from mai_thinking.data.words import words_of
from mai_thinking.data.work import Work


class Words:
    """In place of datatrove's word tokenizer."""

    word_tokenize = staticmethod(words_of)


def ours(source: Path, folder: Path) -> int:
    """Documents kept."""
    work = Work(folder / "work", processes=1)
    writer = Writer(work.texts, 0)
    for line in read_jsonl(source):
        writer.add(Document(str(line.number), line.value["text"]))
    documents = with_words(writer.close().sharded(), work)
    twins = near_duplicates(documents, CleaningSection(near_duplicates=0.8), work)
    kept = [document for place, document in enumerate(documents) if twins[place] == place]
    with (folder / "kept.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": document.text}) + "\n" for document in kept)
    return len(kept)


def theirs(source: Path, folder: Path) -> int:
    """Documents kept."""
    minhash.load_word_tokenizer = lambda language: Words()
    config, at = (
        minhash.MinhashConfig(hash_config=HashConfig(hash_fc="sha1")),
        str(folder),
    )  # its xxhash wants xxhash < 4
    stages: list[tuple[list[Any], int]] = [
        ([JsonlReader(str(source.parent)), minhash.MinhashDedupSignature(f"{at}/sig", config=config)], 1),
        ([minhash.MinhashDedupBuckets(f"{at}/sig", f"{at}/buckets", config=config)], config.num_buckets),
        ([minhash.MinhashDedupCluster(f"{at}/buckets", f"{at}/remove", config=config)], 1),
        ([JsonlReader(str(source.parent)), minhash.MinhashDedupFilter(f"{at}/remove"),
          JsonlWriter(f"{at}/kept", compression=None)], 1),
    ]  # fmt: skip
    for number, (steps, tasks) in enumerate(stages):
        LocalPipelineExecutor(pipeline=steps, tasks=tasks, workers=1, logging_dir=f"{at}/log-{number}").run()
    return sum(1 for path in (folder / "kept").rglob("*.jsonl") for _ in path.open())


def seconds() -> float:
    """Of the processor, of this process and those that it started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main(megabytes: float) -> None:
    """Both, ours first."""
    logger.remove()
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "text" / "text.jsonl"
        source.parent.mkdir()
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(megabytes)))
        size = source.stat().st_size / 1e6
        found: dict[str, Any] = {"mb": size}
        engines: dict[str, Callable[[Path, Path], int]] = {"ours": ours, "datatrove": theirs}
        for engine, run in engines.items():
            folder = Path(name) / engine
            folder.mkdir()
            begin = seconds()
            kept = run(source, folder)
            found[engine] = {"kept": kept, "mb_per_s": size / (seconds() - begin)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(float(sys.argv[1]))
