"""A clip survives the disk; whatever is wrong with one is one line of ClipError."""

import dataclasses
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
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


def test_crop():
    clip = make_clip(2, frames=9)
    part = clip.crop(3, 5)
    np.testing.assert_array_equal(part.frames, clip.frames[3:8])
    np.testing.assert_array_equal(part.c2w, clip.c2w[3:8])
    assert not part.keys[0].any() and part.keys[1:].any()
    assert clip.keys[3].any(), "the crop must not write into its clip"
    with pytest.raises(ClipError, match="has 9 frames: cannot give 5 from frame 5"):
        clip.crop(5, 5)


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
        (_poke("c2w", (4, 0, 3), 1e308), r"c2w holds 1e\+308: must be within"),
        (_poke("intrinsics", (2, 0), 1e38), r"intrinsics holds 1e\+38: must be within"),
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
        "not safetensors: invalid JSON in header": [_record(b"not json"), _record(b'{"a":' + DEEP + b"}")],
        "not safetensors: incomplete metadata": [blob[:-1], blob[: len(blob) - 2000]],
        "a header of 20000000 bytes": [_record(b" " * 20_000_000)],
        r"frames has shape \(4611686018427387904, 0, 4, 3\)": [_with_shape(blob, "frames", [2**62, 0, 4, 3])],
        "frames has 70 dimensions": [_with_shape(blob, "frames", [1] * 70)],
        "frames has dtype BF16": [_with_shape(blob, "frames", [1, 1, 1, 1], "BF16")],
        "not safetensors: overflow": [_with_shape(blob, "frames", [2**62, 2, 4, 3])],
        "without the metadata of a clip": [
            save(arrays),
            save(arrays, metadata={"other": "x"}),
            *(save(arrays, metadata={"clip": text}) for text in ("", "[]", "5", DEEP.decode())),
        ],
        "schema_version = 99: this program reads version 1": [_pack(arrays, header | {"schema_version": 99})],
        "array c2w is missing": [_pack({k: v for k, v in arrays.items() if k != "c2w"}, header)],
        "incomplete or foreign": [
            _pack(arrays, header | {"colour": "red"}),
            _pack(arrays, header | {"frames": 5}),
            *(_pack(arrays, header | {"captions": c}) for c in ([], "x", {"temporal": [5]}, {"temporal": 5})),
            _pack(arrays, {k: v for k, v in header.items() if k != "captions"}),
        ],
    }
    for message, blobs in cases.items():
        for bad in blobs:
            with pytest.raises(ClipError, match=message):
                decode(bad)


DEEP = b"[" * 100_000 + b"]" * 100_000


def _record(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def _with_shape(blob: bytes, name: str, shape: list[int], dtype: str = "U8") -> bytes:
    """The record with another shape for one array, laid out so that the library finds no gap."""
    length = int.from_bytes(blob[:8], "little")
    header, size = (
        json.loads(blob[8 : 8 + length]),
        np.prod(shape, dtype=object) * (2 if dtype == "BF16" else 1),
    )
    place, made, data = 0, {"__metadata__": header.pop("__metadata__")}, b""
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        part = b"\0" * min(int(size), 64) if key == name else blob[8 + length + begin : 8 + length + end]
        changed = {"shape": shape, "dtype": dtype} if key == name else {}
        made[key] = entry | changed | {"data_offsets": [place, place + len(part)]}
        place, data = place + len(part), data + part
    return _record(json.dumps(made).encode(), data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)
SHAPES = st.lists(st.integers(0, 3) | st.integers(0, 2**64), max_size=70)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.data())
def test_any_record_is_a_clip_or_a_clip_error(data):
    """Records that are right but for one thing, which is anything."""
    blob = encode(make_clip(frames=2, size=(2, 2)))
    arrays, header, name = load(blob), _metadata(blob), data.draw(st.sampled_from(sorted(ARRAYS)))
    kind = data.draw(st.sampled_from(["field", "shape", "header", "entry", "bytes"]))
    if kind == "field":
        blob = _pack(arrays, header | {data.draw(st.sampled_from(sorted(header))): data.draw(JSON)})
    elif kind == "shape":
        blob = _with_shape(
            blob, name, data.draw(SHAPES), data.draw(st.sampled_from(["U8", "F64", "BF16", "F4"]))
        )
    elif kind == "header":
        blob = _record(json.dumps(data.draw(JSON)).encode(), data.draw(st.binary(max_size=64)))
    elif kind == "entry":
        length = int.from_bytes(blob[:8], "little")
        changed = json.loads(blob[8 : 8 + length]) | {name: data.draw(JSON)}
        blob = _record(json.dumps(changed).encode(), blob[8 + length :])
    else:
        blob = data.draw(st.binary(max_size=200))
    try:
        decode(blob)
    except ClipError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


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
