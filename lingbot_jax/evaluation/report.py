"""The report of a run as one HTML page with relative links: it can be moved together with its folder."""

import html
import pathlib
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #f6f7f9; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 40px 0 12px; }
p { max-width: 72ch; margin: 8px 0; } .lead { color: #55606e; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0; }
.card { background: #fff; border: 1px solid #dfe3e8; border-radius: 8px; padding: 12px 16px; min-width: 150px; }
.card b { display: block; font-size: 24px; } .card span { color: #55606e; font-size: 14px; }
.ok b { color: #18794e; } .short b { color: #b54708; }
table { border-collapse: collapse; background: #fff; border: 1px solid #dfe3e8; border-radius: 8px; }
td, th { padding: 6px 14px; border-bottom: 1px solid #eef0f3; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
img, video { max-width: 100%; border: 1px solid #dfe3e8; border-radius: 8px; background: #fff; }
code { background: #eceff3; border-radius: 4px; padding: 1px 5px; }
"""


class Report:
    """Collects sections in order, then writes the page."""

    def __init__(self, title: str, lead: str):
        self._title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="lead">{html.escape(lead)}</p>']

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def cards(self, cards: Sequence[tuple[str, str, bool | None]]) -> None:
        """(value, label, whether a target is met; None without a target)."""
        kind = {True: " ok", False: " short", None: ""}
        items = [
            f'<div class="card{kind[ok]}"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'
            for value, label, ok in cards
        ]
        self._parts.append(f'<div class="cards">{"".join(items)}</div>')

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Cells that read as numbers are set right."""

        def cell(value: str) -> str:
            number = value.replace(".", "").replace("-", "").replace("+", "").split(" ")[0].isdigit()
            return f"<td{' class=number' if number else ''}>{html.escape(value)}</td>"

        header = "".join(f"<th>{html.escape(h)}</th>" for h in head)
        body = "".join(f"<tr>{''.join(cell(c) for c in row)}</tr>" for row in rows)
        self._parts.append(f"<table><tr>{header}</tr>{body}</table>")

    def image(self, path: str, alt: str) -> None:
        self._parts.append(f'<p><img src="{html.escape(path)}" alt="{html.escape(alt)}"></p>')

    def video(self, path: str) -> None:
        self._parts.append(
            f'<p><video src="{html.escape(path)}" controls autoplay loop muted playsinline></video></p>'
        )

    def write(self, path: str | pathlib.Path) -> None:
        page = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(self._title)}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
            f"<main>{''.join(self._parts)}</main></html>\n"
        )
        path = pathlib.Path(path)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)


def plot_lines(
    path: str | pathlib.Path,
    series: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    log: bool = False,
) -> None:
    """A line plot of (label, x, y) series."""
    figure, axes = plt.subplots(figsize=(8, 3.2), dpi=120, layout="constrained")
    for label, x, y in series:
        axes.plot(x, y, label=label, linewidth=1.6)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)
