"""Rendered clips: poses, pixels, bytes and words."""

import dataclasses

import numpy as np
import pytest

from lingbot_jax.control.keyboard import KEYS, integrate
from lingbot_jax.data.records import file_sha256
from lingbot_jax.data.schema import ClipError, Event, encode, validate
from lingbot_jax.engine.collect import places, weather
from lingbot_jax.engine.collect.collector import collect
from lingbot_jax.engine.collect.config import BEHAVIOURS, CollectConfig
from lingbot_jax.engine.collect.people import meet
from lingbot_jax.engine.collect.source import camera_to_world, plan

rendered = pytest.importorskip("lingbot_jax.engine.collect.rendered_source")

SETTINGS = {
    "frames": 17,
    "clips": 28,
    "held_out": 4,
    "clips_per_map": 2,
    "clips_per_shard": 8,
    "behaviours": dict.fromkeys(BEHAVIOURS, 1.0),
    "pitching": 0.6,
    "people": 0.5,
    "weather_changes": 0.5,
    "seed": 5,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return CollectConfig(out=str(tmp_path_factory.mktemp("rendered")), **SETTINGS)


@pytest.fixture(scope="module")
def clips(config):
    source = rendered.RenderedSource(config)
    made = [source.record(task) for shard in plan(config) for task in shard.tasks]
    source.close()
    return made


def test_poses_are_the_keys_integrated(clips):
    free = 0
    for clip in clips:
        wanted = integrate(clip.keys, clip.c2w[0], yaw_degrees=3.0, pitch_degrees=3.0, pitch_limit=30.0)
        np.testing.assert_allclose(clip.c2w[:, :3, :3], wanted[:, :3, :3], atol=1e-9)
        moved = np.linalg.norm(np.diff(clip.c2w[:, :3, 3], axis=0), axis=1)
        pressed = clip.keys[1:, :4].any(axis=1)
        assert (moved[~pressed] == 0).all(), "only keys move the camera"
        if (moved[pressed] > 0.01).all():
            free += 1
            np.testing.assert_allclose(clip.c2w[:, :3, 3], wanted[:, :3, 3], atol=1e-9)
    assert free >= len(clips) // 2
    used = np.any([clip.keys.any(axis=0) for clip in clips], axis=0)
    assert used.all(), f"never pressed: {[k for k, u in zip(KEYS, used, strict=True) if not u]}"
    loops = [c for c in clips if c.behaviour == "loop_roaming"]
    assert loops and all(np.allclose(c.c2w[0], c.c2w[-1], atol=1e-9) for c in loops)


def test_every_behaviour_is_recorded_and_something_is_seen(clips):
    assert {clip.behaviour for clip in clips} == set(BEHAVIOURS)
    assert all(clip.frames.std() > 3 for clip in clips)
    assert not {c.map for c in clips if c.split == "train"} & {c.map for c in clips if c.split != "train"}


def test_the_same_bytes_from_any_number_of_processes(config, clips, tmp_path):
    hashes = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        collect(dataclasses.replace(config, out=str(out), processes=processes))
        hashes.append({p.name: file_sha256(p) for p in out.glob("*.array_record")})
    assert hashes[0] == hashes[1] and len(hashes[0]) == 5
    source = rendered.RenderedSource(config)  # other clips before it change nothing
    task = plan(config)[1].tasks[3]
    assert encode(source.record(task)) == encode(clips[8 + 3])


def test_a_projected_point_is_where_the_camera_says():
    """The centre of a bright patch, against the pinhole camera of the record; stored pixels, 3 x 3 drawn ones each."""
    renderer = rendered.Renderer((144, 192))
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(40):
        eye = np.array([*rng.uniform(-50, 50, 2), places.EYE, rng.uniform(0, 360)])
        pitch = rng.uniform(-30, 30)
        c2w = camera_to_world(eye[None], 1.0, np.array([pitch]))[0]
        depth, across, down = rng.uniform(60, 300), *rng.uniform(-0.6, 0.6, 2)
        corners = [
            [across * depth + dx, down * depth + dy, depth] for dx, dy in ((-9, -9), (9, -9), (9, 9), (-9, 9))
        ]
        world = corners @ c2w[:3, :3].T + c2w[:3, 3]
        renderer.load(np.stack([world[:, 0], world[:, 2], -world[:, 1]], axis=1))
        black = np.zeros_like(renderer.sky_directions, np.uint8)
        picture = renderer.draw(tuple(eye[:3]), eye[3], pitch, black, np.full((4, 3), 255, np.uint8))
        y, x = np.nonzero(picture[..., 0] > 127)
        wanted = np.array([across, down]) * 32.0 + [32.0, 24.0]
        if len(x) and x.min() > 0 and x.max() < 191 and y.min() > 0 and y.max() < 143:
            errors.append(np.array([x.mean() + 0.5, y.mean() + 0.5]) / 3.0 - wanted)
    assert len(errors) > 20
    assert np.abs(errors).max() < 0.5 and np.abs(np.mean(errors, axis=0)).max() < 0.1


def test_captions_say_the_weather_and_when_it_changes(clips):
    sentences = {name: state.sentence for name, state in weather.WEATHERS.items()}
    changed = 0
    for clip in clips:
        first, *later = clip.extra["weather"]
        assert sentences[first[0]] in clip.captions.narrative
        scene = [e for e in clip.captions.temporal if e.kind == "scene"]
        end = clip.timestamps[-1]
        if not later:
            assert clip.captions.static.endswith(sentences[first[0]]) and not scene
            assert clip.captions.scene(end) == clip.captions.static
            continue
        changed += 1
        ((after, frame),) = later
        assert [e.text for e in scene] == [sentences[first[0]], sentences[after]]
        assert scene[0].end == scene[1].start == clip.timestamps[frame] and scene[1].end == end
        assert clip.captions.scene(clip.timestamps[frame - 1]).endswith(sentences[first[0]])
        assert clip.captions.scene(end) == f"{clip.captions.static} {sentences[after]}"
        validate(clip)
    assert len(clips) // 4 < changed < len(clips)


def test_the_weather_changes_in_the_picture_at_its_frame(config):
    source = rendered.RenderedSource(
        dataclasses.replace(config, behaviours={"stationary_fixed": 1.0}, pitching=0.0, people=0.0)
    )
    seen = 0
    for task in plan(dataclasses.replace(config, behaviours={"stationary_fixed": 1.0}))[0].tasks:
        clip = source.record(task)
        changes = np.abs(np.diff(clip.frames.astype(int), axis=0)).max(axis=(1, 2, 3))
        moment = clip.extra["weather"][1][1] if len(clip.extra["weather"]) > 1 else len(clip)
        end = moment + weather.FADE
        assert not changes[: moment - 1].any() and not changes[end - 1 :].any()
        assert changes[moment - 1 : min(end - 1, len(changes))].all()
        seen += moment < len(clip)
    assert seen


def test_people_stay_out_of_the_way():
    place = places.generate(3)
    camera = np.tile([0.0, 0.0], (60, 1))
    met = [p for k in range(10) for p in meet(np.random.default_rng(k), place, camera)]
    assert met
    for person in met:
        assert place.free(person.track).all()
        assert np.linalg.norm(person.track, axis=1).min() > 40
        assert np.linalg.norm(np.diff(person.track, axis=0), axis=1).max() < 2.6


def test_places_are_of_many_kinds_and_have_room():
    made = [places.generate(seed) for seed in range(30)]
    assert len({p.description for p in made}) > 20
    for place in made:
        points = np.stack(np.meshgrid(*(np.linspace(-h, h, 40) for h in place.half)), -1)
        assert 0.2 < place.free(points).mean() < 0.95
        assert not place.free(np.array([place.half[0] - 1.0, 0.0])), "walls are walls"


def test_an_event_is_of_a_known_kind(clips):
    odd = dataclasses.replace(clips[0].captions, temporal=(Event(0.0, 1.0, "It rains.", "sky"),))
    with pytest.raises(ClipError, match="kind 'sky'"):
        validate(dataclasses.replace(clips[0], captions=odd))
