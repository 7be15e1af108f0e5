"""LoRA: fine-tuning by a small correction to each weight (arXiv 2106.09685; Owl1 section 3.2).

The weight W of a Linear stays frozen. Beside it stand two thin matrices, trained:

    x [.., n_in] --- W [n_out, n_in] ------------------------------------+--> y [.., n_out]
        |                                                                |
        +-- dropout -- A [rank, n_in] -- B [n_out, rank] -- * alpha/rank +

B starts at zero, so a fresh adapter changes nothing. For use without a cost,
B A alpha/rank is added into W (`merge`); the old W is kept, so that `unmerge` is exact.

Adapters are saved as PEFT saves them: adapter_config.json, and
adapter_model.safetensors with the keys base_model.model.NAME.lora_A.weight.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PREFIX = "base_model.model."


class LoRALinear(nn.Linear):
    """A frozen Linear and its correction."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        nn.Module.__init__(self)  # not nn.Linear's, which would make another weight
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        for parameter in linear.parameters():
            parameter.requires_grad_(False)
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.register_buffer("unmerged_weight", None, persistent=False)
        place = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, **place)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, **place)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=5**0.5)
        nn.init.zeros_(self.lora_B.weight)
        self.train(linear.training)  # no dropout on a model that is in use

    @property
    def merged(self) -> bool:
        return self.unmerged_weight is not None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.merged:
            return y
        x = F.dropout(x, self.dropout, self.training)
        return y + self.lora_B(self.lora_A(x)) * self.scale


def adapted(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The (name, module) pairs of a model's wrapped Linears."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def wrap(model: nn.Module, targets: tuple[str, ...], rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Freezes the model and puts an adapter on every Linear whose name ends with one of `targets`.

    A target is a whole name or its last parts: "q_proj", "k_proj.multiway.0". Raises ValueError if one
    matches no Linear, or if the model has an adapter already.
    """
    if any(adapted(model)):
        raise ValueError("the model has an adapter already; load the model anew for another one")
    if rank < 1:
        raise ValueError(f"an adapter's rank is 1 or more, not {rank}")
    chosen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{target}") for target in targets):
            chosen[name] = module
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in chosen):
            raise ValueError(f"no Linear of the model is called {target}")
    model.requires_grad_(False)
    for name, linear in chosen.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(linear, rank, alpha, dropout))


def initial(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) for fresh matrices of every adapter, float32, for a model that was made without memory."""
    for name, module in adapted(model):
        matrix = torch.empty(module.rank, module.in_features)
        nn.init.kaiming_uniform_(matrix, a=5**0.5)
        yield f"{name}.lora_A.weight", matrix
        yield f"{name}.lora_B.weight", torch.zeros(module.out_features, module.rank)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Adds each correction into its weight: computed in float32, rounded once to the weight's dtype."""
    for _, module in adapted(model):
        if not module.merged:
            module.unmerged_weight = module.weight.data
            correction = module.lora_B.weight.float() @ module.lora_A.weight.float() * module.scale
            module.weight.data = (module.weight.float() + correction).to(module.weight.dtype)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Puts the weights from before `merge` back, bit for bit."""
    for _, module in adapted(model):
        if module.merged:
            module.weight.data = module.unmerged_weight
            module.unmerged_weight = None


def save(model: nn.Module, folder: str | Path, official: Callable[[str], str] = str, base: str = "") -> None:
    """Writes the adapter alone, as PEFT does.

    official: turns a module's name into the one it has in the released model. base: the folder or hub name
    of the model that the adapter belongs to. Raises ValueError if the model has no adapter.
    """
    modules = dict(adapted(model))
    if not modules:
        raise ValueError("the model has no adapter to save")
    tensors = {}
    for name, module in modules.items():
        for matrix in ("lora_A", "lora_B"):
            key = f"{PREFIX}{official(name)}.{matrix}.weight"
            tensors[key] = getattr(module, matrix).weight.detach().contiguous()
    first = next(iter(modules.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "target_modules": [official(name) for name in modules],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "adapter_model.safetensors.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(folder / "adapter_model.safetensors")
    part = folder / "adapter_config.json.part"
    part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    part.replace(folder / "adapter_config.json")


def load(model: nn.Module, folder: str | Path, official: Callable[[str], str] = str) -> None:
    """Wraps the model as an adapter's files say, and loads them (adapter_model.safetensors or .bin).

    official: as in `save`. Raises FileNotFoundError or ValueError, in one sentence, if the files are missing
    or corrupt, use a kind of LoRA other than the plain one, or do not fit the model.
    """
    folder = Path(folder)
    config_path = folder / "adapter_config.json"
    if not config_path.is_file():
        raise FileNotFoundError(f"{folder} is not an adapter: it has no adapter_config.json")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        rank = int(config["r"])
        alpha = float(config["lora_alpha"])
        dropout = float(config.get("lora_dropout", 0.0))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{config_path} cannot be used: {type(error).__name__} {error}") from None
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{config_path} is of peft_type {config['peft_type']!r}; only LORA is supported")
    if rank < 1:
        raise ValueError(f"{config_path} gives a rank of {rank}")
    if not 0 <= dropout < 1:
        raise ValueError(f"{config_path} gives a dropout of {dropout}")
    variants = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out")
    for key in variants:
        if config.get(key):
            raise ValueError(f"{config_path} sets {key}, which is not supported")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{config_path} trains biases, which is not supported")
    path, tensors = _read_adapter(folder)
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(key, str) for key in tensors):
        raise ValueError(f"{path} holds no adapter's tensors")
    ours = {official(name): name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    matrices = {}
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {key} is no tensor")
        name, _, leaf = key.removeprefix(PREFIX).rpartition(".lora_")
        if not key.startswith(PREFIX) or leaf not in ("A.weight", "B.weight") or name not in ours:
            raise ValueError(f"{path} has a tensor {key}, which no Linear of the model takes")
        linear = model.get_submodule(ours[name])
        shape = (rank, linear.in_features) if leaf == "A.weight" else (linear.out_features, rank)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{path}: {key} has shape {list(tensor.shape)}, but the model's is {list(shape)}")
        matrices[f"{ours[name]}.lora_{leaf}"] = tensor
    names = {matrix.rpartition(".lora_")[0] for matrix in matrices}
    missing = [name for name in names for leaf in "AB" if f"{name}.lora_{leaf}.weight" not in matrices]
    if missing:
        raise ValueError(f"{path} has only one of the two matrices for {official(missing[0])}")
    wrap(model, tuple(names), rank, alpha, dropout)
    with torch.no_grad():
        for matrix, tensor in matrices.items():
            model.get_parameter(matrix).copy_(tensor)


def _read_adapter(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    path = folder / "adapter_model.safetensors"
    try:
        if path.is_file():
            return path, load_file(path)
        path = folder / "adapter_model.bin"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds neither adapter_model.safetensors nor adapter_model.bin")
        return path, torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # torch.load fails in many ways on files that are cut or something else
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(f"{path} cannot be read, it seems truncated or corrupt ({reason})") from None
