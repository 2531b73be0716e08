"""Records of where weights and traces came from: every byte accounted for, back to random weights, marks included."""

import hashlib
import io
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.errors import UsageError
from mai_thinking.provenance import lineage
from mai_thinking.provenance.lineage import (
    CodeVersion,
    Lineage,
    Record,
    Source,
    random_weights,
    read_lineage,
    record_id,
    record_model,
    record_traces,
    require_own,
    write_lineage,
)
from mai_thinking.recipes.pretrain import pretrain
from mai_thinking.report import lineage as lineage_report

SCRIPT = Path(__file__).parents[2] / "scripts" / "lineage.py"
TASKS = [Source(name="sums", licence="MIT", provenance="procedural", content="0" * 64)]


def run_folder(path: Path, *parts: str) -> Path:
    """RUN with a config.yaml, and RUN/final or RUN/traces with files of those names."""
    folder = path / ("traces" if parts[0].endswith("parquet") else "final")
    folder.mkdir(parents=True)
    (path / "config.yaml").write_text(f"name: {path.name}\n")
    for part in parts:
        (folder / part).write_bytes(f"{path.name}/{part}".encode() * 50)
    return folder


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """runs/base/final from random weights, runs/climb/traces that it wrote, runs/child/final that learned from both."""
    runs = tmp_path / "runs"
    base = run_folder(runs / "base", "model.safetensors", "config.json")
    root = random_weights(3, {"hidden_size": 32, "num_hidden_layers": 6})
    record_model(base, parents=[root], config=runs / "base" / "config.yaml", data=TASKS, seed=3, steps=20)
    start = require_own(base, allow_third_party=False)
    traces = run_folder(runs / "climb", "wave-0.parquet", "wave-1.parquet")
    record_traces(traces, parent=start, config=runs / "climb" / "config.yaml", data=TASKS, seed=4, steps=7)
    learned = require_own(traces, allow_third_party=False)
    child = run_folder(runs / "child", "model.safetensors")
    record_model(child, parents=[start, learned], config=runs / "child" / "config.yaml", seed=5, steps=9)
    return runs


def report(path: Path) -> tuple[bool, str]:
    """Whether all is well, and what is printed."""
    out = io.StringIO()
    return lineage_report.report(path, Console(file=out, width=300)), out.getvalue()


def flip(path: Path, position: int = -1) -> None:
    """Change one bit of one byte."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def tree_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "lineage.json").read_text())


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the record of `folder` as someone would who knows how ids are made."""
    before = read_lineage(folder)
    tree = before.record.model_dump(mode="json")
    change(tree)
    record = Record.model_validate(tree)
    records = {id: ancestor for id, ancestor in before.records.items() if id != before.id}
    write_lineage(folder, Lineage(record_id(record), records | {record_id(record): record}, before.places))


def test_ids_and_hashes_are_plain_sha256(family: Path) -> None:
    for folder in (family / "base" / "final", family / "climb" / "traces", family / "child" / "final"):
        tree = tree_of(folder)
        for id, record in tree["records"].items():
            canonical = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
            assert hashlib.sha256(canonical).hexdigest() == id
        own = tree["records"][tree["id"]]
        assert set(own["files"]) == {path.name for path in folder.iterdir()} - {"lineage.json"}
        for name, entry in own["files"].items():
            content = (folder / name).read_bytes()
            assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert own["config"] == hashlib.sha256((folder.parent / "config.yaml").read_bytes()).hexdigest()


def test_the_tree_leads_back_to_random_weights(family: Path) -> None:
    child = read_lineage(family / "child" / "final")
    assert [parent.record.kind for parent in child.parents] == ["model", "traces"]
    base, traces = child.parents
    assert traces.parents[0].id == base.id
    root = base.parents[0].record
    assert (root.kind, root.seed, root.parents) == ("random-weights", 3, ())
    well, out = report(family / "child" / "final")
    assert well
    for shown in (
        "9 steps",
        "7 steps",
        "20 steps",
        "random-weights",
        "seed 3, 6 layers of 32",
        "sums (MIT, procedural)",
    ):
        assert shown in out
    assert "5 files are as they were recorded" in out


