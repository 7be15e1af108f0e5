"""Computes the numbers of an explanation page, in one forward pass over a prompt and its answer.

    python sample.py --image x.jpg --prompt "What is this?" --explain page.html

The pass runs through the model itself. A Recorder hooks into it:

    prompt ids, answer ids[:-1] [T], pixels [N, 3, S, S]
      | model(ids, images)
      |     hooks on every module           shapes, times, FLOPs; hidden states after each decoder layer
      |     F.scaled_dot_product_attention  attention probabilities, mean over heads:
      |         abstractor, last layer      each query -> queries, class token, patches   [N, n_query, n_query + 1 + P]
      |         decoder, mean over layers   position before an answer token -> all up to it   [n_answer, T]
      v
    logits [T, vocab_size]                  the five most probable tokens at each position before an answer token
      |
      | explain() puts all in a dictionary for JSON, which inference/explain_page.py makes a page of
      v
    {"model", "images", "vision", "queries", "tokens", "reply", "answer", "modules", "notes"}

Attention to an image "through the queries" is the product of the decoder's attention to the visual tokens and the
queries' attention to the patches. It is no explanation: patch features already mix information from the whole image,
and a query attends to the image in every layer. The logit lens applies the decoder's final norm and lm_head to the
hidden state after each layer, and shows what the model would predict if it ended there.

Long answers and many images give more numbers than a page should have. They are averaged over neighboring cells, so
that the JSON stays below about 3 MB (for a context of up to 8,000 tokens); "notes" says what was.
"""

import base64
import inspect
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common.device import not_finite
from common.files import printable
from data.text import Tokenizer
from inference.chat import ChatSession
from inference.quantize import QuantizedLinear, bits_of
from llama import Block
from model import IMAGE_TOKEN_ID, Owl
from vit import CLIP_MEAN, CLIP_STD

ROOT = Path(__file__).resolve().parents[1]
N_TOP = 5  # most probable tokens of a position
# Limits of one page. Bytes are before base64, which adds a third.
MAX_ANSWER = 512  # tokens of the answer
MAX_IMAGE = 200_000  # bytes of an image; a larger PNG becomes a JPEG
MAX_IMAGES = 300_000  # bytes of all images together
MAX_QUERY_MAPS = 300_000  # numbers in all maps of queries
MAX_ANSWER_MAPS = 530_000  # numbers in all maps of answer tokens
MAX_ATTENTION = 200_000  # numbers in the attention of all answer tokens to positions
MAX_LENS = 4_000  # predictions of the logit lens, about 80 bytes each

NOTES = (
    "Attention is not an explanation: it shows where a layer reads, not what it takes from there or whether that "
    "matters for the answer. Patch features already mix information from the whole image.",
    "All numbers are from one pass over the prompt and its answer. Generation processes the same tokens one at a time, "
    "which rounds differently.",
    "Times are of this one pass, measured by hooks, which slow small modules down. Those of the vision encoder are for "
    "all images together.",
    "FLOPs count Linear layers, convolutions and attention. Causal attention counts only the unmasked pairs. "
    "A multiplication and an addition are two.",
    "The model calls embed_tokens and lm_head itself: the time and FLOPs of llama are those of its layers and norm.",
)


# --- one forward pass, recorded ------------------------------------------------------------------------


@dataclass
class Call:
    """One call of a module."""

    input: list[int]  # shape of its first argument
    output: list[int]
    flops: int
    seconds: float


