"""The networks of a run by name: those of the world, and those that only post-training needs.

world, or high and low      the world that is trained; `world` is the student of a post-training stage
real, or real_high, _low    the frozen teacher's, of stage `distill` (its real score) and of `causal` by `ode`
fake, or fake_high, _low    the fake score, which starts as the teacher and trains on the student's samples
head                        the discriminator on the fake score's features
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from lingbot_jax.models import params
from lingbot_jax.models.config import DiTConfig
from lingbot_jax.models.discriminator import Discriminator, DiscriminatorConfig
from lingbot_jax.models.lora import LoraConfig, adapted
from lingbot_jax.training.config import TrainConfig
from lingbot_jax.worlds.world import template

REAL, FAKE, HEAD = "real", "fake", "head"


def score_name(role: str, network: str) -> str:
    """The name that a network of the teacher, `world`, `high` or `low`, has as real or fake score."""
    return role if network == "world" else f"{role}_{network}"


def scores(config: TrainConfig) -> dict[str, str]:
    """Real and fake scores of a run, and the teacher's network that each starts as."""
    if not config.needs_teacher:
        return {}
    roles = {"causal": (REAL,), "distill": (REAL, FAKE)}[config.stage]
    return {score_name(role, network): network for role in roles for network in config.teachers}


def transformers(config: TrainConfig) -> dict[str, DiTConfig]:
    """All transformers of a run."""
    return config.world.networks | {name: config.teachers[theirs] for name, theirs in scores(config).items()}


def lora_of(config: TrainConfig, network: str) -> LoraConfig:
    """The low-rank adapters of a network of a run: those of the world have them, scores do not."""
    return config.lora if network in config.world.networks else LoraConfig()


def makers(config: TrainConfig) -> dict[str, Callable[[jax.Array], Any]]:
    """All networks of a run: key -> a fresh one."""
    made = {
        name: functools.partial(adapted, network, lora_of(config, name))
        for name, network in transformers(config).items()
    }
    if config.stage == "distill" and config.distill.head is not None:
        made[HEAD] = functools.partial(
            Discriminator, config.distill.head, next(iter(config.teachers.values()))
        )
    return made


def templates(config: TrainConfig) -> dict[str, Any]:
    """All networks of a run, abstract."""
    made = {name: template(network, lora_of(config, name)) for name, network in transformers(config).items()}
    if HEAD in makers(config):
        made[HEAD] = _head(config.distill.head, next(iter(config.teachers.values())))
    return made


@functools.lru_cache(maxsize=8)
def _head(config: DiscriminatorConfig, network: DiTConfig) -> Discriminator:
    return params.abstract(lambda key: Discriminator(config, network, key))
