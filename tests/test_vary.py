"""experiments/run.py: which fields can vary, and what is refused before anything runs."""

import pytest

from experiments import run as vary
from experiments.lab import Setup, create_model
from runs import run_main


def test_a_field_changes_what_depends_on_it():
    one, two = vary.parse_vary("llama.n_layer=1,2").values()
    assert len(create_model(one).llama.layers) == 1 and len(create_model(two).llama.layers) == 2
    assert len({one.language, two.language, Setup().language}) == len({one.stage1, two.stage1, Setup().stage1}) == 3
    few, many = vary.parse_vary("n_query=4,64").values()
    assert create_model(few).config.n_query == 4 and few.language == many.language and few.stage1 != many.stage1
    low, high = vary.parse_vary("lr=1e-4,1e-3").values()
    assert low.recipe == (("--lr", "0.0001"),) and low.stage1 == high.stage1 and low.stage2 != high.stage2
    deep = vary.parse_vary("abstractor.n_layer=1,3")["abstractor.n_layer=3"]
    assert len(create_model(deep).abstractor.layers) == 3 and deep.language == Setup().language
    wide = vary.parse_vary("llama.n_embd=32,64")["llama.n_embd=32"]
    assert create_model(wide).config.abstractor.n_out == 32
    assert vary.parse_vary("adaptive=true,false")["adaptive=false"] == Setup(adaptive=False)


@pytest.mark.parametrize(
    "text, reason",
    {
        "n_query": "NAME=VALUE",
        "n_query=4": "NAME=VALUE",
        "n_query=4,4": "different values",
        "n_query=4,04": "different values",
        "lr=1e-3,0.001": "different values",
        "colour=1,2": "no field 'colour'",
        "patches=true,false": "no field 'patches'",
        "vit.n_layer=2,4": "no field 'vit.n_layer'",
        "n_query=4,many": "cannot be 'many'",
        "lr=1e-3,-1": "above 0",
        "vit=frozen,cold": "trained, layer-wise, frozen",
        "adaptive=true,maybe": "false, true",
        "llama.n_head=4,3": "n_embd, 64, is not a multiple of n_head",
        "image_size=64,60": "not a multiple of the patch size",
        "n_query=16,-1": "above 0",
        "llama.n_layer=0,1": "above 0",
        "llama.rope_theta=nan,1": "above 0",
        "n_layer=1,2": "There are abstractor.n_layer, llama.n_layer\n",
    }.items(),
)
def test_what_cannot_vary_is_refused(tmp_path, text, reason):
    code, stdout, stderr = run_main(vary.main, "--vary", text, "--out", tmp_path / "lab")
    assert code == 2 and stdout == "" and reason in stderr and not (tmp_path / "lab").exists()


def test_one_of_two_flags_is_needed(tmp_path):
    assert run_main(vary.main, "--out", tmp_path)[0] == run_main(vary.main, "--quick", "--vary", "lr=1,2")[0] == 2


@pytest.mark.slow
def test_pages(tmp_path):
    flags = ("--seeds", 2, "--scale", 0.004, "--images", 60, "--out", tmp_path)
    code, stdout, stderr = run_main(vary.main, "--vary", "batch=8,16", *flags)
    assert code == 0 and "vary-batch.md" in stdout, stderr
    page = (tmp_path / "vary-batch.md").read_text()
    assert "batch=16 - batch=8" in page and "The paper reports" not in page
