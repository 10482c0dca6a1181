"""Text encoders: strings -> zero-padded text tokens `b l d`, in two steps.

`encoder.tokenize(texts)` runs on the host and gives a small pytree, the same for the same text; `encoder(tokens)` is
a pure function for the device, also inside a jitted program and on a mesh. Encoders are pytrees: pass them as
arguments.

Two behind one interface (`TextEncoder`): `HashedNgramEncoder`, which has no weights and is the default of
the tiny model, and `UMT5Encoder`, the umT5-xxl encoder of the published checkpoint. Neither ever uses the
network. Rows past the end of a text are zero and are not masked later: as published, they do take part in
the cross-attention of the world model.
"""

import dataclasses
import functools
import hashlib
import html
import math
import re
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import ftfy
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from etils import epath
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from lingbot_jax import axes as ax
from lingbot_jax.axes import Placeholder
from lingbot_jax.config import ConfigError
from lingbot_jax.models import params
from lingbot_jax.models.config import NgramConfig, TextConfig, UMT5Config
from lingbot_jax.parallel.sharding import constrain_batch, gathered, precision_of, take_rows

CACHED_TEXTS = 4096  # tokenized texts kept on the host, the latest ones; umT5's are 2.5 KB each


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextTokens:
    """Texts as an encoder takes them; the leading axis is the text. On their way to it there may be several.

    Attributes:
      values: token ids `b l`, or hashed features `b l d`. mask: `b l`, False past the end of a text.
    """

    values: Int32[np.ndarray | Array, "*b l"] | Float32[np.ndarray | Array, "*b l d"] | Placeholder
    mask: Bool[np.ndarray | Array, "*b l"] | Placeholder


@runtime_checkable
class TextEncoder(Protocol):
    """What the world model needs from a text encoder.

    Attributes:
      dim: width of a text token. length: tokens per text, padding included.
    """

    config: TextConfig
    dim: int
    length: int

    def tokenize(self, texts: Sequence[str]) -> TextTokens:
        """NumPy arrays; texts longer than `length` tokens are cut, as published."""
        ...

    def __call__(self, tokens: TextTokens) -> Float32[Array, "b l d"]:
        """The encoded texts; zero past the end of each."""
        ...

    def encode(self, texts: Sequence[str]) -> Float32[Array, "b l d"]:
        """Both steps."""
        ...


def is_truncated(encoder: TextEncoder, texts: Sequence[str]) -> Bool[np.ndarray, "b"]:
    """Which texts take all tokens of the encoder, so that an end may have been cut off."""
    return encoder.tokenize(texts).mask[:, -1]