@pytest.mark.parametrize(
    "name",
    [
        "child/final/model.safetensors",
        "base/final/model.safetensors",
        "base/final/config.json",
        "base/config.yaml",
        "climb/traces/wave-0.parquet",
        "climb/config.yaml",
        "child/config.yaml",
        "base/final/lineage.json",
        "child/final/lineage.json",
    ],
)
def test_one_changed_byte_is_named(family: Path, name: str) -> None:
    assert report(family / "child")[0]
    flip(family / name, 100 if name.endswith("lineage.json") else 3)
    well, out = report(family / "child")
    assert not well
    faults = [line for line in out.splitlines() if line.startswith("not as recorded: ")]
    assert len(faults) == 1
    assert Path(name).name in faults[0]
    assert Path(name).parts[0] in faults[0]


def test_no_byte_of_a_record_can_change(family: Path) -> None:
    path = family / "base" / "final" / "lineage.json"
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(content)
        flip(path, position)
        with pytest.raises(ValueError, match=r"lineage\.json"):
            read_lineage(path.parent)


def test_missing_and_added_files_are_named(family: Path) -> None:
    traces = family / "climb" / "traces"
    (traces / "wave-9.parquet").write_bytes(b"from elsewhere")
    with pytest.raises(UsageError, match=r"wave-9\.parquet: is not in the record"):
        require_own(traces, allow_third_party=False)
    (traces / "wave-9.parquet").unlink()
    (traces / "wave-1.parquet").unlink()
    with pytest.raises(UsageError, match=r"wave-1\.parquet: is missing"):
        require_own(traces, allow_third_party=False)


def test_growing_traces(family: Path) -> None:
    """Who learned from the first files is not disturbed by the next ones; a change in between is not believed."""
    traces, config = family / "climb" / "traces", family / "climb" / "config.yaml"
    start = require_own(family / "base" / "final", allow_third_party=False)
    (traces / "wave-2.parquet").write_bytes(b"more")
    record_traces(traces, parent=start, config=config, seed=4, steps=8)
    assert set(require_own(traces, allow_third_party=False).record.files) == {f"wave-{n}.parquet" for n in range(3)}
    assert report(family)[0]
    flip(traces / "wave-0.parquet")
    record_traces(traces, parent=start, config=config, seed=4, steps=9)
    with pytest.raises(UsageError, match=r"wave-0\.parquet: has changed"):
        require_own(traces, allow_third_party=False)
    flip(traces / "lineage.json", 100)
    with pytest.raises(UsageError, match="restore it"):
        record_traces(traces, parent=start, config=config, seed=4, steps=9)


def test_a_folder_without_a_record_is_refused_and_named(family: Path) -> None:
    base = family / "base" / "final"
    (base / "lineage.json").unlink()
    with pytest.raises(UsageError, match=r"has no record of where it comes from.*allow_third_party=true") as error:
        require_own(base, allow_third_party=False)
    assert "\n" not in str(error.value)
    well, out = report(base)
    assert not well
    assert f"{base}: has no record of where it comes from" in out
    with pytest.raises(UsageError, match="no such file or folder"):
        report(family / "nobody")
    (family / "empty").mkdir()
    with pytest.raises(UsageError, match="neither weights nor traces"):
        report(family / "empty")
    with pytest.raises(UsageError, match="no such folder"):
        require_own(family / "nobody", allow_third_party=True)


def test_an_override_marks_every_descendant(tmp_path: Path) -> None:
    outside = run_folder(tmp_path / "outside", "model.safetensors")
    parent = require_own(outside, allow_third_party=True)
    (mark,) = parent.record.overrides
    assert "'final'" in mark
    for name in ("first", "second"):
        folder = run_folder(tmp_path / name, "model.safetensors")
        record_model(folder, parents=[parent], config=tmp_path / name / "config.yaml", seed=0, steps=1)
        parent = require_own(folder, allow_third_party=False)  # a mark is shown, not refused again
        assert parent.record.overrides == (mark,)
    well, out = report(folder)
    assert well
    assert out.count("override: ") == 3
    assert "third-party" in out
    shutil.copytree(tmp_path, tmp_path.with_name("copy"))
    flip(outside / "model.safetensors")
    well, out = report(folder)
    assert not well
    assert f"{outside / 'model.safetensors'}: has changed" in out
    forge(folder, lambda record: record.update(overrides=[]))
    with pytest.raises(UsageError, match="hides what was let in"):
        require_own(folder, allow_third_party=False)


