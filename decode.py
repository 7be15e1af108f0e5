"""Decoding: a prompt is read at once, then words are chosen one by one (in the manner of gpt-fast).

    prompt x [B, T, n_embd] --Llama--> last word [B, n_embd] --lm_head, choose--> token [B]      the prefill
                                |  ^
                                v  |
                        keys and values (Cache)
                                |  ^
                                v  |
    token [B] --embed_tokens--Llama--> [B, n_embd] --lm_head, choose--> next token [B]           a step

A step reads every weight once, to make one token a row: it can be no faster than memory. To come near that, nothing
else may cost. All that a step reads or writes has its fixed place (`State`, `Cache`), its shapes depend only on how
far into the cache it looks, and it never asks the device for a value. So on CUDA it is recorded as a graph, and then
a token is one launch; and the host sends off a step before it reads the token of the step before.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llama import BUCKET, Cache, Llama

RECORD_AFTER = 3  # steps with a bucket, on CUDA


class Sampling(NamedTuple):
    """How the next token is chosen."""

    temperature: float = 0.0  # 0: the likeliest; above, one is drawn, the likelier the oftener
    top_k: int | None = None  # among so many of the likeliest
    top_p: float | None = None  # among the fewest that together have this probability

    def check(self) -> None:
        """Raises ValueError for what makes no sense."""
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be 1 or more, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")

    def choose(self, logits: Tensor, luck: Tensor) -> Tensor:
        """logits: [B, V]. luck: [B] float32, uniform in 0..1. Returns a token for each row, [B] int64."""
        if self.temperature == 0:
            return logits.max(dim=-1).indices  # on a CPU twice as fast as argmax
        return draw(logits.float(), self.temperature, self.top_k, self.top_p, luck)


def draw(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, luck: Tensor) -> Tensor:
    """Draws a token a row: the one at which the running sum of probabilities passes `luck`.

    logits: [B, V] float32. luck: [B] or [1], uniform in 0..1. Returns [B] int64.
    """
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # the largest is 0: none overflows
    p, token = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        p[:, top_k:] = 0
    if top_p is not None:
        before = p.cumsum(dim=-1) - p
        p = p.masked_fill(before >= top_p * p.sum(dim=-1, keepdim=True), 0)  # never the first
    total = p.cumsum(dim=-1)
    choice = (total <= luck[:, None] * total[:, -1:]).sum(dim=-1, keepdim=True)
    return token.gather(1, choice.clamp(max=p.shape[1] - 1))[:, 0]


# --- one step ----------------------------------------------------------------------------------------


class State(NamedTuple):
    """What a step reads and writes besides the cache; on the device, each at its place."""

    token: Tensor  # [B] int64: the newest token of each row
    ended: Tensor  # [B] bool: rows that are over, and say </s> from then on
    luck: Tensor  # [B] float32: what chance has to say to the next token
    on_end: Tensor  # [B] float32: what is added to the logit of </s>: -inf while an answer may not end, then 0


def choose(llama: Llama, x: Tensor, state: State, sampling: Sampling) -> Tensor:
    """The next token of each row, [B] int64. x: [B, n_embd], the newest words out of the decoder."""
    logits = llama.lm_head(x)
    logits[:, llama.config.eos_id] += state.on_end
    return sampling.choose(logits, state.luck)


def settle(llama: Llama, cache: Cache, state: State, token: Tensor, stop: bool) -> None:
    """Takes the tokens chosen, [B], and sees which rows end with them: at </s>, or where the context is full."""
    config = llama.config
    state.token.copy_(torch.where(state.ended, config.eos_id, token))
    state.ended.logical_or_(cache.lengths >= config.context)
    if stop:
        state.ended.logical_or_(state.token == config.eos_id)


def take_step(llama: Llama, cache: Cache, state: State, n_visible: int, sampling: Sampling, stop: bool) -> None:
    """Reads each row's newest token and chooses the next. n_visible: how far into the cache it looks."""
    x = llama(llama.embed_tokens(state.token)[:, None], None, cache, n_visible)[:, 0]  # [B, n_embd]
    cache.lengths.add_(~state.ended)  # of a row that is over, the next overwrites what was just written
    settle(llama, cache, state, choose(llama, x, state, sampling), stop)


Step = Callable[[Llama, Cache, State, int, Sampling, bool], None]


def compiled_step() -> Step:
    """take_step, compiled: its many small operations become few. The first call takes a minute."""
    # One program for each way of choosing, and for one row or several: more than the 8 at which torch gives up.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(take_step, fullgraph=True, dynamic=True, options={"coordinate_descent_tuning": True})


def lay_out(llama: Llama) -> None:
    """Lays wide float32 matrices on a CPU column by column, which the product with a single row reads faster.

    Nothing else notices: a tensor's strides say how it lies.
    """
    for module in llama.modules():
        if isinstance(module, nn.Linear) and module.out_features > 2 * module.in_features:
            weight = module.weight.data
            if weight.dtype == torch.float32 and weight.device.type == "cpu":
                module.weight.data = weight.t().contiguous().t()


