"""A mixture search: its space keeps its caps, its regressions find what is there, the whole goes on where it was."""

import json
from pathlib import Path

import numpy as np
import pytest

from mai_thinking.config.loading import load_config
from mai_thinking.config.mixture import MixtureConfig
from mai_thinking.data import prepare
from mai_thinking.errors import UsageError
from mai_thinking.experiments import runs as runs_module
from mai_thinking.experiments.mixture import FINALS, run_mixture
from mai_thinking.experiments.mixture_space import MixtureSpace, Regression
from mai_thinking.report.mixture import write_report
from mai_thinking.training.evaluation import reference_of
from mai_thinking.training.model_files import load_model_and_tokenizer

ROOT = Path(__file__).parents[2]
START = {"code": 0.5, "prose": 0.3, "little": 0.2}


def space(little: int = 2_000, max_epochs: float = 8.0) -> MixtureSpace:
    return MixtureSpace.of(START, {"code": 10**6, "prose": 10**6, "little": little}, 10**5, max_epochs)


def test_no_mixture_repeats_a_source_more_often_than_allowed() -> None:
    """The small source gives at most 8 · 2,000 of 100,000 tokens; the start itself asked for a fifth."""
    drawn = space().draw(500, 1.0, np.random.default_rng(0))
    assert drawn.sum(axis=1) == pytest.approx(1.0)
    assert (drawn > 0).all()
    assert drawn[:, 2].max() == pytest.approx(0.16)
    assert (drawn[:, 2] < 0.159).mean() > 0.2
    assert space().start_S[:2] == pytest.approx(np.array([0.5, 0.3]) * 0.84 / 0.8)
    free = space(little=10**6).draw(500, 1.0, np.random.default_rng(0))
    assert free[:, 2].max() > 0.5  # the control


def test_too_little_text_for_the_target_is_told() -> None:
    with pytest.raises(UsageError, match="are 40% of the target's 1e\\+05 tokens; add sources"):
        MixtureSpace.of({"a": 1.0}, {"a": 5_000}, 1e5, 8.0)


def bowl(shares: np.ndarray, best: np.ndarray) -> np.ndarray:
    return 1 + 0.05 * ((np.log(shares) - np.log(best)) ** 2).sum(axis=1)


@pytest.mark.parametrize("noise", [0.0, 0.002])
def test_the_proposal_is_near_a_known_optimum(noise: float) -> None:
    rng, best = np.random.default_rng(0), np.array([0.2, 0.7, 0.1])
    there = space(little=10**6)
    shares = there.draw(60, 1.0, rng)
    scores = bowl(shares, best) + noise * rng.standard_normal(60)
    model = Regression.fit(shares, scores, seed=0)
    assert model.errors["both"] < 0.8 * model.errors["mean"]
    proposed = there.propose(model, 1.0, rng)
    assert bowl(proposed[None], best)[0] < bowl(there.start_S[None], best)[0] - 0.03
    assert bowl(proposed[None], best)[0] < np.median(scores)


def test_the_line_goes_on_where_trees_know_nothing() -> None:
    """The best mixture is beyond all that was drawn."""
    rng = np.random.default_rng(0)
    there = space(little=10**6)
    shares = there.draw(20, 0.3, rng)
    model = Regression.fit(shares, 1 - 0.1 * np.log(shares[:, 2] + 0.05), seed=0)
    assert model.errors["linear"] < 0.2 * model.errors["boosted"]
    assert there.propose(model, 1.0, rng)[2] > 1.2 * shares[:, 2].max()
    trees = Regression(model.models[1:], {})
    assert there.propose(trees, 1.0, rng)[2] < there.propose(model, 1.0, rng)[2]


def tiny(folder: Path) -> MixtureConfig:
    places = [f"output_dir={folder / 'search'}", f"run.data.cache_dir={folder / 'cache'}"]
    return load_config(MixtureConfig, ROOT / "configs" / "tiny-mixture.yaml", places)


def unseen(config: MixtureConfig) -> float:
    """Eq. 3 on the unseen sources, from the finals' and the small start's weights: the package counts five times as
    much as the manual."""
    data = prepare(config.unseen_data(), log=lambda _: None)
    seeds = [f"final-start-s{seed}" for seed in (1, 2)]
    first, *finals = (
        reference_of(*load_model_and_tokenizer(str(config.folder / "runs" / name / "final")), data, batch_size=8).sets
        for name in ("sample-000", *seeds)
    )
    names = {part: [name for name in first if name.startswith(part)] for part in ("filelock/", "pydantic-")}
    assert all(names.values())
    ratios = {part: np.mean([[f[n].nats / first[n].nats for n in own] for f in finals]) for part, own in names.items()}
    return float((0.5 * ratios["filelock/"] + 0.1 * ratios["pydantic-"]) / 0.6)


def test_a_search_whole_is_taken_up_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tmp_path)
    real, names = runs_module.pretrain, list[str]()

    def until_the_fourth(run: object) -> int:
        names.append(run.name)  # type: ignore[attr-defined]
        return 75 if len(names) == 4 else real(run)  # type: ignore[arg-type]

    monkeypatch.setattr(runs_module, "pretrain", until_the_fourth)
    assert run_mixture(config, report=write_report) == 75
    assert run_mixture(config, report=write_report) == 0
    assert names[:5] == ["sample-000", "sample-001", "sample-002", "sample-003", "sample-003"]
    assert len(names) == 1 + 8 + 2 * len(FINALS)
    assert len(set(names)) == len(names) - 1
    said = capsys.readouterr().out
    assert "sample-001: score " in said
    facts = json.loads((config.folder / "report" / "summary.json").read_text())
    assert [row["mixture"] for row in facts["finals"]] == list(FINALS)
    assert facts["samples"][0]["score"] == 1.0
    assert {row["score"] for row in facts["samples"][1:]} != {1.0}
    again = run_mixture(config, report=write_report)
    assert (again, len(names)) == (0, 15)  # nothing is left to do
    assert json.loads((config.folder / "report" / "summary.json").read_text()) == facts
    assert facts["finals"][0]["unseen"]["value"] == pytest.approx(unseen(config), rel=1e-5)
    small, final = (config.folder / "runs" / name / "config.yaml" for name in ("sample-001", "final-start-s1"))
    assert "down_sample: 0.00768" in small.read_text()  # 12 steps of 256 tokens, of 400,000
    assert "steps: 34" in final.read_text()  # 2.8 times


def test_the_dry_run_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path)
    assert run_mixture(config, dry_run=True) == 0
    assert "still to do:" in capsys.readouterr().out
    assert not (config.folder / "runs").exists()
