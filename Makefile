# make demo         ask the model in checkpoints/tiny-owl2 about an image
# make test         run the tests, except those marked slow (under five minutes on two cores)
# make test-slow    run all tests
# make tiny         train checkpoints/tiny-owl2 again, into runs/tiny-owl2/stage2 (half an hour on two cores)
# make tiny-owl1    train checkpoints/tiny-owl1 again; stage 2 trains LoRA and the abstractor

PYTHON := .venv/bin/python
DATA := data/easy_vqa
TINY := runs/tiny-owl2
TINY1 := runs/tiny-owl1
TINY_FLAGS := --image-size 64 --batch 32 --micro 32 --vit-lr-decay 1 --val-every 200 --workers 1

demo: .venv/run
	$(PYTHON) sample.py --image assets/blue-rectangle.png --prompt "what color is the shape?"

test: .venv/dev
	$(PYTHON) -m pytest -q -m "not slow"

test-slow: .venv/dev
	$(PYTHON) -m pytest -q

tiny: .venv/dev
	$(PYTHON) $(DATA)/prepare.py
	$(PYTHON) -m tools.train_language --preset tiny-owl2 --tokenizer $(DATA)/tokenizer.model --out $(TINY)/stage0 \
	    --data $(DATA)/text.json --val $(DATA)/text_val.json $(TINY_FLAGS)
	$(PYTHON) train_stage1.py --weights $(TINY)/stage0 --out $(TINY)/stage1 \
	    --data $(DATA)/captions.json --val $(DATA)/captions_val.json $(TINY_FLAGS) \
	    --steps 2200 --warmup 100 --lr 1.5e-3 --min-lr 1e-4 --crop-scale 0.8
	$(PYTHON) train_stage2.py --weights $(TINY)/stage1 --out $(TINY)/stage2 \
	    --data $(DATA)/train.json --val $(DATA)/val.json $(TINY_FLAGS) \
	    --steps 1500 --warmup 100 --lr 1e-3 --min-lr 1e-5 --crop-scale 0.8 --weight-decay 0.05 --max-length 512
	$(PYTHON) evaluate.py --data $(DATA)/test.json --weights $(TINY)/stage2
	$(PYTHON) evaluate.py --data $(DATA)/test.json --weights $(TINY)/stage2 --images blank
	$(PYTHON) evaluate.py --data $(DATA)/test.json --weights $(TINY)/stage2 --images shuffled

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

.venv/run: requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(PYTHON) -m pip install --quiet -r requirements-dev.txt
	touch $@

.PHONY: demo test test-slow tiny tiny-owl1
