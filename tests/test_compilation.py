"""Compiled programs are found again by the next process, where and if the user wants it."""

import os
import pathlib
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from lingbot_jax.compilation import keep_compiled
keep_compiled(*sys.argv[1:])
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
"""


def run(home, *arguments, **environment):
    keep = {k: v for k, v in os.environ.items() if not k.startswith("JAX_") and k != "XDG_CACHE_HOME"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=keep | {"HOME": str(home), "JAX_PLATFORMS": "cpu"} | environment,
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


def kept(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and not p.name.endswith("-atime"))


def test_the_users_cache_folder_is_the_default_and_is_read_by_the_next_process(tmp_path):
    assert run(tmp_path) == (0, "")
    first = kept(tmp_path / ".cache" / "lingbot_jax" / "xla")
    assert first
    assert run(tmp_path) == (0, "")
    assert kept(tmp_path / ".cache" / "lingbot_jax" / "xla") == first


@pytest.mark.parametrize(
    "arguments, environment, where",
    [
        (["{}/chosen"], {}, "chosen"),
        ([], {"XDG_CACHE_HOME": "{}/xdg"}, "xdg/lingbot_jax/xla"),
        ([], {"JAX_COMPILATION_CACHE_DIR": "{}/jax"}, "jax"),
        (["{}/chosen"], {"JAX_COMPILATION_CACHE_DIR": "{}/jax"}, "jax"),
        (["off"], {}, None),
    ],
)
def test_where_it_lies(tmp_path, arguments, environment, where):
    here = lambda text: text.format(tmp_path)
    environment = {name: here(value) for name, value in environment.items()}
    assert run(tmp_path, *map(here, arguments), **environment) == (0, "")
    assert bool(kept(tmp_path)) == (where is not None)
    assert where is None or kept(tmp_path) == kept(tmp_path / where)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / ".cache").write_text("no folder")
    assert run(tmp_path)[0] == 0, "nobody asked for it"
    code, errors = run(tmp_path, str(tmp_path / ".cache" / "x"))
    assert code and "compilation_cache = '" in errors and "cannot be written (Not a directory)" in errors
