"""Clips of generated places, rendered in software by Panda3D (BSD licence), headless, on any CPU (docs/data.md).

Camera: field of view 90 degrees across the picture, square pixels, pictures drawn `supersample` times as large and
area-averaged. Keys I and K pitch it, as far as `PITCH_LIMIT`. Light, haze and weather are computed at the corners of
the geometry (`weather.py`) and drawn as plain colours, so that no driver decides what a picture looks like.

The same task gives the same bytes: nodes are drawn in the order of the scene and not of their addresses.
"""

import dataclasses
from functools import lru_cache

import cv2
import numpy as np
import panda3d.core as p3
from jaxtyping import Float, UInt8

from lingbot_jax.data.schema import Clip, Event
from lingbot_jax.engine.collect import places, weather
from lingbot_jax.engine.collect.behaviours import BEHAVIOURS
from lingbot_jax.engine.collect.captions import describe
from lingbot_jax.engine.collect.config import STEP, CollectConfig
from lingbot_jax.engine.collect.people import Person, meet
from lingbot_jax.engine.collect.source import Task, camera_to_world
from lingbot_jax.engine.collect.walk import KEYS, Keys, Walker
from lingbot_jax.engine.collect.weather import FADE, WEATHERS, Weather

PITCH_LIMIT = 30.0  # degrees above and below the horizon
_NEAR, _FAR = 4.0, 4000.0  # of what is drawn, map units
_UP, _DOWN = KEYS.index("I"), KEYS.index("K")
_QUIET = "audio-library-name null\nnotify-level error\nwindow-type offscreen"
_SHARES = {"sun": 0.34, "dusk": 0.17, "night": 0.19, "fog": 0.15, "snow": 0.15}


class Renderer:
    """One offscreen picture of coloured quads in front of a sky. `size` is (height, width) as drawn."""

    def __init__(self, size: tuple[int, int]):
        p3.load_prc_file_data("", _QUIET)
        height, width = size
        pipe = p3.GraphicsPipeSelection.get_global_ptr().make_pipe(
            "TinyOffscreenGraphicsPipe", "p3tinydisplay"
        )
        if pipe is None:
            raise RuntimeError("panda3d has no software renderer here")
        self._engine = p3.GraphicsEngine()
        properties = p3.FrameBufferProperties()
        properties.set_rgb_color(True)
        properties.set_depth_bits(24)
        window = p3.WindowProperties.size(width, height)
        self._buffer = self._engine.make_output(
            pipe, "picture", 0, properties, window, p3.GraphicsPipe.BF_refuse_window
        )
        self._picture = p3.Texture()
        self._buffer.add_render_texture(self._picture, p3.GraphicsOutput.RTM_copy_ram)
        self._buffer.set_clear_color_active(False)
        lens = p3.PerspectiveLens()
        lens.set_film_size(width, height)
        lens.set_focal_length(width / 2)
        lens.set_film_offset(-0.25, 0.25)  # the renderer's pixel centres lie a quarter of a pixel off
        lens.set_near_far(_NEAR, _FAR)
        self._root = p3.NodePath("root")
        self._root.set_two_sided(True)
        self._root.set_bin("unsorted", 30)  # the default sorts by address: pictures would differ
        self._camera = self._root.attach_new_node(p3.Camera("camera", lens))
        region = self._buffer.make_display_region()
        region.set_camera(self._camera)
        corners = _dome()
        self.sky_directions = corners / np.linalg.norm(corners, axis=1, keepdims=True)
        self._sky = _Quads(self._root, corners)
        self._sky.node.set_depth_write(False)
        self._sky.node.set_depth_test(False)
        self._sky.node.set_bin("unsorted", 0)
        self._scene: _Quads | None = None

    def load(self, corners: Float[np.ndarray, "v 3"]) -> None:
        """Takes the geometry of the scene in place of the one before."""
        if self._scene is not None:
            self._scene.node.remove_node()
        self._scene = _Quads(self._root, corners)

    def draw(
        self,
        eye: tuple[float, float, float],
        angle: float,
        pitch: float,
        sky: UInt8[np.ndarray, "s 3"],
        colours: UInt8[np.ndarray, "v 3"],
        moved: Float[np.ndarray, "v 3"] | None = None,
    ) -> UInt8[np.ndarray, "h w 3"]:
        """The picture from `eye`, `angle` anticlockwise from east and `pitch` up, degrees.

        Args:
          moved: the corners, where they are no longer as loaded.
        """
        self._camera.set_pos_hpr(*eye, angle - 90.0, pitch, 0.0)
        self._sky.node.set_pos(*eye)
        self._sky.paint(sky)
        self._scene.paint(colours)
        if moved is not None:
            self._scene.place(moved)
        self._engine.render_frame()
        height, width = self._picture.get_y_size(), self._picture.get_x_size()
        pixels = np.frombuffer(self._picture.get_ram_image_as("RGB"), np.uint8)
        return pixels.reshape(height, width, 3)[::-1]

    def close(self) -> None:
        self._engine.remove_all_windows()


