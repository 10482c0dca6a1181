"""Clips from ViZDoom, headless: the player is placed exactly, frame by frame (docs/data.md).

Doom's own motion has inertia, so the keys do not drive it. A behaviour plans poses; a two-script ACS library
puts the player there (console command `puke`), and refuses places where it does not fit, which makes the engine
the collision checker. Poses are read back from the engine: what is stored is what was drawn.

Camera: field of view 90 degrees over a 4:3 picture of width W, so fx = W / 2, and fy = 1.2 fx because Doom's
pixels are tall. Keys I and K stay 0: the engine shears instead of pitching. World of the records: x east,
y down, z north, in units in which one step of a movement key is 0.05.
"""

import contextlib
import struct
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import vizdoom

from lingbot_jax.data.schema import Clip
from lingbot_jax.engine.collect import engines, maps
from lingbot_jax.engine.collect.behaviours import BEHAVIOURS
from lingbot_jax.engine.collect.captions import describe
from lingbot_jax.engine.collect.config import STEP, CollectConfig
from lingbot_jax.engine.collect.source import EngineLost, MapName, Task, camera_to_world
from lingbot_jax.engine.collect.walk import Pose, Walker

_FIXED = 65536  # ACS numbers are 16.16 fixed point; a turn is 65536 as well
_CLIMB = 24  # map units: the highest step up, in the engine's rules
_SETTLE = 12  # tics after entering a level before the player may be placed; and for the eye to come to rest
_VARIABLES = ("CAMERA_POSITION_X", "CAMERA_POSITION_Y", "CAMERA_POSITION_Z", "CAMERA_ANGLE")
_OPTIONS = (  # nothing on the screen but the world, nothing in the world but walls
    "+sv_cheats 1 -nomonsters +movebob 0 +r_fakecontrast 0 +cl_showsecretmessage 0"
)
_HIDDEN = (
    "hud",
    "weapon",
    "crosshair",
    "decals",
    "particles",
    "effects_sprites",
    "messages",
    "corpses",
    "screen_flashes",
)


def _placing_scripts() -> maps.Lumps:
    """An ACS library with script 900 (x, y, z of the floor left, angle) and 901 (x, y, angle; any floor).

    Both put the player `_CLIMB` above the old floor, which fails where it does not fit, and then down on
    the floor below it, wherever it now is. Byte code, because there is no ACS compiler to depend on.
    """
    number, argument, end, drop, add, divide = 3, 28, 1, 54, 14, 17
    get_x, get_y, actor_floor, sector_floor, set_position, set_angle = 196, 197, 259, 261, 283, 276
    me = [number, 0]
    down = [*me, *me, get_x, *me, get_y, *me, actor_floor, number, 0, set_position, drop]
    raised = [number, _CLIMB * _FIXED, add, number, 0, set_position, drop]
    whole = lambda i: [argument, i, number, _FIXED, divide]
    step = [*me, argument, 0, argument, 1, argument, 2, *raised, *down, *me, argument, 3, set_angle, end]
    floor = [number, 0, *whole(0), *whole(1), sector_floor]
    enter = [*me, argument, 0, argument, 1, *floor, *raised, *down, *me, argument, 2, set_angle, end]
    code = struct.pack(f"<{len(step) + len(enter)}i", *step, *enter)
    table = struct.pack("<i6i", 2, 900, 8, 4, 901, 8 + 4 * len(step), 3)
    library = b"ACS\0" + struct.pack("<i", 8 + len(code)) + code + table + struct.pack("<i", 0)
    return [("LOADACS", b"PLACING\n"), ("A_START", b""), ("PLACING", library), ("A_END", b"")]