class Decoder:
    """Takes steps. On CUDA the first few with a bucket of the cache are taken, the next is recorded, the rest replayed.

    (The first loads kernels, compiles and tunes, none of which may happen while a step is recorded. And a recording
    takes as long as some steps do, which a short answer would not get back.)
    """

    def __init__(
        self,
        llama: Llama,
        cache: Cache,
        state: State,
        luck: Tensor,
        sampling: Sampling,
        stop: bool,
        step: Step,
        min_new_tokens: int = 0,
    ):
        self.llama, self.cache, self.state, self.luck = llama, cache, state, luck
        self.sampling, self.stop = sampling, stop
        self.step = step
        self.min_new_tokens = min_new_tokens
        self.n_taken = 0
        self.n_plain: Counter[int] = Counter()  # steps that were not recorded, by bucket
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # likewise

    def advance(self) -> None:
        """Takes a step. (On CUDA it has only been sent off when this returns.)"""
        self.n_taken += 1
        self.state.luck.copy_(self.luck[self.n_taken])
        if self.n_taken == self.min_new_tokens:
            self.state.on_end.zero_()
        self.cache.longest = min(self.cache.longest + 1, self.cache.size - 1)
        n_visible = self.cache.longest
        on_cuda = self.state.token.is_cuda
        if on_cuda or self.step is not take_step:  # of shapes there should be few
            n_visible = min(-(-n_visible // BUCKET) * BUCKET, self.cache.size - 1)
        arguments = self.llama, self.cache, self.state, n_visible, self.sampling, self.stop
        if not on_cuda or self.n_plain[n_visible] < RECORD_AFTER:
            self.n_plain[n_visible] += 1
            self.step(*arguments)
            return
        with torch.cuda.device_of(self.state.token):  # a graph is recorded on the current device, which may be another
            if n_visible not in self.graphs:
                graph = torch.cuda.CUDAGraph()
                shared = next((other.pool() for other in self.graphs.values()), None)  # memory for what lies between
                with torch.cuda.graph(graph, pool=shared):  # what is recorded is not run
                    self.step(*arguments)
                self.graphs[n_visible] = graph
            self.graphs[n_visible].replay()

    def keep(self, rows: list[int]) -> None:
        """Goes on with these rows alone."""
        index = torch.tensor(rows, device=self.state.token.device)
        self.cache.keep(index)
        self.state = State(*(tensor[index] for tensor in self.state))
        self.luck = self.luck[:, index]
        self.graphs = {}  # they were of the old places
        self.n_plain.clear()


# --- all steps ---------------------------------------------------------------------------------------


class Arriving:
    """A tensor on its way to the CPU."""

    def __init__(self, tensor: Tensor):
        if tensor.is_cuda:
            self.tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.tensor.copy_(tensor, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(tensor.device))
        else:
            self.tensor = tensor.cpu().clone()
            self.event = None

    def wait(self) -> Tensor:
        if self.event is not None:
            self.event.synchronize()
        return self.tensor


def ahead(items: Iterator, n: int) -> Iterator:
    """The same items, each asked for n items before it is handed on."""
    waiting = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > n:
            yield waiting.popleft()
    yield from waiting


def decode(
    llama: Llama,
    x: Tensor,
    cache: Cache,
    held: Tensor,
    luck: Tensor,
    sampling: Sampling,
    stop: bool,
    step: Step,
    shrink: bool,
    min_new_tokens: int,
) -> Iterator[Tensor]:
    """Continues prompts that have been read: yields all rows' next tokens, [B] int64 on the CPU, step by step.

    x: [B, n_embd], the prompts' last words out of the decoder. cache: with the prompts, and room. held: its lengths,
    on the CPU. luck: [n, B] float32, for n tokens at the most. step: take_step, or that compiled.
    shrink: forget rows that are over, once they are half of those computed (not in a cache that somebody keeps, nor
    where steps are compiled, which is done for one number of rows). min_new_tokens: of which none is </s>.
    A row that is over says </s>. Ends when all are, or after n tokens.
    """
    B = x.shape[0]
    ended = torch.zeros(B, dtype=torch.bool, device=x.device)
    on_end = torch.full((B,), -torch.inf if min_new_tokens else 0.0, device=x.device)
    state = State(ended.long(), ended, luck[0].clone(), on_end)
    settle(llama, cache, state, choose(llama, x, state, sampling), stop)
    decoder = Decoder(llama, cache, state, luck, sampling, stop, step, min_new_tokens)
    rows = list(range(B))  # those that are computed

    def tokens() -> Iterator[tuple[list[int], Arriving]]:
        # With the rows that a step was sent off for: once it arrives, fewer may be left.
        yield rows, Arriving(decoder.state.token)
        for _ in luck[1:]:
            decoder.advance()
            yield rows, Arriving(decoder.state.token)

    # The GPU is always one step ahead: it need not wait until a token has been looked at.
    ended = torch.zeros(B, dtype=torch.bool)
    for computed, arriving in ahead(tokens(), 1 if x.is_cuda else 0):
        all_tokens = torch.full((B,), llama.config.eos_id)
        all_tokens[computed] = arriving.wait()
        yield all_tokens
        ended |= held >= llama.config.context
        if stop:
            ended |= all_tokens == llama.config.eos_id
        held = held + ~ended
        if ended.all():
            return
        going = [i for i, row in enumerate(rows) if not ended[row]]
        if shrink and 2 * len(going) <= len(rows):
            decoder.keep(going)
            rows = [rows[i] for i in going]
