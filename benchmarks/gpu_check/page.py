"""The report as Markdown; every table is made of whatever figures there are."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.step_settings import PHASES, PREFILL

STAGES = ("gen_for_und", "und_for_gen", "pretrain", "cold_start")
# what is to be reached on a card: (name in `derived`, how it reads, at least)
GOALS = (
    ("times_as_fast", "whole step, times as fast as compiled PyTorch", 2.0),
    ("denoising_share", "denoising, share of the matrix rate", 0.55),
    ("decoding_share", "decoding, share of the copy bandwidth", 0.60),
)
DEVICE = ("card", "device_kind", "driver", "memory", "compute_capability", "power_limit", "backend", "cpus")
RATES = (
    ("matrix_rate", "matrix rate", "TFLOP/s", 1e12),
    ("copy_bandwidth", "copy bandwidth", "GB/s", 1e9),
    ("peak_flops", "peak of the data sheet", "TFLOP/s", 1e12),
    ("memory_bandwidth", "bandwidth of the data sheet", "GB/s", 1e9),
)
COMPARED = ("hidden", "hidden_rms", "velocity", "velocity_rms", "gradient", "gradient_rms")


def figures_of(parts: Mapping[str, dict], name: str) -> dict[str, Any]:
    """Of a part; empty where it has none."""
    return parts.get(name, {}).get("figures", {})


def page(report: Mapping[str, Any]) -> str:
    """The whole page."""
    identity, parts, derived = report["identity"], report["parts"], report["derived"]
    device = figures_of(parts, "device")
    real = device.get("backend") == "gpu" and identity["size"] == "full"
    kind = "" if real else " A dry run: its figures say nothing about a card, and are held against no goal."
    lines = [f"# GPU check: {identity['card']}", "", f"Commit {identity['commit']}, size {identity['size']}.{kind}"]
    lines += [*runs(report["runs"]), "", *status_table(parts), *(goals_table(derived) if real else ())]
    lines += [*device_table(device), *steps_table(parts, derived), *memory_table(parts, derived)]
    lines += [*attention_table(figures_of(parts, "attention")), *phases_tables(parts, derived), *errors(parts)]
    return "\n".join(lines) + "\n"


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> list[str]:
    """Lines of a section; none without rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return []
    said = [note, ""] if note else []
    return [f"## {title}", "", *said, f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines, ""]


def shown(value: Any, form: str = "{:.2f}") -> str:
    """A number, or a dash where there is none; what was not finite stands as its text."""
    return "-" if value is None else value if isinstance(value, str) else form.format(value)


def percent(value: Any) -> str:
    """A share."""
    return shown(value, "{:.1%}")


def gib(value: Any) -> str:
    """Bytes in GiB."""
    return "-" if value is None else f"{value / 2**30:.2f}"


def runs(found: Sequence[Mapping]) -> list[str]:
    """One line a run."""
    lines = []
    for run in found:
        setup = f", installation {run['setup_seconds']:.0f} s before it" if run.get("setup_seconds") else ""
        lines.append(f"Run of {run['date']}: {run['seconds']:.0f} s of {60 * run['minutes']:.0f}{setup}.")
    return lines


def status_table(parts: Mapping[str, dict]) -> list[str]:
    """How each part ended."""
    rows = [
        (name, part["status"], *(shown(part.get(key), "{:.0f}") for key in ("seconds", "limit")))
        for name, part in parts.items()
    ]
    return table("Parts", ("part", "status", "seconds", "at most"), rows)


def goals_table(derived: Mapping[str, dict]) -> list[str]:
    """What was to be reached, and what was."""
    rows = []
    for name, words, least in GOALS:
        form = shown if least > 1 else percent
        rows += [
            (words, stage, form(least), form(row[name]), "yes" if row[name] >= least else "no")
            for stage, row in derived.items()
            if name in row
        ]
    return table("Goals", ("goal", "stage", "at least", "measured", "reached"), rows)


def device_table(device: Mapping[str, Any]) -> list[str]:
    """Card, versions, rates."""
    rows = [(name.replace("_", " "), str(device[name])) for name in DEVICE if device.get(name)]
    rows += list(device.get("versions", {}).items())
    for name, words, unit, scale in RATES:
        if isinstance(device.get(name), float | int):
            kind = f", {device['dtype']}" if name == "matrix_rate" else ""
            rows.append((words, f"{device[name] / scale:.2f} {unit}{kind}"))
    return table("Device", ("what", "value"), rows)