class _Engine:
    """One running game with some maps, in which the player can be put anywhere."""

    def __init__(self, iwad: str, chosen: list[maps.Map], render: str, work: Path):
        wad = work / "maps.wad"
        maps.write_wad(wad, [lump for m in chosen for lump in m.lumps] + _placing_scripts())
        game = vizdoom.DoomGame()
        game.set_doom_game_path(str(maps.game_folder() / iwad))
        game.set_doom_scenario_path(str(wad))
        game.set_doom_config_path(str(work / "vizdoom.ini"))
        game.set_doom_map(chosen[0].lump)
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        game.set_mode(vizdoom.Mode.PLAYER)
        game.set_episode_timeout(0)
        game.set_seed(1)
        game.set_screen_resolution(getattr(vizdoom.ScreenResolution, f"RES_{render.upper()}"))
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        for thing in _HIDDEN:
            getattr(game, f"set_render_{thing}")(False)
        variables = [getattr(vizdoom.GameVariable, name) for name in _VARIABLES]
        game.set_available_game_variables(variables)
        game.add_game_args(_OPTIONS)
        self._game, self._guard = game, engines.Guard(work)
        try:
            with contextlib.chdir(work):  # the engine writes into its working folder
                game.init()
        except BaseException:
            self.close()
            raise

    def load(self, lump: str) -> None:
        """Enters a map from its beginning."""
        self._game.set_doom_map(lump)
        self._game.set_seed(1)
        self._game.new_episode()
        self._game.advance_action(_SETTLE, False)

    def _position(self) -> tuple[float, float, float]:
        get, names = self._game.get_game_variable, vizdoom.GameVariable
        return get(names.POSITION_X), get(names.POSITION_Y), get(names.POSITION_Z)

    def _ask(self, command: str, x: float, y: float) -> float | None:
        self._game.send_game_command(command)
        self._game.advance_action(1, True)  # without an update the position would be the old one
        at = self._position()
        return at[2] if abs(at[0] - x) < 0.01 and abs(at[1] - y) < 0.01 else None

    def enter(self, x: float, y: float) -> float | None:
        return self._ask(f"puke 901 {_fixed(x)} {_fixed(y)} 0", x, y)

    def move(self, start: Pose, x: float, y: float) -> float | None:
        z = self._ask(f"puke 900 {_fixed(x)} {_fixed(y)} {_fixed(start.z)} 0", x, y)
        return z if z is not None and abs(z - start.z) <= _CLIMB else None

    def rest(self, pose: Pose) -> None:
        """Puts the player at the beginning of a clip and waits until the eye is still."""
        self._game.send_game_command(f"puke 901 {_fixed(pose.x)} {_fixed(pose.y)} {_turn(pose)}")
        self._game.advance_action(_SETTLE, False)

    def draw(self, before: Pose, pose: Pose) -> tuple[np.ndarray, np.ndarray]:
        """Goes from one pose to the next, exactly as `move` was asked.

        Returns:
          The picture [h w 3] and the camera's x, y, z, angle of that very picture.
        """
        place = f"{_fixed(pose.x)} {_fixed(pose.y)} {_fixed(before.z)}"
        self._game.send_game_command(f"puke 900 {place} {_turn(pose)}")
        self._game.advance_action(1, True)
        state = self._game.get_state()
        if state is None:
            raise EngineLost("the episode ended")
        camera = state.game_variables
        if abs(camera[0] - pose.x) > 0.01 or abs(camera[1] - pose.y) > 0.01:
            raise EngineLost(f"the player is at {camera[:2]} instead of {pose[:2]}")
        return state.screen_buffer, camera

    def close(self) -> None:
        try:
            self._game.close()
        finally:
            self._guard.close()


def _fixed(value: float) -> int:
    return round(value * _FIXED)


def _turn(pose: Pose) -> int:
    return round(pose.angle / 360.0 * _FIXED) % _FIXED


