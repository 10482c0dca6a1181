"""The curator: three passes over parts of the work, each part a file that is made once (docs/curation.md).

    scan       a part is some files: probe, split
    annotate   a part is some clips: profile, pose, keys, caption
    write      a part is a shard of the clips that `select` chose from all of them

A part is a pure function of the config and of what it is made from, which its name says; it appears whole or not at
all. Apache Beam hands the parts to workers, here or on a cluster, and knows nothing else of them.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import cv2

from lingbot_jax.config import require
from lingbot_jax.data.records import DATASET, SUFFIX, file_sha256, shard_name, write_shard
from lingbot_jax.data.schema import SCHEMA_VERSION
from lingbot_jax.engine.curate import items, select, stages
from lingbot_jax.engine.curate.config import CurateConfig
from lingbot_jax.engine.curate.items import Rejected, Video
from lingbot_jax.engine.curate.probe import ingest
from lingbot_jax.engine.curate.write import record
from lingbot_jax.files import reached, read_json, write_whole

STARTED, WORK, DROPPED = "curate.json", ".parts", "dropped.jsonl"
CLIPS = 8  # of a part of `annotate`: a minute of work, which a stop may cost


@dataclasses.dataclass(frozen=True)
class Part:
    """Work of one pass: `rows` are videos, clips, or places of clips in the parts before. `path` is what it makes."""

    kind: str
    path: str
    rows: tuple[Any, ...]


def curate(config: CurateConfig, runner: str | None = None, options: Sequence[str] = ()) -> dict[str, Any]:
    """Runs all of it, or what is left of it.

    Args:
      runner: of Apache Beam; None: in this process, or in `config.workers` processes of this machine.
      options: of that runner, as on its command line. Workers elsewhere must see source and out under the same paths.

    Returns:
      clips_in = kept + all dropped (files that gave none, shots and clips); dropped: stage -> reason -> count;
      shares that were reached; cpu_seconds by stage.
    """
    out = pathlib.Path(config.out).absolute()
    with reached(out, "config.out"):
        (out / WORK).mkdir(parents=True, exist_ok=True)
    _same_config(out, config)
    videos = ingest(config)
    _say(f"ingest: {len(videos)} files")
    scanned = _pass(
        config, "scan", [(v.path, v.name, v.nbytes, _changed(v)) for v in videos], 1, runner, options
    )
    clips = [row["clip"] for path in scanned for row in _rows(path) if "clip" in row]
    annotated = _pass(config, "annotate", clips, CLIPS, runner, options)
    found = {
        s.clip_id: s
        for path in annotated
        for i, row in enumerate(_rows(path))
        if "clip" in row
        for s in [select.summary(row["clip"], (path, i))]
    }
    chosen, left_out = select.select(config, list(found.values()))
    _say(f"select: {len(found)} in, {len(found) - len(left_out)} out")
    shards = _write(config, out, chosen, runner, options)
    return _finish(config, out, [*scanned, *annotated], shards, found, left_out)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _changed(video: Video) -> int:
    return pathlib.Path(video.path).stat().st_mtime_ns


def _identity(config: CurateConfig) -> dict[str, Any]:
    """The fields that decide the bytes, as JSON reads them back."""
    values = dataclasses.asdict(config)
    for name in ("out", "source", "workers"):
        del values[name]
    return json.loads(json.dumps({"schema_version": SCHEMA_VERSION, **values}))


def _same_config(out: pathlib.Path, config: CurateConfig) -> None:
    """Refuses a folder that was begun with another config; marks a new one."""
    path, mine = out / STARTED, _identity(config)
    if not path.exists():
        strange = sorted(p.name for p in out.glob(f"*{SUFFIX}"))
        require(
            not strange,
            "config.out",
            str(out),
            f"holds {strange[:1]} of something else; choose another folder",
        )
        write_whole(path, json.dumps(mine, indent=2) + "\n")
    theirs = read_json(path)
    for name, value in mine.items():
        advice = f"{out} was begun with {theirs.get(name)!r}; choose another config.out or delete it"
        require(theirs.get(name) == value, f"config.{name}", value, advice)


# --- Parts and the passes over them.


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def _pass(
    config: CurateConfig, kind: str, rows: list[Any], size: int, runner: str | None, options: Sequence[str]
) -> list[str]:
    """Makes the parts of a pass that are missing; returns the files of all, in order, and says what became of them."""
    folder = pathlib.Path(config.out).absolute() / WORK
    cut = [tuple(rows[i : i + size]) for i in range(0, len(rows), size)]
    parts = [Part(kind, str(folder / f"{kind}-{_digest(rows)}.jsonl"), rows) for rows in cut]
    parts = list({p.path: p for p in parts}.values())
    run_parts(config, parts, runner, options)
    paths = [p.path for p in parts]
    heads, drops = [], collections.Counter()
    for path in paths:
        head, *made = _rows(path)
        heads.append(head)
        drops.update(row["dropped"]["stage"] for row in made if "dropped" in row)
    for stage in stages.STAGES:
        entered = sum(h["entered"].get(stage, 0) for h in heads)
        if entered:
            cpu = sum(h["cpu"].get(stage, 0.0) for h in heads)
            _say(f"{stage}: {entered} in, {drops[stage]} dropped, {cpu:.1f} CPU seconds")
    return paths


def _rows(path: str) -> Iterator[dict[str, Any]]:
    with open(path) as file:
        for line in file:
            yield json.loads(line)


def make_part(config: CurateConfig, part: Part) -> None:
    """Makes one part; runs in whatever process a runner chooses."""
    cv2.setNumThreads(1)  # a process a core already
    if part.kind == "write":
        _write_part(config, part)
        return
    if part.kind == "scan":
        outcome = stages.scan(config, [Video(path, name, nbytes) for path, name, nbytes, _ in part.rows])
    else:
        outcome = stages.annotate(config, map(items.from_json, part.rows))
    rows = [{"entered": outcome.entered, "cpu": outcome.cpu}]
    rows += [{"clip": items.to_json(clip)} for clip in outcome.clips]
    rows += [{"dropped": row} for row in outcome.dropped]
    write_whole(part.path, "".join(json.dumps(row) + "\n" for row in rows))


def run_parts(config: CurateConfig, parts: list[Part], runner: str | None, options: Sequence[str]) -> None:
    """Makes the parts that are missing by Apache Beam; says how far it is every ten seconds."""
    todo = [part for part in parts if not pathlib.Path(part.path).exists()]
    if not todo:
        return
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import (
        FnApiRunner,
    )  # "DirectRunner" may try to download another

    given = list(options)
    if runner is None and config.workers:
        given += ["--direct_running_mode=multi_processing", f"--direct_num_workers={config.workers}"]
    ended = threading.Event()
    said = threading.Thread(target=_watch, args=(todo, ended), daemon=True)
    said.start()
    try:
        with beam.Pipeline(runner or FnApiRunner(), options=PipelineOptions(given)) as pipeline:
            made = pipeline | beam.Create(todo) | beam.Reshuffle()
            made | beam.Map(lambda part, config=config: make_part(config, part))
    finally:
        ended.set()
        said.join()


def _watch(parts: list[Part], ended: threading.Event) -> None:
    while not ended.wait(10.0):
        there = sum(pathlib.Path(part.path).exists() for part in parts)
        _say(f"{parts[0].kind}: {there} of {len(parts)} parts")


# --- Shards.


def _write(
    config: CurateConfig,
    out: pathlib.Path,
    chosen: dict[str, list[select.Summary]],
    runner: str | None,
    options: Sequence[str],
) -> list[str]:
    """Writes the shards; returns the files that say what is in them. Shards of an earlier choice are removed."""
    parts = []
    for split, clips in chosen.items():
        size = config.clips_per_shard
        cut = [clips[i : i + size] for i in range(0, len(clips), size)]
        for index, part in enumerate(cut):
            rows = tuple((s.clip_id, *s.at) for s in part)
            name = shard_name(split, index, len(cut))
            path = out / WORK / f"write-{_digest([name, rows])}.json"
            parts.append(Part("write", str(path), (name, split, *rows)))
    wanted = {part.rows[0] for part in parts}
    for path in out.glob(f"*{SUFFIX}"):
        if path.name not in wanted:
            path.unlink()
    for path in (out / WORK).glob("write-*.json"):
        if str(path) not in {part.path for part in parts}:
            path.unlink()
    for part in parts:  # a shard that somebody has removed
        if not (out / part.rows[0]).exists():
            pathlib.Path(part.path).unlink(missing_ok=True)
    run_parts(config, parts, runner, options)
    return [part.path for part in parts]


def _write_part(config: CurateConfig, part: Part) -> None:
    name, split, *places = part.rows
    held: dict[str, list[dict[str, Any]]] = {}
    outcome, frames = stages.Outcome(), 0

    def blobs() -> Iterator[bytes]:
        nonlocal frames
        for _, path, index in places:
            rows = held.setdefault(path, list(_rows(path)))
            clip = items.from_json(rows[index]["clip"])
            blob = outcome.run("write", clip, lambda clip=clip: record(config, clip, split))
            if blob is not None:
                frames += clip.frames
                yield blob

    out = pathlib.Path(config.out).absolute() / name
    write_shard(out, blobs(), config.compression)
    clips = len(places) - len(outcome.dropped)
    made = {"name": name, "split": split, "clips": clips, "frames": frames, "sha256": file_sha256(out)}
    made |= {"dropped": outcome.dropped, "cpu": outcome.cpu}
    write_whole(part.path, json.dumps(made) + "\n")


def _finish(
    config: CurateConfig,
    out: pathlib.Path,
    parts: list[str],
    shards: list[str],
    found: dict[str, select.Summary],
    left_out: dict[str, Rejected],
) -> dict[str, Any]:
    """dropped.jsonl, then dataset.json; returns the counts."""
    heads = [next(_rows(path)) for path in parts]
    made = [next(_rows(path)) for path in shards]
    dropped = [row["dropped"] for path in parts for row in _rows(path) if "dropped" in row]
    places = {found[clip_id].at: reason for clip_id, reason in left_out.items()}
    for path in sorted({path for path, _ in places}):
        for i, row in enumerate(_rows(path)):
            if (path, i) in places:
                dropped.append(stages.dropped_row("select", items.from_json(row["clip"]), places[path, i]))
    dropped += [row for shard in made for row in shard["dropped"]]
    dropped.sort(key=lambda row: (row["file"], row.get("start", -1.0)))
    write_whole(out / DROPPED, "".join(json.dumps(row) + "\n" for row in dropped))
    splits: dict[str, Any] = {}
    for shard in made:
        split = splits.setdefault(shard["split"], {"clips": 0, "frames": 0, "shards": {}})
        split["clips"] += shard["clips"]
        split["frames"] += shard["frames"]
        split["shards"][shard["name"]] = {"clips": shard["clips"], "sha256": shard["sha256"]}
    write_whole(out / DATASET, json.dumps({"config": _identity(config), "splits": splits}, indent=2) + "\n")
    counts: dict[str, dict[str, int]] = {}
    for row in dropped:
        reasons = counts.setdefault(row["stage"], {})
        reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    kept = sum(shard["clips"] for shard in made)
    cpu = collections.Counter()
    for head in (*heads, *made):
        cpu.update(head["cpu"])
    _say(f"write: {kept} clips in {len(made)} shards")
    shares = select.reached([s for k, s in found.items() if k not in left_out])
    seconds = {stage: round(value, 2) for stage, value in cpu.items()}
    return {
        "clips_in": kept + len(dropped),
        "kept": kept,
        "dropped": counts,
        "shares": shares,
        "cpu_seconds": seconds,
    }
