"""The tokenizer: any text survives, and no text can fake a document boundary."""

import json
import pickle
import random
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mai_thinking.data import PreparedData
from mai_thinking.data.tokenizer import (
    END_OF_TEXT,
    PADDING,
    Encoder,
    check_lossless,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from mai_thinking.errors import UsageError

SAMPLES = [
    "def f(x):\n    if x:\n        return {'a': [1, 2.5e-3]}\n\n\n",
    "naïve café, Straße, Ελληνικά, русский, हिन्दी, العربية, 中文, 日本語, 한국어",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200d\ufeff \x00\x01\x7f \r\n\t\v\f \u2028\u2029\xa0",
    f"a literal {END_OF_TEXT} and {PADDING} in a text",
    "",
    "   leading and trailing   ",
]


def random_text(generator: random.Random) -> str:
    code_points = [generator.choice([generator.randrange(128), generator.randrange(0x110000)]) for _ in range(60)]
    return "".join(chr(point) for point in code_points if not 0xD800 <= point < 0xE000)


def test_any_text_survives_and_has_no_boundary(two_sources: PreparedData) -> None:
    generator = random.Random(1)
    for text in SAMPLES + [random_text(generator) for _ in range(200)]:
        ids = two_sources.encoder.encode(text)
        assert two_sources.tokenizer.decode(ids) == text
        assert not {two_sources.tokenizer.eos_token_id, two_sources.tokenizer.pad_token_id} & set(ids)
    batch = two_sources.encoder.encode_documents(SAMPLES)
    assert [document.tolist() for document in batch] == [two_sources.encoder.encode_prompt(text) for text in SAMPLES]


def test_words_that_are_cut_here_are_those_of_the_library() -> None:
    """All white space and control characters of ASCII, and others between, where a word may reach over a line's end."""
    generator = random.Random(2)
    alphabet = [*map(chr, range(128)), *" \n" * 30, *"ab1.)\t" * 12, *"é\u0301中\u00a0\u2028\x85²" * 2]
    texts = ["".join(generator.choices(alphabet, k=80)) for _ in range(3000)]
    encoder = Encoder(train_tokenizer(texts, 1500))
    for start in range(0, len(texts), 50):
        found = encoder.encode_documents(texts[start : start + 50])
        assert [one.tolist() for one in found] == [encoder.encode_prompt(text) for text in texts[start : start + 50]]


def test_an_encoder_that_another_process_gets_takes_text_for_text(two_sources: PreparedData) -> None:
    """What spells a special token, too."""
    encoder = pickle.loads(pickle.dumps(two_sources.encoder))
    for text in SAMPLES:
        assert encoder.encode(text) == two_sources.encoder.encode(text)
    assert any(END_OF_TEXT in text for text in SAMPLES)


def test_encoders_that_come_and_go_leave_no_memory_behind(two_sources: PreparedData) -> None:
    """As in a process that encodes shard by shard: each of nine would leave about eight megabytes."""
    draw = random.Random(0)
    text = " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 12))) for _ in range(20_000))
    taken = list[int]()
    for _ in range(12):
        pickle.loads(pickle.dumps(two_sources.encoder)).encode_documents([text])
        taken.append(psutil.Process().memory_info().rss)
    assert taken[-1] - taken[2] < 30e6


def test_a_saved_tokenizer_is_the_same(two_sources: PreparedData, tmp_path: Path) -> None:
    two_sources.tokenizer.save_pretrained(tmp_path / "final")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert (loaded.eos_token, loaded.pad_token, loaded.padding_side) == (END_OF_TEXT, PADDING, "left")
    assert len(loaded) == 400
    for text in SAMPLES:
        assert Encoder(loaded).encode(text) == two_sources.encoder.encode(text)
        if END_OF_TEXT not in text:
            assert loaded(text)["input_ids"] == two_sources.encoder.encode(text)


def test_digits_stand_alone() -> None:
    tokenizer = train_tokenizer(["1234567 1234567 abc"] * 50, 400)
    assert len(Encoder(tokenizer).encode("1234567")) == 7


def test_training_is_deterministic(two_sources: PreparedData) -> None:
    texts = [document.text for documents in two_sources.held_out.values() for document in documents]
    first, second = (train_tokenizer(texts, 500).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no tokenizer.json there"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def saved(folder: Path, tokenizer: Tokenizer) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(folder)
    return folder


def test_a_gap_in_the_ids_makes_the_vocabulary_larger(two_sources: PreparedData, tmp_path: Path) -> None:
    tree = json.loads(two_sources.tokenizer.backend_tokenizer.to_str())
    vocabulary = tree["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] += 40
    loaded = load_tokenizer(saved(tmp_path, Tokenizer.from_str(json.dumps(tree))))
    assert (len(loaded), vocabulary_size(loaded)) == (400, 440)
    assert max(Encoder(loaded).encode(" ".join(SAMPLES))) < 440


def test_a_tokenizer_that_loses_text_is_refused(two_sources: PreparedData, tmp_path: Path) -> None:
    check_lossless(two_sources.tokenizer, "here")
    tokenizer = Tokenizer(models.WordLevel({END_OF_TEXT: 0, "<unk>": 1, "text": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UsageError, match="here: the tokenizer loses text"):
        check_lossless(load_tokenizer(saved(tmp_path, tokenizer)), "here")


def test_half_a_surrogate_pair_is_no_text(two_sources: PreparedData) -> None:
    with pytest.raises(UsageError, match=r"half a surrogate pair \(\\ud83d\)"):
        two_sources.encoder.encode("broken \ud83d")
