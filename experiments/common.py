"""What every experiment shares: flags that are fields of a config, --help, and errors of one line.

A user's mistake (a wrong flag, field, file or combination) ends with exit code 2 and one line on stderr that
names the field as it is typed, its value and what is allowed. Anything else is a bug and keeps its stack trace.
"""

import glob
import importlib.util
import os
import pathlib
import re
import shlex
import sys
import tempfile
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from absl import app, flags, logging
from ml_collections import config_flags

from lingbot_jax.compilation import keep_compiled
from lingbot_jax.config import ConfigError, Row, build, fields_of, rows

T = TypeVar("T")

_CACHE = flags.DEFINE_string(
    "compilation_cache", None, "folder of compiled programs, or off; default: in the user's cache folder"
)


class UserError(Exception):
    """A mistake of the user: the message is one line and names the field, the value and the remedy."""


# --- A config from a file, with --config.FIELD=VALUE overrides.


def define_config(kind: type | None = None, default: str | None = None) -> flags.FlagHolder:
    """Defines --config=FILE.py:ARGUMENT, with --config.FIELD=VALUE overrides of known fields only.

    Args:
      kind: the config class, whose fields --help lists.
    """
    holder = config_flags.DEFINE_config_file(
        "config",
        default,
        "config file, e.g. experiments/configs/tiny.py:world",
        lock_config=True,
        allow_override=True,  # a program that imports two experiments has the flag once
    )
    _KINDS[holder.name] = kind
    return holder


_KINDS: dict[str, type | None] = {}  # of config flags, for --help


def load(holder: flags.FlagHolder, kind: type[T]) -> T:
    """The checked config `kind` from the --config flag."""
    if holder.value is None:
        raise UserError("--config is missing: give e.g. --config=experiments/configs/tiny.py:world")
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    try:
        values = holder.value.to_dict()
    except OSError:  # ml_collections reads the file on first use
        raise UserError(
            f"--config={path}: no such file; the named sizes are in experiments/configs/"
        ) from None
    except (ValueError, SyntaxError, TypeError) as error:  # of the file itself, or a file of another kind
        raise UserError(f"--config={path}: {error}") from None
    return build(kind, values)


# --- A flat config from flags: one per field.


def define_fields(kind: type, values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines one flag per field of a config class. Called by the program that runs, so that imports never clash."""
    for name, field in fields_of(kind).items():
        (row,) = [row for row in rows(kind, "") if row.path.lstrip(".") == name]
        default = None if field.is_required() else field.default
        if field.annotation is bool:
            flags.DEFINE_bool(name, default, row.description, values)
        else:
            help = f"{row.description} [{row.kind}{'' if default is None else f', default {_text(default)}'}]"
            flags.DEFINE_string(name, None, help, values)


def read_fields(kind: type[T], values: flags.FlagValues = flags.FLAGS) -> T:
    """The config of the flags that `define_fields` made. Raises ConfigError, naming the flag."""
    given = {}
    for name, field in fields_of(kind).items():
        value = values[name].value
        if value is None and field.is_required():
            raise ConfigError(f"{name} is missing: {field.description}")
        if value is not None:
            given[name] = value if field.annotation is bool else _parsed(value, field.annotation)
    return build(kind, given, "")


def command(module: str, config: Any) -> str:
    """The command line that makes a config of `define_fields`: every field that is not at its default."""
    words = ["python", "-m", module]
    for name, field in fields_of(type(config)).items():
        value = getattr(config, name)
        if field.is_required() or value != field.default:
            words.append(f"--{name}" if value is True else f"--{name}={_text(value)}")
    return shlex.join(words)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _parsed(text: str, kind: Any) -> Any:
    """A flag's text as the annotation of its field wants it; what does not fit stays text, which the field refuses."""
    if typing.get_origin(kind) is typing.Annotated:
        return _parsed(text, typing.get_args(kind)[0])
    if typing.get_origin(kind) is tuple:
        return tuple(_parsed(part, typing.get_args(kind)[0]) for part in re.split(r",|(?<=\d)x(?=\d)", text))
    for member in typing.get_args(kind) or (kind,):
        member = typing.get_args(member)[0] if typing.get_origin(member) is typing.Annotated else member
        if typing.get_origin(member) is tuple:
            return _parsed(text, member)
        if member in (int, float) and re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?|[+-]?(inf|nan)", text, re.I):
            try:
                return member(text)
            except ValueError:
                return text
    return text


# --- What is found before the work.


def need(extras: str, *modules: str) -> None:
    """Raises UserError where a module of an extra is not installed."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed: pip install -e '.[{extras}]'")


def check_writable(folder: pathlib.Path, field: str) -> None:
    """Raises ConfigError unless the folder is there, or can be made, and can be written to; makes nothing."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"{field} = {str(folder)!r}: cannot be written ({error.strerror})") from None


# --- Running.


def _parse(argv: list[str]) -> list[str]:
    """Parses flags, all of which must be known and nothing else there."""
    if any(re.fullmatch(r"--?help(full|short)?", a) for a in argv[1:]):
        _print_help(argv)
    try:
        rest = flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:  # what ml_collections says of an unknown field
        name = re.search(r"'(\w+)\\?'", str(error))
        given = [a for a in argv[1:] if name and re.match(rf"--config(\.\w+)*\.{name[1]}(\.|=|$)", a)]
        hint = re.search(r'Did you mean "(\w+)"', str(error))
        hint = f"; did you mean {hint[1]}?" if hint else "; --help lists the fields"
        raise UserError(f"{(given or ['--config'])[0]}: unknown field{hint}") from None
    except flags.Error as error:
        lines = [line.strip("^ ") for line in str(error).splitlines() if line.strip("^ ")]
        raise UserError(lines[-1]) from None
    except (OSError, SyntaxError, ValueError, TypeError) as error:  # of a config file
        raise UserError(f"--config: {error}") from None
    if rest[1:]:
        raise UserError(f"{rest[1]!r}: a stray argument; every value belongs to a flag, as --name=value")
    return rest


def _print_help(argv: list[str]) -> typing.NoReturn:
    """The module's docstring, its flags, and every field of its config with type, range and default."""
    main = sys.modules["__main__"]
    print((main.__doc__ or "").strip())
    own = flags.FLAGS.flags_by_module_dict()
    for name in (argv[0], main.__name__, __name__):
        for flag in own.get(name, []):
            if flag.name != "config":
                print(f"\n  --{flag.name}\n      {flag.help}")
    for name, kind in _KINDS.items():
        if kind is not None:
            print(f"\n  --{name}=FILE.py:ARGUMENT, a {kind.__name__}; each field with --{name}.FIELD=VALUE:")
            print_rows(list(rows(kind, f"--{name}")))
    sys.exit(0)


def print_rows(table: list[Row]) -> None:
    """Fields as `--config.data.frames  int > 0, default 33` with their description below."""
    for row in table:
        what = ", ".join(x for x in (row.kind, row.default and f"default {row.default}") if x)
        print(f"\n  {row.path}  {what}\n      {row.description}")


def typed(message: str) -> str:
    """An error with its field as it is typed: `config.steps = 0` and `fps = 0` are those of flags."""
    name = re.match(r"(\w+)(?=[.,:\[]|\s=\s|\sis missing)", message)
    known = name is not None and (name[1] in flags.FLAGS or name[1] == "config")
    return f"--{message}" if known else message


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
        print(f"error: {typed(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last thing that was saved", file=sys.stderr)
        sys.exit(130)
