"""What processes of a job agree on. The cases run in two real processes (gloo) of two devices each, see `CASES`."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from lingbot_jax.config import ConfigError
from lingbot_jax.parallel import multihost
from lingbot_jax.parallel.mesh import MeshConfig, make_mesh
from lingbot_jax.training.config import CheckpointConfig
from lingbot_jax.training.saving import Saving
from lingbot_jax.worlds import checksums, storage
from lingbot_jax.worlds.checkpoints import Checkpoints
from tests import xla

ROOT = pathlib.Path(__file__).parents[2]


def two(case: str, folder: pathlib.Path) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of both processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla.flags(2)}
    command = [sys.executable, "-m", "tests.parallel.test_multihost", case, str(folder), str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    made = [subprocess.Popen([*command, str(i)], cwd=ROOT, env=os.environ | flags, **pipes) for i in range(2)]
    ends = [process.communicate(timeout=300) for process in made]
    return [(process.returncode, *end) for process, end in zip(made, ends, strict=True)]


def heard(case: str, folder: pathlib.Path) -> list:
    """What each process printed as its last line, of a case that ends well."""
    ends = two(case, folder)
    assert [code for code, *_ in ends] == [0, 0], ends[0][2][-3000:] + ends[1][2][-3000:]
    return [json.loads(out.splitlines()[-1]) for _, out, _ in ends]


# --- Cases: functions of (folder, index of this process); what they return is printed.


def _errors(folder, index):
    said = []

    def attempt(name, *kinds, fail):
        try:
            with multihost.agree_on_errors(*kinds):
                fail()
            said.append([name, "", ""])
        except Exception as error:
            said.append([name, type(error).__name__, str(error)])

    def raises(error, by):
        def fail():
            if index in by:
                raise error

        return fail

    def nested(outer):
        def fail():
            if outer and index == 1:  # never comes to the inner block, in which the other one is
                raise ConfigError("outer of 1")
            with multihost.agree_on_errors():
                raises(ConfigError("inner of 0"), {0})()

        return fail

    attempt("none", fail=raises(ConfigError("x"), ()))
    attempt("one", fail=raises(ConfigError("config.steps = 0: é"), {1}))
    attempt("both", fail=raises(ConfigError(f"of {index}"), {0, 1}))
    attempt("kind", storage.Damaged, fail=raises(storage.Damaged("f: cannot be read (cut)"), {0}))
    attempt("bug", fail=raises(KeyError("x"), {1}))
    attempt("inner", fail=nested(False))
    attempt("outer", fail=nested(True))
    attempt("after", fail=raises(ConfigError("x"), ()))
    return said


def _from_first(folder, index):
    return multihost.from_first([3, "two"] if index == 0 else list(range(1000)))


def _batch(folder, index):
    found = []
    for sizes in ((2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4), (4, 1, 1), (1, 4, 1)):
        mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], seq=sizes[2]))
        rows = multihost.rows_of_process(mesh, 8)
        whole = np.arange(24).reshape(8, 3)
        made = multihost.global_array(mesh, {"x": whole[rows.start : rows.stop]}, 8)["x"]
        total = jax.jit(lambda x: (x * np.arange(24).reshape(8, 3)).sum())(made)
        found.append([list(rows), list(made.shape), int(total)])
    return found


def _tree(mesh, step):
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    whole = np.arange(32, dtype=np.float32).reshape(8, 4) + step
    return {"params": {"w": jax.make_array_from_callback(whole.shape, place, lambda i: whole[i])}}


def _checkpoints(folder, index):
    """Both save three steps; then process 1 cannot read the newest, and a file of the one before is damaged."""
    mesh = make_mesh(MeshConfig(fsdp=4))
    with Checkpoints(folder / "run", keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, _tree(mesh, step))
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _tree(mesh, 0)
    )
    values = []

    def restore():
        found = Checkpoints(folder / "run", read_only=True).restore(template)["params"]["w"]
        values.append(float(jax.jit(lambda x: x.min())(found)))

    restore()
    check = checksums.check_seal

    def fails(path):
        if index == 1 and path.name == "3":
            raise OSError(5, "Input/output error")
        check(path)

    checksums.check_seal = fails
    restore()
    if index == 0:
        chunk = next((folder / "run" / "checkpoints" / "2" / "arrays" / "params.w").glob("[0-9]*"))
        chunk.write_bytes(chunk.read_bytes()[:-1] + b"\xff")
    multihost.from_first(0)
    restore()
    return values + [_saved(index)]


def _saved(index):
    """Steps that are due by minutes: process 0 has saved at minute 100 and looks again at 101, 102 ...; an hour
    passes for process 1 from one step to the next."""
    minutes = iter(range(100, 200) if index == 0 else range(0, 6000, 60))
    saving = Saving(CheckpointConfig(every=1000, every_minutes=2.5), 5, lambda: 60.0 * next(minutes))
    steps = []
    for step in range(6, 14):
        if saving.due(step, busy=False):
            saving.done(step)
            steps.append(step)
    return steps


def _refused(folder, index):
    """As an experiment does it: process 0 alone finds that the run's folder cannot be made."""
    with multihost.agree_on_errors():
        if index == 0:
            raise ConfigError("run = 'x': cannot be written")
    multihost.from_first(0)


