"""Serves a world: a page to walk through it, for one player or several.

    python -m experiments.serve                                    # the world of this repository
    python -m experiments.serve --run=bundles/mine --fps=24
    python -m experiments.serve --run=runs/demo/distill --picture=door.png --prompt="a hall"

Prints the address of the page when the world is warm. SIGTERM and Ctrl-C let sessions come to an end.
docs/serving.md: many players, behind a balancer, and what to watch.
"""

import os

from experiments import common
from lingbot_jax.serve.config import ServeConfig


def main() -> None:
    common.need("serve", "av", "cv2", "PIL", "starlette", "uvicorn", "websockets", "prometheus_client")
    from lingbot_jax.serve import server

    config = common.read_fields(ServeConfig)
    if not config.token and (token := os.environ.get("LINGBOT_TOKEN")):
        import dataclasses

        config = dataclasses.replace(config, token=token)
    server.run(config)


if __name__ == "__main__":
    common.define_fields(ServeConfig)
    common.run(main)
