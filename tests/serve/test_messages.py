"""Messages are strict: whatever comes is understood or refused in one line, and a frame's header is as documented."""

import collections
import random
import struct

import pytest

from lingbot_jax.serve import messages
from lingbot_jax.serve.messages import Frame, Keys, Refused, Start
from tests.serve.abuse import fuzzed


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "message: Invalid JSON"),
        ("[]", "message: "),
        ("{}", "message: Unable to extract tag"),
        ('{"type": "fly"}', "message: Input tag 'fly'"),
        ('{"type": "keys", "seq": 1, "down": 256}', "keys.down: Input should be less than or equal to 255"),
        ('{"type": "keys", "seq": 1, "down": true}', "keys.down: Input should be a valid integer"),
        ('{"type": "keys", "seq": -1, "down": 0}', "keys.seq: "),
        ('{"type": "keys", "seq": 1, "down": 1, "up": 1}', "keys.up: Extra inputs are not permitted"),
        ('{"type": "start", "picture": "../../etc/passwd"}', "start.picture"),
        ('{"type": "ping", "t": 1e999, "shown": 0}', "ping.t"),
        ("x" * (messages.MAX_TEXT + 1), "a message of 65537 characters"),
    ],
)
def test_what_is_wrong_is_said(text, why):
    with pytest.raises(Refused) as error:
        messages.parse(text)
    assert str(error.value).startswith(why) and "\n" not in str(error.value) and len(str(error.value)) <= 200


def test_what_is_right_is_read():
    assert messages.parse('{"type": "keys", "seq": 7, "down": 33}') == Keys(type="keys", seq=7, down=33)
    assert messages.parse('{"type": "start"}') == Start(type="start", picture=0, prompt=None, seed=0)


def test_whatever_comes_is_read_or_refused():
    rng, kinds = random.Random(0), collections.Counter()
    for _ in range(2000):
        message = fuzzed(rng)
        try:
            kinds[type(messages.parse(message if isinstance(message, str) else repr(message)))] += 1
        except Refused:
            kinds["refused"] += 1
    assert kinds["refused"] > 500 and len(kinds) == 10  # and each of the nine kinds was among them


def test_a_frame_is_as_its_table_says():
    packed = Frame(0x81, 3, 70000, 17, 9, 1.5, -2.0, 0.25, -0.5).packed(b"picture", 1234.5)
    assert packed[:4] == b"\x01\x81\x03\x00" and packed[40:] == b"picture"
    assert struct.unpack("<III", packed[4:16]) == (70000, 17, 9)
    assert struct.unpack("<d4f", packed[16:40]) == (1234.5, 1.5, -2.0, 0.25, -0.5)