def steps_table(parts: Mapping[str, dict], derived: Mapping[str, dict]) -> list[str]:
    """Seconds and utilisation of each stage's step."""
    rows, preset = [], ""
    for stage in STAGES:
        steps, row = figures_of(parts, f"steps:{stage}"), derived.get(stage, {})
        if not steps:
            continue
        preset, known = steps["preset"], " (from disk)" if steps.get("from_disk") else ""
        rows.append(
            (
                stage,
                str(steps["images"]),
                shown(steps.get("compile_seconds"), "{:.1f}") + known,
                ", ".join(f"{seconds:.2f}" for seconds in steps.get("step_seconds", ())),
                shown(steps.get("images_per_second")),
                shown(steps.get("model_flops"), "{:.2e}"),
                percent(row.get("of_peak")),
                percent(row.get("of_matrix_rate")),
                {True: "yes", False: "**no**"}.get(steps.get("finite"), "-"),
            )
        )
    head = (
        "stage",
        "images",
        "compile s",
        "steps, s",
        "images/s",
        "model FLOPs",
        "of the peak",
        "of the matrix rate",
        "finite",
    )
    note = "Random weights. Model FLOPs are counted without recomputation, over the median step."
    return table(f"Steps of `{preset}`", head, rows, note)


def memory_table(parts: Mapping[str, dict], derived: Mapping[str, dict]) -> list[str]:
    """The measured peak beside the plans."""
    rows = []
    for stage in STAGES:
        steps, row = figures_of(parts, f"steps:{stage}"), derived.get(stage, {})
        if "compiler" in steps:
            planned = steps["compiler"]["arguments"], steps["compiler"]["peak"], steps["estimate"]["peak"]
            sizes = *planned, steps.get("peak_before_steps"), steps.get("peak_bytes")
            rows.append((stage, *map(gib, sizes), percent(row.get("of_compiler")), percent(row.get("of_estimate"))))
    head = (
        "stage",
        "arguments",
        "compiler's peak",
        "estimated peak",
        "peak before the steps",
        "measured peak",
        "of the compiler's",
        "of the estimate",
    )
    return table("Memory, GiB", head, rows)


def attention_table(attention: Mapping[str, Any]) -> list[str]:
    """Every form against the plain one, in bfloat16."""
    rows = []
    for form, row in attention.get("against_plain", {}).items():
        tokens = percent(row["equal_tokens"]), percent(row["equal_first"])
        rows.append((form, *tokens, *(shown(row[name], "{:.1e}") for name in COMPARED)))
    forms = ", ".join(attention.get("forms", ()))
    note = (
        f"Against `plain` in bfloat16. Forms: {forms}. Largest differences over the largest value, and root mean "
        "squares. `float32 plain` shows what bfloat16 itself changes."
    )
    head = ("form", "equal greedy tokens", "in the first half", *(name.replace("_", " ") for name in COMPARED))
    return table("Attention", head, rows, note)


def phases_tables(parts: Mapping[str, dict], derived: Mapping[str, dict]) -> list[str]:
    """Milliseconds of both sides, stage by stage."""
    lines = []
    for stage in STAGES[:2]:
        found = [figures_of(parts, f"{kind}:{stage}") for kind in ("phases", "torch")]
        sides = [side for side in found if "total" in side]
        rows = []
        for name in ("total", *PHASES, PREFILL):
            if any(name in side for side in sides):
                rows.append((name.replace("_", " "), *(_milliseconds(side.get(name)) for side in sides)))
        if sides:
            rows.append(("compilation, s", *(shown(side["compile_seconds"], "{:.1f}") for side in sides)))
            rows.append(("peak, GiB", *(gib(side.get("peak_bytes")) for side in sides)))
        head = ("phase, ms", *(side["side"] for side in sides))
        lines += table(f"Phases of {stage}", head, rows, _shares(derived.get(stage, {})))
    return lines


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f}"


def _shares(row: Mapping[str, float]) -> str:
    """What the phases say of the card and of the other side, as sentences."""
    words = (
        ("denoising_share", "Denoising has {:.1%} of the matrix rate."),
        ("decoding_share", "Decoding has {:.1%} of the copy bandwidth."),
        ("times_as_fast", "The whole step is {:.2f} times as fast as compiled PyTorch."),
    )
    return " ".join(form.format(row[name]) for name, form in words if name in row)


def errors(parts: Mapping[str, dict]) -> list[str]:
    """The last lines of what failed."""
    lines = []
    for name, part in parts.items():
        if part.get("error"):
            lines += [f"## {name}: {part['status']}", "", "```", *part["error"], "```", ""]
    return lines