class _Quads:
    """Coloured quads as one node; positions and colours are arrays of their own, each written without the other."""

    def __init__(self, parent: p3.NodePath, corners: Float[np.ndarray, "v 3"]):
        count = len(corners)
        positions, colours = p3.GeomVertexArrayFormat(), p3.GeomVertexArrayFormat()
        positions.add_column(p3.InternalName.get_vertex(), 3, p3.Geom.NT_float32, p3.Geom.C_point)
        colours.add_column(p3.InternalName.get_color(), 4, p3.Geom.NT_uint8, p3.Geom.C_color)
        layout = p3.GeomVertexFormat()
        layout.add_array(positions)
        layout.add_array(colours)
        layout = p3.GeomVertexFormat.register_format(layout)
        self._data = p3.GeomVertexData("quads", layout, p3.Geom.UH_dynamic)
        self._data.set_num_rows(count)
        self._rgba = np.full((count, 4), 255, np.uint8)
        triangles = p3.GeomTriangles(p3.Geom.UH_static)
        for a in range(0, count, 4):
            triangles.add_vertices(a, a + 1, a + 2)
            triangles.add_vertices(a, a + 2, a + 3)
        geometry = p3.Geom(self._data)
        geometry.add_primitive(triangles)
        node = p3.GeomNode("quads")
        node.add_geom(geometry)
        node.set_bounds(p3.OmniBoundingVolume())  # corners move: never culled
        node.set_final(True)
        self._geom_node = node
        self.node = parent.attach_new_node(node)
        self.place(corners)

    def _write(self, array: int, values: bytes) -> None:
        data = self._geom_node.modify_geom(0).modify_vertex_data()
        memoryview(data.modify_array(array)).cast("B")[:] = values

    def place(self, corners: Float[np.ndarray, "v 3"]) -> None:
        self._write(0, np.ascontiguousarray(corners, np.float32).tobytes())

    def paint(self, colours: UInt8[np.ndarray, "v 3"]) -> None:
        self._rgba[:, :3] = colours
        self._write(1, self._rgba.tobytes())


def _dome(sectors: int = 16, radius: float = 100.0) -> Float[np.ndarray, "s 3"]:
    """Quads of a sky all around, down to a little below the horizon."""
    around = np.linspace(0, 2 * np.pi, sectors + 1)
    rise = np.radians([-60, 0, 6, 14, 26, 45, 90])
    point = lambda a, e: (np.cos(a) * np.cos(e), np.sin(a) * np.cos(e), np.sin(e))
    quads = [
        (point(a, e), point(b, e), point(b, f), point(a, f))
        for e, f in zip(rise, rise[1:], strict=False)
        for a, b in zip(around, around[1:], strict=False)
    ]
    return radius * np.array(quads).reshape(-1, 3)


@lru_cache(maxsize=8)
def _place(seed: int) -> places.Place:
    return places.generate(seed)


