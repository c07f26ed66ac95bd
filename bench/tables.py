"""The committed JSON as Markdown: a paragraph and a table for each thing that was measured.

``bench/report.py`` and ``bench/pages.py`` put them between the markers of the pages;
``bench/sections.py`` has those of docs/speed.md that come after the devices' tables.
"""

from __future__ import annotations

import textwrap
from typing import Any

#: Files in the results folder that are not of bench/run.py.
OTHERS = (
    "host", "imports", "codegen", "cpu-detail", "model",
    "peers", "peers-gpu", "training", "training-gpu", "numerics",
    "priors",
)  # fmt: skip
MODE = "forward+backward"
#: Rows and columns of README's table: a small batch, a large one, latents of images.
SHOWN = ("128x20 fp32", "4096x512 fp32", "16x4x64x64 fp32")
BESIDE = ("plain", "vaekl-triton", "vaekl-cpu", "compile")
NO_GPU = "Not yet measured on a GPU."


def prose(text: str) -> str:
    """A paragraph, wrapped like the rest of a page."""
    return textwrap.fill(" ".join(text.split()), 100, break_on_hyphens=False)


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """A table; the first column to the left, figures to the right."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [headings, rule, *rows])


def section(heading: str, text: str, *rest: str) -> str:
    """A heading, a paragraph of it, and what follows."""
    return "\n\n".join([f"## {heading}", prose(text), *rest])


def figure(value: float) -> str:
    """Three digits, never in powers of ten."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def demo(summary: dict[str, Any]) -> str:
    """What the KLs of the example's trained model are."""
    train = summary["train"]
    device = {"cpu": "CPU"}.get(summary["device"], summary["device"])
    return prose(
        f"""In `make demo` ({summary["epochs"]} epochs, seed {summary["seed"]}, torch
        {summary["torch"]}, {device}) the trained model has, on its training images, a KL of
        {train["kl"]:.3f} nats and a KL of the mean of {train["kl_of_mean"]:.3f} nats: the gap of
        {train["gap"]:.3f} nats, {train["gap"] / train["kl"]:.0%} of the first, does not appear in
        the second ([figures](docs/demo))."""
    )


#: Rows of README's table of numerics: dtype, delta.
NEAR = (("fp32", 1e-4), ("bf16", 1e-2))


def numerics(data: dict[str, Any]) -> str:
    """KLs near equality, by the formulas of several projects."""
    rows = [row for row in data["rows"] if row["prior_logvar"] == 0]
    shown = [row for near in NEAR for row in rows if (row["dtype"], row["delta"]) == near]
    lines = [
        [f"{row['dtype']}, δ = {row['delta']:g}"]
        + [f"{value:.4g}" for value in (row["exact"], *row["found"].values())]
        for row in shown
    ]
    text = "The KL of N(0, e^δ), all but collapsed, to a prior N(0, 1) (`bench/numerics.py`):"
    headings = ["", "exact", *shown[0]["found"]]
    return f"{text}\n\n{markdown(headings, lines)}"


def speed(results: dict[str, Any]) -> str:
    """README's share: three shapes of each device."""
    found = devices(results)
    unmeasured = "" if any(is_gpu(data) for data in found.values()) else NO_GPU
    parts = [] if found else [unmeasured]
    for data in found.values():
        of_steps = ""
        for steps in trainings(results):
            if is_gpu(steps) == is_gpu(data):
                slowest, fastest = (f(map(gain, steps["rows"])) for f in (min, max))
                of_steps = f""" Whole training steps on {steps["device"]["name"]}:
                    {slowest:.2f}x to {fastest:.2f}x."""
        threads = "" if is_gpu(data) else f"{data['device']['threads']} threads, "
        text = f"""{unmeasured} {data["device"]["name"]} ({threads}{data["device"]["date"]}),
            forward + backward, both KLs: median ms and, in brackets, how many times as fast as
            plain torch.{of_steps}"""
        cases = by_case(data)
        shown = {case: cases[case] for case in SHOWN if case in cases}
        parts += [prose(text), times_table(shown, BESIDE)]
    return "\n\n".join(parts)


