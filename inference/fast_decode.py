"""Fast decoding: the loop of generate.py with static buffers (the approach of gpt-fast).

A decoding step reads every weight once to produce one token per row, so memory bandwidth bounds its speed. To get
near that bound, a step must cost little else:

    static shapes    everything a step reads or writes is allocated once and updated in place. Attention covers
                     `attend_len` cache positions, rounded up to a multiple of 256.
    compilation      torch.compile fuses the many small operations of a step (--compile).
    CUDA graphs      on CUDA a step is captured as a graph per attend_len and replayed: one launch per token.
    asynchronous     on CUDA the host reads each token one step late, so the device never waits for the host.
    fewer rows       once half of the rows are finished, the others continue without them (not when compiled, since
                     the shapes would change, nor in a cache that the caller keeps).

generate.py is the slow counterpart: same signature, same tokens (tests/test_fast_decode.py).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.device import not_finite
from generate import Sampling, prefill, sample_token
from llama import KVCache, Llama
from model import Owl

BUCKET = 256  # attend_len is a multiple of this, so that there are few shapes
N_WARMUP = 3  # eager steps per shape before a CUDA graph is captured: kernels are loaded, compiled and tuned in them


@dataclass
class DecodeState:
    """What a step reads and writes besides the KV cache. The tensors stay at their addresses until rows are dropped."""

    token: Tensor  # [B] int64: newest token of each row; -1 if its logits are not finite
    finished: Tensor  # [B] bool: rows that have ended; they select </s> from then on
    uniform: Tensor  # [B] or [1] float32: random numbers that select the next token
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
    """Returns decode_step, compiled. Its first call takes about a minute."""
    # One program per sampling mode, and for one row or several: more than the 8 at which torch gives up.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(decode_step, fullgraph=True, dynamic=True, options={"coordinate_descent_tuning": True})


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


class FastDecoder:
    """Generates with a model. compile: compile the step (once for all answers of this decoder)."""

    def __init__(self, model: Owl, compile: bool = False):
        self.model = model
        self.is_compiled = compile
        self.step = compile_step() if compile else decode_step

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
        llama, B = self.model.llama, len(ids)
        may_drop_rows = cache is None and not self.is_compiled
        if cache is None:
            cache = llama.make_cache(B, min(ids.shape[1] + max_new_tokens, llama.config.context))
        x = prefill(self.model, ids, images, prompt_lengths, cache)  # [B, n_embd]
        max_new_tokens = min(max_new_tokens, cache.max_length)
        if max_new_tokens == 0:
            return
        longest, device = int(cache.lengths.max()), x.device
        rng = None if sampling.seed is None else torch.Generator().manual_seed(sampling.seed)
        uniform = torch.rand(max_new_tokens, B if rng is None else 1, generator=rng).to(device)
        finished = torch.zeros(B, dtype=torch.bool, device=device)
        eos_bias = torch.full((), -torch.inf if min_new_tokens > 0 else 0.0, device=device)
        state = DecodeState(finished.long(), finished, uniform[0].clone(), eos_bias, sampling, stop_at_eos)
        select_token(llama, cache, state, x)

        # Decode. On CUDA the copy of a step's tokens is read after the next step has been launched.
        steps = Steps(self.step, self.is_compiled, llama, cache, state)
        rows = torch.arange(B, device="cpu")  # rows that are still computed
        previous = None
        for step in range(max_new_tokens + 1):
            current = None
            if step < max_new_tokens:
                if step > 0:
                    state.uniform.copy_(uniform[step])
                    if step == min_new_tokens:
                        state.eos_bias.zero_()
                    steps.run(longest + step)
                current = rows, AsyncCopy(torch.stack([state.token, state.finished.long()]))  # [2, B]
            if not steps.on_cuda:  # nothing to overlap
                previous = current
            if previous is not None:
                computed, copy = previous
                token, is_finished = copy.wait()
                if (token < 0).any():
                    raise not_finite(self.model, images)
                with torch.inference_mode(False):  # not an inference tensor, so that training may use it
                    answer = torch.full((B,), llama.config.eos_id, device="cpu")
                    answer[computed] = token
                yield answer
                if is_finished.all():
                    return
                active = (is_finished == 0).nonzero()[:, 0]
                if may_drop_rows and computed is rows and 2 * len(active) <= len(rows):
                    rows = rows[active]
                    steps.keep_rows(active.to(device))
                    if rng is None:
                        uniform = uniform[:, active.to(device)]
            previous = current


class Steps:
    """Runs the steps of one answer: eagerly on a CPU; on CUDA it warms up, then captures, then replays graphs."""

    def __init__(
        self,
        step: Callable[[Llama, KVCache, DecodeState], None],
        is_compiled: bool,
        llama: Llama,
        cache: KVCache,
        state: DecodeState,
    ):
        self.step, self.llama, self.cache, self.state = step, llama, cache, state
        self.on_cuda = state.token.is_cuda
        self.is_static = self.on_cuda or is_compiled
        # A compiler makes less work of attention written out for one query than of a kernel for many queries.
        self.backend = SDPBackend.MATH if self.on_cuda and is_compiled else None
        self.n_warmup: Counter[int] = Counter()  # eager steps so far, by attend_len
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by attend_len

    def run(self, attend_len: int) -> None:
        """Runs one step that attends to at least attend_len positions. On CUDA the step may still run afterwards."""
        if self.is_static:
            attend_len = -(-attend_len // BUCKET) * BUCKET
        attend_len = min(attend_len, self.cache.max_length)
        if not self.on_cuda or self.n_warmup[attend_len] < N_WARMUP:
            self.n_warmup[attend_len] += 1
            self.run_eagerly(attend_len)
            return
        with torch.cuda.device_of(self.state.token):  # graphs are captured on the current device
            if attend_len not in self.graphs:
                self.graphs[attend_len] = self.capture(attend_len)
            self.graphs[attend_len].replay()

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
        pool = next((other.pool() for other in self.graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            self.run_eagerly(attend_len)
        return graph

    def keep_rows(self, index: Tensor) -> None:
        """Continues with the rows index [n] only. Their buffers move, so that graphs are captured again."""
        self.cache.k, self.cache.v = self.cache.k[:, index], self.cache.v[:, index]
        self.cache.lengths = self.cache.lengths[index]
        state = self.state
        state.token, state.finished = state.token[index], state.finished[index]
        if len(state.uniform) > 1:
            state.uniform = state.uniform[index]
        self.graphs.clear()
        self.n_warmup.clear()