class RenderedSource:
    """Records planned clips; see the module docstring. Needs the extra `data`."""

    def __init__(self, config: CollectConfig):
        self._config = config
        height, width = config.size
        self._renderer = Renderer((height * config.supersample, width * config.supersample))
        self._intrinsics = np.array([width / 2, width / 2, width / 2, height / 2], np.float32)
        cv2.setNumThreads(1)  # one process a core already

    def record(self, task: Task) -> Clip:
        config, place = self._config, _place(task.map.seed)
        plays, scenery = task.rng(config.seed).spawn(2)
        walker = Walker(place, config.step, config.yaw)
        start, keys = BEHAVIOURS[task.behaviour](plays, walker, config.frames - 1, config.hold)
        pitch = np.zeros(config.frames)
        if scenery.random() < config.pitching:
            keys, pitch = look_around(scenery, keys, config.yaw, closed=task.behaviour == "loop_roaming")
        poses = [start, *walker.follow(start, keys)[0]]
        track = np.array([p[:2] for p in poses])
        people = meet(scenery, place, track) if scenery.random() < config.people else ()
        skies = _skies(scenery, config)
        keys = np.concatenate([np.zeros((1, 8), np.uint8), keys])
        known = task.fields(config)
        timestamps = known["timestamps"]
        view = place.description + (" and people" if people else "")
        captions = describe(keys, timestamps, [view] * config.frames)
        eyes = np.array([(p.x, p.y, p.z + places.EYE, p.angle) for p in poses])
        return Clip(
            **known,
            source="rendered",
            frames=self._draw(place, people, skies, eyes, pitch),
            keys=keys,
            c2w=camera_to_world(eyes, STEP / config.step, pitch),
            intrinsics=np.tile(self._intrinsics, (config.frames, 1)),
            captions=skies.tell(captions, timestamps),
            extra={
                "engine": f"panda3d {p3.PandaSystem.get_version_string()}",
                "licence": "frames: Apache-2.0, as this package; engine: BSD-3-Clause",
                "step": STEP,
                "map_units_a_step": config.step,
                "yaw_degrees": config.yaw,
                "pitch_limit": PITCH_LIMIT,
                "weather": [[skies.before, 0]] + ([[skies.after, skies.change]] if skies.after else []),
            },
        )

    def _draw(
        self,
        place: places.Place,
        people: tuple[Person, ...],
        skies: "Skies",
        eyes: Float[np.ndarray, "f 4"],
        pitch: Float[np.ndarray, "f"],
    ) -> UInt8[np.ndarray, "f h w 3"]:
        config, renderer = self._config, self._renderer
        mesh = place.mesh
        for person in people:
            mesh = mesh + person.mesh
        renderer.load(mesh.corners)
        frames = np.empty((config.frames, *config.size, 3), np.uint8)
        for i, (*eye, angle) in enumerate(eyes):
            state = skies.at(i)
            if i == 0 or state != skies.at(i - 1):
                near, far = weather.light(mesh, state)
                sky = weather.sky(renderer.sky_directions, place.sun, state)
            moved = np.concatenate([place.mesh.corners, *(p.at(i) for p in people)]) if people else None
            corners = mesh.corners if moved is None else moved
            distance = np.linalg.norm(corners - eye, axis=1)
            colours = weather.through_air(near, far, distance, state)
            picture = renderer.draw(tuple(eye), angle, pitch[i], sky, colours, moved)
            cv2.resize(picture, config.size[::-1], dst=frames[i], interpolation=cv2.INTER_AREA)
        return frames

    def close(self) -> None:
        self._renderer.close()


@dataclasses.dataclass(frozen=True)
class Skies:
    """The weather of a clip: `before`, and from frame `change` on, over `FADE` frames, `after` ("": it stays)."""

    before: str
    after: str
    change: int

    def at(self, frame: int) -> Weather:
        begin = WEATHERS[self.before]
        share = min(1.0, (frame - self.change + 1) / FADE) if self.after and frame >= self.change else 0.0
        return begin.towards(WEATHERS[self.after], share) if share else begin

    def tell(self, captions, timestamps: Float[np.ndarray, "f"]):
        """The captions with the weather in them; where it changes, as timed events of the scene."""
        first = WEATHERS[self.before].sentence
        static, story = captions.static, f"{captions.narrative} {first}"
        if not self.after:
            return dataclasses.replace(captions, narrative=story, static=f"{static} {first}")
        then, when = WEATHERS[self.after].sentence, float(timestamps[self.change])
        events = (
            Event(float(timestamps[0]), when, first, "scene"),
            Event(when, float(timestamps[-1]), then, "scene"),
        )
        story = f"{story} Then {then[0].lower()}{then[1:]}"
        return dataclasses.replace(captions, narrative=story, temporal=captions.temporal + events)


def _skies(rng: np.random.Generator, config: CollectConfig) -> Skies:
    names, shares = list(_SHARES), np.array(list(_SHARES.values()))
    before, after = rng.choice(names, 2, replace=False, p=shares)
    if rng.random() >= config.weather_changes or config.frames < 3:
        return Skies(str(before), "", 0)
    return Skies(str(before), str(after), int(rng.integers(1, config.frames - 1)))


def look_around(
    rng: np.random.Generator, keys: Keys, degrees: float, closed: bool
) -> tuple[Keys, Float[np.ndarray, "f"]]:
    """Lays looks up and down over planned keys, which they do not disturb.

    Args:
      keys: `[n 8]` transitions. degrees: per frame. closed: the path ends as it begins, and so do the looks.

    Returns:
      The keys, and the pitch of n + 1 frames in degrees.
    """
    count, most = len(keys), int(PITCH_LIMIT / degrees + 1e-9)
    steps = np.zeros(count, int)
    begin = 0 if closed else int(rng.integers(-most // 3, most // 3 + 1))
    at, level = int(rng.integers(0, 8)), begin
    span = (count - 1) // 2 if closed else count
    while at < span:
        way = 1 if rng.random() < 0.5 - 0.5 * level / max(most, 1) else -1
        n = min(int(rng.integers(3, 9)), span - at, most - way * level)
        steps[at : at + n] = way
        level += way * n
        at += n + int(rng.integers(2, 12))
    if closed:
        steps[span + 1 : 2 * span + 1] = -steps[:span][::-1]
    keys = keys.copy()
    keys[:, _UP], keys[:, _DOWN] = steps > 0, steps < 0
    return keys, degrees * (begin + np.concatenate([[0], np.cumsum(steps)]))
