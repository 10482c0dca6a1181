"""The report of `make demo`: one page from what its stages left in a folder."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from lingbot_jax.evaluation.report import Report, plot_lines
from lingbot_jax.files import write_whole
from lingbot_jax.training.metrics import read_metrics

TARGETS = {"true_over_frozen": 2.4, "true_over_other": 2.1, "minutes": 25.0, "peak_rss_gib": 6.0}


def write_report(root: pathlib.Path, log: Mapping[str, Mapping[str, Any]], keys: str) -> dict[str, Any]:
    """Writes metrics.json and report.html from what the stages left; returns the flat metrics.

    Args:
      log: stage -> command, seconds, peak_rss_gib, in their order. keys: of the walk.
    """
    evaluation = json.loads((root / "evaluation" / "evaluation.json").read_text())
    curves = {name: list(read_metrics(root / name)) for name in ("world", "action", "causal")}
    last = [*(lines[-1] for lines in curves.values()), *list(read_metrics(root / "distill"))[-1:]]
    minutes = sum(entry["seconds"] for entry in log.values()) / 60
    peak = max(entry["peak_rss_gib"] for entry in log.values())
    measures = [k for k, v in evaluation.items() if not isinstance(v, dict)]
    metrics = {name: evaluation[name] for name in measures} | {
        "minutes": minutes,
        "peak_rss_gib": peak,
        "train_steps": sum(line["step"] for line in last),
    }
    compared = json.loads((root / "compare" / "post_training.json").read_text())
    # The rest stands apart: it has a number of clips and of frames per second too.
    table = compared.pop("post_training")
    written = metrics | {"post_training": table, "compared": compared}
    write_whole(root / "metrics.json", json.dumps(written, indent=2) + "\n")

    plot_lines(
        root / "loss.png",
        [(name, [m["step"] for m in lines], [m["loss"] for m in lines]) for name, lines in curves.items()],
        "step",
        "flow matching loss",
        log=True,
    )
    frames = range(1, evaluation["generated_frames"] + 1)
    by_frame = evaluation["psnr_by_frame"].items()
    plot_lines(
        root / "psnr.png", [(k.replace("_", " "), frames, v) for k, v in by_frame], "frame", "PSNR (dB)"
    )

    true, frozen, other = (metrics[f"psnr_{k}"] for k in ("true_keys", "frozen", "other_keys"))
    report = Report(
        "A small world model, learnt on a CPU",
        f"{metrics['train_steps']} steps on this CPU, from frames that a player collected. "
        "It is given one picture and the keys, and imagines the rest.",
    )
    report.cards(
        [
            (
                f"{true - frozen:+.2f} dB",
                "PSNR over a frozen first frame (target +2.4)",
                true - frozen >= TARGETS["true_over_frozen"],
            ),
            (
                f"{true - other:+.2f} dB",
                "PSNR over another clip's keys (target +2.1)",
                true - other >= TARGETS["true_over_other"],
            ),
            (f"{metrics['yaw_sign_agreement']:.0%}", "turns that go the way of the key", None),
            (f"{minutes:.1f} min", "all stages (target 25)", minutes <= TARGETS["minutes"]),
            (f"{peak:.1f} GiB", "resident memory at most (target 6)", peak <= TARGETS["peak_rss_gib"]),
        ]
    )
    report.heading("A walk through a place that was never seen")
    report.text(
        f"One given picture, then the keys {keys}: forward, a turn to the left, forward, a turn to the right. "
        "Each window of frames continues the last frames of the one before; the picture fades from window to window, "
        "which is what post-training, below, is for."
    )
    report.video("walk/video.mp4")
    report.heading("Held-out clips: truth, generated with the true keys, generated with another clip's keys")
    report.text(
        f"The places of these {evaluation['clips']} clips were never trained on. Every generated clip starts from the "
        "true first frame; the third column walks through the same world with keys it was not recorded with."
    )
    report.video("evaluation/generated.mp4")
    report.image("evaluation/sheet.png", "contact sheet of held-out clips")
    report.heading("Long clips: truth, many steps in windows, causal before and after distillation")
    report.text(
        "The first is the world above. The others play chunk after chunk in four steps, on what they made themselves: "
        "as they came from causal training, and after distillation on their own rollouts."
    )
    report.video("compare/compared.mp4")
    report.image("compare/sheet.png", "contact sheet of long clips and of a minute of play")
    report.table(["model", "after", "PSNR (dB)", "sharpness", "action following"], _rows(table))
    report.heading("Numbers")
    rows = [
        [name, f"{value:.3f}" if isinstance(value, float) else str(value)] for name, value in metrics.items()
    ]
    report.table(["measure", "value"], rows)
    report.image("psnr.png", "PSNR by frame")
    report.heading("Training")
    report.image("loss.png", "loss curves")
    report.heading("Stages")
    report.table(
        ["stage", "seconds", "GiB", "command"],
        [
            [name, f"{entry['seconds']:.0f}", f"{entry['peak_rss_gib']:.1f}", entry["command"]]
            for name, entry in log.items()
        ],
    )
    report.write(root / "report.html")
    return metrics


def _rows(table: Mapping[str, Any]) -> list[list[str]]:
    """The table of post-training: a row per model and time."""
    shown = lambda value: "" if value is None else f"{value:.2f}"
    return [
        [model, time, *(shown(numbers.get(name)) for name in ("psnr", "sharpness", "action_following"))]
        for model, times in table.items()
        for time, numbers in times.items()
    ]
