"""What is collected is decided before anything runs: shares, splits, maps, captions, refused settings."""

import collections

import numpy as np
import pytest

from lingbot_jax.config import ConfigError, build
from lingbot_jax.data.schema import Event
from lingbot_jax.engine.collect import maps
from lingbot_jax.engine.collect.captions import describe, phrase
from lingbot_jax.engine.collect.config import CollectConfig
from lingbot_jax.engine.collect.source import plan


def tasks(**fields):
    return [t for s in plan(CollectConfig(out="x", **fields)) for t in s.tasks]


def test_shares_are_exact_and_shards_cover_all():
    config = CollectConfig(
        out="x", clips=200, held_out=50, behaviours={"free_navigation": 3, "loop_roaming": 1}
    )
    shards = plan(config)
    assert [(s.split, s.index, s.count, len(s.tasks)) for s in shards[:7]] == [
        *(("train", k, 7, 32) for k in range(6)),
        ("train", 6, 7, 8),
    ]
    train = [t for s in shards if s.split == "train" for t in s.tasks]
    assert [t.index for t in train] == list(range(200))
    assert collections.Counter(t.behaviour for t in train) == {"free_navigation": 150, "loop_roaming": 50}
    assert plan(config) == shards


def test_no_map_is_in_two_splits():
    all_tasks = tasks(source="vizdoom", clips=400, held_out=400, bundled=0.5, seed=3)
    train, held = ({t.map for t in all_tasks if t.split == s} for s in ("train", "held_out"))
    assert train and held and not train & held
    share = np.mean([t.map.seed is None for t in all_tasks])
    assert share == pytest.approx(0.5, abs=0.02)
    other = {t.map for t in tasks(source="vizdoom", clips=400, held_out=400, bundled=0.0, seed=4)}
    assert not other & (train | held), "another seed is other maps"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clips": 0}, "config.clips = 0: must be greater than or equal to 1"),
        (
            {"source": "vizdoom", "size": (48, 640)},
            r"config.size = \(48, 640\): must be \(height, width\) within",
        ),
        ({"source": "unreal"}, "config.source = 'unreal': must be 'rendered' or 'vizdoom'"),
        ({"people": 2.0}, "config.people = 2.0: must be less than or equal to 1"),
        ({"render": "64x48"}, "config.render = '64x48': must be '160x120'"),
        ({"step": 20.0}, "config.step = 20.0: must be less than or equal to 16"),
        ({"behaviours": {"flying": 1.0}}, r"config.behaviours = \['flying'\]: allowed: free_navigation"),
        ({"behaviours": {"loop_roaming": 0.0}}, "must not all be 0"),
        ({"bundled_held_out": ("E1M5",)}, r"config.bundled_held_out = \['E1M5'\]: a map may be in one split"),
        ({"out": "gs://bucket/data"}, "config.out = 'gs://bucket/data': must be a local folder"),
        ({"out": ""}, "config.out = ''"),
        ({"clips": 10**30}, "config.clips"),
        ({"fps": float("nan")}, "config.fps"),
        ({"bundled_train": ("",)}, r"config.bundled_train\[0\] = ''"),
        ({"compression": "zip"}, "config.compression = 'zip'"),
        ({"bundled": 1.5}, "config.bundled = 1.5: must be less than or equal to 1"),
        ({"frame": 3}, "config.frame: unknown field"),
    ],
)
def test_refused_settings(fields, message):
    with pytest.raises(ConfigError, match=message):
        build(CollectConfig, {"out": "x", **fields})


def test_generated_maps():
    one, same, other = (maps.generate("a", seed, 4, "R") for seed in (5, 5, 6))
    assert one == same and one.lumps != other.lumps
    assert len(one.rooms) == 16 and len(one.doors) >= 15, "a spanning tree: every room can be reached"
    here, next_door = one.describe(np.array([[10.0, -100.0], [10.0, 288.0 - 100.0]]))
    assert here == one.rooms[0][1] and next_door == one.rooms[1][1] and here.startswith("a room with ")
    text = one.lumps[1][1].decode()
    for kind in ("vertex", "linedef", "sidedef", "sector", "thing"):
        assert text.count(kind + "{") > 0
    used = {name for name in (*maps.WALLS, *maps.FRAMES) if f'"{name}"' in text}
    assert len(used) > 5


def test_bundled_maps_are_static_copies():
    pytest.importorskip("vizdoom")
    chosen = maps.bundled("E1M6", min_light=200)
    lumps = dict(chosen.lumps)
    sectors = np.frombuffer(lumps["SECTORS"], np.uint8).reshape(-1, 26)[:, 20:26].copy().view("<i2")
    assert sectors[:, 0].min() >= 200 and not sectors[:, 1].any()
    assert len(lumps["THINGS"]) == 10, "the player alone"
    assert not np.frombuffer(lumps["LINEDEFS"], "<i2").reshape(-1, 7)[:, 3].any()
    assert len(chosen.points) > 50
    with pytest.raises(ConfigError, match="bundled map = 'E9M9': freedoom1.wad has E1M1 .. E4M9"):
        maps.bundled("E9M9", 0)


def test_captions():
    assert phrase("WJ") == "walks forward and turns left"
    keys = np.zeros((7, 8), np.uint8)
    keys[1:4, 0] = 1
    keys[4:6, 7] = 1
    made = describe(keys, np.arange(7) / 2.0, ["a red room"] * 5 + ["a hall"] * 2)
    assert made.static == "First-person view of a red room, next to a hall."
    assert made.narrative == (
        "In a red room, the camera walks forward, then turns right, then stands still, and ends in a hall."
    )
    assert made.temporal == (
        Event(0.0, 1.5, "The camera walks forward."),
        Event(1.5, 2.5, "The camera turns right."),
        Event(2.5, 3.0, "The camera stands still."),
    )
