"""Plots of a machine's figures."""

from __future__ import annotations

from pathlib import Path

PARTS = ("convolutions", "rest", "loss", "teacher", "data_wait")
LABELS = {"rest": "batch norm, neurons, sums, optimiser", "data_wait": "waiting for data"}


def draw(table: list[dict], folder: Path) -> list[Path]:
    """Draw what the rows of tables.py hold figures for; return the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    drawings = {
        "speed-over-T": (_over_size, "lif over T", "time", "ms, forward + backward", 1e3),
        "kept-over-T": (_over_size, "blocks over T", "kept_bytes", "MiB kept for backward", 2**-20),
        "step": (_stacked,),
        "memory": (_memory,),
        "spike-conv-over-rate": (_over_rate, "forward of spikes, layer1, "),
        "weight-gradient-over-rate": (_over_rate, "weight gradient of spikes, layer1, "),
    }
    for name, (drawing, *arguments) in drawings.items():
        figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
        if drawing(table, axes, *arguments):
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=120)
            written.append(path)
        pyplot.close(figure)
    return written


def _over_size(table, axes, study, quantity, label, scale) -> bool:
    """Each contestant's curve over the sizes of a study, with its spread; whether there are any."""
    lines: dict[str, list[tuple]] = {}
    for row in table:
        if row["benchmark"] == "scaling" and row["quantity"] == quantity and row["group"].startswith(f"{study}: "):
            size = int(row["group"].rsplit(" ", 1)[1])
            lines.setdefault(row["contestant"], []).append((size, row["value"], row["low"], row["high"]))
    for contestant, points in lines.items():
        sizes, values, lows, highs = zip(*sorted(points), strict=True)
        axes.plot(sizes, [scale * value for value in values], "o-", label=contestant, markersize=3)
        if None not in lows:
            axes.fill_between(sizes, [scale * low for low in lows], [scale * high for high in highs], alpha=0.2)
    axes.set(xscale="log", yscale="log", xlabel=study, ylabel=label)
    if lines:
        axes.legend()
    return bool(lines)


def _over_rate(table, axes, group) -> bool:
    """The time of convolutions that skip zeros over the firing rate, and of dense ones, in each dtype of a layer."""
    rows = [row for row in table if row["benchmark"] == "spike_conv" and row["quantity"] == "time"]
    rows = [row for row in rows if row["group"].startswith(group)]
    for index, name in enumerate(dict.fromkeys(row["group"] for row in rows)):
        dtype, colour = name.removeprefix(group).split(":")[0], f"C{index}"
        times = [row for row in rows if row["group"] == name]
        points = sorted(
            (float(row["contestant"].split()[-2]), 1e3 * row["value"], 1e3 * row["low"], 1e3 * row["high"])
            for row in times
            if row["contestant"].endswith("%")
        )
        if points:
            percents, values, lows, highs = zip(*points, strict=True)
            axes.plot(percents, values, "o-", color=colour, label=f"seal-fast, {dtype}", markersize=3)
            axes.fill_between(percents, lows, highs, color=colour, alpha=0.2)
        for row in times:
            if not row["contestant"].endswith("%"):
                axes.axhline(1e3 * row["value"], color=colour, linestyle="--", label=f"{row['contestant']}, {dtype}")
    axes.set(xlabel="firing rate, %", ylabel=f"ms, {group.rstrip(', ')}", ylim=(0, None))
    if rows:
        axes.legend(fontsize="small")
    return bool(rows)


def _stacked(table, axes) -> bool:
    """The parts of a step of each contestant."""
    found: dict[str, dict[str, float]] = {}
    for row in table:
        if row["benchmark"] == "parts" and row["quantity"].endswith("_seconds"):
            found.setdefault(row["contestant"], {})[row["quantity"].removesuffix("_seconds")] = 1e3 * row["value"]
    left = dict.fromkeys(found, 0.0)
    for part in PARTS:
        widths = [max(parts.get(part, 0.0), 0.0) for parts in found.values()]
        axes.barh(list(found), widths, left=list(left.values()), label=LABELS.get(part, part))
        left = {name: left[name] + width for name, width in zip(found, widths, strict=True)}
    axes.set(xlabel="ms a step, ResNet-18 <- ResNet-34, T = 4")
    axes.invert_yaxis()
    if found:
        axes.figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    return bool(found)


def _memory(table, axes) -> bool:
    """Peak memory of a step of each contestant."""
    rows = [row for row in table if row["benchmark"] == "train" and row["quantity"] == "peak_bytes"]
    rows = [row for row in rows if row["group"].startswith("training step, resnet18-cifar")]
    axes.barh([row["contestant"] for row in rows], [row["value"] / 2**20 for row in rows])
    axes.set(xlabel="peak memory of networks and step, MiB")
    axes.invert_yaxis()
    return bool(rows)
