"""Rollouts: a batched sampling engine on our model, with continuous batching.

A finished rollout leaves its slot at once and the next one takes its place; a prompt goes through the model once,
however many asked share it. What comes back has what the learner replays: the nucleus that each token was drawn
from, and the experts that each token went through (MAI-Thinking-1 report §3.1).

Every draw is a function of (seed, rollout id, position) and the logits, so neither the batch that a rollout happens to
share nor the number of slots changes what is drawn; both can only change the logits' rounding.
"""

import copy
import logging
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mai_thinking.errors import RunError
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.model.latent_moe import Experts
from mai_thinking.rl.engine.decode_backends import BACKENDS, Backend, NotFiniteError, Sampler, padded_keys
from mai_thinking.rl.engine.kv_cache import SLOT_ATTENTION, Prompt, SlotCache, prefill
from mai_thinking.rl.engine.nucleus import uniforms
from mai_thinking.rl.nuclei import shrink
from mai_thinking.rl.rollout import Rollout

ATTEMPTS = 3  # How often a generation that fails is tried
NUCLEI_AT_ONCE = 64  # Tokens of a rollout whose nuclei are made small together
PREFILL_TOKENS = 4096  # Tokens, padding included, of prompts that go through the model together

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """What generates rollouts; narrow enough for an external engine."""

    model: MaiThinkingForCausalLM  # Its own copy, whose weights workers share
    tools: "Tools | None"  # What answers calls; None: a response is one stretch of text
    heartbeat: Callable[[], None]  # Called between two tokens, where newer weights may be loaded

    def update_weights(self, model: MaiThinkingForCausalLM) -> None:
        """Generate from these weights from now on."""

    def load_parameters(self, parameters: Iterable[torch.Tensor]) -> None:
        """The same of the weights alone, in the model's order."""

    def generate(self, asked: Sequence[Rollout], temperature: float | None = None) -> list[Rollout]:
        """The rollouts with their responses, in order, at the engine's own temperature unless another is given. Raises
        `RunError` if that cannot be had."""


class Tools(Protocol):
    """What answers the calls that a policy writes; see `rl.tools.toolbox.Toolbox`."""

    ends: frozenset[int]  # Tokens that may complete a call

    def observe(self, steps: Sequence[tuple[Rollout, int, Sequence[int]]]) -> list[list[int] | None]:
        """For each (rollout, number of steps before, tokens of its present step): the tokens of what came of its calls,
        none of them where the rollout must end, or None where there is no complete call."""


@dataclass
class _Running:
    """A rollout in a slot. The arrays are rows of what a whole step produced."""

    asked: Rollout
    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    nucleus: list[NDArray[np.uint8]] = field(default_factory=list)
    """Of the newest tokens; `nuclei` of those before them."""
    nuclei: list[bytes] = field(default_factory=list)
    experts: list[NDArray[np.uint16]] = field(default_factory=list)
    observed: list[bool] = field(default_factory=list)  # Which of the tokens a tool wrote
    step: list[int] = field(default_factory=list)  # The policy's tokens since the last observation
    observations: int = 0
    forced: deque[int] = field(default_factory=deque)
    """Tokens of an observation that have not been through the model yet."""
    over: bool = False  # Whether it may not go on

    def observe(self, tokens: Sequence[int]) -> None:
        """Go on with these tokens, or end if there are none."""
        self.observations, self.step = self.observations + 1, []
        self.forced.extend(tokens)
        self.over = not tokens

    @property
    def position(self) -> int:
        """Of the newest token."""
        return len(self.asked.prompt_ids) + len(self.tokens) - 1

    def rollout(self, finished: bool) -> Rollout:
        experts_MnK = [np.stack(self.experts, axis=1)] if self.experts else []
        return replace(
            self.asked,
            response_ids=np.array(self.tokens, dtype=np.int64),
            observed=np.array(self.observed, dtype=bool),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            nuclei=(*self.nuclei, shrink(np.stack(self.nucleus))),
            experts=np.concatenate([self.prompt.experts_MPK, *experts_MnK], axis=1),
            finished=finished,
        )


