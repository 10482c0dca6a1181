"""How a run starts: what its world is and where its parameters come from."""

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lingbot_jax.config import ConfigError
from lingbot_jax.models import params
from lingbot_jax.models.control import is_adapter
from lingbot_jax.parallel import multihost
from lingbot_jax.training.config import POST_TRAINING, STUDENT, TrainConfig
from lingbot_jax.training.networks import scores, templates, transformers
from lingbot_jax.training.objectives import Objective
from lingbot_jax.training.objectives.action import ActionObjective
from lingbot_jax.training.objectives.causal import CausalObjective
from lingbot_jax.training.objectives.distill import DistillObjective
from lingbot_jax.training.objectives.world import WorldObjective
from lingbot_jax.training.state import TrainState, abstract_state, init_state, random_params
from lingbot_jax.worlds.open import Source, find
from lingbot_jax.worlds.world import Arrays, specs, template

OBJECTIVES = {
    "world": WorldObjective,
    "action": ActionObjective,
    "causal": CausalObjective,
    "distill": DistillObjective,
}


class Origin(NamedTuple):
    """Where the parameters of one network come from: the network `name` of a run or a bundle."""

    source: Source
    name: str


def objective_of(config: TrainConfig) -> Objective:
    return OBJECTIVES[config.stage](config)


def resolve(config: TrainConfig) -> TrainConfig:
    """The config with its world complete: what it leaves out is read off `init` and `codec`.

    Raises:
      ConfigError: a source is not there, or says something else than the config.
    """
    origins = read_origins(config)
    encoders = (
        find(config.codec, "config.codec")
        if config.codec is not None
        else next(iter(origins.values())).source
    )
    theirs = encoders.config
    field, where = ("codec", config.codec) if config.codec is not None else ("init", config.init)
    if theirs.codec is None:
        raise ConfigError(
            f"config.{field} = {where!r}: has no codec; experiments.fit_codec and convert make one"
        )
    networks = config.world.networks or {
        name: o.source.config.networks[o.name] for name, o in origins.items()
    }
    changes = {"networks": networks, "codec": config.world.codec or theirs.codec}
    changes["text"] = config.world.text or theirs.text
    if changes["text"] is None:
        raise ConfigError(
            f"config.world.text = None: {where} has no text encoder; describe one, as kind = 'ngram'"
        )
    for part in ("codec", "text"):
        given = getattr(theirs, part)
        if given is not None and _sizes(changes[part]) != _sizes(given):
            raise ConfigError(f"config.world.{part} = {changes[part]}: {where} has {given}")
    try:
        world = dataclasses.replace(config.world, **changes)
    except ConfigError as error:
        raise ConfigError(f"config.world.{error}") from None
    config = dataclasses.replace(config, world=world, codec=str(encoders.path))
    if config.needs_teacher and not config.teachers:
        config = dataclasses.replace(config, teachers=_teacher(config).config.networks)
    return config


def _teacher(config: TrainConfig) -> Source:
    """The teacher. Raises ConfigError: it is none for this run's world."""
    source, where = find(config.teacher, "config.teacher"), f"config.teacher = {config.teacher!r}"
    have = sorted(source.config.networks)
    if have not in (["world"], ["high", "low"]):
        raise ConfigError(f"{where}: has the networks {have}; a teacher has world, or high and low")
    for name in ("pose", "null_text", "boundary"):
        ours, theirs = getattr(config.world, name), getattr(source.config, name)
        if ours != theirs:
            raise ConfigError(f"config.world.{name} = {ours!r}: the teacher, {source.path}, has {theirs!r}")
    return source


def read_teachers(config: TrainConfig) -> dict[str, Origin]:
    """Where the real and fake scores of a run start."""
    wanted = scores(config)
    if not wanted or config.teacher is None:
        return {}
    source = _teacher(config)
    missing = sorted(set(wanted.values()) - set(source.config.networks))
    if missing:
        raise ConfigError(
            f"config.teacher = {config.teacher!r}: has no network {missing[0]}; see config.teachers"
        )
    return {name: Origin(source, theirs) for name, theirs in wanted.items()}


def _sizes(part) -> dict:
    """What decides whether arrays fit: all but the compute dtype."""
    return {
        name: value for name, value in vars(part).items() if name != "dtype" and not name.startswith("__")
    }


