"""Text encoders: a list of strings -> zero-padded text tokens `b l d`.

Two behind one interface (`TextEncoder`): `HashedNgramEncoder`, which has no weights and is the default of
the tiny model, and `UMT5Encoder`, the umT5-xxl encoder of the published checkpoint. Neither ever uses the
network. Rows past the end of a text are zero and are not masked later: as published, they do take part in
the cross-attention of the world model.
"""

import hashlib
import html
import re
from collections.abc import Sequence
from typing import Protocol

import ftfy
import numpy as np
from jaxtyping import Float32


class TextEncoder(Protocol):
    """What the world model needs from a text encoder.

    Attributes:
      dim: width of a text token. length: text tokens a text, padding included.
    """

    dim: int
    length: int

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "b l d"]:
        """Encodes each text; longer ones are cut to `length` tokens, as published."""


def clean(text: str) -> str:
    """Published cleaning: mojibake repaired, HTML entities unescaped twice, white space collapsed."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def _signs(feature: str, dim: int) -> Float32[np.ndarray, "d"]:
    """A fixed pseudo-random vector of +-1 for a feature: the same in every process and NumPy version."""
    digest = hashlib.shake_256(feature.encode()).digest((dim + 7) // 8)
    return np.unpackbits(np.frombuffer(digest, np.uint8))[:dim].astype(np.float32) * 2 - 1


class HashedNgramEncoder:
    """One token a word: the sum of hashed features, scaled to unit root mean square.

    Features of a word: itself, its character 3- and 4-grams (so `door` and `doors` are near), and itself
    with the word before it (the world model's cross-attention knows no text positions). A last token marks
    the end of the text, so that the empty text is not all zeros.
    """

    def __init__(self, dim: int, length: int):
        self.dim = dim
        self.length = length

    def _features(self, words: list[str]) -> list[list[str]]:
        previous = ["<start>", *words]
        named = []
        for before, word in zip(previous, [*words, "<end>"], strict=True):
            marked = f"<{word}>"
            grams = [marked[i : i + n] for n in (3, 4) for i in range(len(marked) - n + 1)]
            named.append([f"word {word}", f"pair {before} {word}", *(f"gram {g}" for g in grams)])
        return named

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "b l d"]:
        tokens = np.zeros((len(texts), self.length, self.dim), np.float32)
        for row, text in enumerate(texts):
            words = re.findall(r"\w+|[^\w\s]", clean(text).lower())[: self.length - 1]
            for column, features in enumerate(self._features(words)):
                total = np.sum([_signs(f, self.dim) for f in features], axis=0)
                tokens[row, column] = total / max(np.sqrt(np.mean(total**2)), 1e-6)
        return tokens
