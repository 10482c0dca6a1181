"""What every experiment shares: the --config flag and errors of one line.

A user's mistake (a wrong flag, field, file or combination) ends with exit code 2 and one line on stderr that
names the field, its value and what is allowed. Anything else is a bug and keeps its stack trace.
"""

import glob
import os
import re
import sys
from collections.abc import Callable
from typing import TypeVar

from absl import app, flags, logging
from ml_collections import config_flags

from lingbot_jax.compilation import keep_compiled
from lingbot_jax.config import ConfigError, build

T = TypeVar("T")

_CACHE = flags.DEFINE_string(
    "compilation_cache", None, "folder of compiled programs, or off; default: in the user's cache folder"
)


class UserError(Exception):
    """A mistake of the user: the message is one line and names the field, the value and the remedy."""


def define_config(default: str | None = None) -> flags.FlagHolder:
    """Defines --config=FILE.py:ARGUMENT, with --config.FIELD=VALUE overrides of known fields only."""
    return config_flags.DEFINE_config_file(
        "config",
        default,
        "config file, e.g. experiments/configs/tiny.py:world",
        lock_config=True,
        allow_override=True,  # a program that imports two experiments has the flag once
    )


def load(holder: flags.FlagHolder, kind: type[T]) -> T:
    """The checked dataclass `kind` from the --config flag."""
    if holder.value is None:
        raise UserError("--config is missing: give e.g. --config=experiments/configs/tiny.py:world")
    try:
        values = holder.value.to_dict()
    except OSError:  # ml_collections reports a missing file on first use
        path = config_flags.get_config_filename(flags.FLAGS["config"])
        raise UserError(
            f"--config={path}: no such file; the named sizes are in experiments/configs/"
        ) from None
    return build(kind, values)


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; ml_collections reports an unknown config field as a bare AttributeError, we name it."""
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:
        name = re.search(r"'(\w+)\\?'", str(error))
        given = [a for a in argv[1:] if name and re.match(rf"--config(\.\w+)*\.{name[1]}(\.|=|$)", a)]
        hint = re.search(r'Did you mean "(\w+)"', str(error))
        hint = f"; did you mean {hint[1]}?" if hint else "; see the config file for the fields"
        raise UserError(f"{(given or ['--config'])[0].lstrip('-')}: unknown field{hint}") from None
    except flags.Error as error:
        lines = [line.strip("^ ") for line in str(error).splitlines() if line.strip("^ ")]
        raise UserError(lines[-1]) from None


def _quiet() -> None:
    """Leaves out what libraries say although nothing is wrong, or before they raise it, which is when we report it."""
    # Of plain (not OCDBT) checkpoints, that there is nothing to merge; of an error in a writing thread, its trace.
    usual = lambda r: r.pathname.endswith("ocdbt_utils.py") and r.getMessage().find("Skipping merge") >= 0
    early = lambda r: r.exc_info and re.search("orbax|asyncio", r.pathname)
    logging.get_absl_handler().addFilter(lambda record: not usual(record) and not early(record))
    report = sys.unraisablehook  # of writes that end after the first one failed, without a loop to tell
    sys.unraisablehook = lambda u: None if str(u.exc_value) == "Event loop is closed" else report(u)
    if not glob.glob("/dev/accel*") and not os.path.exists(
        "/dev/vfio"
    ):  # no TPU: libtpu would look for its name
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def run(main: Callable[[], None]) -> None:
    """Runs `main()` under absl: flags parsed; user errors as one line and exit code 2, Ctrl-C as 130."""
    logging.set_verbosity(logging.WARNING)
    _quiet()

    def start(_):
        keep_compiled(_CACHE.value)
        main()

    try:
        app.run(start, flags_parser=_parse)
    except (UserError, ConfigError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last thing that was saved", file=sys.stderr)
        sys.exit(130)
