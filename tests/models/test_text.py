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
from lingbot_jax.models.text import (
    UMT5,
    HashedNgramEncoder,
    UMT5Config,
    UMT5Encoder,
    clean,
    load_tokenizer,
    position_buckets,
)
from tests.convert.checkpoints import tokenizer

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
    encoder = HashedNgramEncoder(dim=256, length=5)
    texts = ["a red door", "a red doors", "", "one two three four five six"]
    tokens = encoder.encode(texts)
    assert tokens.shape == (4, 5, 256) and tokens.dtype == np.float32
    used = np.abs(tokens).max(-1) > 0
    np.testing.assert_array_equal(used.sum(1), [4, 4, 1, 5])  # the words and an end mark; cut to the length
    np.testing.assert_allclose(np.square(tokens[used]).mean(-1), 1, rtol=1e-5)
    similar = lambda a, b: float(a @ b) / 256
    assert similar(tokens[0, 2], tokens[1, 2]) > 0.4 > 0.2 > abs(similar(tokens[0, 1], tokens[0, 2]))
    np.testing.assert_array_equal(tokens[0, :2], tokens[1, :2])
    np.testing.assert_array_equal(encoder.encode(texts), tokens)


def test_hashed_tokens_are_the_same_in_every_process():
    code = (
        "import hashlib; from lingbot_jax.models.text import HashedNgramEncoder as E;"
        "print(hashlib.sha256(E(24, 4).encode(['snow falls']).tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = hashlib.sha256(HashedNgramEncoder(24, 4).encode(["snow falls"]).tobytes()).hexdigest()
    assert other.strip() == here


def test_buckets_by_hand():
    """8 buckets, half a sign: 0 and 1 exact, then to distance 16 logarithmic, positive offsets 4 higher."""
    offsets = np.array([0, -1, -2, -3, -6, -100, 1, 2, 100])
    np.testing.assert_array_equal(position_buckets(offsets, TINY), [0, 1, 2, 2, 3, 3, 5, 6, 7])


def test_umt5_encodes_texts_from_a_tokenizer_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer().save(str(path))
    model = jax.jit(lambda: UMT5(TINY, jax.random.key(0)))()
    encoder = UMT5Encoder(model, load_tokenizer(path, TINY.length))
    assert (encoder.dim, encoder.length) == (16, 6)
    tokens = encoder.encode(["a narrow corridor", "snow", "", "a a a a a a a a a"])
    assert tokens.shape == (4, 6, 16) and tokens.dtype == np.float32
    # Words and the end token; the padding is zero, and does not take part.
    np.testing.assert_array_equal((np.abs(tokens).max(-1) > 0).sum(1), [4, 2, 1, 6])
    alone = jax.jit(UMT5.__call__)(model, jnp.array([[7, 1]]), jnp.ones((1, 2), bool))
    np.testing.assert_allclose(tokens[1, :2], alone[0], atol=2e-6)


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


def test_wrong_sizes_are_named():
    with pytest.raises(ConfigError, match="text.layers = 0: must be positive"):
        UMT5Config(layers=0)
    with pytest.raises(ConfigError, match="text.buckets = 6"):
        UMT5Config(buckets=6)
