"""The structure of the code: arrows point one way, files stay short, every option is read."""

import ast
import importlib
import pathlib
import typing
from collections.abc import Iterator

import pytest

from lingbot_jax import config

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("lingbot_jax", "kernels_pallas", "experiments")
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))

# The house from the ground up: a package imports from its own floor and those below.
FLOORS = (
    ("kernels_pallas", "lingbot_jax.config", "lingbot_jax.files", "lingbot_jax.axes", "lingbot_jax.cards"),
    ("lingbot_jax.control", "lingbot_jax.parallel", "lingbot_jax.compilation"),
    ("lingbot_jax.data",),
    ("lingbot_jax.engine",),
    ("lingbot_jax.models", "lingbot_jax.diffusion"),
    ("lingbot_jax.worlds",),
    ("lingbot_jax.rollout",),
    ("lingbot_jax.training", "lingbot_jax.planning", "lingbot_jax.convert"),
    ("lingbot_jax.evaluation",),
    ("lingbot_jax.serve", "lingbot_jax"),
    ("experiments",),
)
# Beside that, what knows nothing of models, and what is not told of a world.
FORBIDDEN = {
    "lingbot_jax.models": ("lingbot_jax.data", "lingbot_jax.engine"),
    "lingbot_jax.worlds": ("lingbot_jax.data", "lingbot_jax.engine"),
    "lingbot_jax.diffusion": ("lingbot_jax.data", "lingbot_jax.engine"),
    "lingbot_jax.data": ("lingbot_jax.parallel", "lingbot_jax.engine"),
    "lingbot_jax.engine": ("lingbot_jax.parallel",),
}
# The one arrow upwards: what a user types (`World.session`).
ALLOWED = {("lingbot_jax/worlds/world.py", "lingbot_jax.rollout.session.Session")}


def floor_of(name: str) -> int | None:
    """The floor of a module or of something in it, by the longest name that fits; None: not ours."""
    fits = [
        (len(p), i) for i, floor in enumerate(FLOORS) for p in floor if name == p or name.startswith(p + ".")
    ]
    return max(fits)[1] if fits else None


def imports(path: pathlib.Path) -> set[str]:
    """Dotted names a file imports, `from a import b` as a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_arrows_point_one_way():
    wrong = []
    for path in SOURCES:
        own, at = dotted(path), floor_of(dotted(path))
        assert at is not None, f"{own} is on no floor"
        for name in sorted(imports(path)):
            up = (floor_of(name) or 0) > at or name.split(".")[0] == "tests"
            bad = [
                f for p, names in FORBIDDEN.items() for f in names if own.startswith(p) and name.startswith(f)
            ]
            if (up or bad) and (str(path.relative_to(ROOT)), name) not in ALLOWED:
                wrong.append(f"{own} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_private_jax():
    wrong = [str(p.relative_to(ROOT)) for p in SOURCES if any(n.startswith("jax._src") for n in imports(p))]
    assert not wrong


def test_files_are_short():
    page = [p for kind in ("js", "css", "html") for p in (ROOT / "lingbot_jax/serve/web").glob(f"*.{kind}")]
    limit = lambda p: 400 if p.parts[len(ROOT.parts)] == "kernels_pallas" else 350
    long = {
        str(p.relative_to(ROOT)): n
        for p in [*SOURCES, *page]
        if (n := len(p.read_text().splitlines())) > limit(p)
    }
    assert not long


def config_classes() -> dict[str, type]:
    """Every class made by `config`, by name."""
    found = {}
    for path in SOURCES:
        if "@config\nclass" in path.read_text():
            module = importlib.import_module(dotted(path))
            found |= {
                k: v
                for k, v in vars(module).items()
                if config.is_config(v) and v.__module__ == module.__name__
            }
    return found


CONFIGS = config_classes()


def bare(annotation: ast.expr | None) -> str | None:
    """The config class that an annotation names, `X`, `X | None` or `"X"`."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)} if annotation else set()
    found = names & CONFIGS.keys()
    return found.pop() if len(found) == 1 else None


def member(owner: str, field: str) -> str | None:
    """The config class of a field; of a dictionary or a tuple, that of its values."""
    info = config.fields_of(CONFIGS[owner]).get(field)
    kinds = [info.annotation, *typing.get_args(info.annotation)] if info else []
    named = [k.__name__ for kind in kinds for k in config.members_of(kind)]
    return named[0] if named else None


def reads(scope: ast.AST, known: dict[str, str]) -> Iterator[tuple[str | None, str, str]]:
    """(class, name before the dot, field) of every attribute that is read; class None where it is not known."""

    def kind(node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return known.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = kind(node.value)
            return member(owner, node.attr) if owner else None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "values":
            return kind(node.func.value)
        return kind(node.value) if isinstance(node, ast.Subscript) else None

    for node in ast.walk(scope):  # `for phase in config.curriculum`, in loops and comprehensions
        if isinstance(node, ast.For | ast.comprehension):
            over, target = node.iter, node.target
            if isinstance(over, ast.Call) and isinstance(over.func, ast.Name) and over.func.id == "enumerate":
                over, target = over.args[0], target.elts[1]
            if isinstance(target, ast.Name) and kind(over):
                known = known | {target.id: kind(over)}
    for node in ast.walk(scope):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            texts = (
                n.value for n in ast.walk(scope) if isinstance(n, ast.Constant) and isinstance(n.value, str)
            )
            yield from ((kind(node.args[0]), "", text) for text in texts)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            base = node.value
            last = (
                base.attr
                if isinstance(base, ast.Attribute)
                else base.id
                if isinstance(base, ast.Name)
                else ""
            )
            yield kind(base), last, node.attr


def all_reads() -> set[tuple[str | None, str, str]]:
    found = set()
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name in CONFIGS:
                for child in node.body:  # its own checks read nothing
                    if isinstance(child, ast.FunctionDef) and child.name != "__post_init__":
                        found |= set(reads(child, {"self": node.name}))
            elif isinstance(node, ast.FunctionDef):
                arguments = [*node.args.args, *node.args.kwonlyargs]
                found |= set(reads(node, {a.arg: k for a in arguments if (k := bare(a.annotation))}))
        found |= set(reads(tree, {}))
    return found


@pytest.fixture(scope="module")
def read() -> set[tuple[str | None, str, str]]:
    return all_reads()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_is_read(name, read):
    """As an attribute of something annotated with the class, of what a config holds it under, or of a `config`: not of
    anything that happens to have an attribute of that name."""
    under = {f for owner in CONFIGS for f in config.fields_of(CONFIGS[owner]) if member(owner, f) == name}
    under |= {"config", "_config", "self"}
    known = {field for kind, base, field in read if kind == name or kind is None and base in under}
    assert not config.fields_of(CONFIGS[name]).keys() - known - {"kind"}


def test_an_option_that_nothing_reads_is_found(read):
    """`flow.shift` is read; under another class's name it is not."""
    assert ("FlowConfig", "flow", "shift") in read
    assert not any(kind == "DataConfig" and field == "shift" for kind, _, field in read)
