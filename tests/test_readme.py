"""The README against the script that runs its commands, and its links against the tree."""

import re
from pathlib import Path

from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from readme_commands import ADDED, INSTEAD, ROOT, blocks, readme_commands


def test_what_is_run_in_their_place_are_the_readmes_commands() -> None:
    """A long one that changed would be run in full, or not at all."""
    commands = readme_commands()
    assert len(commands) > 20
    assert [command for command in (*ADDED, *INSTEAD) if command not in commands] == []
    long = [
        c
        for c in commands
        if re.search(r"(pretrain|grpo|climb|study|self_distill|ladder)\.py", c) and "--dry-run" not in c
    ]
    assert [command for command in long if command not in ADDED and command not in INSTEAD] == []


def test_examples_are_valid_configs(tmp_path: Path) -> None:
    """Each laid over the config that it is a part of."""
    examples = blocks("yaml")
    assert len(examples) == 2
    for example, kind, base in zip(examples, (PretrainConfig, GrpoConfig), ("nano", "nano-grpo"), strict=True):
        file = tmp_path / "example.yaml"
        file.write_text(f"base: {ROOT / 'configs' / base}.yaml\n{example}")
        load_config(kind, file)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    local = [link for link in links if "://" not in link]
    assert len(local) > 20
    assert [link for link in local if not (ROOT / link).exists()] == []
