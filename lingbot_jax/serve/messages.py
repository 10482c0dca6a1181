"""What travels between page and server: strict JSON of the client, JSON of the server, binary frames.

A frame is a header of 40 bytes, little-endian, and an encoded picture:

    0   u8   version           1   u8   keys held during the transition into it, bit i: key i of W A S D I J K L
    2   u16  place in chunk    4   u32  number of the frame in its world
    8   u32  chunk             12  u32  seq of the last keys message that the chunk saw
    16  f64  time it was made, milliseconds of the server's clock
    24  f32  x, f32 z          where the camera stands, world units (x right, z forward at the start)
    32  f32  yaw, f32 pitch    where it looks, radians (right and up are positive)
"""

import dataclasses
import struct
from typing import Annotated, Any, Literal

import pydantic
from pydantic import ConfigDict, Field

VERSION = 1
HEADER = struct.Struct("<BBHIIIdffff")
SUBPROTOCOL = "lingbot.v1"
MAX_TEXT = 64 << 10  # bytes of a JSON message: a prompt is far smaller
U32 = Annotated[int, Field(ge=0, le=2**32 - 1)]


class Message(pydantic.BaseModel):
    """A message of a client: no field more, no type but its own."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Start(Message):
    """Begins a world: at a picture of the bundle, by number, or at the one uploaded last."""

    type: Literal["start"]
    picture: Annotated[int, Field(ge=0, le=10_000)] | Literal["upload"] = 0
    prompt: str | None = None
    seed: U32 = 0


class Keys(Message):
    """The keys that are down, bit i for key i of W A S D I J K L. `seq` counts a client's messages."""

    type: Literal["keys"]
    seq: U32
    down: Annotated[int, Field(ge=0, le=255)]


class Prompt(Message):
    """Replaces the prompt from the next chunk on."""

    type: Literal["prompt"]
    text: str


class Event(Message):
    """Turns an event on, in place of the one before, or off."""

    type: Literal["event"]
    name: Annotated[str, Field(max_length=24)]
    on: bool


class Keep(Message):
    """Keeps this moment, to come back to."""

    type: Literal["keep"]


class Restore(Message):
    """Goes on from a moment that was kept: another future of the same past."""

    type: Literal["restore"]
    moment: U32


class Forget(Message):
    """Drops a moment."""

    type: Literal["forget"]
    moment: U32


class Pause(Message):
    """Stops and starts the clock of the world."""

    type: Literal["pause"]
    on: bool


class Ping(Message):
    """Is answered at once; `t` comes back. `shown`: how many frames of this connection have arrived.

    A client that does not say so for long is taken for one that cannot keep up.
    """

    type: Literal["ping"]
    t: Annotated[float, Field(allow_inf_nan=False)] | int
    shown: U32


Command = Start | Keys | Prompt | Event | Keep | Restore | Forget | Pause | Ping
_COMMAND: pydantic.TypeAdapter[Command] = pydantic.TypeAdapter(
    Annotated[Command, Field(discriminator="type")]
)


class Refused(Exception):
    """A message that is answered with an error of one line and changes nothing."""


def parse(text: str) -> Command:
    """A client's message. Raises Refused: what is wrong with it, in one line."""
    if len(text) > MAX_TEXT:
        raise Refused(f"a message of {len(text)} characters; at most {MAX_TEXT}")
    try:
        return _COMMAND.validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:60]
        raise Refused(f"{place or 'message'}: {first['msg']}"[:200]) from None


@dataclasses.dataclass(frozen=True)
class Frame:
    """The header of a frame; fields as in the module. `keys` is the bit mask."""

    keys: int
    place: int
    number: int
    chunk: int
    seq: int
    x: float
    z: float
    yaw: float
    pitch: float

    def packed(self, picture: bytes, milliseconds: float) -> bytes:
        """The frame as it travels."""
        head = (VERSION, self.keys, self.place, self.number, self.chunk, self.seq, milliseconds)
        return HEADER.pack(*head, self.x, self.z, self.yaw, self.pitch) + picture


def to_json(kind: str, **fields: Any) -> str:
    """A message of the server."""
    return pydantic.TypeAdapter(dict[str, Any]).dump_json({"type": kind, **fields}).decode()