class Recorder(TorchFunctionMode):
    """Runs a model on a prompt and its answer, and records what happens inside.

    ids: the prompt, with the placeholders of its images. answer_ids: each is predicted by the position before it, so
    the last one is not processed: T is len(ids) + n_answer - 1.
    """

    def __init__(self, model: Owl, ids: list[int], answer_ids: list[int]):
        super().__init__()
        self.model = model
        self.n_prompt = len(ids)
        self.row = ids + answer_ids[:-1]  # [T]
        self.device = model.llama.embed_tokens.weight.device
        self.timed = {*shown_modules(model), *(f"vit.blocks.{i}" for i in range(len(model.vit.blocks)))}
        self.running: list[tuple[str, float, int]] = []  # modules within one another: name, start, FLOPs before
        self.flops = 0
        self.seconds = 0.0  # spent in the recorder itself

        # The results. n_answer is 1 if there is no answer.
        self.query_attention: Tensor | None = None  # [N, n_query, n_query + 1 + P] of the abstractor's last layer
        self.attention: Tensor | int = 0  # [n_answer, T], mean over the decoder's layers
        self.hidden: list[Tensor] = []  # after each layer of the decoder, [n_answer, n_embd]
        self.logits: Tensor | None = None  # [n_answer, vocab_size]
        self.is_visual: list[bool] | None = None  # [T]: takes the visual branch; None if there is only one
        self.calls: dict[str, Call] = {}  # by the module's name

    def run(self, images: Tensor | None) -> None:
        """Runs the model. images: [N, 3, S, S], None if N is 0. Raises ValueError if the logits are not finite."""
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(self.start, name)))
            handles.append(module.register_forward_hook(partial(self.end, name)))
        images = None if images is None else images.to(self.device)
        try:
            with self:
                logits, _ = self.model(torch.tensor([self.row], device=self.device), images)
        finally:
            for handle in handles:
                handle.remove()
        self.logits = logits[0, self.n_prompt - 1 :]
        if not self.logits.isfinite().all():
            raise not_finite(self.model, images)

    def now(self, name: str) -> float:
        """Returns the time without the recorder's own work; for a timed module, once the device is ready."""
        if self.device.type != "cpu" and name in self.timed:
            torch.accelerator.synchronize(self.device)
        return time.perf_counter() - self.seconds

    def start(self, name: str, module: nn.Module, args: tuple) -> None:
        now = self.now(name)
        if name == "llama" and self.model.config.llama.adaptive:
            modality = args[1]
            self.is_visual = [False] * len(self.row) if modality is None else modality.index[0].bool().tolist()
        self.running.append((name, now, self.flops))
        self.seconds += self.now("-") - now

    def end(self, name: str, module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, None]) -> None:
        now = self.now(name)
        output = output[0] if name == "" else output  # the whole model returns (logits, loss)
        if isinstance(module, (nn.Linear, QuantizedLinear)):
            self.flops += 2 * output.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            self.flops += 2 * output.numel() * module.weight[0].numel()
        elif isinstance(module, Block):
            self.hidden.append(output[0, self.n_prompt - 1 :].clone())  # a view would keep all positions in memory
        _, start, flops = self.running.pop()
        self.calls[name] = Call(list(args[0].shape), list(output.shape), self.flops - flops, now - start)
        self.seconds += self.now("-") - now

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k, v = args
            is_causal = kwargs.get("is_causal", False)
            name = self.running[-1][0]
            start = self.now("")  # "": the whole model, which is timed
            if name.startswith("abstractor."):
                self.query_attention = attention_probs(q, k)  # each layer replaces the one before
            elif name.startswith("llama."):
                probs = attention_probs(q, k, self.n_prompt - 1, is_causal)[0]
                self.attention = self.attention + probs / len(self.model.llama.layers)
            n_pair = q.shape[2] * (q.shape[2] + 1) // 2 if is_causal else q.shape[2] * k.shape[2]
            self.flops += 2 * q.shape[0] * q.shape[1] * n_pair * (q.shape[3] + v.shape[3])
            self.seconds += self.now("") - start  # the kernel itself runs below
        return function(*args, **kwargs)


