"""Where a piece of work spends its processor time, by kind of operation."""

from collections import Counter
from collections.abc import Callable

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from mai_thinking.bench.result import Row
from mai_thinking.bench.timing import Figure

PRODUCTS, ATTENTION, OPTIMISER, LOSS = "matrix products", "attention", "optimiser", "loss"
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot", "linear", "matmul", "_grouped_mm"}


def profile_rows(work: Callable[[], object], *, least: float = 1.0) -> list[Row]:
    """Shares of all operators' own time in one call of `work`, in percent; those below `least` are one row, "other".

    What runs inside the optimiser, the loss and the attention function counts as theirs, products included.
    """
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        work()
    spent: Counter[str] = Counter()
    for event in measured.events():
        spent[_kind(event)] += event.self_cpu_time_total
    total = sum(spent.values()) or 1
    shares = {name: 100.0 * time / total for name, time in spent.most_common()}
    shown = {name: share for name, share in shares.items() if share >= least}
    shown["other"] = sum(shares.values()) - sum(shown.values())
    return [Row({"operation": name}, {"share": Figure.of([share], "%")}) for name, share in shown.items()]


def _kind(event: FunctionEvent) -> str:
    """The innermost of the four kinds that `event` or something around it belongs to; else its own name."""
    name = event.name.removeprefix("aten::")
    around: FunctionEvent | None = event
    while around is not None:
        if around.name.startswith("Optimizer."):
            return OPTIMISER
        if "CrossEntropy" in around.name:
            return LOSS
        if "scaled_dot_product" in around.name or "flash_attention" in around.name:
            return ATTENTION
        around = around.cpu_parent
    return PRODUCTS if name in _PRODUCTS else name
