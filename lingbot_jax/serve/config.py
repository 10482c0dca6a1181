"""How a world is served."""

import re
from typing import Annotated, Literal

from pydantic import Field

from lingbot_jax.config import NonNegative, Path, PositiveInt, Seconds, Text, config, require

Name = Annotated[str, Field(min_length=1, max_length=255)]
Pixels = Annotated[int, Field(gt=0, le=8192)]


@config
class ServeConfig:
    """How a world is served: `python -m experiments.serve --help` lists the flags."""

    run: Path = Field("assets/world", description="run or bundle to play, local or gs://")
    host: Name = Field("127.0.0.1", description="address to listen on; 0.0.0.0: every one, behind a balancer")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        8000, description="port to listen on; 0: any free one"
    )
    token: Annotated[str, Field(max_length=256)] = Field(
        "", description="secret that a client must know; empty: none. Better given as LINGBOT_TOKEN"
    )
    allowed_hosts: tuple[Name, ...] = Field(
        (), description="names by which clients may call the server, besides its own address and localhost"
    )
    max_sessions: Annotated[int, Field(gt=0, le=10_000)] = Field(
        4, description="worlds played at once, in turns on the device; one more client is told busy"
    )
    fps: Annotated[float, Field(gt=0, le=240, allow_inf_nan=False)] | None = Field(
        None, description="video frames per second that are played; None: as the world was trained, or 16"
    )
    size: tuple[Pixels, Pixels] | None = Field(
        None, description="height and width of the video; None: of the bundle's pictures"
    )
    picture: Path | None = Field(None, description="an image file to start from, where the bundle has none")
    prompt: Text = Field("a place to walk through", description="of pictures that bring none")
    events: tuple[Annotated[str, Field(max_length=200)], ...] = Field(
        (
            "sun: It is sunny.",
            "dusk: It is dusk.",
            "night: It is night.",
            "fog: It is foggy.",
            "snow: It is snowy.",
        ),
        description="buttons of the page, `name: text` each, of which at most one is on: its text joins the prompt in "
        "place of the others'",
    )
    format: Literal["jpeg", "webp"] = Field("jpeg", description="of the frames")
    quality: Annotated[int, Field(ge=1, le=100)] | None = Field(
        None,
        description="of the frames; webp at 100 is without loss; None: 97 for small frames, 88 for large",
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="of the parameters; None: float32 on a CPU, elsewhere as they are stored"
    )
    weights: Literal["split", "whole"] = Field(
        "split",
        description="parameters split over the devices, or whole on each: more memory, sooner frames (docs/serving.md)",
    )
    idle_seconds: Seconds = Field(
        180.0, description="without a message of the player, after which a session ends"
    )
    total_seconds: Seconds = Field(3600.0, description="after which any session ends")
    stall_seconds: Seconds = Field(10.0, description="in which a client must take a frame")
    drain_seconds: NonNegative = Field(20.0, description="that sessions go on after SIGTERM, at most")
    max_snapshots: Annotated[int, Field(ge=0, le=1000)] = Field(8, description="moments kept for a session")
    max_prompt: Annotated[int, Field(gt=0, le=65536)] = Field(400, description="characters of a prompt")
    max_picture_bytes: PositiveInt = Field(8 << 20, description="of an uploaded picture, as a file")
    max_picture_pixels: PositiveInt = Field(16_000_000, description="of an uploaded picture, unpacked")
    check: bool = Field(False, description="open and warm the world, print what it does as JSON, and end")

    def __post_init__(self):
        for event in self.events:
            form = "must be `name: text`, the name of letters, digits, - and _"
            require(re.fullmatch(r"[\w-]{1,24}: *\S.*", event) is not None, "events", event, form)
        names = [event.partition(":")[0] for event in self.events]
        require(len(names) == len(set(names)), "events", names, "each name once")
        printable = re.fullmatch(r"[\w.~-]*", self.token, re.ASCII) is not None
        require(printable, "token", "...", "must be of letters, digits, and - . _ ~")

    def event_texts(self) -> dict[str, str]:
        """What each event button adds to the prompt, by name."""
        return {name: text.strip() for name, _, text in (event.partition(":") for event in self.events)}
