"""Draws a roofline from what `kiln bench engine --json FILE` has measured: how much is computed for each byte moved, against how fast.

    python infra/bench/plot_roofline.py FILE.json [MORE.json …] --out roofline.png

Each file is a panel. Operations are numbered dots with a list beside the plot, whole models are stars; the lines are the machine's own
ceilings, and what lies on one could not be faster."""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plot  # noqa: E402
from matplotlib import ticker  # noqa: E402

INK, CEILING, COMPUTE, MEMORY, WHOLE = "#222222", "#888888", "#1f6fb4", "#2a9d5c", "#c8321e"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--out", type=Path, default=Path("roofline.png"))
    return parser.parse_args()


def points(report: dict) -> list[dict]:
    """Operations and parts of the model: FLOP for each byte, GFLOP/s, name. What computes nothing has no place here."""
    of = lambda name, flops, moved, timed, whole: {
        "name": name, "intensity": flops / moved, "rate": flops / timed["seconds"]["median"] / 1e9, "whole": whole,
    }
    operations = (report["ops"] or {"lines": []})["lines"]
    parts = (report["model"] or {"parts": []})["parts"]
    return [
        *(of(f"{op['name']}, {op['shape']}", op["flops"], op["bytes"], op["timed"], False) for op in operations if op["flops"]),
        *(of(f"whole {part['name']}", part["flops"], part["work"]["bytes"], part["timed"], True) for part in parts),
    ]


def draw_ceilings(axes, report: dict, left: float, right: float) -> float:
    """The slope of memory and a level for each kind of multiply-add; gives the highest level in GFLOP/s."""
    ceilings = report["ceilings"]
    bandwidth = max(ceilings["read"]["all"], ceilings["copy"]["all"]) / 1e9
    # Of each number format the fastest instructions: the slower ones limit nothing.
    rates = {peak["dtype"]: peak for peak in sorted(ceilings["peaks"], key=lambda peak: peak["flops"]["all"])}
    levels = [peak for dtype, peak in rates.items() if dtype in ("f32", report["dtype"])]
    top = max(peak["flops"]["all"] for peak in levels) / 1e9
    axes.plot([left, top / bandwidth], [left * bandwidth, top], color=INK, linewidth=1.5)
    axes.annotate(
        f"memory {bandwidth:.0f} GB/s", (left * 1.15, left * 1.15 * bandwidth), xytext=(6, -4), textcoords="offset points", fontsize=8,
        color=INK, va="top",
    )
    for peak in levels:
        level = peak["flops"]["all"] / 1e9
        axes.plot(
            [level / bandwidth, right], [level, level], color=INK if level == top else CEILING, linewidth=1.5 if level == top else 1,
            linestyle="-" if level == top else "--",
        )
        text = f"{peak['dtype']}, {peak['instructions']}: {level:.0f} GFLOP/s"
        axes.annotate(text, (level / bandwidth, level), xytext=(8, 3), textcoords="offset points", fontsize=8, color=INK)
    return top


