"""A document, the unit in which data is cleaned, held out and shuffled."""

from typing import NamedTuple

import xxhash


class Document(NamedTuple):
    """A piece of text with a name that is unique in its source."""

    id: str
    """Where it came from: a relative path, a line number, an index."""
    text: str

    @property
    def size(self) -> int:
        """Bytes of UTF-8."""
        return len(self.text) if self.text.isascii() else len(self.text.encode())

    @property
    def fingerprint(self) -> int:
        """64 bits of the text, all white space alike: equal for exact duplicates, and the dice of the split."""
        return xxhash.xxh3_64_intdigest(" ".join(self.text.split()).encode())
