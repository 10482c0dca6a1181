"""Clip references to pictures: decoded, turned, cut, scaled, at a constant rate.

Only containers that hold their own pictures are opened, with no protocol but the file itself: playlists could name
other files or hosts, and texts would be drawn as pictures.
"""

import typing
from collections.abc import Iterator

import av
import cv2
import numpy as np
from jaxtyping import UInt8

from lingbot_jax.engine.curate.items import Clip, Rejected, Video

_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,mxf,gif,y4m,yuv4mpegpipe,ivf,h264,hevc"
)
_FAULTS = 200  # packets in a row that cannot be read, or decoded, after which a video has ended
_PIXELS = 8192 * 8192  # of a picture; a decoder that is told more refuses
_FAR = 2.0  # seconds from a time to the nearest picture; segments end at far smaller gaps
Frames = UInt8[np.ndarray, "f h w 3"]
Grey = UInt8[np.ndarray, "f h w"]
_LAST: dict[tuple, Frames] = {}  # the last clip looked at


class Picture(typing.NamedTuple):
    """A decoded frame at `time` seconds; `index` counts from where reading began."""

    time: float
    frame: av.VideoFrame
    index: int


def open_video(path: str) -> av.container.InputContainer:
    """Opens a container for reading. Raises Rejected."""
    allowed = {"protocol_whitelist": "file", "format_whitelist": _CONTAINERS}
    try:
        return av.open(path, options=allowed, metadata_errors="ignore")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise Rejected("not a video", str(error)) from None


def packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """The packets of a stream, in the order of the file, as far as it can be read: damage is passed over."""
    faults = 0
    while faults < _FAULTS:
        try:
            for packet in container.demux(stream):
                yield packet
                faults = 0
            return
        except (
            av.FFmpegError,
            OSError,
        ):  # the iterator has ended with it; another one goes on behind the damage
            faults += 1


def pictures(video: Video, start: float) -> Iterator[Picture]:
    """The pictures of a video from the last one at or before `start` seconds on (or earlier), times increasing.

    What cannot be decoded, or is known to be damaged, is left out; a broken tail ends the video.
    """
    with open_video(video.path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # a process a core already
        stream.codec_context.options = {"max_pixels": str(_PIXELS)}
        if start > video.start:
            try:
                container.seek(int(start / stream.time_base), stream=stream)
            except (av.FFmpegError, OSError, OverflowError):
                container.seek(0)
        last, index = -np.inf, 0
        for frame in _decoded(container, stream):
            if frame.pts is None or frame.is_corrupt:
                continue
            time = float(frame.pts * stream.time_base)
            if time > last:
                yield Picture(time, frame, index)
                last, index = time, index + 1


def _decoded(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    faults = 0
    for packet in packets(container, stream):
        try:
            frames = packet.decode()
            faults = 0
        except (av.FFmpegError, ValueError, MemoryError):
            frames, faults = [], faults + 1
        yield from frames
        if faults == _FAULTS:
            return


def shown(video: Video, frame: av.VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
    """RGB, turned as it is meant to be seen; pixels as stored, perhaps not square."""
    return np.rot90(frame.to_ndarray(format="rgb24"), video.rotation)


def fit(
    video: Video, box: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """What the picture inside `box` is scaled to so that it covers `size`, and the corner of the cut about its centre.

    All are (height, width) in pixels.
    """
    height, width = video.height * (box[1] - box[0]), video.width * (box[3] - box[2])
    scale = max(size[0] / height, size[1] / width)
    scaled = max(round(height * scale), size[0]), max(round(width * scale), size[1])
    return scaled, ((scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2)


def _cut(clip: Clip, picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = picture.shape[:2]
    top, bottom = round(clip.box[0] * height), round(clip.box[1] * height)
    left, right = round(clip.box[2] * width), round(clip.box[3] * width)
    (rows, columns), (y, x) = fit(clip.video, clip.box, size)
    inside = picture[top:bottom, left:right]
    how = cv2.INTER_AREA if rows < inside.shape[0] else cv2.INTER_LINEAR
    return cv2.resize(inside, (columns, rows), interpolation=how)[y : y + size[0], x : x + size[1]]


def read(clip: Clip, size: tuple[int, int]) -> Frames:
    """The pictures of a clip: for each time of the constant rate the nearest one.

    Raises:
      Rejected: one is missing.
    """
    wanted = clip.start + np.arange(clip.frames) / clip.fps
    frames = np.empty((clip.frames, *size, 3), np.uint8)
    at, before = 0, None

    def take(picture: Picture, until: float) -> int:
        """Fills the frames that `picture` is the nearest to: those before `until`."""
        end = max(at, int(np.searchsorted(wanted, until)))
        if end > at:
            far = max(abs(picture.time - wanted[at]), abs(picture.time - wanted[end - 1]))
            if far > _FAR:
                raise Rejected("frames missing", f"none within {far:.2f} s of {wanted[at]:.2f} s")
            frames[at:end] = _cut(clip, shown(clip.video, picture.frame), size)
        return end

    for picture in pictures(clip.video, clip.start):
        if before is not None:
            at = take(before, (before.time + picture.time) / 2)
        before = picture
        if at == clip.frames:
            return frames
    if before is not None:
        at = take(before, np.inf)
    if at < clip.frames:
        raise Rejected("frames missing", f"{at} of {clip.frames}")
    return frames


def analysed(clip: Clip, width: int, size: tuple[int, int]) -> Frames:
    """The pictures of a clip as they will be stored, but `width` pixels wide; of the last clip asked for they are kept.

    So stages that follow one another on one clip decode it once.
    """
    key = (clip.video.path, clip.start, clip.frames, clip.fps, clip.box, width, size)
    found = _LAST.get(key)
    if found is None:
        found = read(clip, (max(16, round(width * size[0] / size[1])), width))
        found.flags.writeable = False
        _LAST.clear()
        _LAST[key] = found
    return found


def grey_of(frames: Frames) -> Grey:
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])
