"""The README against the script that runs its commands, and its links against the tree."""

import re

from readme_commands import ADDED, INSTEAD, ROOT, readme_commands


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


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    local = [link for link in links if "://" not in link]
    assert len(local) > 20
    assert [link for link in local if not (ROOT / link).exists()] == []