class BatchedEngine:
    """Our own engine, on a copy of the model. `temperature` 0 is greedy; `end_of_text` None never ends by itself.

    `dtype` is that of autocast in the learner: what autocast would cast, the copy holds in it. None: all in the
    weights' own. It goes to `device`, or to where the model is. The `backend`, by its name in `BACKENDS`, is left to
    the device unless given: CUDA graphs in bf16 on a GPU. `heartbeat` is called once for each token that the slots take
    together, between its draw and the next one's forward pass: there it may load newer weights.

    On a CPU, many slots pay: a step reads the experts' weights once for all of them.
    """

    def __init__(
        self,
        model: MaiThinkingForCausalLM,
        *,
        slots: int,
        temperature: float,
        top_p: float,
        seed: int,
        end_of_text: int | None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        backend: str | None = None,
        heartbeat: Callable[[], None] = lambda: None,
        tools: Tools | None = None,
    ) -> None:
        self.heartbeat, self.tools = heartbeat, tools
        self.slots, self.temperature, self.seed, self.end_of_text = slots, temperature, seed, end_of_text
        self.model = inference_copy(model, dtype).to(device or model.device)
        on_gpu = self.model.device.type == "cuda"
        # Grouped products ask the host for sizes, which no graph can, in fp32 and before Hopper.
        captured = dtype is torch.bfloat16 and on_gpu and torch.cuda.get_device_capability() >= (9, 0)
        fastest = "cuda_graph" if captured else "static"
        self._kind = backend or (fastest if on_gpu else "eager")
        # Both take the decoding step's masks.
        self.model.set_attn_implementation("sdpa" if self._kind == "eager" else SLOT_ATTENTION)
        head_VD = self.model.lm_head.weight.detach()
        head_dtype = dtype if dtype and on_gpu else head_VD.dtype  # as in the learner: see `half_precision`
        self._sampler = Sampler(head_VD.to(head_dtype), top_p)
        self._experts_shape = len(model.config.moe_layers), model.config.num_experts_per_tok
        self._cache: SlotCache | None = None
        self._backend: Backend | None = None

    def update_weights(self, model: MaiThinkingForCausalLM) -> None:
        """Copy `model`'s weights; collective if ranks divide them. Until then, rollouts come from those of the last
        call, whatever the learner does."""
        # One after the other: no rank holds more than one whole parameter of what they divide.
        self.load_parameters(p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters())

    def load_parameters(self, parameters: Iterable[torch.Tensor]) -> None:
        with torch.no_grad():  # in place: graphs know the addresses
            for mine, theirs in zip(self.model.parameters(), parameters, strict=True):
                mine.copy_(theirs)
            self._sampler.head_VD.copy_(self.model.lm_head.weight)

    def generate(self, asked: Sequence[Rollout], temperature: float | None = None) -> list[Rollout]:
        """The rollouts with their responses; see `Engine.generate`.

        A generation that fails, by an exception or by logits that are not finite, is tried again, without what had
        finished before. Raises `RunError` after `ATTEMPTS`.
        """
        temperature = self.temperature if temperature is None else temperature
        done: dict[int, Rollout] = {}
        for _ in range(ATTEMPTS):
            try:
                with torch.inference_mode(), self._attention_kernels():
                    self._run([one for one in asked if one.id not in done], temperature, done)
                return [done[one.id] for one in asked]
            except Exception as error:
                failure = error
                traceback.clear_frames(error.__traceback__)  # which hold what the attempt had allocated
                self._cache = None  # it may hold values that are not finite, which no mask hides
                missing = len(asked) - len(done)
                logger.warning("generation failed with %d of %d rollouts missing: %r", missing, len(asked), error)
        raise RunError(
            f"rollouts: generation failed {ATTEMPTS} times, {missing} of {len(asked)} rollouts are missing; "
            f"the last failure was {type(failure).__name__}: {failure}"
        ) from failure

    def _run(self, asked: Sequence[Rollout], temperature: float, done: dict[int, Rollout]) -> None:
        """Generate all into `done`."""
        if not asked:
            return
        cache, backend = self._room(max(len(one.prompt_ids) + one.max_new_tokens for one in asked))
        for one in asked:
            one.calls = ()
        waiting = _prefilled(self.model, asked)
        running: list[_Running] = []
        hidden_AD = self.model.lm_head.weight.new_empty(0, self.model.config.hidden_size)
        experts_aMK = torch.zeros(0, *self._experts_shape, dtype=torch.long, device=hidden_AD.device)
        while True:
            hidden_AD = torch.cat((hidden_AD, *self._admit(waiting, running, cache)))
            if not running:
                return
            self._draw(backend, hidden_AD, experts_aMK, running, temperature)
            self._observe(running)
            self.heartbeat()
            running = self._retire(running, cache, done)
            if running:
                positions_A = np.array([one.position for one in running])
                hidden_AD, experts_aMK = backend.decode([one.tokens[-1] for one in running], positions_A)
            else:
                hidden_AD, experts_aMK = hidden_AD[:0], experts_aMK[:0]

    def _attention_kernels(self) -> AbstractContextManager[None]:
        """On a GPU not cuDNN's, which plan anew for every length of a prompt."""
        if self.model.device.type == "cpu":
            return nullcontext()
        return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])

    def _room(self, length: int) -> tuple[SlotCache, Backend]:
        """A cache for sequences of `length` tokens, and what works on it; the last ones, if large enough."""
        if self._cache is None or self._backend is None or self._cache.length < length:
            self._cache = self._backend = None  # before there is a second one
            first: Any = self.model.model.layers[0]
            room = length if self._kind == "eager" else padded_keys(length, sys.maxsize)
            self._cache = SlotCache(self.model.config, self.slots, room, first.attention.v_proj.weight)
            self._backend = BACKENDS[self._kind](self.model, self._cache, self._sampler)
        return self._cache, self._backend

    def _admit(
        self, waiting: Iterator[tuple[Prompt, Rollout]], running: list[_Running], cache: SlotCache
    ) -> list[torch.Tensor]:
        """Fill the free slots, behind those in use; → the hidden states [n, D] that predict their first tokens."""
        hidden = []
        admitted = list(islice(waiting, self.slots - len(running)))
        for _, pairs in groupby(admitted, key=lambda pair: id(pair[0])):
            new = [_Running(one, prompt) for prompt, one in pairs]
            cache.fill(len(running), len(new), new[0].prompt)
            hidden.append(new[0].prompt.hidden_D.expand(len(new), -1))
            running += new
        return hidden

    def _draw(
        self, backend: Backend, hidden_AD: torch.Tensor, experts_aMK: torch.Tensor, running: list[_Running],
        temperature: float,
    ) -> None:  # fmt: skip
        """The next token of every slot in use, and the experts that those decoded went through."""
        ids_A = np.array([one.asked.id for one in running])
        positions_A = np.array([one.position + 1 for one in running])
        try:
            drawn = backend.draw(hidden_AD, experts_aMK, uniforms(self.seed, ids_A, positions_A), temperature)
        except NotFiniteError as error:
            one = running[error.row]
            raise FloatingPointError(
                f"rollout {one.asked.id}: the logits of response token {len(one.tokens)} are not finite"
            ) from None
        for one, experts_MK in zip(running, drawn.experts_aMK, strict=False):  # the newest have none yet
            one.experts.append(experts_MK)
        tokens = zip(running, drawn.tokens_A, drawn.logprobs_A, drawn.nucleus_AB, strict=True)
        for one, token, logprob, nucleus in tokens:
            one.observed.append(bool(one.forced))
            if one.forced:  # an observation is read, token by token: it goes through the model, and nobody drew it
                token, logprob, nucleus = one.forced.popleft(), 0.0, np.zeros_like(nucleus)
            else:
                one.step.append(token)
            one.tokens.append(token)
            one.logprobs.append(logprob)
            if len(one.nucleus) == NUCLEI_AT_ONCE:
                one.nuclei.append(shrink(np.stack(one.nucleus)))
                one.nucleus.clear()
            one.nucleus.append(nucleus)

    def _observe(self, running: Sequence[_Running]) -> None:
        """Have the calls answered that the newest tokens have completed."""
        if self.tools is None:
            return
        own = [one for one in running if not one.forced and one.step and one.tokens[-1] in self.tools.ends]
        # Who has no room left for an answer is cut off by the limit of its tokens.
        results = self.tools.observe([(one.asked, one.observations, one.step) for one in own]) if own else []
        for one, tokens in zip(own, results, strict=True):
            if tokens is not None:
                one.observe(tokens)

    def _retire(self, running: list[_Running], cache: SlotCache, done: dict[int, Rollout]) -> list[_Running]:
        """Take finished rollouts out. The last slots move into the gaps, so that those in use are the first again."""
        kept = []
        for slot, one in enumerate(running):
            finished = one.tokens[-1] == self.end_of_text
            if finished or one.over or len(one.tokens) == one.asked.max_new_tokens:
                done[one.asked.id] = one.rollout(finished)
            else:
                kept.append(slot)
        count = len(kept)
        gaps = sorted(set(range(count)).difference(kept))
        movers = [slot for slot in kept if slot >= count]
        if movers:
            cache.move(movers, gaps, max(running[slot].position for slot in movers))
        place = dict(zip(gaps, movers, strict=True))
        return [running[place.get(slot, slot)] for slot in range(count)]


