"""The engine's two kinds of work, done for all slots in use: a token of each through the model, and the next one drawn.

`EagerBackend` is for a CPU: one operation after another. `StaticBackend` is for a GPU. It pads the slots in use, and
the keys that are looked at, to one of few sizes, reads and writes buffers that stay where they are, and waits for the
device once a token. So `CudaGraphBackend` can record each size once as a CUDA graph and start it as a whole: otherwise
the host takes longer to start a step's kernels than the device to run them.

Shapes: S slots, A of them in use, a of which were decoded (the others' first token is yet to be drawn), R after
padding; D hidden size, V vocabulary, M MoE layers, K experts chosen per token.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.model.projection import fp32_product
from mai_thinking.rl.engine.kv_cache import SlotCache, decode
from mai_thinking.rl.engine.nucleus import draw, draw_unbranched, pack_bits, pack_bits_there

FEWEST_KEYS = 128
"""Keys looked at are padded to a multiple of this, and beyond eight times as many to a multiple of an eighth of the
next power of two."""


class Sampler(NamedTuple):
    """What makes tokens of hidden states."""

    head_VD: torch.Tensor  # The head's weights, in the dtype of its product
    top_p: float

    def logits(self, hidden_AD: torch.Tensor) -> torch.Tensor:
        """[A, D] → [A, V] fp32."""
        return fp32_product(hidden_AD.to(self.head_VD.dtype), self.head_VD.mT)


class Drawn(NamedTuple):
    """A step's yield, on the host. Rows of the arrays are views of what the whole step produced."""

    tokens_A: list[int]
    logprobs_A: list[float]
    nucleus_AB: NDArray[np.uint8]  # Bit-packed, B = ceil(V / 8)
    experts_aMK: NDArray[np.uint16]


class NotFiniteError(Exception):
    """Logits that are not finite, of slot `row`."""

    def __init__(self, row: int) -> None:
        super().__init__(f"the logits of slot {row} are not finite")
        self.row = row