def draw(axes, listing, report: dict) -> None:
    shown = points(report)
    left, right = 4, 2 * max(point["intensity"] for point in shown) if shown else 1000
    top = draw_ceilings(axes, report, left, right)
    bandwidth = max(report["ceilings"]["read"]["all"], report["ceilings"]["copy"]["all"]) / 1e9
    lines, placed = [], []
    for number, point in enumerate(sorted(shown, key=lambda point: (not point["whole"], -point["rate"])), 1):
        roof = min(top, point["intensity"] * bandwidth)
        colour = WHOLE if point["whole"] else COMPUTE if point["intensity"] * bandwidth >= top else MEMORY
        axes.scatter(
            point["intensity"], point["rate"], s=170 if point["whole"] else 26, marker="*" if point["whole"] else "o", color=colour, zorder=4,
            edgecolor="white", linewidth=0.6,
        )
        placed.append((point["intensity"], point["rate"], number, colour))
        lines.append((f"{number:>2}", f"{point['name']}", f"{point['rate']:.0f}", f"{100 * point['rate'] / roof:.0f} %", colour))
    rates = [point["rate"] for point in shown]
    lowest, highest = min([*rates, top / 8]) / 1.5, max([*rates, top]) * 1.35
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(lowest, highest))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(ticker.NullFormatter())
    label(axes, placed)
    axes.set_xlabel("FLOP for each byte that must be moved")
    axes.set_ylabel("GFLOP/s")
    for mark, colour, text in [
        ("*", WHOLE, "the whole model"), ("o", COMPUTE, "an operation that multiply-adds limit"), ("o", MEMORY, "an operation that memory limits"),
    ]:
        axes.scatter([], [], s=90 if mark == "*" else 26, marker=mark, color=colour, label=text)
    axes.legend(loc="lower right", fontsize=8, framealpha=1)
    axes.grid(which="both", color="#eeeeee", linewidth=0.6)
    axes.set_axisbelow(True)
    machine = report["machine"]
    axes.set_title(
        f"{machine['cpu']}, {report['device']}, {report['dtype']}, {report['started_at'][:10]}", fontsize=10, loc="left", color=INK,
    )
    listing.axis("off")
    step = 1 / max(len(lines) + 1, 24)
    listing.text(0.87, 1, "GFLOP/s", fontsize=7.5, ha="right", va="top", color=CEILING, transform=listing.transAxes)
    listing.text(1, 1, "of its roof", fontsize=7.5, ha="right", va="top", color=CEILING, transform=listing.transAxes)
    for row, (number, name, rate, share, colour) in enumerate(lines, 1):
        height = 1 - row * step
        for place, text, align in ((0.04, number, "right"), (0.06, name, "left"), (0.87, rate, "right"), (1, share, "right")):
            listing.text(
                place, height, text, fontsize=7.5, ha=align, va="top", color=colour if text in (number, share) else INK, transform=listing.transAxes,
            )


def label(axes, placed: list[tuple]) -> None:
    """Numbers beside their dots, moved apart where they would lie on each other: in points, from below to above."""
    to_points = lambda x, y: axes.transData.transform((x, y)) * 72 / axes.figure.dpi
    taken: list[tuple[float, float]] = []
    dots = [tuple(to_points(x, y)) for x, y, _, _ in placed]
    offsets = [(6, -3), (-12, -3), (-3, 6), (-3, -12), (8, 6), (8, -11), (-15, 6), (-15, -11), (17, -3), (-23, -3), (-3, 16), (-3, -22), (16, 12), (-22, -18)]
    for (x, y, number, colour), (left, up) in zip(placed, dots):
        def crowding(offset):
            at = (left + offset[0] + 4, up + offset[1] + 3)
            near = [other for other in taken if abs(other[0] - at[0]) < 11 and abs(other[1] - at[1]) < 8]
            over = [dot for dot in dots if abs(dot[0] - at[0]) < 7 and abs(dot[1] - at[1]) < 6]
            return 3 * len(near) + len(over)

        offset = min(offsets, key=crowding)
        taken.append((left + offset[0] + 4, up + offset[1] + 3))
        far = max(abs(offset[0]), abs(offset[1])) > 13
        axes.annotate(
            str(number), (x, y), xytext=offset, textcoords="offset points", fontsize=7.5, color=colour, zorder=5,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4} if far else None,
        )


def main() -> None:
    args = arguments()
    reports = [json.loads(path.read_text()) for path in args.reports]
    figure, axes = plot.subplots(
        len(reports), 2, figsize=(13, 6.4 * len(reports)), width_ratios=[1.4, 1], squeeze=False, layout="constrained", dpi=130,
    )
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.1)
    for (chart, listing), report in zip(axes, reports):
        draw(chart, listing, report)
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
