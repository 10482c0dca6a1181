"""A clip survives the disk; whatever is wrong with one is one line of ClipError."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load, save

from lingbot_jax.data.schema import ARRAYS, ClipError, decode, encode
from tests.data.clips import make_clip


def test_round_trip():
    clip = make_clip(3)
    again = decode(encode(clip))
    for field in dataclasses.fields(clip):
        a, b = getattr(clip, field.name), getattr(again, field.name)
        if field.name in ARRAYS:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b
    assert encode(clip) == encode(clip)


def test_arrays_are_what_safetensors_reads():
    clip = make_clip(1)
    for name, array in load(encode(clip)).items():
        np.testing.assert_array_equal(array, getattr(clip, name))


def test_window():
    clip = make_clip(2, frames=9)
    part = clip.window(3, 5)
    np.testing.assert_array_equal(part.frames, clip.frames[3:8])
    np.testing.assert_array_equal(part.c2w, clip.c2w[3:8])
    assert not part.keys[0].any() and part.keys[1:].any()
    assert clip.keys[3].any(), "the window must not write into its clip"
    with pytest.raises(ClipError, match="has 9 frames: cannot give 5 from frame 5"):
        clip.window(5, 5)


def _poke(name, index, value):
    def change(clip):
        array = getattr(clip, name).copy()
        array[index] = value
        return dataclasses.replace(clip, **{name: array})

    return change


def _set(**fields):
    return lambda clip: dataclasses.replace(clip, **fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_poke("c2w", (4, 0, 3), np.nan), "c2w is not finite at frame 4"),
        (_poke("intrinsics", (2, 0), np.inf), "intrinsics is not finite at frame 2"),
        (_poke("intrinsics", (2, 0), 0.0), "focal lengths must be positive"),
        (_poke("c2w", (3, 0, 0), 1.1), "c2w of frame 3 is not a rigid pose"),
        (_poke("c2w", (3, 3, 3), 2.0), "c2w of frame 3 is not a rigid pose"),
        (lambda c: _set(c2w=c.c2w @ np.diag([-1.0, 1, 1, 1]))(c), "c2w of frame 0 is mirrored"),
        (_poke("keys", (1, 1), 2), "keys holds 2: must be 0 or 1"),
        (_poke("keys", (0, 0), 1), "keys row 0 is not zero"),
        (_poke("timestamps", 5, 0.0), "timestamps do not increase"),
        (lambda c: _set(keys=c.keys[:-1])(c), r"keys has shape \(8, 8\)"),
        (lambda c: _set(frames=c.frames[..., :2])(c), "frames has shape"),
        (lambda c: _set(frames=c.frames.astype(np.float32))(c), "frames has dtype float32: must be uint8"),
        (lambda c: _set(c2w=c.c2w.astype(np.float32))(c), "c2w has dtype float32: must be float64"),
        (lambda c: _set(timestamps=list(c.timestamps))(c), "timestamps is list"),
        (_set(split="test"), "split = 'test': must be one of train, held_out"),
        (_set(clip_id=""), "clip_id = ''"),
        (_set(fps=0.0), "fps = 0.0: must be positive"),
        (_set(seed=-1), "seed = -1"),
    ],
)
def test_refuses_on_write_and_on_read(change, message):
    good = make_clip()
    bad = change(good)
    with pytest.raises(ClipError, match=message) as caught:
        encode(bad)
    assert "\n" not in str(caught.value)
    if any(not isinstance(getattr(bad, name), np.ndarray) for name in ARRAYS):
        return
    # The same clip, written by someone who does not check.
    header = _metadata(encode(good))
    header |= {k: getattr(bad, k) for k in ("split", "clip_id", "fps", "seed")}
    with pytest.raises(ClipError) as caught:
        decode(_pack({name: getattr(bad, name) for name in ARRAYS}, header))
    assert "\n" not in str(caught.value)


def _metadata(blob):
    length = int.from_bytes(blob[:8], "little")
    return json.loads(json.loads(blob[8 : 8 + length])["__metadata__"]["clip"])


def _pack(arrays, header):
    return save(
        {k: np.ascontiguousarray(v) for k, v in arrays.items()}, metadata={"clip": json.dumps(header)}
    )


def test_refuses_foreign_and_damaged_bytes():
    blob = encode(make_clip())
    arrays, header = load(blob), _metadata(blob)
    cases = {
        "no whole safetensors": [b"", b"abc", blob[:200], b"\xff" * 64],
        "header is not JSON": [(8).to_bytes(8, "little") + b"not json"],
        "is cut off": [blob[:-1], blob[: len(blob) - 2000]],
        "without the metadata of a clip": [save(arrays), save(arrays, metadata={"other": "x"})],
        "schema_version = 99: this program reads version 1": [_pack(arrays, header | {"schema_version": 99})],
        "array c2w is missing": [_pack({k: v for k, v in arrays.items() if k != "c2w"}, header)],
        "incomplete or foreign": [
            _pack(arrays, header | {"colour": "red"}),
            _pack(arrays, {k: v for k, v in header.items() if k != "captions"}),
        ],
    }
    for message, blobs in cases.items():
        for bad in blobs:
            with pytest.raises(ClipError, match=message):
                decode(bad)


def test_any_flipped_byte_is_read_or_refused_in_one_line():
    """No byte can make the reader crash; the pixels and most numbers may of course change unseen."""
    blob = bytearray(encode(make_clip(frames=2, size=(2, 2))))
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(len(blob)):
        old = blob[i]
        blob[i] ^= int(rng.integers(1, 256))
        try:
            decode(bytes(blob))
        except ClipError as error:
            refused += 1
            assert "\n" not in str(error)
        blob[i] = old
    assert refused > len(blob) // 4