class EagerBackend:
    """On a model and a cache given before: one operation after another, of the sizes that there are."""

    def __init__(self, model: MaiThinkingForCausalLM, cache: SlotCache, sampler: Sampler) -> None:
        self._model, self._cache, self._sampler = model, cache, sampler

    def decode(self, tokens: Sequence[int], positions_A: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """A token of each of the first A slots through the model → final hidden states [A, D] fp32, experts [A, M, K]
        of an integer type, both on the device and until the next call."""
        device = self._model.device
        tokens_A, position_A = torch.tensor(tokens, device=device), torch.from_numpy(positions_A).to(device)
        return decode(self._model, self._cache, tokens_A, position_A, int(positions_A.max()) + 1)

    def draw(
        self, hidden_AD: torch.Tensor, experts_aMK: torch.Tensor, uniforms_A: NDArray[np.float64], temperature: float
    ) -> Drawn:
        """The next token of each slot in use. Raises NotFiniteError."""
        logits_AV = self._sampler.logits(hidden_AD)
        low, high = logits_AV.aminmax()  # NaN if any is; several times faster than `isfinite` of each
        if not (low.isfinite() and high.isfinite()):
            raise NotFiniteError(int(logits_AV.isfinite().all(dim=-1).int().argmin()))
        u_A = torch.from_numpy(uniforms_A).to(logits_AV.device)
        draws = draw(logits_AV, u_A, temperature=temperature, top_p=self._sampler.top_p)
        experts = experts_aMK.cpu().numpy().astype(np.uint16)
        return Drawn(draws.tokens_A.tolist(), draws.logprobs_A.tolist(), pack_bits(draws.nucleus_AV), experts)


class StaticBackend:
    """The same at few different sizes. Slots that only pad are decoded as if at position 0, where they write what the
    next prompt in them, or the next slot moved there, overwrites first of all."""

    def __init__(self, model: MaiThinkingForCausalLM, cache: SlotCache, sampler: Sampler) -> None:
        self._model, self._cache, self._sampler = model, cache, sampler
        config, S, device = model.config, cache.slots, model.device
        self._experts_shape = (len(config.moe_layers), config.num_experts_per_tok)
        # What goes in: of decoding, tokens and positions; of drawing, hidden states, experts and uniforms.
        self._inputs_S2 = torch.zeros(S, 2, dtype=torch.long, device=device)
        self._hidden_SD = torch.zeros(S, config.hidden_size, device=device)
        self._experts_SMK = torch.zeros(S, *self._experts_shape, dtype=torch.int16, device=device)
        self._uniforms_S = torch.zeros(S, dtype=torch.float64, device=device)
        # What comes out of decoding, and of drawing: a row of bytes a slot, which cross to the host together.
        self._decoded_SD, self._decoded_SMK = torch.zeros_like(self._hidden_SD), torch.zeros_like(self._experts_SMK)
        self._row = np.dtype(
            [
                ("token", np.int64),
                ("logprob", np.float32),
                ("finite", np.bool_),
                ("experts", np.uint16, self._experts_shape),
                ("nucleus", np.uint8, -(-config.vocab_size // 8)),
            ]
        )
        self._drawn_Sb = torch.zeros(S, self._row.itemsize, dtype=torch.uint8, device=device)

    def decode(self, tokens: Sequence[int], positions_A: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        A, R = len(tokens), padded_slots(len(tokens), self._cache.slots)
        used = padded_keys(int(positions_A.max()) + 1, self._cache.length)
        inputs_R2 = np.zeros((R, 2), dtype=np.int64)
        inputs_R2[:A, 0], inputs_R2[:A, 1] = tokens, positions_A
        self._inputs_S2[:R].copy_(torch.from_numpy(inputs_R2))
        self._launch(("decode", R, used), lambda: self._decode(R, used))
        return self._decoded_SD[:A], self._decoded_SMK[:A]

    def draw(
        self, hidden_AD: torch.Tensor, experts_aMK: torch.Tensor, uniforms_A: NDArray[np.float64], temperature: float
    ) -> Drawn:
        A, a, R = hidden_AD.size(0), experts_aMK.size(0), padded_slots(hidden_AD.size(0), self._cache.slots)
        self._hidden_SD[:A].copy_(hidden_AD)
        self._experts_SMK[:a].copy_(experts_aMK)
        self._uniforms_S[:A].copy_(torch.from_numpy(uniforms_A))
        self._launch(("draw", R, temperature), lambda: self._draw(R, temperature))
        rows_A = self._drawn_Sb[:A].to("cpu", copy=True).numpy().view(self._row)[:, 0]
        if not rows_A["finite"].all():
            raise NotFiniteError(int(rows_A["finite"].argmin()))
        return Drawn(rows_A["token"].tolist(), rows_A["logprob"].tolist(), rows_A["nucleus"], rows_A["experts"][:a])

    def _launch(self, size: Hashable, work: Callable[[], None]) -> None:
        """Start `work`, which is the same for the same `size`."""
        work()

    def _decode(self, R: int, used: int) -> None:
        tokens_R, position_R = self._inputs_S2[:R].unbind(1)
        hidden_RD, experts_RMK = decode(self._model, self._cache, tokens_R, position_R, used)
        self._decoded_SD[:R].copy_(hidden_RD)
        self._decoded_SMK[:R].copy_(experts_RMK)

    def _draw(self, R: int, temperature: float) -> None:
        sampler = self._sampler
        logits_RV = sampler.logits(self._hidden_SD[:R])
        finite_R = (logits_RV.amax(dim=-1) - logits_RV.amin(dim=-1)).isfinite()
        uniforms_R = self._uniforms_S[:R]
        draws = draw_unbranched(logits_RV, uniforms_R, temperature=temperature, top_p=sampler.top_p)
        parts = (draws.tokens_A, draws.logprobs_A, finite_R, self._experts_SMK[:R], pack_bits_there(draws.nucleus_AV))
        bytes_R = [part.reshape(R, -1).contiguous().view(torch.uint8) for part in parts]
        self._drawn_Sb[:R].copy_(torch.cat(bytes_R, dim=1))


class CudaGraphBackend(StaticBackend):
    """The same, each size recorded when it first occurs, and from then on started as one.

    Graphs share their scratch memory, and may since nothing in it outlives a graph: results are in our buffers. They
    hold the addresses of weights, cache and buffers, so those may change in place only.
    """

    def __init__(self, model: MaiThinkingForCausalLM, cache: SlotCache, sampler: Sampler) -> None:
        super().__init__(model, cache, sampler)
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(model.device)

    def _launch(self, size: Hashable, work: Callable[[], None]) -> None:
        if size not in self._graphs:
            # First as it is, for all that is set up only once. Doing it twice does no harm.
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                work()
            torch.cuda.current_stream().wait_stream(self._side)
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as NCCL's, may go on with theirs.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
            self._graphs[size] = graph
        self._graphs[size].replay()


Backend = EagerBackend | StaticBackend
BACKENDS: dict[str, type[Backend]] = {"eager": EagerBackend, "static": StaticBackend, "cuda_graph": CudaGraphBackend}


def padded_slots(in_use: int, slots: int) -> int:
    """The next power of two, or all slots."""
    return min(slots, 1 << (in_use - 1).bit_length())


def padded_keys(used: int, length: int) -> int:
    """As many as are looked at instead of `used`, `length` at most."""
    multiple = max(FEWEST_KEYS, (1 << (used - 1).bit_length()) // 8)
    return min(length, -(-used // multiple) * multiple)
