"""Sections of docs/speed.md, of the results that are not of bench/run.py."""

from __future__ import annotations

from typing import Any

from tables import (
    NO_GPU,
    by_case,
    cpu_detail,
    devices,
    figure,
    is_gpu,
    markdown,
    measured_on,
    peers,
    section,
    steps_table,
    trainings,
)

from vaekl.backends import layout


def benchmarks(results: dict[str, Any]) -> str:
    """All devices' tables, host overhead and code generation, each if there is a file of it."""
    found = devices(results)
    parts = [] if any(is_gpu(data) for data in found.values()) else [NO_GPU]
    parts += [measured_on(data, name) for name, data in found.items()]
    if "cpu-detail" in results:
        parts.append(cpu_detail(results["cpu-detail"]))
    parts += [peers(results[name]) for name in ("peers-gpu", "peers") if name in results]
    if "host" in results:
        parts.append(host(results["host"]))
    parts += map(training, trainings(results))
    if "priors" in results:
        parts.append(priors(results["priors"]))
    if "imports" in results:
        parts.append(imports(results["imports"]))
    if "codegen" in results:
        parts += [codegen(results["codegen"]), occupancy(results["codegen"])]
    if "model" in results:
        parts.append(model(results["model"], found))
    return "\n\n".join(parts)


def host(data: dict[str, Any]) -> str:
    """Microseconds of Python and C++ before a kernel is launched."""
    versions = ", ".join(f"{key} {value}" for key, value in data["versions"].items())
    text = f"""Of the Triton path, launches thrown away ({data["machine"]}; {versions}), beside the
        operators that plain torch would launch; the cheapest takes {data["operator_us"]} µs
        there."""
    headings = ["call", "forward, µs", "forward + backward, µs", "plain torch, operators"]
    keys = ("name", "forward_us", "forward_backward_us", "plain_operators")
    lines = [[str(row[key]) for key in keys] for row in data["rows"]]
    return section("Host time", text, markdown(headings, lines))


def priors(data: dict[str, Any]) -> str:
    """Milliseconds to other priors than N(0, I), and how many times that of N(0, I)."""
    device, rows = data["device"], data["rows"]
    text = f"""The sample and the KL, forward + backward, float32, all in turns: ms and, in
        brackets, how many times the call to N(0, I) ({device["name"]}, torch
        {device["versions"]["torch"]}, commit {device["commit"]}, {device["date"]};
        `bench/priors.py`). A dense prior has a mean and scale for each element of the batch, a
        shared one for each of an event; a learned one gets gradients. The last two columns are the
        same call on standard deviations."""
    names = list(rows[0]["seconds"])
    lines = []
    for row in rows:
        seconds = row["seconds"]
        cells = [
            figure(seconds[n] * 1e3) + f" ({seconds[n] / seconds[names[0]]:.2f})" for n in names[1:]
        ]
        shape = "x".join(map(str, row["shape"]))
        lines.append([shape, figure(seconds[names[0]] * 1e3), *cells])
    return section("A prior", text, markdown(["shape", *names], lines))


def imports(data: dict[str, Any]) -> str:
    """Milliseconds of importing, beside torch's own."""
    versions = ", ".join(f"{key} {value}" for key, value in data["versions"].items())
    text = f"""`import vaekl` after `import torch` takes {data["vaekl_ms"]} ms of processor time,
        torch itself {data["torch_ms"]} ms (medians of {data["runs"]} processes; {data["machine"]};
        {versions})."""
    return section("Import", text)


def codegen(data: dict[str, Any]) -> str:
    """Registers and instructions per element of the main path's kernels, by target."""
    shown: dict[str, dict[str, str]] = {}
    for row in data["rows"]:
        dtype, *outputs = row["variant"].split()
        if outputs != ["many", "kl=batchmean", "of_mean=batch", "z"]:
            continue
        cell = f"{row['registers']} registers"
        if "instructions_per_element" in row:
            cell += f", {row['instructions_per_element']:g}"
        shown.setdefault(row["target"], {})[f"{row['kernel']} {dtype}"] = cell
    names = list(dict.fromkeys(name for cells in shown.values() for name in cells))
    text = """Compiled without a GPU, both KLs on large aligned inputs: registers, and instructions
        per element in the main loop. All variants: `make codegen`."""
    lines = [[name, *(cells.get(name, "") for cells in shown.values())] for name in names]
    return section("Machine code", text, markdown(["kernel", *shown], lines))