def trainings(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of bench/training.py, the GPU's first."""
    return [results[name] for name in ("training-gpu", "training") if name in results]


def gain(row: dict[str, Any]) -> float:
    """How many times as fast a training step is with vaekl."""
    return float(row["plain"] / row["vaekl"])


def steps_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of bench/training.py's results; in a CUDA graph where there are some."""
    headings, lines = ["model"], [[row["what"].rstrip(".")] for row in rows]
    for suffix, where in (("", ""), ("_graph", " in a graph")):
        if f"plain{suffix}" not in rows[0]:
            continue
        headings += [f"{name}{where}, ms" for name in ("plain", "vaekl")] + ["gain"]
        for line, row in zip(lines, rows):
            plain, fused = row["plain" + suffix], row["vaekl" + suffix]
            line += ["" if seconds is None else figure(seconds * 1e3) for seconds in (plain, fused)]
            line.append("" if None in (plain, fused) else f"{plain / fused:.2f}x")
    return headings, lines


def devices(results: dict[str, Any]) -> dict[str, Any]:
    """The results of bench/run.py, GPUs first: they are what the kernels are for."""
    found = {name: data for name, data in results.items() if name not in OTHERS}
    return dict(sorted(found.items(), key=lambda item: not is_gpu(item[1])))


def is_gpu(data: dict[str, Any]) -> bool:
    """Whether a result of bench/run.py is of a GPU."""
    return bool(data["device"]["kind"] == "cuda")


def by_case(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of forward + backward with both KLs: case → provider → row."""
    cases: dict[str, dict[str, Any]] = {}
    for row in data["rows"]:
        if row["both"] and row["mode"] == MODE:
            cases.setdefault(row["case"], {})[row["provider"]] = row
    return cases


def times_table(cases: dict[str, dict[str, Any]], providers: tuple[str, ...] | None = None) -> str:
    """A line for each case; the providers that there are, or those of them that are named."""
    names = list(dict.fromkeys(name for rows in cases.values() for name in rows))
    if providers is not None:
        names = [name for name in providers if name in names]
    lines = [[case, *(times(rows, name) for name in names)] for case, rows in cases.items()]
    return markdown(["shape", *names], lines)


def measured_on(data: dict[str, Any], name: str) -> str:
    """One device: times of every provider and, on a GPU, what the device alone did."""
    device, cases = data["device"], by_case(data)
    facts = [f"{key} {value}" for key, value in device["versions"].items() if value]
    driver = f"driver {device['driver']}" if device.get("driver") else None
    threads = None if is_gpu(data) else f"{device['threads']} threads"
    facts = [part for part in (driver, threads) if part] + facts
    facts += [f"commit {device['commit'] or 'unknown'}", device["date"]]
    copy = data["copy_bytes_per_second"]
    text = f"""{", ".join(facts)}. Forward + backward, both KLs, calls in a row: median ms and, in
        brackets, how many times as fast as plain torch. A copy reaches {figure(copy / 1e9)}
        GB/s."""
    text += busy(device)
    if not data["complete"]:
        text += " The run stopped at its time limit."
    wrong = sorted({f"{entry['provider']} ({entry['case']})" for entry in data["wrong"]})
    if wrong:
        text += f" Not timed, as results were wrong: {', '.join(wrong)}."
    parts = [f"## {device['name']}", prose(text), times_table(cases)]
    if is_gpu(data):
        parts.append(device_alone(data, cases))
    plots = {kind: f"{name}-{kind}.png" for kind in ("bandwidth", "speedup", "growth")}
    links = [f"[{kind}]({data['folder']}/{plot})" for kind, plot in plots.items()
             if plot in data["plots"]]  # fmt: skip
    return "\n\n".join(parts + (["Plots: " + ", ".join(links) + "."] if links else []))


def busy(device: dict[str, Any]) -> str:
    """A sentence if the machine had other work to do."""
    if device.get("load", 0) <= 0.5 * device.get("cpus", 1):
        return ""
    return f" The machine was busy with other work (load {device['load']}): noisy."


def times(found: dict[str, Any], provider: str) -> str:
    """Milliseconds, and how many times as fast as plain torch."""
    if provider not in found:
        return ""
    seconds = found[provider]["seconds"]
    if provider == "plain" or "plain" not in found:
        return figure(seconds * 1e3)
    return f"{figure(seconds * 1e3)} ({found['plain']['seconds'] / seconds:.2f}x)"


def device_alone(data: dict[str, Any], cases: dict[str, dict[str, Any]]) -> str:
    """vaekl on a GPU: launches, share of the copy bandwidth, CUDA graphs, memory."""
    forward = {
        (r["case"], r["provider"]): r for r in data["rows"] if r["both"] and r["mode"] == "forward"
    }
    lines = []
    for case, found in cases.items():
        for provider, row in found.items():
            first = forward.get((case, provider))
            if not provider.startswith("vaekl") or first is None:
                continue
            shares = [
                f"{r['floor_bytes'] / r['device_seconds'] / data['copy_bytes_per_second']:.0%}"
                for r in (first, row)
            ]
            launches = "?"
            if first["launches"] and row["launches"]:
                launches = f"{first['launches']} + {row['launches'] - first['launches']}"
            graph = "" if row["graph_seconds"] is None else figure(row["graph_seconds"] * 1e3)
            memory = [f"{row[key] / 2**20:.2f}" for key in ("peak_bytes", "saved_bytes")]
            lines.append([f"{case}, {provider}", launches, *shares, graph, *memory])
    headings = ["", "launches", "share of copy, forward", "forward + backward"]
    return markdown([*headings, "in a CUDA graph, ms", "peak MiB", "saved MiB"], lines)


def cpu_detail(data: dict[str, Any]) -> str:
    """Where the cpu backend's time goes, how it grows, and what it takes beside that."""
    device, copy = data["device"], data["copy_bytes_per_second"]
    lines = [
        [row["name"], figure(row["seconds"] / row["elements"] * 1e9),
         f"{row['bytes'] / row['seconds'] / copy:.0%}"]
        for row in data["parts"]
    ]  # fmt: skip
    text = f"""{device["name"]}, {device["threads"]} threads, commit {device["commit"]},
        {device["date"]}; `bench/cpu.py`. Where the time goes at [4096, 512] fp32: one call beside
        another that does less shows the cost of the difference. Shares are of the bandwidth of a
        large copy, {figure(copy / 1e9)} GB/s; what the cache holds can pass it."""
    heading = "## The cpu backend in detail"
    parts = [heading, prose(text), markdown(["call", "ns per element", "share of copy"], lines)]
    lines = [
        [f"{row['elements']:.2g}".replace("e+0", "e"),
         *(figure(row[mode] / row["elements"] * 1e9) for mode in ("forward", MODE)),
         "" if row["peak_bytes"] is None else figure(max(row["peak_bytes"], 0) / 2**20),
         figure(row["result_bytes"] / 2**20)]
        for row in data["growth"]
    ]  # fmt: skip
    text = """Growth, D = 512, both KLs; the memory is what a forward and backward newly took from
        the system (nothing while the allocator had enough), beside the size of z and the two
        gradients."""
    headings = ["elements", "forward, ns per element", "forward + backward", "taken, MiB"]
    parts += [prose(text), markdown([*headings, "results, MiB"], lines)]
    calls = [
        f"{row['forward']:.1f} s forward and {row['backward']:.1f} s backward with {row['name']}"
        for row in data["first_call"]
    ]
    text = """Small batches, forward + backward in µs, beside an autograd.Function that computes
        nothing."""
    lines = [
        ["x".join(map(str, row["shape"])),
         *(figure(row[name] * 1e6) for name in ("plain", "vaekl", "empty"))]
        for row in data["small"]
    ]  # fmt: skip
    parts += [prose(text), markdown(["shape", "plain torch", "vaekl", "empty Function"], lines)]
    gain = ", ".join(
        f"{row['one'] / row['all']:.2f}x at {row['elements']}" for row in data["threads"]
    )
    text = f"""The first calls of a process took {"; ".join(calls)}. Forward + backward on all
        threads against one, by number of elements: {gain}."""
    return "\n\n".join([*parts, prose(text)])


def peers(data: dict[str, Any]) -> str:
    """Other projects' own code beside vaekl's: a line for each of their functions."""
    device = data["device"]
    versions = {row["package"]: row["version"] for row in data["rows"]}
    told = ", ".join(f"{package} {version}" for package, version in versions.items())
    text = f"""{device["name"]}, {device["threads"]} threads, torch {device["versions"]["torch"]},
        commit {device["commit"] or "unknown"}, {device["date"]}; {told}. Forward + backward of the
        sample and the KL as each of them trains with it, float32: median ms, theirs and vaekl's,
        on the same inputs."""
    text += busy(device)
    for entry in data["not_compared"]:
        text += f" Not compared: {entry['package']} ({entry['reason']})."
    lines = [
        [
            row["name"], "x".join(map(str, row["shape"])), figure(row["theirs_seconds"] * 1e3),
            f"{figure(row['ours_seconds'] * 1e3)} "
            f"({row['theirs_seconds'] / row['ours_seconds']:.2f}x)",
        ]
        for row in data["rows"]
    ]  # fmt: skip
    headings = ["function", "shape handed in", "theirs", "vaekl"]
    return section("Beside the code of others", text, markdown(headings, lines))