CASES = {
    "errors": _errors,
    "from_first": _from_first,
    "batch": _batch,
    "checkpoints": _checkpoints,
    "refused": _refused,
}


# --- Tests.


def test_an_error_of_one_process_is_the_error_of_all(tmp_path):
    first, second = heard("errors", tmp_path)
    expected = [
        ["none", "", ""],
        ["one", "ConfigError", "config.steps = 0: é"],
        ["both", "ConfigError", "of 0"],
        ["kind", "Damaged", "f: cannot be read (cut)"],
        ["bug", "RuntimeError", "KeyError: 'x'"],
        ["inner", "ConfigError", "inner of 0"],
        ["outer", "ConfigError", "inner of 0"],
        ["after", "", ""],
    ]
    assert first == expected
    expected[4] = ["bug", "KeyError", "'x'"]  # the process that has the bug keeps its trace
    assert second == expected


def test_a_refusal_ends_all_processes_with_the_same_line_and_code(tmp_path):
    ends = two("refused", tmp_path)
    assert [code for code, *_ in ends] == [2, 2], ends
    assert [[line for line in err.splitlines() if "error" in line] for *_, err in ends] == [
        ["error: run = 'x': cannot be written"]
    ] * 2


def test_what_the_first_process_has_is_what_all_have(tmp_path):
    assert heard("from_first", tmp_path) == [[3, "two"]] * 2


def test_rows_that_processes_load_make_the_batch_on_every_mesh(tmp_path):
    total = int((np.arange(24) ** 2).sum())
    first, second = heard("batch", tmp_path)
    for (mine, shape, got), (other, _, same) in zip(first, second, strict=True):
        assert sorted({*mine, *other}) == list(range(8)) and shape == [8, 3]
        assert got == same == total
    assert first[0][0] == [0, 1, 2, 3] and second[0][0] == [4, 5, 6, 7]
    assert first[3][0] == second[3][0] == list(range(8)), "one sample over all devices: all load it"


def test_all_processes_save_and_restore_the_same_steps(tmp_path):
    assert heard("checkpoints", tmp_path) == [[3.0, 2.0, 1.0, [8, 11]]] * 2


def test_one_device_has_no_path_of_its_own():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert multihost.rows_of_process(mesh, 3) == range(3)
    made = multihost.global_array(mesh, np.arange(6).reshape(3, 2), 3)
    np.testing.assert_array_equal(made, np.arange(6).reshape(3, 2))
    assert multihost.from_first({"a": 1}) == {"a": 1}
    with pytest.raises(ConfigError, match="x"), multihost.agree_on_errors():
        raise ConfigError("x")


def main() -> None:
    case, folder, port, index = sys.argv[1:]
    multihost.initialize(f"127.0.0.1:{port}", 2, int(index))
    try:
        said = CASES[case](pathlib.Path(folder), int(index))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
