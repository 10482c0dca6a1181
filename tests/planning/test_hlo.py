"""Reading compiled programs: forms of replica groups, loops, fusions; and against XLA's own count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lingbot_jax.planning.collectives import collectives, replica_groups
from lingbot_jax.planning.hlo import HloModule

MESH = {"data": 1, "fsdp": 2, "seq": 4}
ROWS = [[0, 1, 2, 3], [4, 5, 6, 7]]  # along seq
COLUMNS = [[0, 4], [1, 5], [2, 6], [3, 7]]  # along fsdp


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}", ROWS),
        ("replica_groups=[2,4]<=[8], dimensions={0}", ROWS),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", COLUMNS),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%add", ROWS),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, to_apply=%add", COLUMNS),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, to_apply=%add", COLUMNS),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}, to_apply=%add", [sum(ROWS, [])]),
    ],
)
def test_replica_groups(text, groups):
    assert sorted(map(sorted, replica_groups(text).tolist())) == groups


PROGRAM = """HloModule step

%body (p: (s32[], f32[16,8], f32[40,4,8])) -> (s32[], f32[16,8], f32[40,4,8]) {
  %p = (s32[], f32[16,8]{1,0}, f32[40,4,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[16,8]{1,0} get-tuple-element(%p), index=1
  %w = f32[40,4,8]{2,1,0} get-tuple-element(%p), index=2
  %slice = f32[2,8]{1,0} fusion(%w, %i), kind=kLoop, calls=%cut
  %whole = f32[8,8]{1,0} all-gather(%slice), replica_groups={{0,1,2,3},{4,5,6,7}}, metadata={op_name="jit(f)/gather"}
  %y = f32[16,8]{1,0} convolution(%x, %whole), dim_labels=bf_io->bf
  %sum = f32[16,8]{1,0} all-reduce(%y), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  ROOT %out = (s32[], f32[16,8]{1,0}, f32[40,4,8]{2,1,0}) tuple(%i, /*index=1*/%sum, %w)
}

%cond (q: (s32[], f32[16,8], f32[40,4,8])) -> pred[] {
  %q = (s32[], f32[16,8]{1,0}, f32[40,4,8]{2,1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[]{:T(128)} constant(40)
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}

%cut (a: f32[40,4,8], b: s32[]) -> f32[2,8] {
  %a = f32[40,4,8]{2,1,0} parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = f32[2,8]{1,0} constant(0)
}

ENTRY %main (arg: f32[16,8]) -> f32[16,8] {
  %arg = f32[16,8]{1,0} parameter(0)
  %start = (s32[], f32[16,8]{1,0}, f32[40,4,8]{2,1,0}) tuple(%arg)
  %loop = (s32[], f32[16,8]{1,0}, f32[40,4,8]{2,1,0}) while(%start), condition=%cond, body=%body
  ROOT %r = f32[16,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_counts_as_often_as_it_runs():
    program = HloModule(PROGRAM)
    assert program.matmul_flops() == 40 * 2 * 16 * 8 * 8
    gather, reduce = sorted(collectives(program, MESH), key=lambda c: c.kind)
    assert (gather.kind, gather.axes, gather.runs, gather.op) == (
        "all-gather",
        ("seq",),
        40,
        "jit(f)/gather",
    )
    assert gather.bytes == 40 * 8 * 8 * 4 * 3 / 4
    assert (reduce.kind, reduce.axes) == ("all-reduce", ("fsdp",))
    assert reduce.bytes == 40 * 2 * 16 * 8 * 4 / 2
    # A run: fusion reads its slice of w and i and writes; gather, convolution and sum read and write.
    run = (4 * 8 + 1 + 2 * 8) + (2 * 8 + 8 * 8) + (2 * 16 * 8 + 8 * 8) + 2 * 16 * 8
    assert program.hbm_bytes() == 40 * 4 * run
    assert program.stacked_bytes(40, known=set()) == 40 * 4 * 8 * 4
    assert program.stacked_bytes(40, known={(40, 4, 8)}) == 0


def test_counts_equal_xla_for_a_program_without_loops():
    f = jax.jit(lambda x, w: jnp.einsum("bnk,bmk->bnm", jnp.tanh(x @ w), x))
    compiled = f.lower(jnp.zeros((3, 64, 32)), jnp.zeros((32, 32))).compile()
    exact = 2 * 3 * 64 * 32 * 32 + 2 * 3 * 64 * 64 * 32
    program = HloModule(compiled.as_text())
    assert program.matmul_flops() in (0, exact)  # 0 where XLA:CPU calls a library
    assert compiled.cost_analysis()["flops"] >= exact


def test_batch_dots_of_tpus_are_not_overcounted():
    text = PROGRAM.replace(
        "convolution(%x, %whole), dim_labels=bf_io->bf",
        "convolution(%lhs, %rhs), window={size=40 stride=39 lhs_dilate=40}, dim_labels=0bf_0oi->0bf",
    ).replace("%y = f32[16,8]{1,0}", "%y = f32[40,64,32]{2,1,0}")
    text = text.replace(
        "  %whole =",
        "  %lhs = bf16[40,64,16]{2,1,0} constant(0)\n  %rhs = bf16[40,32,16]{2,1,0} constant(0)\n  %whole =",
    )
    assert HloModule(text).matmul_flops() == 40 * 2 * 40 * 64 * 32 * 16


def test_a_loop_with_its_first_step_taken_out_runs_once_less():
    start = "  %one = s32[] constant(1)\n  %first = s32[] copy(%one)\n  %start ="
    text = PROGRAM.replace("  %start =", start).replace("tuple(%arg)", "tuple(%first, %arg, %arg)")
    assert HloModule(text).matmul_flops() == 39 * 2 * 16 * 8 * 8
    assert HloModule(text).stacked_bytes(40, known=set()) == 40 * 4 * 8 * 4


def test_a_collective_over_several_fusions_counts_once():
    """TPUs put the steps of one gather into several fusions of a chain; the first of them starts it."""
    gather = PROGRAM[PROGRAM.index("  %whole =") : PROGRAM.index("  %y =")]
    chained = gather.replace("metadata=", 'frontend_attributes={chain_id="1"}, metadata=')
    text = PROGRAM.replace(gather, chained)
    assert [c.kind for c in collectives(HloModule(text), MESH)] == ["all-reduce"]
    begun = chained + '  %go = u32[] custom-call(%whole), custom_call_target="AsyncCollectiveStart"\n'
    assert len(collectives(HloModule(PROGRAM.replace(gather, begun)), MESH)) == 2


def test_sums_between_slices_are_sends():
    sent = "  %s = (f32[16,8]{1,0}, u32[], token[]) send(%y, %i), is_host_transfer=true, frontend_attributes="
    sent += '{_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}\n'
    text = PROGRAM.replace("  ROOT %out", sent + "  ROOT %out")
    found = [c for c in collectives(HloModule(text), MESH | {"data": 2}) if c.axes == ("data",)]
    assert [(c.kind, c.bytes) for c in found] == [("all-reduce", 40 * 2 * 16 * 8 * 4 / 2)]


def test_unreadable_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        HloModule("not a program")
    with pytest.raises(ValueError, match="unknown form"):
        replica_groups("dimensions={0}")
    assert replica_groups("source_target_pairs={{0,1},{1,0}}").shape == (2, 2)
    assert np.issubdtype(replica_groups("replica_groups=[2,4]<=[8]").dtype, np.integer)
