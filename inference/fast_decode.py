"""Fast decoding: the loop of generate.py with static buffers (the approach of gpt-fast).

A decoding step reads every weight once to produce one token per row, so memory bandwidth bounds its speed. To get
near that bound, a step must cost little else:

    static shapes    everything a step reads or writes is allocated once and updated in place. Attention covers
                     `attend_len` cache positions, rounded up to a multiple of 256.
    compilation      torch.compile fuses the many small operations of a layer (--compile).
    CUDA graphs      on CUDA a step is captured as a graph per attend_len and replayed: one launch per token. A decoder
                     keeps its graphs for later answers, so make one per model and keep it.
    asynchronous     on CUDA the host reads each token one step late, so the device never waits for the host.
    fewer rows       once half of the rows are finished, the others continue without them (not when compiled, since
                     the shapes would change, nor in a cache that the caller keeps).

A graph contains the addresses of what it reads and writes, so the decoder keeps these buffers too:

    cache of the caller, or the decoder's own     [B, ...]    the first rows of a larger one serve a smaller batch
    token, finished, uniform (DecodeState)        [B]         and the rows that are left when others have finished
    graphs, by number of rows, sampling and attend_len

generate.py is the slow counterpart: same signature, same tokens (tests/test_fast_decode.py).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.device import not_finite
from generate import Sampling, prefill, sample_token
from llama import Block, KVCache, Llama
from model import Owl

BUCKET = 256  # attend_len is a multiple of this, so that there are few shapes
N_WARMUP = 3  # eager steps per shape before a CUDA graph is captured: kernels are loaded, compiled and tuned in them

# A capture takes as long as this number of replays saves: about three eager steps on the host, and a replay saves most
# of one. It is an estimate, which `python -m tools.gpu_check` measures. A graph is captured if the answer may have as
# many steps left, or once as many eager steps have run, over all answers: so at most twice the necessary time is spent.
CAPTURE_COST = 8


@dataclass
class DecodeState:
    """What a step reads and writes besides the KV cache. The tensors stay at their addresses."""

    token: Tensor  # [B] int64: newest token of each row; -1 if its logits are not finite
    finished: Tensor  # [B] bool: rows that have ended; they select </s> from then on
    uniform: Tensor  # [B] float32: random numbers that select the next token
    eos_bias: Tensor  # [] float32: added to the logit of </s>; -inf until min_new_tokens are selected
    sampling: Sampling
    stop_at_eos: bool


def select_token(llama: Llama, cache: KVCache, state: DecodeState, x: Tensor) -> None:
    """Selects the next token of every row in place. x: [B, n_embd], the last hidden states."""
    eos_id = llama.config.eos_id
    logits = llama.lm_head(x)  # [B, vocab_size]
    logits[:, eos_id] += state.eos_bias
    token = sample_token(logits, state.sampling, state.uniform)
    state.token.copy_(torch.where(state.finished, eos_id, token))
    state.finished.logical_or_(cache.lengths >= cache.max_length)
    if state.stop_at_eos:
        state.finished.logical_or_(state.token == eos_id)


def decode_step(llama: Llama, cache: KVCache, state: DecodeState) -> None:
    """Processes the newest token of every row and selects the next. Never synchronizes with the device."""
    token = state.token.clamp(min=0)  # the host sees a -1 one step late, and a -1 would end CUDA
    x = llama(llama.embed_tokens(token)[:, None], None, cache)[:, 0]  # [B, n_embd]
    cache.lengths.add_(~state.finished)
    select_token(llama, cache, state, x)


def compile_step() -> Callable[[Llama, KVCache, DecodeState], None]:
    """Returns decode_step in compiled parts. All layers share one program, which takes seconds to compile."""
    # One program per sampling mode, and for one row or several: more than the 8 at which torch gives up.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    compiled = partial(torch.compile, fullgraph=True, dynamic=True, options={"coordinate_descent_tuning": True})
    attention_context, block, select = map(compiled, (Llama.attention_context, Block.forward, select_token))

    def compiled_step(llama: Llama, cache: KVCache, state: DecodeState) -> None:
        token = state.token.clamp(min=0)
        x = llama.embed_tokens(token)[:, None]  # [B, 1, n_embd]
        context = attention_context(llama, x, None, cache, None)
        for layer, k, v in zip(llama.layers, cache.k, cache.v):
            x = block(layer, x, context, (k, v))
        cache.lengths.add_(~state.finished)
        select(llama, cache, state, llama.norm(x)[:, 0])

    return compiled_step


def use_column_major_weights(llama: Llama) -> None:
    """Stores wide float32 matrices on a CPU column by column, which is faster for products with a single row.

    Only the strides change, so every other use of the weights stays valid.
    """
    for module in llama.modules():
        if isinstance(module, nn.Linear) and module.out_features > 2 * module.in_features:
            weight = module.weight.data
            if weight.dtype == torch.float32 and weight.device.type == "cpu":
                module.weight.data = weight.t().contiguous().t()


class AsyncCopy:
    """A copy of a tensor to the CPU that does not block the host until `wait`."""

    def __init__(self, tensor: Tensor):
        self.event = None
        if tensor.is_cuda:
            self.tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.tensor.copy_(tensor, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(tensor.device))
        else:
            self.tensor = tensor.cpu().clone()

    def wait(self) -> Tensor:
        if self.event is not None:
            self.event.synchronize()
        return self.tensor


class Shape(NamedTuple):
    """What a graph is captured for: a step with another shape is another graph."""

    n_row: int
    attend_len: int
    sampling: Sampling  # without its seed, which selects the random numbers
    stop_at_eos: bool


@dataclass
class Graphs:
    """What is kept for the answers with one cache: CUDA graphs of their steps, and the state in these graphs.

    (Not the cache itself: what is kept of a caller's cache is freed with it.)
    """

    state: DecodeState  # for all rows of the cache
    n_eager: Counter[Shape] = field(default_factory=Counter)  # steps that ran eagerly so far
    captured: dict[Shape, torch.cuda.CUDAGraph] = field(default_factory=dict)


def first_rows(cache: KVCache, state: DecodeState, n: int) -> tuple[KVCache, DecodeState]:
    """Returns the first n rows of a cache and of a state, which share their memory."""
    rows = copy(cache)
    rows.k, rows.v, rows.lengths = cache.k[:, :n], cache.v[:, :n], cache.lengths[:n]
    return rows, replace(state, token=state.token[:n], finished=state.finished[:n], uniform=state.uniform[:n])


class FastDecoder:
    """Generates with a model. compile: compile the step (once for all answers of this decoder).

    On CUDA it keeps graphs and a cache for later answers, so the model's weights must stay where they are.
    """

    def __init__(self, model: Owl, compile: bool = False):
        self.model = model
        self.is_compiled = compile
        self.step = compile_step() if compile else decode_step
        self.graphs: WeakKeyDictionary[KVCache, Graphs] = WeakKeyDictionary()  # by whole cache
        self.own_cache: KVCache | None = None  # of the last complete answer on CUDA for which the caller had no cache

    def take_cache(self, batch_size: int, max_length: int) -> KVCache:
        """Returns an empty cache with at least these sizes: the decoder's own, or a new one if that is too small.

        The decoder does not have it until the answer is complete, so that two answers at a time do not share it.
        """
        cache, self.own_cache = self.own_cache, None
        if cache is None or cache.k.shape[1] < batch_size or cache.max_length < max_length:
            cache = None  # frees the small one first
            cache = self.model.llama.make_cache(batch_size, max_length)
        cache.truncate(0)
        return cache

    def make_steps(self, cache: KVCache, n: int, sampling: Sampling, stop_at_eos: bool) -> "Steps":
        """Returns the steps of an answer in the first n rows of a cache, with the graphs of earlier answers in it."""
        if cache not in self.graphs:
            token, eos_bias = torch.zeros_like(cache.lengths), torch.zeros((), device=cache.lengths.device)
            self.graphs[cache] = Graphs(DecodeState(token, token.bool(), token.float(), eos_bias, sampling, stop_at_eos))
        graphs = self.graphs[cache]
        state = replace(graphs.state, sampling=sampling, stop_at_eos=stop_at_eos)
        return Steps(self.step, self.is_compiled, self.model.llama, *first_rows(cache, state, n), graphs)

    @torch.inference_mode()
    def generate(
        self,
        ids: Tensor,
        images: Tensor | None = None,
        *,
        prompt_lengths: Tensor | None = None,
        max_new_tokens: int = 512,
        min_new_tokens: int = 0,
        sampling: Sampling = Sampling(),
        stop_at_eos: bool = True,
        cache: KVCache | None = None,
    ) -> Iterator[Tensor]:
        """Yields the next token of every row, [B] int64 on the CPU; see generate.generate, which is the same."""
        # Process the prompt and select the first token.
        llama, B, is_own = self.model.llama, len(ids), cache is None
        if is_own:
            cache = self.take_cache(B, min(ids.shape[1] + max_new_tokens, llama.config.context))
        steps = self.make_steps(cache, B, sampling, stop_at_eos)
        x = prefill(self.model, ids, images, prompt_lengths, steps.cache)  # [B, n_embd]
        max_new_tokens = min(max_new_tokens, cache.max_length)
        if max_new_tokens == 0:
            return
        longest = int(steps.cache.lengths.max())
        uniform = random_numbers(sampling.seed, max_new_tokens, B).to(x.device)
        steps.start(uniform[0], has_minimum=min_new_tokens > 0)
        select_token(llama, steps.cache, steps.state, x)

        # Decode. On CUDA the copy of a step's tokens is read after the next step has been launched.
        rows = torch.arange(B, device="cpu")  # rows that are still computed
        previous = None
        for step in range(max_new_tokens + 1):
            current = None
            if step < max_new_tokens:
                if step > 0:
                    steps.state.uniform.copy_(uniform[step])
                    if step == min_new_tokens:
                        steps.state.eos_bias.zero_()
                    steps.run(longest + step, n_left=max_new_tokens - step)
                current = rows, AsyncCopy(torch.stack([steps.state.token, steps.state.finished.long()]))  # [2, B]
            if not steps.on_cuda:  # nothing to overlap
                previous = current
            if previous is not None:
                computed, copied = previous
                token, is_finished = copied.wait()
                if (token < 0).any():
                    for stored in (cache.k, cache.v, cache.lengths):
                        stored.zero_()  # a fixed attend_len reads them later too, and 0 * NaN is NaN
                    raise not_finite(self.model, images)
                with torch.inference_mode(False):  # not an inference tensor, so that training may use it
                    answer = torch.full((B,), llama.config.eos_id, device="cpu")
                    answer[computed] = token
                yield answer
                if is_finished.all():
                    break
                if is_own and not self.is_compiled and computed is rows:
                    kept = rows_to_keep(is_finished)
                    if len(kept) < len(rows):
                        rows, uniform = rows[kept], uniform[:, kept.to(x.device)]
                        steps.keep_rows(kept.to(x.device))
            previous = current
        if is_own and steps.on_cuda:
            self.own_cache = cache


def random_numbers(seed: int | None, n: int, B: int) -> Tensor:
    """Returns numbers in [0, 1) that select n tokens of each row, [n, B]. With a seed they are the same in all rows."""
    if seed is None:
        return torch.rand(n, B)
    return torch.rand(n, 1, generator=torch.Generator().manual_seed(seed)).expand(-1, B)


def rows_to_keep(is_finished: Tensor) -> Tensor:
    """Returns the rows that go on, and finished ones, so that their number is B halved until more than half go on.

    is_finished: [B], 0 or 1, not all 1. (With any other number there would be many shapes, each with its own graphs.)
    """
    n_active, n = int((is_finished == 0).sum()), len(is_finished)
    while n >= 2 * n_active:
        n //= 2
    return is_finished.argsort(stable=True)[:n].sort().values


class Steps:
    """Runs the steps of one answer: eagerly on a CPU; on CUDA it warms up, then captures, then replays graphs.

    cache, state: the rows of this answer. graphs: what is kept for the whole cache.
    """

    def __init__(
        self,
        step: Callable[[Llama, KVCache, DecodeState], None],
        is_compiled: bool,
        llama: Llama,
        cache: KVCache,
        state: DecodeState,
        graphs: Graphs,
    ):
        self.step, self.llama, self.cache, self.state, self.graphs = step, llama, cache, state, graphs
        self.on_cuda = state.token.is_cuda
        self.is_static = self.on_cuda or is_compiled
        # A compiler makes less work of attention written out for one query than of a kernel for many queries.
        self.backend = SDPBackend.MATH if self.on_cuda and is_compiled else None

    def start(self, uniform: Tensor, has_minimum: bool) -> None:
        """Sets the state for the first token. uniform: [B]. has_minimum: </s> must not be selected yet."""
        self.state.finished.zero_()
        self.state.uniform.copy_(uniform)
        self.state.eos_bias.fill_(-torch.inf if has_minimum else 0.0)

    def run(self, attend_len: int, n_left: int) -> None:
        """Runs one step that attends to at least attend_len positions. On CUDA the step may still run afterwards.

        n_left: how many steps the answer may still have, this one included.
        """
        if self.is_static:
            attend_len = -(-attend_len // BUCKET) * BUCKET
        attend_len = min(attend_len, self.cache.max_length)
        if not self.on_cuda:
            self.run_eagerly(attend_len)
            return
        state, n_eager, captured = self.state, self.graphs.n_eager, self.graphs.captured
        shape = Shape(len(state.token), attend_len, replace(state.sampling, seed=None), state.stop_at_eos)
        if shape not in captured and (n_eager[shape] < N_WARMUP or max(n_eager[shape], n_left) < CAPTURE_COST):
            n_eager[shape] += 1
            self.run_eagerly(attend_len)
            return
        with torch.cuda.device_of(state.token):  # graphs are captured on the current device
            if shape not in captured:
                captured[shape] = self.capture(attend_len)
            captured[shape].replay()

    def run_eagerly(self, attend_len: int) -> None:
        """Runs the step's operations, compiled or not."""
        self.cache.attend_len = attend_len
        try:
            with sdpa_kernel(self.backend) if self.backend else nullcontext():
                self.step(self.llama, self.cache, self.state)
        finally:
            self.cache.attend_len = None

    def capture(self, attend_len: int) -> torch.cuda.CUDAGraph:
        """Captures a step without running it. All graphs share one memory pool for intermediate results."""
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other in self.graphs.captured.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            self.run_eagerly(attend_len)
        return graph

    def keep_rows(self, index: Tensor) -> None:
        """Continues with the rows index [n] only, moved to the first n rows of the buffers."""
        cache, state = self.cache, self.state
        self.cache, self.state = first_rows(cache, state, len(index))
        self.cache.k.copy_(cache.k[:, index])
        self.cache.v.copy_(cache.v[:, index])
        self.cache.lengths.copy_(cache.lengths[index])
        for name in ("token", "finished", "uniform"):
            getattr(self.state, name).copy_(getattr(state, name)[index])
