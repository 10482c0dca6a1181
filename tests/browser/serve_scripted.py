"""A server of the scripted courtyard: python -m tests.browser.serve_scripted [serve's flags] [--chunk_seconds=0.08]."""

import asyncio
import functools

from absl import flags

from experiments import common
from lingbot_jax.serve import server
from lingbot_jax.serve.config import ServeConfig
from tests.serve import scripted

SECONDS = flags.DEFINE_float("chunk_seconds", 0.08, "that a chunk takes")


def main() -> None:
    scripted.install(SECONDS.value)
    game = scripted.game(common.read_fields(ServeConfig))
    asyncio.run(server.serve(game, functools.partial(server.say, game)))


if __name__ == "__main__":
    common.define_fields(ServeConfig)
    common.run(main)
