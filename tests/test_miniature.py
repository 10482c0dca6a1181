"""What a pod runs, in miniature: a published folder converted, trained in two processes, killed, resumed, sampled."""

import json
import subprocess
import sys

import pytest

from lingbot_jax.convert import contents, write
from tests.bench import miniature
from tests.convert.published import write_published

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniature")
    write_published(folder / "source")
    (folder / "work").mkdir()
    return folder / "work", miniature.measure(folder / "source", folder / "work", processes=2, devices=4)


def test_numbers_of_the_issue_hold(measured):
    _, found = measured
    assert len(found["losses"]) == miniature.STEPS and len(set(found["losses"])) == miniature.STEPS
    assert found["resumed_equal"] and found["converted_back_equal"]
    assert found["one_process_max_difference"] <= 1e-4
    assert found["sampled_max_difference"] <= 1e-3
    assert found["played_max_difference"] <= 2 / 127.5, "a level of 8 bits: play gives bytes"


def test_the_bundle_is_evaluated_and_the_run_becomes_a_bundle(measured):
    folder, _ = measured
    made = miniature.Miniature(folder, 2, 4)
    evaluate = folder / "evaluate.py"
    evaluate.write_text(
        "from experiments.configs.schema import EvaluateConfig\n"
        "from lingbot_jax.config import template\n"
        "def get_config():\n"
        f"    data = {{'path': {str(folder / 'data')!r}, 'frames': {miniature.FRAMES}}}\n"
        f"    fields = {{'run': {str(made.bundle)!r}, 'out': {str(folder / 'evaluation')!r}, 'data': data}}\n"
        "    return template(EvaluateConfig, fields | {'clips': 2, 'batch': 2, 'shown': 1, 'steps': 2})\n"
    )
    miniature.run(["experiments.evaluate", f"--config={evaluate}"], 1, made.cache)
    numbers = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    assert {"psnr_true_keys", "psnr_other_keys", "psnr_frozen"} <= numbers.keys()
    trained = folder / "trained"
    write.to_bundle(contents.look(str(folder / "whole")), trained)
    assert {part.name for part in contents.look(str(trained)).parts} == {"high", "low", "codec", "text"}


def test_the_command_refuses_in_one_line(tmp_path):
    command = [sys.executable, "-m", "tests.bench", "miniature", f"--source={tmp_path / 'nowhere'}"]
    done = subprocess.run(command, cwd=miniature.ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "nowhere" in done.stderr
