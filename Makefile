# make demo    ask the embedded model about a picture
# make test    the tests (under five minutes on two cores); make test-slow: all of them
# make tiny    train the embedded model anew, into runs/tiny-owl2 (half an hour on two cores)

PYTHON := .venv/bin/python

demo: .venv/run
	$(PYTHON) sample.py --image assets/blue-rectangle.png --prompt "what color is the shape?"

test: .venv/dev
	$(PYTHON) -m pytest -q -m "not slow"

test-slow: .venv/dev
	$(PYTHON) -m pytest -q

.venv/run: requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(PYTHON) -m pip install --quiet -r requirements-dev.txt
	touch $@

.PHONY: demo test test-slow
