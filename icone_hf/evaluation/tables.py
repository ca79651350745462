"""Tables of metrics of any kind, a row for each measurement."""

from collections.abc import Collection, Mapping

from .metrics import metrics_table

LABELS = {
    **{"r1": "R@1", "r5": "R@5", "r10": "R@10", "medr": "MedR", "mnr": "MnR", "rsum": "Rsum"},
    **{"map_at_r": "mAP@R", "r_precision": "R-Precision"},
}


def difference(metrics: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, float]:
    """Subtract a baseline's metrics.

    Of ranks, less is better; of all else, more.
    """
    return {name: value - baseline[name] for name, value in metrics.items()}


def write_tables(rows: Mapping[str, Mapping[str, float]], signed: Collection[str] = ()) -> str:
    """Write metrics as Markdown tables.

    Rows of the same metrics make one table, in the order of the first of each.

    Args:
        rows: metrics by what was measured.
        signed: rows that are differences.
    """
    tables: dict[tuple[str, ...], dict[str, Mapping[str, float]]] = {}
    for name, metrics in rows.items():
        tables.setdefault(tuple(metrics), {})[name] = metrics
    return "\n\n".join(_write(table, signed) for table in tables.values())


def _write(rows: Mapping[str, Mapping[str, float]], signed: Collection[str]) -> str:
    names = tuple(next(iter(rows.values())))
    if "rsum" in names and not signed:
        return metrics_table({name: dict(metrics) for name, metrics in rows.items()})
    width = max(map(len, rows))
    labels = list(map(_label, names))
    cells = {
        name: [f"{metrics[key]:{'+' if name in signed else ''}.1f}" for key in names] for name, metrics in rows.items()
    }
    widths = [max(len(label), *(len(row[place]) for row in cells.values())) for place, label in enumerate(labels)]
    lines = [
        [" " * width, *(f"{label:>{size}}" for label, size in zip(labels, widths, strict=True))],
        ["-" * width, *("-" * (size - 1) + ":" for size in widths)],
    ]
    for name, row in cells.items():
        lines.append([f"{name:{width}}", *(f"{cell:>{size}}" for cell, size in zip(row, widths, strict=True))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _label(name: str) -> str:
    """Name a metric as papers do."""
    direction, _, metric = name.partition("_")
    return f"{direction} {LABELS[metric]}" if metric in LABELS else LABELS.get(name, name.replace("_", " "))
