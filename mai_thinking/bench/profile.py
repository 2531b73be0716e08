"""Where a piece of work spends its time, by kind of operation."""

from collections import Counter
from collections.abc import Callable, Iterable

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
