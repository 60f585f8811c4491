"""A benchmark's document as tables; where we lose comes first."""

from __future__ import annotations

from typing import Any

Row = list[str]
COMPARISON = ("network", "mode", "ours", "against", "time, theirs / ours", "interval", "peak memory", "verdict")
CONTESTANT = (
    *("network", "mode", "contestant", "ms", "quartiles", "forward", "backward", "optimizer", "images/s"),
    *("peak MB", "kept MB"),
)
LOSS = ("network", "contestant", "last loss", "distance to eager NCHW")


def comparisons(document: dict[str, Any]) -> list[Row]:
    """One line for every pair of ours and another, the largest loss first."""
    found = [(result, pair) for result in document["results"] for pair in result["comparisons"]]
    found.sort(key=lambda entry: entry[1]["ratio"])
    rows = []
    for result, pair in found:
        ours, theirs = (by_name(result)[pair[side]] for side in ("ours", "against"))
        memory = _memory_ratio(ours, theirs)
        interval = f"[{pair['low']:.2f}, {pair['high']:.2f}] {pair['coverage']:.0%}"
        names = [result["model"], result["mode"], ours["label"], theirs["label"]]
        rows.append([*names, f"{pair['ratio']:.2f}x", interval, memory, pair["verdict"]])
    return rows


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a result."""
    return {row["name"]: row for row in result["contestants"]}


def _memory_ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    if not ours.get("peak_bytes") or not theirs.get("peak_bytes"):
        return "-"
    return f"{theirs['peak_bytes'] / ours['peak_bytes']:.2f}x"


def contestants(document: dict[str, Any]) -> list[Row]:
    """One line for everyone who ran."""
    rows = []
    for result in document["results"]:
        for row in result["contestants"]:
            if "milliseconds" not in row:
                continue
            times = row["milliseconds"]
            step = times["step"]
            phases = [_number(times.get(name)) for name in ("forward", "backward", "optimizer")]
            memory = ["-" if row[name] is None else f"{row[name] / 1e6:.1f}" for name in ("peak_bytes", "kept_bytes")]
            names = [result["model"], result["mode"], row["label"]]
            spread = f"[{step['low']:.1f}, {step['high']:.1f}]"
            rows.append([*names, _number(step), spread, *phases, f"{row['images_per_second']:.1f}", *memory])
    return rows


def _number(times: dict[str, float] | None) -> str:
    return "-" if times is None else f"{times['median']:.1f}"


def loss_rows(document: dict[str, Any]) -> list[Row]:
    """Last losses, ours and theirs, and how far two programs of eager part by rounding alone."""
    rows = []
    for result in document["results"]:
        if not result["losses"]:
            continue
        found = result["losses"]
        for name, value in found["last"].items():
            distance = found["to_eager"].get(name)
            rows.append(
                [
                    result["model"],
                    by_name(result)[name]["label"],
                    f"{value:.4f} after {found['steps']} steps",
                    "-" if distance is None else f"{distance:.1e}",
                ]
            )
    return rows


def failures(document: dict[str, Any]) -> list[str]:
    """Networks that were not right, contestants that did not run, and rounds that were not made."""
    lines = [f"{entry['model']}: NOT TIMED: {entry['reason']}" for entry in document["not_timed"]]
    asked = document["settings"]["rounds"]
    for result in document["results"]:
        where = f"{result['model']}, {result['mode']}"
        lines += [f"{where}, {row['label']}: did not run: {row['failed']}" for row in _failed(result)]
        if result["rounds"] < asked:
            lines.append(f"{where}: interrupted after {result['rounds']} of {asked} rounds")
    return lines


def _failed(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["contestants"] if row["failed"]]


def machine_line(document: dict[str, Any]) -> str:
    """Hardware, versions, and date."""
    machine, versions = document["machine"], document["versions"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores"
    threads = f"threads {machine['threads']}, {machine['cpu_capability']}"
    words = [where, threads, f"torch {versions['torch']}", f"resnet_fused {versions['resnet_fused']}"]
    return "; ".join([*words, f"engine {machine['engine']}", document["date"]])


def setting_line(document: dict[str, Any]) -> str:
    """Shape, precision and rounds."""
    given = document["settings"]
    precision = given["dtype"] if given["amp"] == "off" else f"fp32 with autocast to {given['amp']}"
    return f"batch {given['batch']}, {given['image']} px, {precision}, {given['rounds']} rounds in turns"


def tables(document: dict[str, Any]) -> list[tuple[tuple[str, ...], list[Row]]]:
    """What `resnet-fused bench` prints: columns and rows, those without a row left out."""
    made = [
        (COMPARISON, comparisons(document)),
        (CONTESTANT, contestants(document)),
        (LOSS, loss_rows(document)),
    ]
    return [(columns, rows) for columns, rows in made if rows]
