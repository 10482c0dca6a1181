"""Plans for people to read."""

from lingbot_jax.planning.compiled import MARGIN
from lingbot_jax.planning.estimate import Plan
from lingbot_jax.planning.latency import ServingPlan


def line(plan: Plan) -> str:
    """One line: phase, size, memory, time."""
    total, limit = plan.hbm_bytes_per_chip["total"] / 1e9, plan.hbm_limit_bytes / 1e9
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    text = f"phase {plan.phase}: batch {plan.batch}, {plan.tokens_per_step:,} tokens per step, {mesh}, remat "
    text += f"{plan.remat}, grad_accum_steps {plan.grad_accum_steps}; "
    text += f"{'fits' if plan.fits else 'DOES NOT FIT'}, {total:.1f} of {limit:.1f} GB"
    if plan.step_seconds_roofline is not None:
        text += f"; {plan.step_seconds_roofline:.3f} s per step, bound by {plan.bound_by}"
    if plan.mfu is not None:
        text += f", MFU {plan.mfu_without_overlap:.1%} to {plan.mfu:.1%}"
    return text + "".join("; FAULT" for _ in (plan.faults or [])[:1])


def describe(plan: Plan) -> str:
    """Every figure, and a verdict of two lines at the end."""
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    lines = [
        f"{plan.topology}, {plan.program}, phase {plan.phase}: {plan.chips} devices, {mesh}; batch {plan.batch}, "
        f"{plan.tokens_per_step:,} tokens per step, remat {plan.remat}, grad_accum_steps {plan.grad_accum_steps}",
        f"  HBM per device (GB): {_gigabytes(plan.hbm_bytes_per_chip)}",
    ]
    if plan.seconds is not None:
        lines += _work(plan)
    return "\n".join([*lines, *_verdict(plan)])


def _work(plan: Plan) -> list[str]:
    flops, kinds = plan.flops, sorted(plan.collective_bytes.items())
    lines = [
        f"  matrix products per device: {flops['matmul_per_chip_hlo']:.3e} FLOPs in the compiled program"
    ]
    if plan.mfu is not None:
        lines[0] += f", {flops['matmul_per_chip_analytic']:.3e} by the sizes of the network"
        lines.append(f"  attention kernels per device: {flops['attention_per_chip']:.3e} FLOPs")
    lines += [f"  {kind} (GB): {_gigabytes(row)}" for kind, row in kinds]
    if plan.faults is not None:
        found = [f"  FAULT: {fault}" for fault in plan.faults]
        lines += found or ["  sends and holds what it should"]
    lines.append("  seconds: " + ", ".join(f"{name} {value:.3f}" for name, value in plan.seconds.items()))
    if plan.mfu is not None:
        busy = f"{plan.step_seconds_roofline:.3f} s x {flops['peak']:.3e} FLOP/s"
        lines.append(f"  MFU {plan.mfu:.1%} = {flops['model_per_step']:.3e} model FLOPs per step / ({busy})")
    return lines


def _verdict(plan: Plan) -> list[str]:
    total, limit = plan.hbm_bytes_per_chip["total"] / 1e9, plan.hbm_limit_bytes / 1e9
    says = "FITS" if plan.fits else "DOES NOT FIT"
    first = f"{says}: {total:.1f} of {limit:.1f} GB per device, {MARGIN:.0%} of which must stay free"
    if plan.step_seconds_roofline is None:
        return [first, "try --search, a larger topology, remat = full or more grad_accum_steps"]
    second = f"a step takes {plan.step_seconds_roofline:.3f} s, bound by {plan.bound_by}"
    if plan.mfu is not None:
        hidden = max(plan.seconds["compute"], plan.seconds["hbm"])
        second += f"; {hidden + plan.seconds['network']:.3f} s if no communication is hidden"
        second += f" (MFU {plan.mfu:.0%}, {plan.mfu_without_overlap:.0%})"
        days = plan.chip_hours / plan.chips / 24
        second += f"; {plan.chip_hours_tokens:.3g} training tokens take {plan.chip_hours:,.0f} chip-hours"
        second += f", {days:,.1f} days of these devices"
    return [first, second]


def describe_serving(plan: ServingPlan) -> str:
    """Every figure of a plan of serving, and the verdict last."""
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    lines = [
        f"{plan.topology}, {plan.program} of {plan.frames} frames of {plan.height} x {plan.width}: "
        f"{plan.devices} devices, {mesh}, weights {plan.weights}; computes in {plan.computes}",
        f"  HBM per device (GB): {_gigabytes(plan.hbm_bytes_per_chip)}",
    ]
    if plan.terms is not None:
        lines.append("  seconds: " + ", ".join(f"{name} {value:.4f}" for name, value in plan.terms.items()))
    if plan.flops is not None:
        lines.append(
            f"  {plan.flops:.3e} FLOPs, {plan.flops / plan.flops_published:.1%} of the published loop's; less: "
            + ", ".join(f"{name} {value:.2e}" for name, value in plan.flops_removed.items())
        )
    total, limit = plan.hbm_bytes_per_chip["total"] / 1e9, plan.hbm_limit_bytes / 1e9
    verdict = f"{'FITS' if plan.fits else 'DOES NOT FIT'}: {total:.1f} of {limit:.1f} GB per device"
    if plan.chunk_seconds is not None:
        verdict += (
            f"; {plan.chunk_seconds:.3f} s as scheduled ({plan.chunk_seconds_hidden:.3f} s with all hidden behind "
            f"{plan.bound_by}, {plan.chunk_seconds_serial:.3f} s with nothing), {plan.frames_per_second:.1f} frames "
            f"per second, key to frame {plan.key_to_frame_seconds:.3f} s at most"
        )
    return "\n".join([*lines, verdict])


def _gigabytes(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value / 1e9:.2f}" for name, value in values.items())
