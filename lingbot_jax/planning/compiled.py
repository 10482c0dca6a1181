"""Programs put through the TPU compiler, and the memory that they need."""

import re
from typing import Any

import jax

from lingbot_jax.training.step import Program

MARGIN = 0.05  # of HBM that a fit leaves free: fragments, and what runs beside the program


def compiled_or_needed(program: Program) -> jax.stages.Compiled | int:
    """The compiled program, or the bytes that one needs that does not fit."""
    lowered = program.lower()
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(error)
        if needed is None:
            raise
        return needed


def _needed(error: Exception) -> int | None:
    """Bytes, from the compiler's out-of-memory message; of a step far too large it counts temporaries alone."""
    text = " ".join(str(error).split())
    found = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", text)
    found = found or re.search(
        r"required for HLO temporaries \(([\d.]+)([KMG])\) exceeds available HBM", text
    )
    return found and int(float(found[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[found[2]])


def total_bytes(memory: Any) -> int:
    """Bytes of a running program. Outputs live in donated arguments, except for those that are not aliased."""
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    work = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return memory.argument_size_in_bytes + outputs + work