def test_forged_roots_and_sources_are_refused(family: Path) -> None:
    folder = family / "base" / "final"
    before = (folder / "lineage.json").read_text()
    forge(folder, lambda record: record["data"]["sources"][0].update(provenance="third-party-model"))
    with pytest.raises(UsageError, match="written by somebody else's model: sums"):
        require_own(folder, allow_third_party=False)
    (folder / "lineage.json").write_text(before)
    forge(folder, lambda record: record.update(parents=[]))
    with pytest.raises(UsageError, match="does not lead back to random weights"):
        require_own(folder, allow_third_party=False)
    (folder / "lineage.json").write_text(before)
    forge(folder, lambda record: record.update(parents=["f" * 64]))
    with pytest.raises(UsageError, match="lacks the record of ffffffffffff"):
        require_own(folder, allow_third_party=False)
    (folder / "lineage.json").write_text(before)
    found = read_lineage(folder)
    (root,) = found.record.parents
    other = found.records[root].model_copy(update={"seed": 4})
    write_lineage(folder, Lineage(found.id, {**found.records, root: other}, found.places))
    with pytest.raises(UsageError, match=f"the record of {root[:12]} has another hash"):
        require_own(folder, allow_third_party=False)


def test_moved_copied_and_replaced_folders(family: Path, tmp_path: Path) -> None:
    moved = family.rename(tmp_path / "elsewhere")
    well, out = report(moved / "child")
    assert well
    assert "5 files are as they were recorded" in out  # the ancestors' too, which moved along
    alone = shutil.copytree(moved / "child" / "final", tmp_path / "a" / "b" / "copy")
    assert require_own(alone, allow_third_party=False).parents[0].parents[0].record.kind == "random-weights"
    assert report(alone)[1].count("not there any more") == 2
    shutil.rmtree(moved / "base")
    base = run_folder(moved / "base", "model.safetensors")
    (base / "model.safetensors").write_bytes(b"another run's")
    record_model(base, parents=[random_weights(8, {})], config=moved / "base" / "config.yaml", seed=8, steps=1)
    well, out = report(moved / "child")
    assert well
    assert "another is there now" in out


