"""The benchmarks' own arithmetic, and each of them on sizes that take no time."""

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mai_thinking.bench import card, command, growth, moe, rollout, train
from mai_thinking.bench.learner import BenchLearner
from mai_thinking.bench.machine import Ceiling, Options, describe
from mai_thinking.bench.profile import ATTENTION, OPTIMISER, PRODUCTS, kernel_rows, own_times, profile_rows
from mai_thinking.bench.result import Result, Row
from mai_thinking.bench.timing import Figure, Turn, alternate, fastest, milliseconds, rate, ratio
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import Batch, prepare
from mai_thinking.errors import UsageError
from mai_thinking.model import MaiThinkingConfig
from mai_thinking.model.configuration import GLOBAL, LOCAL
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def options() -> Options:
    ceiling = Ceiling(size=64, megabytes=1)
    ceiling.sample(rounds=2)
    return Options(Path("nowhere"), 2, ceiling)


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
    assert fastest({"slow": theirs, "fast": ours}) == "fast"
    assert fastest({"little": ours, "much": [Turn(2.0, 8.0)]}) == "much"


def test_a_result_says_the_same_in_both_forms() -> None:
    rows = [Row({"tokens": n}, {"ours": Figure.of([float(n), n + 1.0], "ms")}) for n in (1, 512)]
    result = Result("moe", [*rows, Row({"operation": "bmm"}, {"share": Figure.of([61.5], "%")})], ["a note"])
    result.ceiling = {"product": Figure.of([90.0], "GFLOP/s")}
    result.machine = describe()
    text = result.text()
    assert "512 (512 … 513)" in text
    assert text.count("ours ms") == 1  # one table for rows of the same columns
    for part in ("operation", "61.5", "a note", "product 90 GFLOP/s", torch.__version__):
        assert part in text
    read = json.loads(result.json())
    assert read["rows"][1] == {
        "case": {"tokens": 512},
        "figures": {"ours": {"median": 512.5, "low": 512.25, "high": 512.75, "count": 2, "unit": "ms"}},
    }
    assert {"cpu", "cores", "threads", "torch", "transformers"} <= read["machine"].keys()
    assert "\n" not in result.json()


def test_the_ceiling_counts_both_ways_of_a_copy() -> None:
    ceiling = Ceiling(size=8, megabytes=1)
    ceiling._products = [Turn(2.0, ceiling._multiply())]
    ceiling._copies = [Turn(1.0, ceiling._copy())]
    assert math.isclose(ceiling.product_milliseconds(2 * 8**3), 2000.0)
    assert math.isclose(ceiling.copy_milliseconds(2 * 2**20), 1000.0)
    assert ceiling._out.equal(ceiling._a @ ceiling._b)


def test_a_profile_gives_inner_operations_to_what_they_are_part_of() -> None:
    weight = torch.nn.Parameter(torch.randn(400, 400))
    optimizer = torch.optim.AdamW([weight], foreach=False)
    x = torch.randn(2, 4, 200, 64)

    def work() -> None:
        F.scaled_dot_product_attention(x, x, x)
        F.cross_entropy(weight @ weight, torch.zeros(400, dtype=torch.long)).backward()
        weight.detach().cumsum(0)
        optimizer.step()

    rows = profile_rows(work, least=0.0)
    shares = {row.case["operation"]: row.figures["share"].median for row in rows}
    assert {PRODUCTS, ATTENTION, OPTIMISER, "cumsum", "other"} <= shares.keys()
    assert "addcdiv_" not in shares  # the optimiser's
    assert not any(name in shares for name in ("mm", "bmm"))
    assert math.isclose(sum(shares.values()), 100.0)
    assert profile_rows(work, least=101.0)[0].figures["share"].median == pytest.approx(100.0)


def test_an_operation_does_not_count_what_runs_inside_it() -> None:
    spans = [
        (1, 0, 100, "Optimizer.step#AdamW.step"),
        (1, 10, 30, "aten::mm"),
        (1, 100, 160, "aten::linear"),
        (1, 110, 150, "aten::t"),
        (1, 120, 130, "aten::mm"),
        (2, 0, 50, "aten::copy_"),  # beside the optimiser, not in it
    ]
    assert own_times(spans) == {OPTIMISER: 100, PRODUCTS: 60 - 40 + 10, "t": 30, "copy_": 50}


