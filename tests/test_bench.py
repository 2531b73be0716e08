"""The benchmarks' own arithmetic, and each of them on sizes that take no time."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mai_thinking.bench import card, command, exchange, growth, moe, rollout, train
from mai_thinking.bench.machine import describe, sample_ceiling
from mai_thinking.bench.measure import Figure, Result, Row, Turn, alternate, as_json, as_text, milliseconds, rate, ratio
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import Batch, prepare
from mai_thinking.errors import UsageError
from mai_thinking.model import MaiThinkingConfig
from mai_thinking.model.configuration import GLOBAL, LOCAL
from tiny_models import tiny_model


def test_sides_take_turns_and_only_their_own_time_counts() -> None:
    now, order = 0.0, []

    def side(name: str, takes: float, amount: float | None) -> Callable[[], float | None]:
        def work() -> float | None:
            nonlocal now
            now += takes
            order.append(name)
            return amount

        return work

    sides = {"a": side("a", 2.0, None), "b": side("b", 3.0, 30.0)}
    turns = alternate(sides, rounds=3, warmup=1, clock=lambda: now)
    assert "".join(order) == "abbaabba"  # so that neither side always has the other just before it
    assert turns == {"a": [Turn(2.0, 1.0)] * 3, "b": [Turn(3.0, 30.0)] * 3}


def test_figures() -> None:
    figure = Figure.of([5.0, 1.0, 2.0, 4.0, 3.0], "ms")
    assert figure == Figure(3.0, 2.0, 4.0, 5, "ms")
    assert figure.text() == "3 (2 … 4)"
    assert Figure.of([7.0], "%").text() == "7"
    turns = [Turn(0.5, 10.0), Turn(0.25, 10.0), Turn(1.0, 10.0)]
    assert milliseconds(turns).median == 500.0
    assert rate(turns, "tokens/s").median == 20.0


def test_a_ratio_is_taken_round_by_round_and_for_the_same_amount() -> None:
    """A machine that is three times slower in one round is so for both sides."""
    ours = [Turn(1.0, 1.0), Turn(3.0, 1.0), Turn(1.0, 1.0)]
    theirs = [Turn(2.0, 1.0), Turn(6.0, 1.0), Turn(2.0, 1.0)]
    assert ratio(theirs, ours) == Figure(2.0, 2.0, 2.0, 3, "×")
    assert ratio([Turn(2.0, 4.0)], [Turn(1.0, 1.0)]).median == 0.5


def test_a_result_says_the_same_in_both_forms() -> None:
    rows = [Row({"tokens": n}, {"ours": Figure.of([float(n), n + 1.0], "ms")}) for n in (1, 512)]
    result = Result([*rows, Row({"operator": "bmm"}, {"share": Figure.of([61.5], "%")})], ["a note"])
    shared = {"product": Figure.of([90.0], "GFLOP/s")}, describe()
    text, line = as_text(result, *shared), as_json("moe", result, *shared)
    assert "512 (512 … 513)" in text
    assert text.count("ours ms") == 1  # one table for rows of the same columns
    for part in ("operator", "61.5", "a note", "product 90 GFLOP/s", torch.__version__):
        assert part in text
    read = json.loads(line)
    assert read["rows"][1] == {
        "case": {"tokens": 512},
        "figures": {"ours": {"median": 512.5, "low": 512.25, "high": 512.75, "count": 2, "unit": "ms"}},
    }
    assert {"cpu", "cores", "threads", "torch", "transformers"} <= read["machine"].keys()
    assert "\n" not in line


def test_the_ceiling_counts_both_ways_of_a_copy() -> None:
    turns = sample_ceiling(size=8, megabytes=1, rounds=2)
    assert [turn.amount for turn in turns["product"]] == [pytest.approx(2e-9 * 8**3)] * 2
    assert [turn.amount for turn in turns["copy"]] == [pytest.approx(2e-9 * 2**20)] * 2


def test_moe_compares_layers_that_compute_the_same() -> None:
    layer = moe.Layer(experts=16, top_k=3, latent=8, inner=12)
    inputs = torch.randn(5, 8), torch.rand(5, 16).topk(3).indices, torch.rand(5, 3)
    with torch.no_grad():
        for name in moe.PEERS[moe.DECODING]:
            assert (layer.compute(name, *inputs) - layer.compute("ours", *inputs)).abs().max() < 1e-6, name
    for what in (moe.DECODING, moe.TRAINING):
        row = layer.compare(what, 5, 2)
        assert row.case["fastest peer"] in moe.PEERS[what]
        assert row.figures["ours"].count == 2


def test_training_and_loading(tmp_path: Path, tiny_config: Callable[..., PretrainConfig]) -> None:
    config = tiny_config(tmp_path / "run", "steps=4", "schedule.warmup_steps=0")
    row, waiting, *shares = train.compare(config, 2).rows
    assert row.figures.keys() == {"ours", "grouped_mm", "ratio", "ours, rate"}
    assert 0.0 <= waiting.figures["waiting"].median <= 100.0
    assert 0.0 < sum(share.figures["share"].median for share in shares) <= 100.0 + 1e-6
    assert "aten::mm" in {share.case["operator"] for share in shares}
    assert not (tmp_path / "run").exists()


def test_growth(tmp_path: Path, tiny_config: Callable[..., PretrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[set[str]] = []

    class Learner(growth.BenchLearner):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            kinds.append({layer.kind for layer in self.model.model.layers})

    monkeypatch.setattr(growth, "BenchLearner", Learner)
    data = prepare(tiny_config(tmp_path / "run").data)
    path = str(Path(__file__).parents[1] / "configs" / "tiny.yaml")
    rows = growth.sweep("experts", {8: ["model.num_experts=8"], 16: []}, data, 2, path)
    assert [row.case for row in rows] == [{"grows": "experts", "to": 8}, {"grows": "experts", "to": 16}]
    assert rows[0].figures["to first"].median == 1.0
    growth.sweep(growth.LOCAL_LAYERS, {8: []}, data, 2, path)
    assert GLOBAL in kinds[0]
    assert kinds[-1] == {LOCAL}


def test_the_link_between_ranks() -> None:
    """What is predicted of groups, in closed form; and ranks that carry rows over such a link."""
    assert exchange.predicted(3.0, 1.0, 1) == 3.0 + 4 * 1.0
    assert exchange.predicted(300.0, 1.0, 4) == pytest.approx(300.0 + 4 * 1.0 / 4)  # the first out, the last home
    assert exchange.predicted(0.003, 1.0, 4) == pytest.approx(4 * 1.0, rel=0.01)
    sizes = exchange.Sizes(experts=8, top_k=2, latent=8, inner=12, tokens=50, rate=4e4)
    rows = exchange.compare(sizes, 2).rows
    assert [row.case["groups"] for row in rows] == 2 * list(exchange.GROUPS)
    assert rows[4].figures["time"].median > 4 * 24.0  # ms: at least 30 of 100 rows leave, each way


def test_rollouts() -> None:
    rows = rollout.compare(tiny_model(), 2, requests=3, longest=6, slots=2).rows
    assert [row.case.get("lengths") for row in rows[:2]] == ["as they fall", "all 3"]
    assert rows[0].figures.keys() == {"engine", "generate", "engine to generate"}
    assert rows[2].figures["max |Δ log p|"].median < 1e-4


def test_the_last_line_is_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(model: Path, rounds: int) -> Result:
        return Result([Row({"model": str(model)}, {"x": Figure.of([1.0] * rounds, "s")})], [])

    monkeypatch.setattr("mai_thinking.bench.zero_start.measure", measure)
    small = functools.partial(sample_ceiling, size=16, megabytes=1)
    monkeypatch.setattr("mai_thinking.bench.machine.sample_ceiling", small)
    command.run(["zero-start", "some/model", "--rounds", "3", "--json"])
    read: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert read["rows"][0]["case"] == {"model": "some/model"}
    assert read["rows"][0]["figures"]["x"]["count"] == 3
    assert read["ceiling"].keys() == {"product", "copy"}
    assert read["ceiling"]["product"]["count"] == 10  # before and after
    with pytest.raises(UsageError, match="argument --rounds"):
        command.run(["moe", "--rounds", "1"])


def test_the_command_line_answers_without_torch() -> None:
    code = "import sys; from mai_thinking.bench.command import run; sys.argv = ['bench', '-h']; run()"
    check = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in command.BENCHES)
    assert done.stdout.endswith("False\n")


def test_the_flops_of_a_step_count_the_pairs_that_documents_leave() -> None:
    architecture = MaiThinkingConfig(num_hidden_layers=6, sliding_window=16, vocab_size=1000)
    whole, halves = torch.arange(64).expand(2, 64), torch.arange(32).repeat(2).expand(2, 64)

    def flops(positions: torch.Tensor) -> float:
        return card.step_flops(architecture, Batch([{"position_ids": positions}] * 3, []))

    assert flops(whole) == pytest.approx(6 * 64 * architecture.flops_per_token(64))
    assert flops(halves) == pytest.approx(6 * 64 * architecture.flops_per_token(32))
    # Products are the same; of 6 rows and 6 layers, the keys of 5 with a window of 16 and of a global one.
    seen = {n: 5 * sum(min(i, 16) for i in range(1, n + 1)) + sum(range(1, n + 1)) for n in (32, 64)}
    scores = 12 * architecture.num_attention_heads * architecture.head_dim * 6 * (seen[64] - 2 * seen[32])
    assert flops(whole) - flops(halves) == pytest.approx(scores)


def test_a_card_is_measured_where_there_is_one() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no GPU here"):
            card.measure(Path("nowhere"), 2)
