"""Config values that nobody would write on purpose: each is taken, and then saved and read back alike, or refused in
one line. The seeds are fixed."""

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mai_thinking.config.base import Section
from mai_thinking.config.climb import ClimbConfig
from mai_thinking.config.command import exit_with, option
from mai_thinking.config.distillation import DistillConfig
from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.launch import LaunchSection
from mai_thinking.config.loading import load_config, parse_yaml, save_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.errors import UsageError

CONFIGS = Path(__file__).parents[2] / "configs"
KINDS: dict[str, type[Section]] = {
    "tiny": PretrainConfig,
    "tiny-grpo": GrpoConfig,
    "tiny-distill": DistillConfig,
    "tiny-climb": ClimbConfig,
}
ODD = (
    *("0", "-1", "1", "2", "3", "7", "1.5", "-0.0", ".nan", ".inf", "-.inf", "1e-40", "1e-7", "1e300", "0x10", "010"),
    *("9" * 20, "2147483648", "1:30", "1_000", "yes", "null", "~", "''", "x", "'ü'", "'\ud83d'", '"\\0"', '"\\ud83d"'),
    *(
        "2024-99-99",
        "2024-01-01",
        "[]",
        "{}",
        "[1]",
        "[2,1]",
        "[0.9,0.1]",
        "[.nan,1]",
        "{a: 1}",
        "{1: 2}",
        "{a: {b: {}}}",
    ),
    *("&a [*a]", "[[[[]]]]", "!!python/object:os.system x", *"!*&[{-?%@`|>/.", "..", "~/x", "/dev/null/x"),
)
values = (
    st.sampled_from(ODD)
    | st.integers(0, 64).map(str)
    | st.floats(0, 1).map(repr)
    | st.integers().map(str)
    | st.floats().map(repr)
    | st.text(max_size=8)
)


def paths_in(tree: Any, prefix: str = "") -> Iterator[str]:
    """The `key.path` of everything in a config."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield f"{prefix}{key}"
        yield from paths_in(value, f"{prefix}{key}.")


PATHS = {
    name: sorted(paths_in(load_config(kind, CONFIGS / f"{name}.yaml").model_dump(mode="json")))
    for name, kind in KINDS.items()
}
overrides = st.sampled_from(sorted(KINDS)).flatmap(
    lambda name: st.tuples(
        st.just(name),
        st.lists(st.builds("{}={}".format, st.sampled_from(PATHS[name]), values), min_size=1, max_size=3),
    )
)


def numbers_in(tree: Any) -> Iterator[float]:
    """All numbers of a config."""
    if isinstance(tree, int | float):
        yield tree
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from numbers_in(value)


def tried(act: Callable[[], Any]) -> tuple[Any, str]:
    """What comes out, or None and the line that is told instead."""
    try:
        return act(), ""
    except UsageError as error:
        return None, str(error)


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(overrides)
def test_a_value_is_taken_or_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, case: Any) -> None:
    name, given_overrides = case
    config, told = tried(lambda: load_config(KINDS[name], CONFIGS / f"{name}.yaml", given_overrides))
    assert "\n" not in told
    assert len(told) < 1_000
    if config is None:
        return
    assert all(math.isfinite(number) for number in numbers_in(config.model_dump(mode="json")))
    saved = tmp_path_factory.getbasetemp() / "saved.yaml"
    save_config(config, saved)
    assert load_config(KINDS[name], saved) == config


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(st.text(max_size=60) | st.text("{}[]:,-&*!|>'\"# \n\tab01.~?%@", max_size=60))
def test_any_text_is_yaml_or_refused_in_one_line(text: str) -> None:
    value, told = tried(lambda: parse_yaml(text, "x.yaml"))
    assert "\n" not in told
    assert not told or told.startswith("x.yaml")
    yaml.safe_dump(value)


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(st.sampled_from(sorted(LaunchSection.model_fields)), values)
def test_options_of_the_launcher_are_bounded(name: str, text: str) -> None:
    with contextlib.suppress(ValueError):
        section = LaunchSection.model_validate({name: text})
        assert all(math.isfinite(number) for number in numbers_in(section.model_dump()))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=600, derandomize=True, deadline=None, database=None)
@given(st.lists(st.builds("{}={}".format, st.sampled_from(PATHS["tiny"]), values), min_size=1, max_size=2))
def test_a_dry_run_ends_with_a_known_exit_code(given_overrides: list[str]) -> None:
    """No traceback: whatever is not an exit code of ours is raised here."""
    from mai_thinking.recipes.pretrain import pretrain

    def main() -> int:
        return int(pretrain(load_config(PretrainConfig, CONFIGS / "tiny.yaml", given_overrides), dry_run=True) or 0)

    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as told,
        pytest.raises(SystemExit) as end,
    ):
        exit_with(main)
    assert end.value.code in (0, 2, 3, 75)
    assert told.getvalue().count("\n") <= 2


def test_an_option_without_bounds_would_be_seen() -> None:
    """The negative control: what argparse's own `float` takes."""
    assert math.isnan(float("nan"))
    with pytest.raises(Exception, match="finite"):
        option(float)("nan")
