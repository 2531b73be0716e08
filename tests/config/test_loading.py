"""Config files: inheritance, overrides, and one clear line for each mistake."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mai_thinking.config.base import Section
from mai_thinking.config.climb import ClimbConfig
from mai_thinking.config.distillation import DistillConfig
from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.ladder import LadderConfig
from mai_thinking.config.launch import LaunchSection
from mai_thinking.config.loading import load_config, read_yaml_with_base, save_config
from mai_thinking.config.mixture import MixtureConfig
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.config.study import StudyConfig
from mai_thinking.errors import UsageError

CONFIGS = Path(__file__).parents[2] / "configs"
SMALLEST = "name: a\nsteps: 5\nbatch: {context_length: 64, global_batch_size: 4, micro_batch_size: 2}\n"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALLEST)
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_of_ours_can_be_read(path: Path) -> None:
    tree = read_yaml_with_base(path)
    kinds: dict[str, type[Section]] = {
        "arms": StudyConfig, "stages": ClimbConfig, "baseline": LadderConfig,
        "traces": DistillConfig, "tasks": GrpoConfig, "samples": MixtureConfig,
    }  # fmt: skip
    kind = next((kind for key, kind in kinds.items() if key in tree), PretrainConfig)
    assert load_config(kind, path).name


def test_a_saved_config_reads_back_the_same(small: Path, tmp_path: Path) -> None:
    config = load_config(PretrainConfig, small, ["optimizer.betas=[0.8, 0.9]"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(PretrainConfig, tmp_path / "saved.yaml") == config


def test_base_is_laid_under_and_overrides_over(small: Path, tmp_path: Path) -> None:
    child = tmp_path / "below" / "child.yaml"
    child.parent.mkdir()
    child.write_text("base: ../small.yaml\nname: child\nbatch: {global_batch_size: 8}\n")
    config = load_config(PretrainConfig, child, ["batch.micro_batch_size=4"])
    assert (config.name, config.steps) == ("child", 5)
    assert (config.batch.context_length, config.batch.global_batch_size, config.batch.micro_batch_size) == (64, 8, 4)


def test_an_override_reaches_into_a_list(tmp_path: Path) -> None:
    tree = yaml.safe_load(SMALLEST)
    source = {"name": "x", "kind": "text", "path": "p", "category": "code", "licence": "MIT", "provenance": "human"}
    tree["data"] = {"sources": [source | {"weight": 1}]}
    path = tmp_path / "list.yaml"
    path.write_text(yaml.safe_dump(tree))
    config = load_config(PretrainConfig, path, ["data.sources.0.weight=7"])
    assert config.data.sources[0].weight == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.micro_batch_sise=2", "unknown key 'batch.micro_batch_sise'; did you mean 'micro_batch_size'"),
        ("stepz=2", "did you mean 'steps'"),
        ("steps=many", "steps: .* got 'many'"),
        ("steps=0", "steps: .* greater than or equal to 1"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate"),
        ("batch.micro_batch_size=3", ": batch.global_batch_size: 4 is not a multiple of micro_batch_size 3"),
        ("schedule.warmup_steps=6", "schedule.warmup_steps: 6 is more than the 5 steps"),
        ("name=../elsewhere", "name: "),
        ("execution.parallel=zero", "execution.parallel: .*'ddp' or 'fsdp'"),
        ("steps", "write it as key.path=value"),
        ("steps=[", "not valid YAML"),
        ("steps.more=1", "steps is a plain value"),
        ("data.sources=[{name: x}]", "data.sources"),
    ],
)
def test_a_mistake_gets_one_line(small: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_config(PretrainConfig, small, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"provenance": "third-party-model"}, "never trained on"),
        ({"provenance": "own-model"}, "human and procedural text only"),
        ({"provenance": None}, "provenance"),
        ({"licence": None}, "licence"),
        ({"licence": ""}, "licence"),
        ({"kind": "embedded", "path": "stdlibs"}, "did you mean 'stdlib'"),
        ({"held_out": False}, "nothing is held out to be evaluated on"),
    ],
)
def test_sources_say_where_they_come_from(small: Path, changes: dict[str, str | None], message: str) -> None:
    source = {"name": "x", "kind": "text", "path": "p", "category": "code", "licence": "MIT", "provenance": "human"}
    source = {key: value for key, value in (source | {"weight": 1} | changes).items() if value is not None}
    with pytest.raises(UsageError, match=message):
        load_config(PretrainConfig, small, [f"data.sources={yaml.safe_dump([source], default_flow_style=True)}"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: [", "line 1: not valid YAML"),
        ("- a list", "a config is a mapping"),
        ("base: bad.yaml", "leads back to itself"),
        ("base: smal.yaml", r"no such config file; did you mean .*small\.yaml"),
        ("", "is missing; add it"),
    ],
)
def test_a_broken_file_gets_one_line(small: Path, content: str, message: str) -> None:
    path = small.parent / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        load_config(PretrainConfig, path)


def test_a_mistake_is_told_before_torch_is_imported() -> None:
    """Configs import in a fraction of a second."""
    code = "import sys, mai_thinking.config.pretraining, mai_thinking.config.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_chaos_is_checked() -> None:
    with pytest.raises(ValueError, match="explode"):
        LaunchSection(chaos="explode:30s")


def test_a_climb_s_learning_rate_alone_leaves_its_other_values() -> None:
    """They are the report's for RL (§3.6), and not those of pre-training, whose section is the same."""
    config = load_config(GrpoConfig, CONFIGS / "tiny-grpo.yaml", ["optimizer={learning_rate: 1.0e-4}"])
    assert (config.optimizer.learning_rate, config.optimizer.betas) == (1e-4, (0.95, 0.95))
    assert (config.optimizer.epsilon, config.optimizer.weight_decay) == (1e-15, 0.0)