def _stack(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> TextTokens:
    values, masks = zip(*rows, strict=True)
    return TextTokens(np.stack(values), np.stack(masks))


@jax.jit
def _encode(encoder: TextEncoder, tokens: TextTokens) -> Float32[Array, "b l d"]:
    return encoder(tokens)


def clean(text: str) -> str:
    """Published cleaning: mojibake repaired, HTML entities unescaped twice, white space collapsed."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def _signs(feature: str, dim: int) -> Float32[np.ndarray, "d"]:
    """A fixed pseudo-random vector of +-1 for a feature: the same in every process and NumPy version."""
    digest = hashlib.shake_256(feature.encode()).digest((dim + 7) // 8)
    return np.unpackbits(np.frombuffer(digest, np.uint8))[:dim].astype(np.float32) * 2 - 1


def _features(words: list[str]) -> list[list[str]]:
    """Names of the features of each word, and of the end of the text."""
    previous = ["<start>", *words]
    named = []
    for before, word in zip(previous, [*words, "<end>"], strict=True):
        marked = f"<{word}>"
        grams = [marked[i : i + n] for n in (3, 4) for i in range(len(marked) - n + 1)]
        named.append([f"word {word}", f"pair {before} {word}", *(f"gram {g}" for g in grams)])
    return named


@functools.lru_cache(CACHED_TEXTS)
def _hashed(config: NgramConfig, text: str) -> tuple[Float32[np.ndarray, "l d"], Bool[np.ndarray, "l"]]:
    tokens = np.zeros((config.length, config.dim), np.float32)
    words = re.findall(r"\w+|[^\w\s]", clean(text).lower())[: config.length - 1]
    for row, features in enumerate(_features(words)):
        total = np.sum([_signs(f, config.dim) for f in features], axis=0)
        tokens[row] = total / max(np.sqrt(np.mean(total**2)), 1e-6)
    return tokens, np.arange(config.length) <= len(words)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HashedNgramEncoder:
    """One token per word: the sum of hashed features, scaled to unit root mean square.

    Features of a word: itself, its character 3- and 4-grams (so `door` and `doors` are near), and itself
    with the word before it (the world model's cross-attention knows no text positions). A last token marks
    the end of the text, so that the empty text is not all zeros.
    """

    config: NgramConfig = dataclasses.field(metadata={"static": True})

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def length(self) -> int:
        return self.config.length

    def tokenize(self, texts: Sequence[str]) -> TextTokens:
        return _stack([_hashed(self.config, text) for text in texts])

    def __call__(self, tokens: TextTokens) -> Float32[Array, "b l d"]:
        return jnp.asarray(tokens.values)

    def encode(self, texts: Sequence[str]) -> Float32[Array, "b l d"]:
        return _encode(self, self.tokenize(texts))


def position_buckets(offset: Int[np.ndarray, "..."], config: UMT5Config) -> Int[np.ndarray, "..."]:
    """Bucket of each key position minus query position: half of them per sign, exact near zero, then
    logarithmic up to `max_distance`."""
    half, near = config.buckets // 2, config.buckets // 4
    distance = np.abs(offset)
    # float32, as published: the truncation below depends on it at powers of two.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / near)
    far = near + (ratio / np.float32(math.log(config.max_distance / near)) * (half - near)).astype(np.int32)
    bucket = np.where(distance < near, distance, np.minimum(far, half - 1))
    return bucket + half * (offset > 0)


class RMSNorm(nnx.Module):
    """Scale to unit root mean square, in float32."""

    def __init__(self, config: UMT5Config, key: jax.Array):
        self.scale = params.param(key, (config.dim,), (ax.NORM,), params.ones)
        self.eps = config.eps

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return (wide * inverse * gathered(self.scale)).astype(x.dtype)


class UMT5Block(nnx.Module):
    """Self-attention with a position bias and no scaling of the logits, then a gated tanh-GELU network."""

    def __init__(self, config: UMT5Config, key: jax.Array):
        keys = iter(jax.random.split(key, 8))
        width = config.heads * config.head_dim
        self.config = config
        self.norm1 = RMSNorm(config, key)
        self.q = params.param(next(keys), (config.dim, width), (ax.EMBED, ax.HEADS))
        self.k = params.param(next(keys), (config.dim, width), (ax.EMBED, ax.HEADS))
        self.v = params.param(next(keys), (config.dim, width), (ax.EMBED, ax.HEADS))
        self.o = params.param(next(keys), (width, config.dim), (ax.HEADS, ax.EMBED))
        self.bias = params.param(
            next(keys), (config.buckets, config.heads), (None, ax.HEADS), params.normal(1.0)
        )
        self.norm2 = RMSNorm(config, key)
        self.gate = params.param(next(keys), (config.dim, config.ffn), (ax.EMBED, ax.MLP))
        self.up = params.param(next(keys), (config.dim, config.ffn), (ax.EMBED, ax.MLP))
        self.down = params.param(next(keys), (config.ffn, config.dim), (ax.MLP, ax.EMBED))

    def position_bias(self, length: int) -> Float[Array, "h l m"]:
        """The bias of every query (row) and key (column)."""
        places = np.arange(length)
        table = gathered(self.bias)[position_buckets(places[None, :] - places[:, None], self.config)]
        return jnp.moveaxis(table, -1, 0).astype(jnp.float32)

    def __call__(self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None) -> Float[Array, "b l d"]:
        use = lambda name: gathered(getattr(self, name), x.dtype)
        precision = precision_of(x.dtype)
        product, einsum = (functools.partial(f, precision=precision) for f in (jnp.matmul, jnp.einsum))
        heads = lambda y: y.reshape(*y.shape[:2], self.config.heads, self.config.head_dim)
        y = self.norm1(x)
        q, k, v = (heads(product(y, use(name))) for name in ("q", "k", "v"))
        logits = einsum("bnhk,bmhk->bhnm", q, k, preferred_element_type=jnp.float32)
        logits = logits + self.position_bias(x.shape[1])
        if mask is not None:
            logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits).astype(x.dtype)
        mixed = einsum("bhnm,bmhk->bnhk", weights, v).reshape(*x.shape[:2], -1)
        x = x + product(mixed, use("o"))
        y = self.norm2(x)
        gate = jax.nn.gelu(product(y, use("gate")), approximate=True)
        return x + product(gate * product(y, use("up")), use("down"))


class UMT5(nnx.Module):
    """The encoder network. Rows where `mask` is false are computed too, as published; they see only real keys."""

    def __init__(self, config: UMT5Config, key: jax.Array):
        keys = jax.random.split(key)
        self.config = config
        self.embedding = params.param(
            keys[0], (config.vocab, config.dim), (ax.VOCAB, ax.EMBED), params.normal(1.0)
        )
        self.blocks = params.stack(lambda k: UMT5Block(config, k), keys[1], config.layers)
        self.norm = RMSNorm(config, key)

    def __call__(
        self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None
    ) -> Float[Array, "b l d"]:
        x = constrain_batch(take_rows(self.embedding, ids).astype(self.config.dtype))
        x, _ = jax.lax.scan(lambda x, block: (constrain_batch(block(x, mask)), None), x, self.blocks)
        return self.norm(x)


def load_tokenizer(path: epath.PathLike, length: int) -> tokenizers.Tokenizer:
    """The umT5 tokenizer from its `tokenizer.json`; texts are cut and padded to `length` tokens.

    Raises:
      ConfigError: there is no such file, or it is not a tokenizer.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise ConfigError(
            f"text.tokenizer = {str(path)!r}: no such file; it is google/umt5-xxl/tokenizer.json of the published "
            "LingBot-World or Wan checkpoint folder (the same file as in the Hugging Face repository google/umt5-xxl)"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text())
    except Exception as error:  # the library raises a bare Exception for any file it cannot read
        raise ConfigError(f"text.tokenizer = {str(path)!r}: not a tokenizer file ({error})") from None
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=tokenizer.token_to_id("<pad>") or 0, pad_token="<pad>")
    return tokenizer


@functools.lru_cache(CACHED_TEXTS)
def _ids(tokenizer: tokenizers.Tokenizer, text: str) -> tuple[Int32[np.ndarray, "l"], Bool[np.ndarray, "l"]]:
    found = tokenizer.encode(clean(text))
    return np.array(found.ids, np.int32), np.array(found.attention_mask, bool)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UMT5Encoder:
    """The published text encoder.

    Attributes:
      model: the network; may be abstract. tokenizer: of `load_tokenizer`, for `model.config.length` tokens; None: for
        tokens that are there already.
    """

    model: UMT5
    tokenizer: tokenizers.Tokenizer | None = dataclasses.field(metadata={"static": True})

    @property
    def config(self) -> UMT5Config:
        return self.model.config

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def length(self) -> int:
        return self.config.length

    def tokenize(self, texts: Sequence[str]) -> TextTokens:
        return _stack([_ids(self.tokenizer, text) for text in texts])

    def __call__(self, tokens: TextTokens) -> Float32[Array, "b l d"]:
        out = self.model(tokens.values, tokens.mask)
        return jnp.where(tokens.mask[..., None], out, 0).astype(jnp.float32)

    def encode(self, texts: Sequence[str]) -> Float32[Array, "b l d"]:
        return _encode(self, self.tokenize(texts))
