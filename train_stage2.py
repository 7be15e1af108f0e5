"""Stage 2: the owl learns to answer (Owl1 section 3.2, Owl2 section 3.3).

From conversations, about images and not. Owl1 keeps everything frozen and trains LoRA adapters on the
language model's q_proj and v_proj. Owl2 trains everything, the vision tower's lower layers ever more slowly.

On one GPU, on eight, and on two nodes of eight (the last line on both nodes, with the same --out on both):

    python train_stage2.py --weights runs/stage1 --data my.json --out runs/stage2 --micro 4 --workers 8
    torchrun --nproc_per_node=8 train_stage2.py --weights runs/stage1 --out runs/stage2 --micro 4 --workers 8 \\
        --mix llava.json:158 vqa.json:83 sharegpt.json:40
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=FIRST_NODE:29500 train_stage2.py ...

Fine-tune the released Owl2 as its own scripts do, by LoRA on every Linear of the decoder, the ViT frozen, images
padded (then ask with --fit pad as well):

    torchrun --nproc_per_node=8 train_stage2.py --weights mplug-owl2-llama2-7b --data my.json --out runs/mine \\
        --micro 4 --lora-rank 128 --lora-alpha 256 --lr 1e-4 --min-lr 0 --fit pad

Look at the data first with --check, at what is trained and whether it fits with --dry-run; continue a run that
stopped with --resume. With LoRA, OUT/adapter holds the adapter alone in PEFT's files, and OUT the model with the
adapter merged.
"""

import math
from pathlib import Path

import lora
from launch import fail, initial_weights, parser, prepare, start_model
from model import Owl
from parallel import start_process
from train import Recipe, train
from weights import official_name, save_model, save_non_lora

# The papers' numbers. Owl1's batch is 128 texts and 128 conversations about images: --mix texts.json:1 images.json:1.
# The released scripts differ: Owl1's run 3 epochs with a linear decay to 0, Owl2's freeze the ViT and use LoRA.
OWL1 = Recipe(
    steps=2_000,
    warmup=50,
    batch=256,
    lr=2e-5,
    min_lr=1e-6,
    betas=(0.9, 0.999),
    eps=1e-6,
    weight_decay=1e-4,
    grad_clip=1.0,
    max_length=1_024,
    image_size=224,
)
OWL2 = Recipe(
    steps=4_800,
    warmup=250,
    batch=256,
    lr=2e-5,
    min_lr=1e-7,
    betas=(0.9, 0.98),
    eps=1e-6,
    weight_decay=0.0,
    grad_clip=1.0,
    max_length=2_048,
    image_size=448,
    vit_lr_decay=0.9,
)
RECIPES = {"owl1": OWL1, "owl2": OWL2}
LORA_RANK = {"owl1": 8, "owl2": 0}  # 0: none, everything is trained
LORA_TARGETS = {
    "owl1": ("q_proj", "v_proj"),
    "owl2": (
        "q_proj",
        "k_proj.multiway.0",
        "k_proj.multiway.1",
        "v_proj.multiway.0",
        "v_proj.multiway.1",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ),
}


def choose_trained(
    model: Owl, rank: int, alpha: float, dropout: float, train_abstractor: bool, freeze_vit: bool = False
) -> None:
    """Without a rank, everything; with one, adapters on the language model and, if asked for, the abstractor."""
    model.requires_grad_(rank == 0)
    model.vit.requires_grad_(rank == 0 and not freeze_vit)
    if rank > 0:
        lora.wrap(model.llama, LORA_TARGETS[model.config.style], rank, alpha, dropout)
        model.abstractor.requires_grad_(train_abstractor)


def main() -> None:
    p = parser(__doc__)
    g = p.add_argument_group("LoRA")
    g.add_argument("--lora-rank", type=int, help="0: train everything (default: 8 for Owl1, 0 for Owl2)")
    g.add_argument("--lora-alpha", type=float, default=32.0, help="alpha / rank weighs the correction (default 32)")
    g.add_argument("--lora-dropout", type=float, default=0.05)
    g.add_argument("--train-abstractor", action="store_true", help="beside the adapters, as Owl1's abstract has it")
    p.add_argument("--freeze-vit", action="store_true", help="leave the vision tower as it is (LoRA does so anyway)")
    args = p.parse_args()
    try:
        place = start_process(args.device, args.precision)
        model, tokenizer, recipe = start_model(args, RECIPES)
        rank = LORA_RANK[model.config.style] if args.lora_rank is None else args.lora_rank
        if rank < 0 or not 0 <= args.lora_dropout < 1 or not 0 < args.lora_alpha < math.inf:
            raise ValueError("--lora-rank is 0 or more, --lora-alpha above 0, --lora-dropout from 0 to below 1")
        choose_trained(model, rank, args.lora_alpha, args.lora_dropout, args.train_abstractor, args.freeze_vit)
        run = prepare(args, recipe, place, model, tokenizer, initial_weights(args, model.config))
    except (ValueError, OSError) as error:
        fail(error)

    def finish(model: Owl, out: Path) -> None:
        if rank > 0:
            save_non_lora(model, out / "adapter")
            lora.save(model, out / "adapter", lambda name: official_name(name, model.config.style), args.weights)
            lora.merge(model)
        save_model(model, out)

    train(run, finish)


if __name__ == "__main__":
    main()
