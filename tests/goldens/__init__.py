"""Handlers of golden cases: each module here has `CASES`, see `tests/golden.py`."""
