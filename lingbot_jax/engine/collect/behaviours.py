"""Named ways to play (paper section 2.1.2): each is a pure function of its arguments.

A behaviour is `plan(rng, walker, frames, hold) -> (start pose, keys [frames 8])`, where `frames` counts
transitions and keys are held for about `hold` frames so that their effect can be seen. It may ask the walker
what is free; the same rng and world give the same plan.
"""

from collections.abc import Callable

import numpy as np

from lingbot_jax.engine.collect.walk import Keys, Pose, Walker, hold, reverse

Plan = tuple[Pose, Keys]
Behaviour = Callable[[np.random.Generator, Walker, int, int], Plan]

_FREE = {"W": 0.32, "WJ": 0.12, "WL": 0.12, "J": 0.13, "L": 0.13, "A": 0.05, "D": 0.05, "S": 0.05, "": 0.03}
_TURNS = ("J", "L")
_BUMP = 0.15  # share of blocked choices that are played all the same: walls stop, and that is to be learnt


def _length(rng: np.random.Generator, held: int) -> int:
    """Frames to hold a key: `held`, give or take a quarter."""
    spread = held // 4
    return held + int(rng.integers(-spread, spread + 1))


def _wander(
    rng: np.random.Generator, walker: Walker, pose: Pose, frames: int, held: int, weights: dict
) -> Keys:
    """Segments drawn by `weights`; a segment that would be blocked is drawn again, turns always fit."""
    names, shares = list(weights), np.array(list(weights.values()))
    parts, left = [], frames
    while left > 0:
        n = min(_length(rng, held), left)
        for _ in range(6):
            keys = hold(names[rng.choice(len(names), p=shares / shares.sum())], n)
            if walker.clear(pose, keys) == n or rng.random() < _BUMP:
                break
        else:
            keys = hold(_TURNS[rng.integers(2)], n)
        pose = walker.follow(pose, keys)[0][-1]
        parts.append(keys)
        left -= n
    return np.concatenate(parts)


def free_navigation(rng: np.random.Generator, walker: Walker, frames: int, held: int) -> Plan:
    """Stochastic exploration."""
    pose = walker.start(rng)
    return pose, _wander(rng, walker, pose, frames, held, _FREE)


def backward_navigation(rng: np.random.Generator, walker: Walker, frames: int, held: int) -> Plan:
    """Retreats, often while turning."""
    pose = walker.start(rng)
    half_turn = pose._replace(angle=(pose.angle + 180.0) % 360.0)  # room ahead becomes room behind
    return half_turn, _wander(rng, walker, half_turn, frames, held, {"S": 0.6, "SJ": 0.2, "SL": 0.2})