def read_origins(config: TrainConfig) -> dict[str, Origin]:
    """The origin of every network of the run, as `init` says; none without it.

    `init` is one source, whose networks start those of the same names (a network `world` starts any), or
    NAME=SOURCE,..., where SOURCE may end in #NETWORK. The student of a post-training stage starts as the high-noise
    expert of a source that has two (paper section 3.4.1).

    Raises:
      ConfigError: no such source, or one that has not the network.
    """
    if config.init is None:
        return {}
    post = config.stage in POST_TRAINING
    names = (STUDENT,) if post else tuple(config.world.networks)
    entries = [
        re.fullmatch(r"(?:(\w+)=)?(.+?)(?:#(\w+))?", entry.strip()) for entry in config.init.split(",")
    ]
    if any(entry is None for entry in entries) or (len(entries) > 1 and not all(e[1] for e in entries)):
        raise ConfigError(
            f"config.init = {config.init!r}: must be a run or bundle, or NAME=SOURCE,NAME=SOURCE"
        )
    found: dict[str, Origin] = {}
    for name, path, chosen in (entry.groups() for entry in entries):
        source = find(path, "config.init")
        have = tuple(source.config.networks)
        if not have:
            raise ConfigError(f"config.init = {path!r}: has no transformer")
        for ours in (name,) if name else names or have:
            theirs = chosen or (
                have[0] if have == ("world",) else "high" if post and "high" in have else ours
            )
            if theirs not in have:
                raise ConfigError(
                    f"config.init = {config.init!r}: {path} has {' and '.join(have)}, not {theirs!r}; another network "
                    f"may start {ours} if it is named: {ours}={path}#{have[0]}"
                )
            found[ours] = Origin(source, theirs)
    surplus, missing = found.keys() - set(names), set(names) - found.keys()
    if names and (surplus or missing):
        wrong = (
            f"nothing starts {', '.join(sorted(missing))}"
            if missing
            else f"this run has no {', '.join(surplus)}"
        )
        raise ConfigError(
            f"config.init = {config.init!r}: {wrong}; the networks of the run are {', '.join(names)}"
        )
    return found


def read_init(config: TrainConfig, mesh: Mesh) -> dict[str, Arrays]:
    """Parameters that `init` names, in float32, each read where it belongs. Adapters may be missing.

    Raises:
      ConfigError: another model.
    """
    made = {}
    networks = transformers(config)
    for name, origin in (read_origins(config) | read_teachers(config)).items():
        wanted = specs(template(networks[name]), mesh, jnp.float32)
        theirs = params.arrays_of(template(origin.source.config.networks[origin.name]))
        field, ours = "teacher", "config.teachers"
        if name in config.world.networks:
            field, ours = "init", f"config.world.networks.{name}"
        where = f"config.{field} = {str(origin.source.path)!r}"
        for path, leaf in theirs.items():
            if path not in wanted:
                raise ConfigError(f"{where}: has a parameter {path}, which {ours} lacks; use the same model")
            if wanted[path].shape != leaf.shape:
                raise ConfigError(
                    f"{where}: its parameter {path} has another shape; use the same sizes in {ours}"
                )
        for path in wanted.keys() - theirs.keys():
            if not is_adapter(path):
                raise ConfigError(f"{where}: has no parameter {path}; use the same model")
        made[name] = origin.source.read(origin.name, {path: wanted[path] for path in theirs})
    return made


def fresh_state(config: TrainConfig, mesh: Mesh, objective: Objective) -> TrainState:
    """The state a new run starts from: random, with what `init` has in its place; made where it belongs."""
    counts = {name: objective.update_count(name) for name in templates(config)}
    with multihost.agree_on_errors():
        given = read_init(config, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh, objective.trains, counts))

    def initial(given: dict[str, Arrays]) -> TrainState:
        made = {name: arrays | given.get(name, {}) for name, arrays in random_params(config).items()}
        # Copied: one source may start two experts, and the state is donated to every step.
        return init_state(config, jax.tree.map(jnp.copy, made), objective.trains, counts)

    with jax.set_mesh(mesh):
        return jax.jit(initial, out_shardings=placed)(given)