def test_code_that_took_part_before_a_restart_is_remembered(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, child = family / "base" / "final", family / "child" / "final"
    parents, code = lineage.resuming_from(base, [])
    monkeypatch.setattr(lineage, "code_version", lambda: CodeVersion(sha256="1" * 64, commit=None))
    record_model(child, parents=parents, config=family / "child" / "config.yaml", seed=0, steps=1, code=code)
    record = read_lineage(child).record
    assert [version.sha256 for version in record.code] == [code[0].sha256, "1" * 64]
    assert record.parents == read_lineage(base).record.parents
    (base / "lineage.json").unlink()
    assert lineage.resuming_from(base, parents) == (parents, ())


# ------------------------------------------------------------------------------------------------- a run's own records


def copied(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


def test_a_run_records_its_model_and_checkpoints(tiny_run: Path) -> None:
    final = read_lineage(tiny_run / "final")
    checkpoint = read_lineage(tiny_run / "checkpoints" / "step-00000020")
    assert (final.record.kind, checkpoint.record.kind) == ("model", "checkpoint")
    assert final.record.steps == checkpoint.record.steps == 20
    assert final.record.parents == checkpoint.record.parents
    root = final.parents[0].record
    config = json.loads((tiny_run / "final" / "config.json").read_text())
    assert root.architecture is not None
    assert {name: root.architecture[name] for name in ("hidden_size", "num_experts", "vocab_size")} == {
        name: config[name] for name in ("hidden_size", "num_experts", "vocab_size")
    }
    assert final.record.data is not None
    assert {(s.name, s.licence, s.provenance) for s in final.record.data.sources} == {
        ("manuals", "PSF-2.0", "human"),
        ("exercises", "MIT", "procedural"),
    }
    manifest = (tiny_run / "final" / "data_manifest.json").read_bytes()
    assert final.record.data.manifest == hashlib.sha256(manifest).hexdigest()
    well, out = report(tiny_run)
    assert well
    assert out.count("checkpoint ") == len(list((tiny_run / "checkpoints").iterdir()))


@pytest.mark.parametrize(
    "name",
    [
        "final/model.safetensors",
        "final/tokenizer.json",
        "final/data_manifest.json",
        "checkpoints/step-00000020/rank-00000.safetensors",
        "checkpoints/step-00000020/manifest.json",
        "checkpoints/step-00000020/lineage.json",
    ],
)
def test_one_changed_byte_of_a_run_is_named(tiny_run: Path, tmp_path: Path, name: str) -> None:
    run = copied(tiny_run, tmp_path)
    flip(run / name, -9)
    well, out = report(run)
    faults = [line for line in out.splitlines() if line.startswith("not as recorded: ")]
    assert not well
    assert len(faults) == 1
    assert Path(name).name in faults[0]
    assert Path(name).parts[-2] in faults[0]


def test_changed_prepared_data_is_named(tiny_run: Path, tmp_path: Path) -> None:
    """The manifest and the tokens in the cache; the clock's part of the manifest is nobody's evidence."""
    final = read_lineage(tiny_run / "final")
    data = final.record.data
    assert data is not None
    assert data.manifest is not None
    prepared = shutil.copytree(final.places[data.manifest], tmp_path / final.places[data.manifest].name)
    manifest = json.loads((prepared / "manifest.json").read_text())
    (prepared / "manifest.json").write_text(json.dumps(manifest | {"seconds": {}}))
    assert lineage_report.data_faults(prepared, data) == []
    flip(prepared / "manuals.tokens.npy")
    assert "manuals.tokens.npy has changed" in str(lineage_report.data_faults(prepared, data)[0])
    manifest["sources"]["manuals"]["licence"] = "MIT"
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    assert str(lineage_report.data_faults(prepared, data)[0]) == (
        f"{prepared / 'manifest.json'}: has changed since it was recorded"
    )


def test_a_run_starts_from_own_weights_or_says_so(
    tiny_run: Path, tmp_path: Path, tiny_config: Callable[..., PretrainConfig]
) -> None:
    outside = shutil.copytree(tiny_run / "final", tmp_path / "outside")
    (outside / "lineage.json").unlink()
    changed = shutil.copytree(tiny_run / "final", tmp_path / "changed")
    flip(changed / "model.safetensors")
    stage = ["steps=5", "evaluation.every=100", "evaluation.sample_prompts=[]"]
    for start, message in [(outside, "has no record"), (changed, r"model\.safetensors: has changed")]:
        source = [f"init_from={start}", f"data.tokenizer.path={start}"]
        with pytest.raises(UsageError, match=rf"{message}.*allow_third_party=true"):
            pretrain(tiny_config(tmp_path / "run", *source, *stage))
        assert not (tmp_path / "run" / "final").exists()
    own, marked = (
        [f"init_from={start}", f"data.tokenizer.path={start}", *more]
        for start, more in [(tiny_run / "final", []), (outside, ["allow_third_party=true"])]
    )
    assert pretrain(tiny_config(tmp_path / "own", *own, *stage)) == 0
    child = read_lineage(tmp_path / "own" / "final")
    assert child.record.parents == (read_lineage(tiny_run / "final").id,)
    assert child.record.overrides == ()
    assert pretrain(tiny_config(tmp_path / "marked", *marked, *stage)) == 0
    for folder in (tmp_path / "marked" / "final", tmp_path / "marked" / "checkpoints" / "step-00000005"):
        (mark,) = read_lineage(folder).record.overrides
        assert "'outside', which has no record" in mark


def test_the_script_exits_as_promised(
    family: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(path: Path) -> int:
        monkeypatch.setattr(sys, "argv", ["lineage.py", str(path)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return int(end.value.code or 0)

    assert run(family) == run(family / "child" / "final" / "model.safetensors") == 0
    flip(family / "base" / "final" / "model.safetensors")
    capsys.readouterr()
    assert run(family) == 1
    assert f"not as recorded: {family / 'base' / 'final' / 'model.safetensors'}" in capsys.readouterr().out
    assert run(family / "nobody") == 2