class _World:
    """The map that is loaded, as a behaviour sees it. Remembers answers: following a plan asks nothing again."""

    def __init__(self, engine: _Engine, chosen: maps.Map):
        self.enter, self.move = engine.enter, cache(engine.move)
        self.doors, self.landmarks = chosen.doors, chosen.landmarks
        self._map = chosen

    def spawn(self, rng: np.random.Generator) -> tuple[float, float]:
        point = self._map.points[rng.integers(len(self._map.points))]
        x, y = rng.uniform(-self._map.spread, self._map.spread, 2)
        return point.x + float(x), point.y + float(y)


class VizdoomSource:
    """Records planned clips; see the module docstring. Needs the extra `data`.

    Args:
      work: folder for the engine's files, from `engines.folder`.
      chosen: the maps that will be asked for.
    """

    def __init__(self, config: CollectConfig, work: Path, chosen: list[MapName]):
        self._config, self._work = config, work
        self._maps = {}
        for k, m in enumerate(dict.fromkeys(chosen)):
            self._maps[m] = (
                maps.bundled(m.name, config.min_light)
                if m.seed is None
                else maps.generate(m.name, m.seed, config.rooms, f"R{k:05d}")
            )
        self._engine: _Engine | None = None
        self._loaded: maps.Map | None = None
        height, width = config.size
        drawn_width, drawn_height = config.render_size
        fx = drawn_width / 2
        self._intrinsics = np.array(
            [fx * width / drawn_width, 1.2 * fx * height / drawn_height, width / 2, height / 2], np.float32
        )
        cv2.setNumThreads(1)  # one process a core already

    def record(self, task: Task) -> Clip:
        """One clip.

        Raises:
          EngineLost: the engine died; close this source and make another.
        """
        try:
            return self._record(task)
        except vizdoom.ViZDoomErrorException as error:
            raise EngineLost(str(error)) from error

    def _record(self, task: Task) -> Clip:
        config, chosen = self._config, self._maps[task.map]
        self._load(chosen)
        walker = Walker(_World(self._engine, chosen), config.step, config.yaw)
        start, keys = BEHAVIOURS[task.behaviour](
            task.rng(config.seed), walker, config.frames - 1, config.hold
        )
        poses = [start, *walker.follow(start, keys)[0]]
        self._engine.rest(start)
        frames = np.empty((config.frames, *config.size, 3), np.uint8)
        cameras = np.empty((config.frames, 4))
        for i, pose in enumerate(poses):
            picture, cameras[i] = self._engine.draw(poses[max(i - 1, 0)], pose)
            cv2.resize(picture, config.size[::-1], dst=frames[i], interpolation=cv2.INTER_AREA)
        keys = np.concatenate([np.zeros((1, 8), np.uint8), keys])
        known = task.fields(config)
        timestamps = known["timestamps"]
        return Clip(
            **known,
            source="vizdoom",
            frames=frames,
            keys=keys,
            c2w=camera_to_world(cameras, STEP / config.step),
            intrinsics=np.tile(self._intrinsics, (config.frames, 1)),
            captions=describe(keys, timestamps, chosen.describe(np.array([p[:2] for p in poses]))),
            extra={
                "engine": f"vizdoom {vizdoom.__version__}, {chosen.iwad}",
                "licence": "engine: non-commercial (ZDoom); maps and textures: BSD-3-Clause (Freedoom)",
                "step": STEP,
                "map_units_a_step": config.step,
                "yaw_degrees": config.yaw,
            },
        )

    def _load(self, chosen: maps.Map) -> None:
        """Enters the map unless it is the one we are in; another game file is another engine."""
        if self._loaded is chosen:
            return
        if self._engine is None or self._loaded.iwad != chosen.iwad:
            self.close()
            together = [m for m in self._maps.values() if m.iwad == chosen.iwad]
            self._engine = _Engine(chosen.iwad, together, self._config.render, self._work)
        self._engine.load(chosen.lump)
        self._loaded = chosen

    def close(self) -> None:
        if self._engine is not None:
            engine, self._engine, self._loaded = self._engine, None, None
            engine.close()