#: A GPU of each target: its multiprocessors, and threads that one holds at most (data sheets).
GPUS = {
    "sm_90": ("H100 SXM", 132, 2048),
    "sm_100": ("B200", 148, 2048),
    "sm_89": ("RTX 4090", 128, 1536),
    "gfx942": ("MI300X", 304, 2048),
}


def resident(target: str, registers: int, threads: int) -> int:
    """Programs that a multiprocessor has registers for; they are given out in eights."""
    registers = -(-registers // 8) * 8
    # 64K of 32 bits on NVIDIA; AMD's have 512 for each lane of 4 SIMDs of 64.
    all_registers = 4 * 64 * 512 if target.startswith("gfx") else 2**16
    of_program = layout.Config().threads
    return min(all_registers // (registers * of_program), threads // of_program)


def occupancy(data: dict[str, Any]) -> str:
    """Programs that a launch has, and those that devices hold."""
    config = layout.Config()
    lines = []
    for target, (name, multiprocessors, threads) in GPUS.items():
        holds = [
            str(multiprocessors * resident(target, row["registers"], threads))
            for kernel in ("forward", "backward")
            for row in data["rows"]
            if row["kernel"] == kernel and row["target"] == target
            and row["variant"] == "fp32 many kl=batchmean of_mean=batch z"
        ]  # fmt: skip
        if holds:
            lines.append(
                [f"{name}, {target}", str(multiprocessors),
                 str(config.resident * multiprocessors), *holds]
            )  # fmt: skip
    text = f"""Of a large batch a launch has {config.resident} programs for each multiprocessor of
        the device at hand, as many as H100's registers hold of forward fp32. Beside it: what
        devices hold, worked out from the machine code."""
    headings = ["device", "multiprocessors", "programs", "forward holds", "backward holds"]
    return section("Programs of a device", text, markdown(headings, lines))


def training(data: dict[str, Any]) -> str:
    """Whole training steps with plain code and with vaekl."""
    device = data["device"]
    text = f"""Forward, backward and Adam on one batch, in turns ({device["name"]}, torch
        {device["versions"]["torch"]}, commit {device["commit"]}, {device["date"]};
        `bench/training.py`): where a model computes for milliseconds, its loss is a small part."""
    heading = "A training step" + (" on a GPU" if is_gpu(data) else "")
    return section(heading, text, markdown(*steps_table(data["rows"])))


def model(data: dict[str, Any], found: dict[str, Any]) -> str:
    """What an H100 should take, beside what a GPU took once one has run it."""
    copy, issue = (figure(data["assumed"][name] / 1e12) for name in ("copy", "issue"))
    text = f"""**A model, not a measurement**: the largest of bytes at {copy} TB/s, instructions of
        all lanes at {issue}·10¹² a second, and a program's iterations at
        {data["assumed"]["latency"] * 1e6:g} µs each, and after it what the last program of a
        launch waits for (`bench/model.py`). Forward + backward, both KLs, launches left out, µs;
        "before" is the code of 2026-11-25, whose kernels took 528 programs and added eight partial
        sums at a time."""
    measured = [by_case(data) for data in found.values() if is_gpu(data)]
    cases = measured[0] if measured else {}
    lines = []
    for row in data["rows"]:
        times = [row[f"{name}seconds"] for name in ("floor_", "before_", "")]
        seconds = cases.get(row["case"], {}).get("vaekl-triton", {}).get("device_seconds")
        cells = [figure(time * 1e6) for time in times]
        lines.append([row["case"], *cells, "" if seconds is None else figure(seconds * 1e6)])
    headings = ["shape", "bytes alone", "before", "now", "measured"]
    return section("What a GPU should take", text, markdown(headings, lines))