def loop_roaming(rng: np.random.Generator, walker: Walker, frames: int, held: int) -> Plan:
    """A closed path: out and back the same way, or a rectangle; ends in the pose it began with."""
    for _ in range(12):
        pose = walker.start(rng)
        keys = _rectangle(rng, frames, held) if rng.random() < 0.4 else _out_and_back(rng, frames, held)
        if walker.clear(pose, keys) == len(keys):
            return pose, keys
    return pose, _return(hold(_TURNS[rng.integers(2)], (frames - 1) // 2), frames)


def _return(out: Keys, frames: int) -> Keys:
    """`out`, its exact reverse, and rest."""
    keys = np.concatenate([out, reverse(out)])
    return np.concatenate([keys, hold("", frames - len(keys))])


def _out_and_back(rng: np.random.Generator, frames: int, held: int) -> Keys:
    half, parts = (frames - 1) // 2, []
    while sum(map(len, parts)) < half:
        parts.append(hold(("W", "WJ", "WL", "J", "L", "D", "A")[rng.integers(7)], _length(rng, held)))
    return _return(np.concatenate(parts)[:half], frames) if parts else hold("", frames)


def _rectangle(rng: np.random.Generator, frames: int, held: int) -> Keys:
    """Forward, aside, back, aside: as many frames out as back, so it closes without turning."""
    long = min(_length(rng, held), frames // 2)
    wide = max(0, min(_length(rng, held), frames // 2 - long))
    sides = ("D", "A") if rng.random() < 0.5 else ("A", "D")
    loop = np.concatenate([hold("W", long), hold(sides[0], wide), hold("S", long), hold(sides[1], wide)])
    return np.concatenate([loop, hold("", frames - len(loop))])


def transition_navigation(rng: np.random.Generator, walker: Walker, frames: int, held: int) -> Plan:
    """Walks through a door into the next room, or down the longest free way if doors are unknown."""
    doors = walker.world.doors
    for _ in range(12 if doors else 0):
        door = doors[rng.integers(len(doors))]
        angle = (door.angle + 180.0 * rng.integers(2) + rng.integers(-10, 11)) % 360.0
        back = rng.uniform(0.3, 0.7) * min(frames * walker.step, 130.0)
        x = door.x - back * np.cos(np.radians(angle))
        y = door.y - back * np.sin(np.radians(angle))
        z = walker.world.enter(float(x), float(y))
        if z is None:
            continue
        pose = Pose(float(x), float(y), z, float(angle))
        through = min(frames, int(np.ceil((back + 40.0) / walker.step)))
        if walker.clear(pose, hold("W", through)) == through:
            return pose, _go_on(rng, walker, pose, through, frames, held)
    ways = [walker.start(rng)._replace(angle=float(rng.integers(360))) for _ in range(6)]
    free = [walker.clear(pose, hold("W", frames)) for pose in ways]
    best = int(np.argmax(free))
    return ways[best], _go_on(rng, walker, ways[best], free[best], frames, held)


def _go_on(rng: np.random.Generator, walker: Walker, pose: Pose, walked: int, frames: int, held: int) -> Keys:
    """Forward for `walked` frames, then a look around and on."""
    keys = hold("W", walked)
    if walked == frames:
        return keys
    if walked:
        pose = walker.follow(pose, keys)[0][-1]
    turn = hold(_TURNS[rng.integers(2)], min(_length(rng, held), frames - walked))
    pose = walker.follow(pose, turn)[0][-1]
    rest = (
        _wander(rng, walker, pose, frames - walked - len(turn), held, _FREE)
        if walked + len(turn) < frames
        else []
    )
    return np.concatenate([keys, turn, *([rest] if len(rest) else [])])


def sightseeing(rng: np.random.Generator, walker: Walker, frames: int, held: int) -> Plan:
    """Circles a landmark while looking at it, or pans slowly with pauses."""
    turn = np.radians(walker.yaw)
    radius = walker.step / (2.0 * np.sin(turn / 2.0))  # step and turn a frame close to a regular polygon
    landmarks = walker.world.landmarks
    for _ in range(8 if landmarks else 0):
        spot = landmarks[rng.integers(len(landmarks))]
        side, keys = (1.0, "DJ") if rng.random() < 0.5 else (-1.0, "AL")
        around = rng.uniform(0, 2 * np.pi)
        x, y = spot.x - radius * np.cos(around), spot.y - radius * np.sin(around)
        z = walker.world.enter(float(x), float(y))
        if z is None:
            continue
        # The first transition turns before it moves: half a turn back makes every chord lie on the circle.
        pose = Pose(float(x), float(y), z, float(np.degrees(around) - side * walker.yaw / 2) % 360.0)
        if walker.clear(pose, hold(keys, frames)) == frames:
            return pose, hold(keys, frames)
    pose = walker.start(rng)
    keys, parts = _TURNS[rng.integers(2)], []
    while sum(map(len, parts)) < frames:
        parts += [hold(keys, _length(rng, held)), hold("", _length(rng, held))]
    return pose, np.concatenate(parts)[:frames]


def stationary_360(rng: np.random.Generator, walker: Walker, frames: int, held: int) -> Plan:
    """Turns on the spot, always the same way: the whole circle if the clip is long enough."""
    return walker.start(rng), hold(_TURNS[rng.integers(2)], frames)


def stationary_fixed(rng: np.random.Generator, walker: Walker, frames: int, held: int) -> Plan:
    """Stands and looks."""
    return walker.start(rng), hold("", frames)


BEHAVIOURS: dict[str, Behaviour] = {
    f.__name__: f
    for f in (
        free_navigation,
        loop_roaming,
        transition_navigation,
        sightseeing,
        stationary_360,
        stationary_fixed,
        backward_navigation,
    )
}