def attention_probs(q: Tensor, k: Tensor, first: int = 0, is_causal: bool = False) -> Tensor:
    """Attention probabilities of the queries from position `first` on, mean over heads: [N, T - first, U] float32.

    q: [N, n_head, T, D]; k: [N, n_kv_head, U, D], where each head serves several of q's.
    """
    q = q[:, :, first:].float()  # before the product, which takes gigabytes for all positions of a 7B model
    k = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if is_causal:
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(first + 1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(dim=-1).mean(dim=1)


# --- the explanation -----------------------------------------------------------------------------------


@torch.inference_mode()
def explain(session: ChatSession, name: str) -> dict:
    """Runs the model once more on the last question of a session and its answer. Returns data for JSON.

    name: of the model. Arrays are as in `pack`. No other thread may use the model meanwhile: the hooks see every call.
    """
    chat, model = session.conversation, session.model
    answer_ids = session.answer_ids[:MAX_ANSWER]
    pixels = chat.images
    recorder = Recorder(model, chat.prompt_ids, answer_ids)
    recorder.run(torch.stack(pixels) if pixels else None)
    thin = Thinning.choose(recorder, len(pixels), len(answer_ids))
    images = [describe_image(image, model, min(MAX_IMAGE, MAX_IMAGES // len(pixels))) for image in pixels]
    notes = [*NOTES, *thin.notes()]
    if any(image["png"].startswith("data:image/jpeg") for image in images):
        notes.append("To save space, an image is shown as JPEG, which changes colors a little. The model got exact ones.")
    if len(answer_ids) < len(session.answer_ids):
        notes.append(f"Only the first {MAX_ANSWER} of the answer's {len(session.answer_ids)} tokens are shown.")
    if session.sampling.temperature > 0:
        notes.append("The answer was sampled. The probabilities are those before temperature, top-k and top-p.")
    return {
        "model": describe_model(model, name),
        "images": images,
        "vision": describe_vision(recorder),
        "queries": describe_queries(recorder, thin),
        "tokens": describe_tokens(recorder, chat.tokenizer),
        "reply": chat.tokenizer.decode(answer_ids),
        "answer": describe_answer(recorder, answer_ids, chat.tokenizer, thin),
        "modules": describe_modules(recorder),
        "notes": notes,
    }


@dataclass
class Thinning:
    """How many numbers are averaged into one cell of a page; 1 keeps all of them."""

    queries: int  # maps of queries have a cell for each square of this many patches a side
    answer: int  # the same for maps of answer tokens
    positions: int  # attention to the sequence has a cell for this many positions
    layers: int  # the logit lens has one of this many layers, counted from the last

    @staticmethod
    def choose(recorder: Recorder, n_image: int, n_answer: int) -> "Thinning":
        """Chooses the least thinning that keeps the limits."""
        config, n_position = recorder.model.config, len(recorder.row)
        n_row, n_layer = config.vit.grid_size, config.llama.n_layer

        def smallest(n: int, size: Callable[[int], int], limit: int) -> int:
            return next((k for k in range(1, n) if size(k) <= limit), n)

        return Thinning(
            smallest(n_row, lambda k: n_image * config.n_query * math.ceil(n_row / k) ** 2, MAX_QUERY_MAPS),
            smallest(n_row, lambda k: n_image * n_answer * math.ceil(n_row / k) ** 2, MAX_ANSWER_MAPS),
            smallest(n_position, lambda k: n_answer * math.ceil(n_position / k), MAX_ATTENTION),
            smallest(n_layer, lambda k: n_answer * math.ceil(n_layer / k), MAX_LENS),
        )

    def notes(self) -> Iterator[str]:
        """Yields a sentence for each kind of numbers that is thinned."""
        for maps, k in {"the queries": self.queries, "the answer": self.answer}.items():
            if k > 1:
                yield f"To save space, a cell in the maps of {maps} is the mean of {k} x {k} patches."
        if self.positions > 1:
            yield f"To save space, attention to the sequence is the mean of {self.positions} neighboring positions."
        if self.layers > 1:
            yield f"To save space, the logit lens has one of {self.layers} layers."


def describe_model(model: Owl, name: str) -> dict:
    bits, weight = bits_of(model), model.llama.embed_tokens.weight
    dtype = str(weight.dtype).removeprefix("torch.") + (f", language model in {bits} bits" if bits else "")
    return {
        "name": printable(name),
        "variant": model.config.variant,
        "dtype": dtype,
        "device": str(weight.device),
        "parameters": count_parameters(model),
    }


def describe_image(pixels: Tensor, model: Owl, max_bytes: int) -> dict:
    """Returns an image as the model receives it, and its grid. pixels: normalized, [3, S, S]."""
    rgb = ((pixels.cpu().float() * CLIP_STD + CLIP_MEAN) * 255).round().clamp(0, 255).byte()
    config = model.config.vit
    return {
        "png": data_url(Image.fromarray(rgb.permute(1, 2, 0).numpy()), max_bytes),
        "size": config.image_size,
        "patch_size": config.patch_size,
        "grid": [config.grid_size, config.grid_size],
    }


def data_url(image: Image.Image, max_bytes: int) -> str:
    """Encodes an image as PNG if this has at most max_bytes, else as JPEG, halved in size until it fits."""
    kind, options = "png", {"optimize": True}
    while True:
        file = BytesIO()
        image.save(file, kind, **options)
        if file.tell() <= max_bytes or min(image.size) < 32:
            return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
        if kind == "jpeg":
            image = image.reduce(2)
        kind, options = "jpeg", {"quality": 85}


def describe_vision(recorder: Recorder) -> list[dict]:
    """Returns name, shape and time of each layer of the vision encoder."""
    layers = {"vit.patch_embed": "patch embedding", "vit.pre_norm": "first norm"}
    layers |= {f"vit.blocks.{i}": f"block {i + 1}" for i in range(len(recorder.model.vit.blocks))}
    layers |= {"vit.post_norm": "last norm"}
    vision = []
    for name, title in layers.items():
        if name in recorder.calls:  # the vision encoder does not run without an image
            call = recorder.calls[name]
            shape = call.output[1:]  # without the number of images
            if name == "vit.patch_embed":
                shape = [shape[1] * shape[2], shape[0]]  # from [C, rows, columns]
            vision.append({"name": title, "shape": shape, "ms": rounded(1000 * call.seconds)})
    return vision


def describe_queries(recorder: Recorder, thin: Thinning) -> list[dict]:
    """Returns, for each image, where its queries attend in the abstractor's last layer."""
    queries, n_query = [], recorder.model.config.n_query
    for attention in () if recorder.query_attention is None else recorder.query_attention.cpu():
        to_queries, to_class, to_patches = attention[:, :n_query], attention[:, n_query], attention[:, n_query + 1 :]
        queries.append(
            {
                "maps": pack(thin_maps(to_patches, thin.queries), thin.queries),
                "on_class": [rounded(x) for x in to_class.tolist()],
                "on_queries": [rounded(x) for x in to_queries.sum(dim=1).tolist()],
            }
        )
    return queries


def describe_tokens(recorder: Recorder, tokenizer: Tokenizer) -> list[dict]:
    """Returns text, kind and branch of each position."""
    n_visual_tokens = recorder.model.config.n_visual_tokens
    tokens, n_visual = [], 0
    for position, token in enumerate(recorder.row):
        part = "prompt" if position < recorder.n_prompt else "answer"
        branch = None
        if recorder.is_visual is not None:
            branch = "visual" if recorder.is_visual[position] else "text"
        entry = {"id": token, "kind": "text", "part": part, "branch": branch}
        if token == IMAGE_TOKEN_ID:
            image, query = divmod(n_visual, n_visual_tokens)
            text = f"query {query}" if query < n_visual_tokens - 1 else "end of image"
            tokens.append(entry | {"text": text, "kind": "visual", "image": image, "query": query})
            n_visual += 1
        else:
            tokens.append(entry | {"text": token_text(token, tokenizer)})
    return tokens


def describe_answer(recorder: Recorder, answer_ids: list[int], tokenizer: Tokenizer, thin: Thinning) -> list[dict]:
    """Returns, for each token of the answer, what else was probable and what its position attended to."""
    if not answer_ids:
        return []
    text = partial(token_text, tokenizer=tokenizer)
    top_p, top_ids = recorder.logits.float().softmax(dim=-1).topk(N_TOP)  # [n_answer, 5]
    lens = logit_lens(recorder, answer_ids, text, thin)

    # Attention, summed over what a position belongs to.
    attention = recorder.attention.cpu()  # [n_answer, T]
    is_image = torch.tensor(recorder.row) == IMAGE_TOKEN_ID
    is_answer = torch.arange(len(recorder.row)) >= recorder.n_prompt
    to_image = attention[:, is_image]  # [n_answer, N * (n_query + 1)]
    shares = [attention[:, mask].sum(dim=1).tolist() for mask in (is_image, ~is_image & ~is_answer, is_answer)]

    # Through the queries to the patches; the end-of-image embedding has no map.
    maps = torch.zeros(len(answer_ids), 0, 0)
    if recorder.query_attention is not None:
        to_patches = recorder.query_attention.cpu()[:, :, recorder.model.config.n_query + 1 :]  # [N, n_query, P]
        to_queries = to_image.unflatten(1, (len(to_patches), -1))[:, :, :-1]  # [n_answer, N, n_query]
        maps = thin_maps(torch.einsum("anq,nqp->anp", to_queries, to_patches), thin.answer)  # [n_answer, N, cells]

    answer = []
    for i, token in enumerate(answer_ids):
        position = recorder.n_prompt - 1 + i
        top = zip(top_ids[i].tolist(), top_p[i].tolist())
        answer.append(
            {
                "position": position,
                "id": token,
                "text": text(token),
                "top": [{"id": other, "text": text(other), "p": rounded(p)} for other, p in top],
                "on_image": rounded(shares[0][i]),
                "on_prompt": rounded(shares[1][i]),
                "on_answer": rounded(shares[2][i]),
                "attention": pack(thin_positions(attention[i, : position + 1], thin.positions), thin.positions),
                "image_maps": pack(maps[i], thin.answer),
                "lens": lens[i],
            }
        )
    return answer


def logit_lens(
    recorder: Recorder, answer_ids: list[int], text: Callable[[int], str], thin: Thinning
) -> list[list[dict]]:
    """Returns, for each token of the answer, what each layer would predict: its hidden state through norm and lm_head.

    Layers count from 1. The last one's logits are the model's.
    """
    llama = recorder.model.llama
    lens: list[list[dict]] = [[] for _ in answer_ids]
    answer = torch.tensor(answer_ids, device=recorder.logits.device)[:, None]  # [n_answer, 1]
    n_layer = len(recorder.hidden)
    for layer in range(n_layer, 0, -thin.layers):
        hidden = recorder.hidden[layer - 1]  # [n_answer, n_embd]
        logits = recorder.logits if layer == n_layer else llama.lm_head(llama.norm(hidden))
        probs = logits.float().softmax(dim=-1)  # [n_answer, vocab_size], of one layer at a time
        p_answer = probs.gather(1, answer)[:, 0].tolist()
        p, ids = (x[:, 0].tolist() for x in probs.topk(N_TOP))  # of equal ones, the same as in "top"
        for i in range(len(answer_ids)):
            entry = {"layer": layer, "text": text(ids[i]), "id": ids[i]}
            lens[i].insert(0, entry | {"p": rounded(p[i]), "p_answer": rounded(p_answer[i])})
    return lens


# --- modules -------------------------------------------------------------------------------------------


def shown_modules(model: Owl) -> dict[str, int]:
    """Returns the names of the modules to show, each with the number of its copies: of equal layers only the first."""
    shown = {}
    for name, module in model.named_modules():
        part, stack, index, *rest = [*name.split("."), "", "", ""]
        is_layer = stack in ("blocks", "layers")  # such as vit.blocks.0, and all in it
        if isinstance(module, nn.ModuleList) or ".lora_" in name or (is_layer and index != "0"):
            continue
        shown[name] = len(getattr(model.get_submodule(part), stack)) if is_layer and not any(rest) else 1
    return shown


def describe_modules(recorder: Recorder) -> list[dict]:
    """Returns what each shown module is, has and did. One that was not called as a module has no shapes."""
    modules = []
    shown = shown_modules(recorder.model)
    for name, copies in shown.items():
        module = recorder.model.get_submodule(name)
        call = recorder.calls.get(name)
        file, line = source_of(type(module))
        parts = name.split(".") if name else []
        modules.append(
            {
                "name": name or "model",
                "cls": type(module).__name__,
                "file": file,
                "line": line,
                "parameters": count_parameters(module),
                "flops": call.flops if call else 0,
                "input": call.input if call else None,
                "output": call.output if call else None,
                "depth": sum(".".join(parts[:i]) in shown for i in range(len(parts))),
                "ms": rounded(1000 * call.seconds) if call else None,
                "copies": copies,
            }
        )
    return modules


def source_of(cls: type) -> tuple[str, int]:
    """Returns file and line of a class: below this project's root, or from its package's name on (torch/nn/...)."""
    path = Path(inspect.getsourcefile(cls))
    _, line = inspect.getsourcelines(cls)
    packages = Path(torch.__file__).parents[1]  # perhaps below ROOT, in .venv
    return path.relative_to(packages if path.is_relative_to(packages) else ROOT).as_posix(), line


def count_parameters(module: nn.Module) -> int:
    """Counts weights; those of a quantized Linear are buffers."""
    quantized = (part for part in module.modules() if isinstance(part, QuantizedLinear))
    n_quantized = sum(part.in_features * part.out_features for part in quantized)
    return n_quantized + sum(parameter.numel() for parameter in module.parameters())


# --- numbers and texts ---------------------------------------------------------------------------------


def rounded(x: float | Tensor) -> float:
    """Rounds to four significant digits."""
    return float(f"{float(x):.4g}")


def pack(x: Tensor, per_cell: int = 1) -> dict:
    """Returns non-negative numbers as {"shape", "scale", "data", "per_cell"}, with a byte for each number.

    data: base64. A number is byte / 255 * scale. per_cell: what the numbers are means of: so many positions, or a
    square of so many patches a side.
    """
    scale = rounded(x.max()) if x.numel() else 0.0
    bytes_ = (x / scale * 255).round().clamp(max=255).byte() if scale > 0 else torch.zeros(x.shape, dtype=torch.uint8)
    data = base64.b64encode(bytes_.numpy().tobytes()).decode()
    return {"shape": list(x.shape), "scale": scale, "data": data, "per_cell": per_cell}


def thin_maps(maps: Tensor, k: int) -> Tensor:
    """Means of squares of k x k patches: [.., P] to [.., cells], row by row. At the edge a square may be cut."""
    grid_size = math.isqrt(maps.shape[-1])
    squares = maps.reshape(-1, 1, grid_size, grid_size)
    return F.avg_pool2d(squares, k, ceil_mode=True).view(*maps.shape[:-1], -1)


def thin_positions(attention: Tensor, k: int) -> Tensor:
    """Means of k positions: [T] to [cells]. The last cell may have fewer."""
    return F.avg_pool1d(attention[None], k, ceil_mode=True)[0]


def token_text(token: int, tokenizer: Tokenizer) -> str:
    """Returns the text of one token with its leading space, and control characters escaped."""
    if not 0 <= token < tokenizer.vocab_size:  # a model's vocabulary may be larger
        return f"<{token}>"
    text = tokenizer.processor.id_to_piece(token)
    if tokenizer.processor.is_byte(token):  # such as <0x0A>
        value = int(text[1:-1], 16)
        text = chr(value) if value < 128 else text
    text = text.replace("\u2581", " ")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
