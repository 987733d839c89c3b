"""What the service did under load, for people: a table, and a page with its plots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ip2p_ray.benchmark.measure import cell
from ip2p_ray.gallery import COLOURS, Series, plot, template

TEMPLATE = "load.html.jinja"

NAMES = {
    "ours": "step batches (ours)",
    "reference": "one by one",
    "request_batching": "request batches",
}
"""What each way is called, in the order in which they are told."""

ROWS = {
    "images_per_s": ("pictures/s at saturation", 1.0, ".2f"),
    "cpu_s_per_image": ("CPU seconds of a picture's replica", 1.0, ".3f"),
    "batch_rows": ("requests in a batch, at saturation", 1.0, ".1f"),
    "threads": ("threads of torch", 1.0, ".0f"),
    "p50_s": ("p50, ms", 1000.0, ",.0f"),
    "p95_s": ("p95, ms", 1000.0, ",.0f"),
    "p99_s": ("p99, ms", 1000.0, ",.0f"),
}
"""What is told of each way: label, factor and form."""


def table(found: Mapping[str, Any]) -> str:
    """The conditions, a line for each of ROWS, and one for each load."""
    lines = [*conditions(found).values(), ""]
    heads = (*NAMES.values(), "/ one by one", "/ request b.")
    lines.append(f"{'':36}" + "".join(f"{head:>21}" for head in heads))
    for key, (label, factor, form) in ROWS.items():
        cells = [cell(found[way][key], factor, form) for way in NAMES]
        ratios = (found["ratio"], found["ratio_to_request_batching"])
        cells += [cell(ratio.get(key), 1.0, ".2f") for ratio in ratios]
        lines.append(f"{label:36}" + "".join(f"{each:>21}" for each in cells))
    offered = found["compare_at"] * found["capacity_per_s"]
    lines += [
        f"latencies at {offered:.2f} requests/s ({found['compare_at']:g} times what one by one "
        "does), Poisson",
        "",
        "p50 / p95 / p99 in ms; pictures/s; requests in a batch",
    ]
    for index, load in enumerate(found["reference"]["loads"]):
        cells = [_load(found[way]["loads"][index]) for way in NAMES]
        label = f"{load['arrivals']} {load['offered_per_s']:.2f}/s ({load['times_capacity']:g} x)"
        lines.append(f"{label:26}" + "".join(f"{each:>36}" for each in cells))
    return "\n".join([*lines, "", *remarks(found)])


def load_page(found: Mapping[str, Any]) -> str:
    """The page's text: p95 and throughput against the offered rate, and the table's figures."""
    kinds = list(dict.fromkeys(load["arrivals"] for load in found["reference"]["loads"]))
    return template(TEMPLATE).render(
        conditions=conditions(found),
        remarks=remarks(found),
        legend=list(zip(NAMES.values(), COLOURS, strict=False)),
        plots={kind: _plots(found, kind) for kind in kinds},
        names=NAMES,
        rows=ROWS,
        found=found,
        cell=cell,
        offered=found["compare_at"] * found["capacity_per_s"],
    )


def conditions(found: Mapping[str, Any]) -> dict[str, str]:
    """What was measured, and where."""
    model = found["model"] or "miniature"
    if found["sd15"]:
        model = "SD-1.5 shapes, random weights"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return {
        "model": f"{model}, {found['resolution']} px, {found['steps']} steps, {found['dtype']}, "
        f"batches of {found['batch_size']}; {found['requests']} requests at each load, "
        f"{found['rounds']} rounds of {found['saturation']} at saturation",
        "machine": f"{found['device_name']} ({found['device']}, {found['cpus']} cpus, load "
        f"{found['load'][0]} before), {found['date']}",
        "versions": versions,
    }


def remarks(found: Mapping[str, Any]) -> list[str]:
    """What to know of the figures, a sentence each."""
    overhead, cold = found["overhead"], found["cold_start"]
    loads = [load for way in NAMES for load in found[way]["loads"]]
    rejected, failed = (sum(load[key] for load in loads) for key in ("rejected", "failed"))
    late = max(load["late_s"] for load in loads)
    batches = found["request_batching"]
    waits = ", ".join(
        f"{float(wait):g} s: {cell(p95, 1000.0, ',.0f')}"
        for wait, p95 in batches["batch_waits_p95_s"].items()
    )
    searched = "; ".join(
        f"{NAMES[way]} "
        + ", ".join(
            f"{count}: {rate:.2f}" for count, rate in found[way]["threads_searched"].items()
        )
        for way in NAMES
        if found[way]["threads_searched"]
    )
    return [
        f"HTTP and Serve add {overhead['added_p50_s'] * 1000:.1f} ms at p50 to the bare engine's "
        f"{overhead['engine_p50_s'] * 1000:.1f} ms, {overhead['requests']} requests one after "
        "another",
        f"cold start: the first picture {cold['process_to_first_picture_s']:.1f} s after the "
        f"process began; {cold['replica_s']:.1f} s of it until the replica ran, "
        f"{cold['first_picture_s']:.2f} s the picture",
        *(
            [f"pictures/s by threads, of which each way got the quickest: {searched}"]
            if searched
            else []
        ),
        f"batches of whole requests wait {batches['batch_wait_s']:.3g} s to become full"
        + (f", which was best (p95 in ms by wait: {waits})" if waits else ""),
        f"pictures of the three ways differ by {found['mean_difference']:.4f} of 255 on average "
        f"(bound {found['mean_difference_bound']:g}), {found['max_difference']} at most",
        f"{rejected} requests were rejected and {failed} failed; none was sent more than "
        f"{late * 1000:.0f} ms late; waiting is counted from when a request was due",
    ]


def _load(load: Mapping[str, Any]) -> str:
    waits = " / ".join(cell(load[key], 1000.0, ",.0f") for key in ("p50_s", "p95_s", "p99_s"))
    return f"{waits}; {load['images_per_s']:.2f}; {cell(load['batch_rows'], 1.0, '.1f')}"


def _plots(found: Mapping[str, Any], kind: str) -> list[str]:
    """p95 and throughput against the rate that was offered."""

    def lines(key: str) -> list[Series]:
        return [
            Series(
                name,
                [
                    (load["offered_per_s"], load[key])
                    for load in found[way]["loads"]
                    if load["arrivals"] == kind and load[key]
                ],
            )
            for way, name in NAMES.items()
        ]

    x_label = "requests offered a second"
    return [
        plot(
            lines("p95_s"),
            x_label=x_label,
            y_label="p95, seconds",
            legend=False,
            logarithmic=True,
        ),
        plot(
            lines("images_per_s"),
            x_label=x_label,
            y_label="pictures a second",
            legend=False,
            from_zero=True,
        ),
    ]
