"""Text that is measured or continued is text, whatever it spells."""

import io
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mai_thinking.data.tokenizer import END_OF_TEXT, train_tokenizer
from mai_thinking.errors import UsageError
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.training.evaluation import evaluate_files, evaluate_texts
from mai_thinking.training.long_context import long_context_table, suffix_nll
from mai_thinking.training.sampling import converse
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["some text"] * 3, 258)  # a token a byte, and two special ones


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> MaiThinkingForCausalLM:
    return tiny_model(vocab_size=len(tokenizer))


def test_a_special_token_spelled_out_costs_what_other_text_costs(
    model: MaiThinkingForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    spelled, near = (
        evaluate_texts(model, tokenizer, [text * 10], context_length=32, batch_size=4)
        for text in (END_OF_TEXT, END_OF_TEXT.replace("text", "texx"))
    )
    assert spelled.tokens == near.tokens == 10 * len(END_OF_TEXT) + 1
    assert math.isclose(spelled.bits_per_byte, near.bits_per_byte, rel_tol=0.2)


def test_a_file_is_measured_with_its_own_line_ends(
    model: MaiThinkingForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "crlf.txt").write_bytes(b"one\r\ntwo\r\n")
    assert evaluate_files(model, tokenizer, [tmp_path / "crlf.txt"], context_length=32, batch_size=4).endswith(" 10 |")


def test_a_prompt_that_is_no_text_ends_no_session(
    model: MaiThinkingForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nThe \n"), encoding="utf-8"))
    converse(model, tokenizer, tokens=2)
    out, err = capsys.readouterr()
    assert err == "error: the prompt is not UTF-8; convert it\n"
    assert out.startswith("The ")


def test_the_same_suffix_is_predicted_from_prefixes_of_every_length(model: MaiThinkingForCausalLM) -> None:
    """Against all logits at once."""
    tokens = torch.randint(2, 258, (120,), generator=torch.Generator().manual_seed(0)).tolist()
    found = suffix_nll(model, tokens, suffix=5, prefixes=[1, 8, 40], ends=[50, 120])
    for prefix, nll in found.items():
        expected = 0.0
        for end in (50, 120):
            window = torch.tensor([tokens[end - 5 - prefix : end]])
            scores = torch.log_softmax(model(input_ids=window).logits[0].double(), dim=-1)
            expected -= sum(scores[i - 1, window[0, i]].item() for i in range(prefix, prefix + 5))
        assert math.isclose(nll, expected / 10, rel_tol=1e-5)
    assert len(set(found.values())) == 3


def test_a_text_too_short_for_the_longest_prefix_is_told(
    model: MaiThinkingForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("x" * 100)
    table = long_context_table(model, tokenizer, [tmp_path / "a.txt"], suffix=4, trained=16)
    assert [line.split()[1] for line in table.splitlines()[4:]] == ["2", "4", "8", "16", "32", "64"]
    with pytest.raises(UsageError, match="has 101 tokens, 132 are needed"):
        long_context_table(model, tokenizer, [tmp_path / "a.txt"], suffix=4, trained=32)
