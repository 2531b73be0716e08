"""Scripts as a user runs them: what they print, what they refuse, and their exit codes."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


def script(name: str, *arguments: object) -> int:
    """Run one of scripts/ as a user would; its exit code."""
    before = sys.argv
    sys.argv = [name, *map(str, arguments)]
    try:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_hidden_layers=7"], "num_hidden_layers"),
        (["model.num_experts_per_tok=17"], "num_experts_per_tok"),
        (["model.num_attention_heads=3", "model.num_key_value_heads=2"], "num_key_value_heads"),
        (["model.hidden_sise=7"], "did you mean 'hidden_size'"),
        (["batch.context_length=5000000"], "context"),
        (["execution.attention=flesh"], "flesh"),
        (["execution.experts=nobody"], "nobody"),
        (["init_from=nowhere"], "nowhere: no model here"),
        (["data.tokenizer.path=nowhere"], "nowhere: no tokenizer"),
        (["init_from={final}"], "was trained with a tokenizer of its own; set data.tokenizer.path={final}"),
        (["init_from={final}", "data.tokenizer.path={final}", "model.hidden_size=64"], "hidden_size: 64 does not fit"),
        (["data.sources.0.kind=text", "data.sources.0.path=nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    overrides = [override.format(final=tiny_run / "final") for override in overrides]
    places = [f"output_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}"]
    assert script("pretrain.py", SCRIPTS.parent / "configs" / "tiny.yaml", *places, *overrides) == 2
    error = capsys.readouterr().err
    assert message.format(final=tiny_run / "final") in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_evaluate_and_sample_any_checkpoint(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.py"
    text.write_text(Path(__file__).read_text())
    bits = []
    for place in (tiny_run, tiny_run / "final", tiny_run / "checkpoints" / "step-00000020"):
        assert script("evaluate.py", place, text) == 0
        bits.append(capsys.readouterr().out.splitlines()[-1])
    assert len(set(bits)) == 1
    assert 2 < float(bits[0].split()[3]) < 8
    assert script("sample.py", tiny_run, "--prompt", "def ", "--tokens", 12) == 0
    first = capsys.readouterr().out
    assert script("sample.py", tiny_run, "--prompt", "def ", "--tokens", 12) == 0
    assert capsys.readouterr().out == first
    assert first.startswith("def ")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for wrong, message in [("latin.txt", "not UTF-8 (byte 3)"), ("nothing.txt", "cannot be read")]:
        assert script("evaluate.py", tiny_run, tmp_path / wrong) == 2
        assert message in capsys.readouterr().err


def test_dry_run_of_the_full_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The published totals; and FSDP with EP 64 on 8,192 GPUs, by hand, for what does not depend on estimates."""
    config = SCRIPTS.parent / "configs" / "mai-base-1.yaml"
    assert script("pretrain.py", config, f"output_dir={tmp_path / 'run'}", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "962.1B total, 34.66B active" in out
    assert "experts over 64 ranks, each share sharded over 128 ranks" in out
    assert not (tmp_path / "run").exists()
    printed = {line.split()[0]: float(line.split()[1].replace(",", "")) for line in out.splitlines() if " GiB" in line}
    of_a_rank = 962.1e9 / 8192 / 2**30
    assert printed["weights"] == pytest.approx(4 * of_a_rank, abs=0.01)
    assert printed["optimiser"] == pytest.approx(8 * of_a_rank, abs=0.01)
