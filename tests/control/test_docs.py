"""The Python of docs/control.md runs, and its numbers hold."""

import pathlib
import re

import numpy as np

from lingbot_jax.control import keyboard

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "control.md"


def test_examples_run_as_written():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["keys"].shape == (41, 8) and names["path"].c2w.shape == (161, 4, 4)
    # Walked with keys, read back with the documented thresholds.
    np.testing.assert_array_equal(names["keys"], keyboard.parse("w-20,wl-12,none-8"))