def _prefilled(model: MaiThinkingForCausalLM, asked: Sequence[Rollout]) -> Iterator[tuple[Prompt, Rollout]]:
    """The rollouts, those with one prompt together, each with its prompt. As many prompts as there is room for go
    through the model together, when the first of them is wanted."""
    by_prompt: dict[tuple[int, ...], list[Rollout]] = {}
    for one in asked:
        by_prompt.setdefault(tuple(one.prompt_ids), []).append(one)
    batches: list[list[tuple[int, ...]]] = [[]]
    for ids in by_prompt:
        longest = max(map(len, [*batches[-1], ids]))
        if batches[-1] and longest * (len(batches[-1]) + 1) > PREFILL_TOKENS:
            batches.append([])
        batches[-1].append(ids)
    for batch in batches:
        for ids, prompt in zip(batch, prefill(model, batch), strict=True):
            for one in by_prompt[ids]:
                yield prompt, one


def inference_copy(model: MaiThinkingForCausalLM, dtype: torch.dtype | None) -> MaiThinkingForCausalLM:
    """A copy without gradients, that holds in `dtype` what autocast casts to it: the weights of all products but the
    router's and the head's."""
    made = copy.deepcopy(model).eval().requires_grad_(False)
    made.zero_grad(set_to_none=True)
    if dtype is not None:
        for module in made.model.modules():
            if isinstance(module, nn.Linear | Experts):
                module.to(dtype)
    return made
