"""Text encoders: cleaning, the hashed encoder, umT5 and its tokenizer file."""

import hashlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.models import params
from lingbot_jax.models.config import NgramConfig, UMT5Config
from lingbot_jax.models.text import (
    UMT5,
    HashedNgramEncoder,
    TextEncoder,
    UMT5Encoder,
    clean,
    is_truncated,
    load_tokenizer,
    position_buckets,
)
from tests.convert.published import tokenizer

TINY = UMT5Config(
    vocab=8,
    dim=16,
    heads=2,
    head_dim=4,
    ffn=24,
    layers=2,
    buckets=8,
    max_distance=16,
    length=6,
    dtype="float32",
)


def test_cleaning_is_the_published_one():
    assert clean("  a &amp;amp; b \n\t c ") == "a & b c"
    assert clean("schÃ¶n") == "schön"  # mojibake


def test_hashed_tokens():
    encoder = HashedNgramEncoder(NgramConfig(dim=256, length=5))
    texts = ["a red door", "a red doors", "", "one two three four five six"]
    tokens = np.asarray(encoder.encode(texts))
    assert tokens.shape == (4, 5, 256) and tokens.dtype == np.float32
    used = np.abs(tokens).max(-1) > 0
    np.testing.assert_array_equal(used.sum(1), [4, 4, 1, 5])  # the words and an end mark; cut to the length
    np.testing.assert_allclose(np.square(tokens[used]).mean(-1), 1, rtol=1e-5)
    similar = lambda a, b: float(a @ b) / 256
    assert similar(tokens[0, 2], tokens[1, 2]) > 0.4 > 0.2 > abs(similar(tokens[0, 1], tokens[0, 2]))
    np.testing.assert_array_equal(tokens[0, :2], tokens[1, :2])
    np.testing.assert_array_equal(is_truncated(encoder, texts), [False, False, False, True])
    # Under jit, as an argument.
    again = jax.jit(lambda encoder, tokens: encoder(tokens))(encoder, encoder.tokenize(texts))
    np.testing.assert_array_equal(again, tokens)


def test_hashed_tokens_are_the_same_in_every_process():
    code = (
        "import hashlib; from lingbot_jax.models.text import HashedNgramEncoder, NgramConfig;"
        "tokens = HashedNgramEncoder(NgramConfig(dim=24, length=4)).tokenize(['snow falls']);"
        "print(hashlib.sha256(tokens.values.tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    tokens = HashedNgramEncoder(NgramConfig(dim=24, length=4)).tokenize(["snow falls"])
    assert other.strip() == hashlib.sha256(tokens.values.tobytes()).hexdigest()


def test_buckets_by_hand():
    """8 buckets, half a sign: 0 and 1 exact, then to distance 16 logarithmic, positive offsets 4 higher."""
    offsets = np.array([0, -1, -2, -3, -6, -100, 1, 2, 100])
    np.testing.assert_array_equal(position_buckets(offsets, TINY), [0, 1, 2, 2, 3, 3, 5, 6, 7])


def test_umt5_encodes_texts_from_a_tokenizer_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer().save(str(path))
    model = jax.jit(lambda: UMT5(TINY, jax.random.key(0)))()
    encoder = UMT5Encoder(model, load_tokenizer(path, TINY.length))
    assert isinstance(encoder, TextEncoder) and (encoder.dim, encoder.length) == (16, 6)
    texts = ["a narrow corridor", "snow", "", "a a a a a a a a a"]
    tokens = np.asarray(encoder.encode(texts))
    assert tokens.shape == (4, 6, 16) and tokens.dtype == np.float32
    np.testing.assert_array_equal(is_truncated(encoder, texts), [False, False, False, True])
    # Words and the end token; the padding is zero, and does not take part.
    np.testing.assert_array_equal((np.abs(tokens).max(-1) > 0).sum(1), [4, 2, 1, 6])
    alone = jax.jit(UMT5.__call__)(model, jnp.array([[7, 1]]), jnp.ones((1, 2), bool))
    np.testing.assert_allclose(tokens[1, :2], alone[0], atol=2e-6)


def test_an_encoder_may_be_abstract(tmp_path):
    """As `open_world(abstract=True)` has it: the program is traced with shapes alone."""
    path = tmp_path / "tokenizer.json"
    tokenizer().save(str(path))
    model = params.abstract(lambda key: UMT5(TINY, key))
    encoder = UMT5Encoder(model, load_tokenizer(path, TINY.length))
    tokens = encoder.tokenize(["snow", "a door"])
    out = jax.eval_shape(lambda encoder, tokens: encoder(tokens), encoder, tokens)
    assert (out.shape, out.dtype) == ((2, 6, 16), jnp.float32)
    assert not jax.tree.leaves(HashedNgramEncoder(NgramConfig()))


def test_missing_or_foreign_tokenizer_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file; it is google/umt5-xxl/tokenizer.json") as error:
        load_tokenizer(tmp_path / "tokenizer.json", 8)
    assert "\n" not in str(error.value)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a tokenizer file"):
        load_tokenizer(tmp_path / "bad.json", 8)


def test_xxl_builds_abstractly():
    config = UMT5Config()
    model = params.abstract(lambda key: UMT5(config, key))
    d, f = config.dim, config.ffn
    assert (
        params.count(model)
        == 256384 * d + 24 * (4 * d * d + 3 * d * f + 32 * 64 + 2 * d) + d
        == 5_680_910_336
    )
    ids = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    out = jax.eval_shape(UMT5.__call__, model, ids, jax.ShapeDtypeStruct((1, 512), bool))
    assert (out.shape, out.dtype) == ((1, 512, 4096), jnp.bfloat16)
