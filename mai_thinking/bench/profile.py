"""Where a piece of work spends its time, by kind of operation."""

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile

from mai_thinking.bench.result import Row
from mai_thinking.bench.timing import Figure

PRODUCTS, ATTENTION, OPTIMISER, LOSS = "matrix products", "attention", "optimiser", "loss"
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot", "linear", "matmul", "_grouped_mm"}
Span = tuple[int, int, int, str]
"""Of an operation: its thread, its begin and end in nanoseconds, its name."""


def profile_rows(work: Callable[[], object], *, least: float = 1.0) -> list[Row]:
    """Shares of all operators' own time in one call of `work`, in percent; those below `least` are one row, "other".

    What runs inside the optimiser, the loss and the attention function counts as theirs, products included.
    """
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        work()
    # Torch's own lists of events take minutes, and gigabytes, for what a second of decoding does.
    assert measured.profiler is not None
    assert measured.profiler.kineto_results is not None
    events = measured.profiler.kineto_results.events()
    spans = [(e.start_thread_id(), e.start_ns(), e.start_ns() + e.duration_ns(), e.name()) for e in events]
    spent = own_times(spans)
    total = sum(spent.values()) or 1
    shares = {name: 100.0 * time / total for name, time in spent.most_common()}
    shown = {name: share for name, share in shares.items() if share >= least}
    shown["other"] = sum(shares.values()) - sum(shown.values())
    return [Row({"operation": name}, {"share": Figure.of([share], "%")}) for name, share in shown.items()]


def own_times(spans: Iterable[Span]) -> Counter[str]:
    """Nanoseconds by kind of operation, without those of operations inside of them."""
    spent: Counter[str] = Counter()
    around: list[tuple[int, int, str]] = []  # (thread, end, kind), the innermost last
    for thread, begin, end, name in sorted(spans, key=lambda span: (span[0], span[1], -span[2])):
        while around and (around[-1][0] != thread or around[-1][1] <= begin):
            around.pop()
        kind = _kind(name, around[-1][2] if around else "")
        if around:
            spent[around[-1][2]] -= end - begin
        spent[kind] += end - begin
        around.append((thread, end, kind))
    return spent


def _kind(name: str, outer: str) -> str:
    """What an operation inside one of the kind `outer` is."""
    if outer in (OPTIMISER, LOSS, ATTENTION):
        return outer
    if name.startswith("Optimizer."):
        return OPTIMISER
    if "CrossEntropy" in name:
        return LOSS
    if "scaled_dot_product" in name or "flash_attention" in name:
        return ATTENTION
    name = name.removeprefix("aten::")
    return PRODUCTS if name in _PRODUCTS else name


_KERNELS = (
    (ATTENTION, ("triton_tem", "flash", "fmha")),
    ("compiled", ("triton_", "swiglu")),
    ("optimiser", ("adam", "multi_tensor")),
    ("grouped products", ("group",)),
    (PRODUCTS, ("gemm", "nvjet", "cutlass", "sm90_xmma", "splitk", "cublas")),
    ("sorting", ("sort", "radix", "searchsorted", "topk")),
    ("copies", ("memcpy", "memset", "copy")),
)
"""Kinds of kernels and what their names have in them; the first that fits."""


def gpu_profile_rows(work: Callable[[], object], *, kernels: int = 12) -> list[Row]:
    """Shares of the GPU's busy time in one call of `work` by kind of kernel, in percent; then the longest kernels."""
    with profile(activities=[ProfilerActivity.CUDA]) as measured:
        work()
        torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    for event in measured.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.key] += int(event.self_device_time_total)
    return kernel_rows(spent, kernels)


def kernel_rows(spent: Counter[str], kernels: int = 12) -> list[Row]:
    """The same of microseconds by kernel."""
    kinds: Counter[str] = Counter()
    for name, time in spent.items():
        low = name.lower()
        kinds[next((kind for kind, marks in _KERNELS if any(mark in low for mark in marks)), "other")] += time
    total = sum(spent.values()) or 1
    by_kind = [
        Row({"kernels": kind}, {"share": Figure.of([100.0 * t / total], "%")}) for kind, t in kinds.most_common()
    ]
    longest = [
        Row({"kernel": name[:90]}, {"share": Figure.of([100.0 * time / total], "%")})
        for name, time in spent.most_common(kernels)
    ]
    return by_kind + longest
