"""An estimate for people, and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ip2p_ray.estimate.arithmetic import Estimate
from ip2p_ray.estimate.comparison import Comparison, Line
from ip2p_ray.estimate.config import Basis, Prices, Speed
from ip2p_ray.estimate.sensitivity import Changed
from ip2p_ray.report import duration, size

TOTALS: dict[str, Callable[[Estimate], float]] = {
    "device_hours": lambda made: made.device_hours,
    "wall_hours": lambda made: made.wall_hours,
    "kept_bytes": lambda made: made.kept_bytes,
    "cost": lambda made: 0.0 if made.cost is None else made.cost.total,
}
"""What the sensitivity table has columns of."""


def lines(
    basis: Basis, prices: Prices | None, made: Estimate, changed: Sequence[Changed]
) -> list[str]:
    """All tables."""
    return [
        *_stages(made),
        "",
        *_stored(made),
        "",
        *_network(made),
        *([] if made.cost is None or prices is None else ["", *_cost(made, prices)]),
        "",
        *_sensitivity(made, changed),
        "",
        *_sources(basis),
    ]


def _stages(made: Estimate) -> list[str]:
    rows = [
        [
            stage.name,
            f"{stage.units:,.0f} {stage.unit}",
            _hours(stage.device_hours),
            f"{stage.devices}",
            duration(stage.fixed_seconds),
            duration(3600 * stage.wall_hours),
        ]
        for stage in made.stages
    ]
    rows.append(["start and end", "", "", "", "", duration(3600 * made.start_hours)])
    rows.append(["all", "", _hours(made.device_hours), "", "", duration(3600 * made.wall_hours)])
    head = ["stage", "work", "device h", "devices", "fixed", "wall time"]
    return _table(head, rows)


def _stored(made: Estimate) -> list[str]:
    rows = [
        [
            each.name,
            f"{each.rows:,.0f}",
            size(each.bytes),
            f"{each.objects:,.0f}",
            "on the nodes" if each.local else ("" if each.kept else "while it is made"),
        ]
        for each in made.stored
    ]
    rows.append(["all that stays", "", size(made.kept_bytes), f"{made.objects:,.0f}", ""])
    return _table(["stored", "rows", "bytes", "objects", ""], rows)


def _network(made: Estimate) -> list[str]:
    rows = [
        [stage.name, size(made.read_bytes[stage.name]), size(made.written_bytes[stage.name])]
        for stage in made.stages
    ]
    rows.append(
        ["all", size(sum(made.read_bytes.values())), size(sum(made.written_bytes.values()))]
    )
    return [
        *_table(["bucket", "read", "written"], rows),
        f"gradients: each trainer sends {size(made.exchanged_bytes)} over the run",
        f"requests: {made.puts:,.0f} that write, about {made.gets:,.0f} that read",
        *(
            [f"tokens: {made.prompt_tokens:,.0f} read, {made.reply_tokens:,.0f} written"]
            if made.prompt_tokens
            else []
        ),
    ]


def _cost(made: Estimate, prices: Prices) -> list[str]:
    assert made.cost is not None
    held = sum(stage.held_hours for stage in made.stages)
    names = {
        "devices": f"{held:,.1f} device hours held, each stage's pool for its wall time",
        "tokens": "",
        "storage": f"{prices.months:g} months",
        "requests": "",
        "transfer": "",
    }
    rows = [[name, f"{getattr(made.cost, name):,.2f}", note] for name, note in names.items()]
    rows.append(["all", f"{made.cost.total:,.2f}", prices.as_of])
    return _table([f"cost, {prices.currency}", "", ""], rows)


def _sensitivity(made: Estimate, changed: Sequence[Changed]) -> list[str]:
    names = [name for name in TOTALS if name != "cost" or made.cost is not None]
    rows = []
    for each in changed:
        cells = [each.name]
        for name in names:
            total = TOTALS[name]
            low, high = (_told(name, total(found)) for found in (each.halved, each.doubled))
            cells += [f"{low} .. {high}", f"{each.elasticity(total):+.2f}"]
        rows.append(cells)
    head = ["at half .. at twice"]
    for name in names:
        head += [name.replace("_", " "), ""]
    now = ["as asked"]
    for name in names:
        now += [_told(name, TOTALS[name](made)), ""]
    return [
        *_table(head, [now, *rows]),
        "the number beside a range: percent of the total for one percent of the quantity",
    ]


def _told(name: str, value: float) -> str:
    if name == "kept_bytes":
        return size(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:,.3g}"


def _sources(basis: Basis) -> list[str]:
    speeds = [
        (name, speed) for name, speed in vars(basis.speeds).items() if isinstance(speed, Speed)
    ]
    rows = [[name, f"{speed.seconds:.3g} s", speed.source] for name, speed in speeds]
    return [
        *_table(["speed of a device", "", "where that is from"], rows),
        f"sizes: {basis.sizes.source}",
    ]


def comparison_lines(found: Comparison) -> list[str]:
    """The prediction beside what was."""

    def part(head: str, told: Sequence[Line], show: Callable[[float], str]) -> list[str]:
        rows = [
            [
                line.name,
                show(line.predicted),
                show(line.took),
                "" if line.error is None else f"{100 * line.error:+.0f} %",
            ]
            for line in told
        ]
        return [*_table([head, "predicted", "was", "error"], rows), ""]

    return [
        *part("wall time", found.walls, duration),
        *part("seconds of devices", found.device, lambda value: f"{value:,.1f}"),
        *part("rows", found.rows, lambda value: f"{value:,.0f}"),
        *part("bytes", found.bytes, size),
    ]


def as_json(
    basis: Basis, prices: Prices | None, made: Estimate, changed: Sequence[Changed]
) -> dict[str, Any]:
    """Everything, as JSON can express it."""
    return {
        "workload": asdict(basis.workload),
        "cluster": asdict(basis.cluster),
        "speeds": asdict(basis.speeds),
        "sizes": asdict(basis.sizes),
        "prices": None if prices is None else asdict(prices),
        "estimate": {
            **asdict(made),
            **{name: total(made) for name, total in TOTALS.items()},
            "cost": None if made.cost is None else {**asdict(made.cost), "all": made.cost.total},
        },
        "sensitivity": {
            each.name: {
                name: {
                    "halved": total(each.halved),
                    "doubled": total(each.doubled),
                    "elasticity": each.elasticity(total),
                }
                for name, total in TOTALS.items()
            }
            for each in changed
        },
    }


def _hours(hours: float) -> str:
    return f"{hours:,.3g}" if hours < 100 else f"{hours:,.0f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they need; the first is set to the left, and a last one that explains."""
    whole = [head, *rows]
    widths = [max(len(row[place]) for row in whole) for place in range(len(head))]
    last = len(head) - 1

    def cell(text: str, place: int) -> str:
        left = place == 0 or (place == last and len(head) > 3)
        return text.ljust(widths[place]) if left else text.rjust(widths[place])

    return [
        "  ".join(cell(text, place) for place, text in enumerate(row)).rstrip() for row in whole
    ]
