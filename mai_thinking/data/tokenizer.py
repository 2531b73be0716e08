"""Byte-level BPE: training, reuse, and encoding of text that may contain anything."""

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mai_thinking.data.jsonl import check_text
from mai_thinking.errors import UsageError

END_OF_TEXT = "<|endoftext|>"
"""Opens every document, so that its first token has something to be predicted from, and so also ends the one before."""
PADDING = "<|pad|>"

# What merges may not cross. A word takes one mark or space before it (`.append`, ` the`), punctuation the line break
# and the indentation behind it (`):\n        `), which packs 4 % more code into a token than GPT-2's pattern; each
# digit stands alone, for arithmetic.
_PATTERN = (
    r"[^\s\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+| ?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+(?:\n *(?! ))?|\s+(?!\S)|\s+"
)

# `_PATTERN` for ASCII text, where Python's `re` gives the same words.
_ASCII_WORD = re.compile(
    r"[^\t-\r A-Za-z0-9]?[A-Za-z]+| ?[A-Za-z]+|[0-9]"
    r"| ?[^\t-\r A-Za-z0-9]+(?:\n *(?! ))?|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+"
)
_LINE = re.compile(r"(?<=[!-~]\n)(?=[!-~])")
"""Between two lines that no word of `_PATTERN` holds parts of, and that see nothing of each other."""
_REMEMBERED, _LONG = 200_000, 32
"""So many words' ids are kept; none of a word of more characters, which hardly comes again."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: special tokens 0 and 1, 256 bytes, and merges up to `vocab_size`, or all that the text has."""
    tokenizer = _untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _untrained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` is one of a run's `checkpoints/step-…`."""
    return (Path(path).expanduser() / "manifest.json").is_file()


def architecture_folder(path: str | Path) -> Path:
    """Where the tokenizer and the model's config are: in a model folder itself, for a checkpoint beside it."""
    folder = Path(path).expanduser()
    return folder.parent.parent / "architecture" if is_checkpoint(folder) else folder


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder or checkpoint; UsageError unless it is a fast one with an end-of-text token."""
    folder = architecture_folder(path)
    if not (folder / "tokenizer.json").is_file():
        raise UsageError(f"{path}: no tokenizer.json there; name a folder such as a run's `final/`")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # The library raises what it stumbles over: KeyError, ValueError, bare Exception, ...
        raise UsageError(f"{path}: the tokenizer cannot be loaded: {error!r:.200}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.eos_token_id is None:
        raise UsageError(f"{path}: a fast tokenizer with an end-of-text token (eos_token) is needed")
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs: one more than the largest id, also where ids have gaps."""
    return 1 + max(tokenizer.get_vocab().values())


def check_lossless(tokenizer: PreTrainedTokenizerFast, where: str) -> None:
    """UsageError unless text survives the tokenizer: what it loses would cost no bits, and could never be written."""
    if tokenizer.decode(Encoder(tokenizer).encode(_PROBE), clean_up_tokenization_spaces=False) != _PROBE:
        raise UsageError(f"{where}: the tokenizer loses text (case, spaces or characters); take a byte-level one")


_PROBE = "Text, TEXT and text:\n\tif x != 1:  # caf\u00e9 \u65e5\u672c\u8a9e \u0440\u0443\u0441 \U0001f600\n"


class Encoder:
    """Text → token ids. All text is encoded here, so that text is text: what spells a special token, such as
    `<|endoftext|>`, becomes ordinary tokens, and no document or question can fake a document's end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self.end_of_text = tokenizer, int(tokenizer.eos_token_id)
        self.vocab_size = vocabulary_size(tokenizer)
        self._backend = _text_backend(tokenizer.backend_tokenizer.to_str())
        self._cuts_as_ours, self._known = _cuts_as_ours(self._backend), dict[str, list[int]]()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process makes its own: a pickled backend has forgotten that text is text."""
        return Encoder, (self._tokenizer,)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without any special token. UsageError for half a surrogate pair, which is no text."""
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except TypeError:  # what the library makes of it
            check_text(text, repr(text[:40]))
            raise

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of `text` behind the end-of-text token that opens every document."""
        return [self.end_of_text, *self.encode(text)]

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """`encode_prompt` of each, as arrays. For a tokenizer of ours, ASCII text is cut into words here, whose ids are
        remembered: several times as fast as the library, which does the rest on all cores."""
        pieces = [self._cut(text) for text in texts]
        new = list(set(chain.from_iterable(pieces)) - self._known.keys())
        encodings = self._backend.encode_batch_fast(new, add_special_tokens=False)
        self._known.update(zip(new, (encoding.ids for encoding in encodings), strict=True))
        ids = (chain.from_iterable(map(self._known.__getitem__, cut)) for cut in pieces)
        found = [np.fromiter(chain((self.end_of_text,), one), dtype=np.int64) for one in ids]
        for piece in new:
            if len(piece) > _LONG:
                del self._known[piece]
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        return found

    def _cut(self, text: str) -> list[str]:
        """Pieces that are encoded by themselves."""
        if not self._cuts_as_ours:
            return [text]
        lines = [text] if text.isascii() else _LINE.split(text)
        return list(chain.from_iterable(_ASCII_WORD.findall(line) if line.isascii() else [line] for line in lines))


@lru_cache(maxsize=8)
def _text_backend(tree: str) -> Tokenizer:
    """The library's tokenizer, to which text is text. One for all encoders of a process: each that has encoded leaves
    megabytes in the library's threads when it goes (tokenizers 0.23), a gigabyte after 150 shards."""
    backend = Tokenizer.from_str(tree)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def _cuts_as_ours(backend: Tokenizer) -> bool:
    """Whether what `Encoder` cuts is encoded by itself, as in a tokenizer of `train_tokenizer`."""
    tree, ours = json.loads(backend.to_str()), json.loads(_untrained().to_str())
    plain = tree["model"]["type"] == "BPE" and all(token["special"] for token in tree["added_tokens"])
    return plain and all(tree[part] == ours[part] for part in ("normalizer", "pre_tokenizer"))
