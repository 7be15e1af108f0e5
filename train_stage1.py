"""Stage 1: the owl learns to see (Owl1 section 3.2, Owl2 section 3.3).

From pairs of images and captions. The language model stays frozen, so that it forgets nothing; the
vision tower and the abstractor learn to speak to it. In Owl2 the image half of the modality-adaptive
module (its K/V projections and norms for image words) is trained as well.

From CLIP's and LLaMA's weights, on one GPU, on eight, and on two nodes of eight (the last line on both nodes):

    python train_stage1.py --preset owl2-7b --clip clip-vit-large-patch14 --llama Llama-2-7b-hf \\
        --data 'laion/*.tar' --out runs/stage1 --micro 32 --workers 8
    torchrun --nproc_per_node=8 train_stage1.py --preset owl2-7b --clip ... --llama ... \\
        --mix 'laion/*.tar':4 coco.json:1 --out runs/stage1 --micro 32 --workers 8
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=FIRST_NODE:29500 train_stage1.py ...

(The folder of --out must be the same on both nodes.) --weights FOLDER starts from a model instead (the tiny owl does,
with numbers of its own: see the Makefile). A JSON file of captions does as well as tar shards.

Look at the data first with --check, at what is trained and whether it fits with --dry-run; continue a run that
stopped with --resume.
"""

from launch import fail, initial_weights, parser, prepare, start_model
from model import Owl
from parallel import start_process
from train import Recipe, train
from weights import save_model, start_from

# The papers' numbers (Owl1 section 3.2, Owl2 section 3.3 and its appendix).
OWL1 = Recipe(
    steps=50_000,
    warmup=2_000,
    batch=4_096,
    lr=1e-4,
    min_lr=0.0,
    betas=(0.9, 0.98),
    eps=1e-6,
    weight_decay=0.1,
    grad_clip=1.0,
    max_length=512,
    image_size=224,
    crop_scale=0.5,
)
OWL2 = Recipe(
    steps=42_500,
    warmup=1_000,
    batch=8_192,
    lr=1e-4,
    min_lr=1e-6,
    betas=(0.9, 0.98),
    eps=1e-6,
    weight_decay=0.05,
    grad_clip=1.0,
    max_length=256,
    image_size=224,
    vit_lr_decay=0.9,
    crop_scale=0.5,
)
RECIPES = {"owl1": OWL1, "owl2": OWL2}


def choose_trained(model: Owl, freeze_vit: bool = False) -> None:
    """Trains the vision tower, the abstractor and, in Owl2, the image half of the modality-adaptive module."""
    model.requires_grad_(True)
    model.vit.requires_grad_(not freeze_vit)
    for name, parameter in model.llama.named_parameters():
        parameter.requires_grad_(".multiway.1." in name)


def main() -> None:
    p = parser(__doc__)
    g = p.add_argument_group("starting from parts (with --preset)")
    g.add_argument("--clip", metavar="FOLDER", help="openai/clip-vit-large-patch14, as safetensors")
    g.add_argument("--llama", metavar="FOLDER", help="huggyllama/llama-7b for Owl1, meta-llama/Llama-2-7b-hf for Owl2")
    p.add_argument("--freeze-vit", action="store_true", help="leave the vision tower as it is")
    args = p.parse_args()
    try:
        place = start_process(args.device, args.precision)
        if (args.clip or args.llama) and not (args.preset and args.clip and args.llama and not args.weights):
            raise ValueError("--clip, --llama and --preset go together, and without --weights")
        args.tokenizer = args.tokenizer or args.llama
        model, tokenizer, recipe = start_model(args, RECIPES)
        choose_trained(model, args.freeze_vit)
        if args.clip:
            tensors = start_from(model.config, args.clip, args.llama)
        else:
            tensors = initial_weights(args, model.config)
        run = prepare(args, recipe, place, model, tokenizer, tensors)
    except (ValueError, OSError) as error:
        fail(error)
    train(run, save_model)


if __name__ == "__main__":
    main()
