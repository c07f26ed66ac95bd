"""How it is measured.

- ``seconds``: what a training loop waits for. Calls back to back, one wait for the device at the
  end of each sample. All providers take turns, so that a change of clock rate hits all alike.
  Before each sample come SETTLE calls that are not timed, until caches and the heap are the
  provider's own. A first call after another's takes longer, whosever it is: glibc gives the top
  of the heap back to the system at whatever free comes last, and the next call faults it in.
- ``device_seconds`` (CUDA): between two events with the L2 cache cold and the host far ahead, so
  that what the host needs for launching does not show.
- ``graph_seconds`` (CUDA): the same for a replay of the call captured in a CUDA graph. Each replay
  draws its own key and zeroes its own counters: vaekl's graph has two nodes (a randint, a memset)
  that its eager call does not launch.

Each is a median.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

Call = Callable[[], object]

#: A sample is as many calls as take this long.
SAMPLE_SECONDS = 1e-3
MIN_SAMPLES, MAX_SAMPLES = 5, 300
#: Calls after another provider's until the time of one stays the same.
SETTLE = 3
#: Clock cycles that the device waits while the host queues the call: some 2 ms.
AHEAD_CYCLES = 4_000_000
COPY_BYTES = 2**28


def wait(device: str) -> None:
    """Until the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection in between."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def sample(call: Call, calls: int, device: str) -> float:
    """Seconds per call."""
    started = time.perf_counter()
    for _ in range(calls):
        call()
    wait(device)
    return (time.perf_counter() - started) / calls


def warm_up(call: Call, device: str) -> int:
    """Calls until they are fast; returns how many make a sample."""
    seconds = min(sample(call, 1, device) for _ in range(3))
    return max(1, min(1000, round(SAMPLE_SECONDS / max(seconds, 1e-7))))


def interleaved(calls: Mapping[str, Call], device: str, budget: float) -> dict[str, list[float]]:
    """Samples of seconds per call: rounds over all calls until the budget (seconds) is spent."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    counts = {name: warm_up(call, device) for name, call in calls.items()}
    with no_collection():
        started = time.perf_counter()
        for done in range(MAX_SAMPLES):
            if done >= MIN_SAMPLES and time.perf_counter() - started > budget:
                break
            for name, call in calls.items():
                sample(call, SETTLE, device)
                samples[name].append(sample(call, counts[name], device))
    return samples


@cache
def _flush_buffer() -> Tensor:
    """More than the L2 cache holds, to be read: what is written leaves lines that are not in memory
    yet, and that the call timed next would have to write back.
    """
    cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.zeros(max(4 * cache_bytes, 2**28) // 8, dtype=torch.int64, device="cuda")


def device_seconds(call: Call, samples: int = 30) -> float:
    """Median seconds of the device per call: cold L2, launches queued ahead."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
    for _ in range(3):
        call()
    for start, end in pairs:
        _flush_buffer().sum()
        torch.cuda._sleep(AHEAD_CYCLES)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def graph_seconds(call: Call) -> float | None:
    """device_seconds of a captured graph; None if the call cannot be captured."""
    if waits_for_device(call):  # seen beforehand: a failed capture would disturb what follows
        return None
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        call()
    return device_seconds(graph.replay)


def waits_for_device(call: Call) -> bool:
    """Whether the host waits for a result of the device, as torch's own check finds."""
    call()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the check is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return False


def launches(call: Call) -> int | None:
    """Everything that one call puts on the device: kernels, fills, copies. None: not seen."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [
        event
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return len(on_device) or None  # none at all: the profiler cannot see this device


def peak_bytes(call: Call) -> int:
    """Most device memory that the call held beyond what was there before."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(forward: Callable[[], tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> int:
    """What forward keeps for backward beside the inputs, each storage once."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()  # while they are held no address is used again
    for tensor in inputs:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del outputs
    return sum(storages.values())


def copy_bandwidth(device: str, budget: float) -> float:
    """Bytes per second of copying a large tensor, read and written bytes together."""
    source = torch.randn(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    if device == "cuda":
        seconds = device_seconds(lambda: target.copy_(source))
    else:
        samples = interleaved({"copy": lambda: target.copy_(source)}, device, budget)
        seconds = statistics.median(samples["copy"])
    return 2 * COPY_BYTES / seconds
