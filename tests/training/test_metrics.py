"""metrics.jsonl: each step once, recomputed steps compared bit for bit."""

import json
import math

import pytest

from mai_thinking.training.metrics import MetricsLog, NotReproducedError, read_records


def record(step: int, loss: float = 1.5, **more: object) -> dict:
    return {"step": step, "loss": loss, "grad_norm": 0.5, **more}


def test_a_step_computed_again_is_compared_and_not_written_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3):
        assert log.append(record(step, step / 3, seconds=0.1))
    log.close()
    log = MetricsLog(path)
    assert not log.append(record(2, 2 / 3, seconds=0.2))
    assert log.append(record(4))
    assert [entry["step"] for entry in read_records(path)] == [1, 2, 3, 4]
    assert read_records(path)[1]["seconds"] == 0.1


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("field", ["loss", "grad_norm"])
def test_the_last_bit_counts(tmp_path, field):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(record(7))
    again = record(7)
    again[field] = math.nextafter(again[field], 9)
    with pytest.raises(NotReproducedError, match=rf"step 7, .* gave {field} "):
        log.append(again)
    MetricsLog(tmp_path / "metrics.jsonl", tolerance=1e-9).append(again)


def test_on_a_gpu_the_last_bit_is_told(tmp_path, monkeypatch, capsys):
    """There a run that is struck must be able to go on."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(record(7))
    assert not log.append(record(7, 0.25))
    assert "warning: step 7, computed again after a restart, gave loss 0.25" in capsys.readouterr().err
    assert [entry["loss"] for entry in read_records(tmp_path / "metrics.jsonl")] == [record(7)["loss"]]


@pytest.mark.usefixtures("no_gpu")
def test_evaluations_are_records_of_their_own(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(record(7))
    evaluation = {"kind": "evaluation", "step": 7, "bits_per_byte": 2.0}
    assert log.append(evaluation, exact=("bits_per_byte",))
    assert not log.append(evaluation, exact=("bits_per_byte",))
    with pytest.raises(NotReproducedError, match="bits_per_byte"):
        log.append({**evaluation, "bits_per_byte": 3.0}, exact=("bits_per_byte",))


def test_torn_last_line_is_cut_off(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append(record(1))
    with path.open("a") as stream:
        stream.write(json.dumps(record(2))[:-9])
    assert [entry["step"] for entry in read_records(path)] == [1]
    log = MetricsLog(path)
    assert "torn last line" in capsys.readouterr().err
    assert log.append(record(2))
    assert [entry["step"] for entry in read_records(path)] == [1, 2]


def test_not_a_number_equals_itself(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(record(1, math.nan))
    assert not MetricsLog(tmp_path / "metrics.jsonl").append(record(1, math.nan))