def test_moe_compares_layers_that_compute_the_same(options: Options) -> None:
    bench = moe.Layer(experts=16, top_k=3, latent=8, inner=12)
    x, gates = torch.randn(5, 8), torch.rand(5, 3)
    chosen = torch.rand(5, 16).topk(3).indices
    with torch.no_grad():
        expected = moe.bucketed_experts(bench.ours, x, chosen, gates)
        for name in moe.PEERS[moe.DECODING]:
            assert (bench._peer(name)(x, chosen, gates) - expected).abs().max() < 1e-6, name
    for what in (moe.DECODING, moe.TRAINING):
        row = bench.compare(what, 5, options)
        figures = row.figures
        assert row.case["fastest peer"] in moe.PEERS[what]
        assert figures["ours"].count == options.rounds
    flops = 6 * 15 * (3 * 8 * 12)
    assert figures["arithmetic"].median == pytest.approx(options.ceiling.product_milliseconds(flops))


def test_training_and_loading(options: Options, tmp_path: Path, tiny_config: Callable[..., PretrainConfig]) -> None:
    config = tiny_config(tmp_path / "run", "steps=4", "schedule.warmup_steps=0")
    row, waiting, *shares = train.compare(config, options).rows
    assert row.figures.keys() == {"ours", "grouped_mm", "ratio", "ours, rate"}
    assert {PRODUCTS, OPTIMISER} <= {share.case["operation"] for share in shares}  # the rest may be next to nothing
    assert 0.0 <= waiting.figures["waiting"].median <= 100.0
    assert not (tmp_path / "run").exists()


def test_growth(options: Options, tmp_path: Path, tiny_config: Callable[..., PretrainConfig]) -> None:
    config = tiny_config(tmp_path / "run")
    path = Path(__file__).parents[1] / "configs" / "tiny.yaml"
    sizes = {8: ["model.num_experts=8"], 16: []}
    rows = growth.sweep("experts", sizes, prepare(config.data), options, str(path))
    assert [row.case for row in rows] == [{"grows": "experts", "to": "8"}, {"grows": "experts", "to": "16"}]
    assert rows[0].figures["to first"].median == 1.0


def test_local_layers_alone(tmp_path: Path, tiny_config: Callable[..., PretrainConfig]) -> None:
    config = tiny_config(tmp_path / "run")
    data = prepare(config.data)
    kinds = [
        [layer.kind for layer in learner.model.model.layers]
        for learner in (BenchLearner(config, data), BenchLearner(config, data, local_layers_alone=True))
    ]
    assert GLOBAL in kinds[0]
    assert set(kinds[1]) == {LOCAL}


def test_rollouts(options: Options) -> None:
    result = rollout.compare(tiny_model(), options, about="tiny", requests=3, longest=6, slots=2)
    assert [row.case.get("lengths") for row in result.rows[:2]] == ["as they fall", "all 3"]
    assert result.rows[0].figures.keys() == {"engine", "generate", "engine to generate"}


def test_the_last_line_is_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(options: Options) -> Result:
        return Result("zero-start", [Row({"model": str(options.model)}, {"x": Figure.of([1.0], "s")})])

    monkeypatch.setattr("mai_thinking.bench.zero_start.measure", measure)
    monkeypatch.setattr("mai_thinking.bench.machine.Ceiling", lambda: Ceiling(size=16, megabytes=1))
    command.run(["zero-start", "some/model", "--rounds", "3", "--json"])
    read: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert read["rows"][0]["case"] == {"model": "some/model"}
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


def test_a_card_is_measured_where_there_is_one(options: Options) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no GPU here"):
            card.measure(options)


def test_kernels_by_kind() -> None:
    spent = Counter({"nvjet_sm90_tst": 50, "triton_poi_fused_add": 20, "triton_tem_fused_flex_attention": 25, "odd": 5})
    rows = kernel_rows(spent, kernels=2)
    shares = {str(row.case["kernels"]): row.figures["share"].median for row in rows[:4]}
    assert shares == {PRODUCTS: 50.0, ATTENTION: 25.0, "compiled": 20.0, "other": 5.0}
    assert [row.case["kernel"] for row in rows[4:]] == ["nvjet_sm90_tst", "triton_tem_fused_flex_attention"]
