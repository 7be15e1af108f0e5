"""experiments/probes.py: the probes themselves, what is asked, the layers that are read, and the page."""

import argparse
import json
import random

import pytest
import torch

from data.shapes.prepare import Object, Scene, make_scene
from experiments import probes
from experiments.lab import Lab, Setup, create_model
from training.presets import init_weights

N_TRAIN, N_TEST = 200, 100


def test_a_probe_reads_what_is_linear_and_nothing_else():
    """Of three classes. The standard error of a guess is 2.1 points."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 20, generator=generator)
    linear = (x @ torch.randn(20, 3, generator=generator)).argmax(1).tolist()
    guessed = torch.randint(3, (1500,), generator=generator).tolist()
    rare = [answer if i % 2 else None for i, answer in enumerate(linear)]
    asked = {"linear": [linear], "guessed": [guessed], "both": [linear, guessed], "rare": [rare]}
    found = probes.probe_all(x, asked, 1000)
    assert found["linear"] > 85 and found["rare"] > 80
    assert 20 < found["guessed"] < 46
    assert found["both"] == pytest.approx((found["linear"] + found["guessed"]) / 2)


def test_the_kernel_form_equals_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    classes = torch.randint(4, (20,), generator=generator)
    kernel, ridge = x @ x.T, 0.3
    penalty = ridge * kernel[:20, :20].diagonal().mean() * torch.eye(8)
    targets = torch.nn.functional.one_hot(classes).double()
    expected = x[20:] @ torch.linalg.solve(x[:20].T @ x[:20] + penalty, x[:20].T @ targets)
    torch.testing.assert_close(kernel[20:, :20] @ probes.fit(kernel[:20, :20], classes, ridge), expected)


def test_questions():
    objects = Object("circle", "blue", "big", 1, 0), Object("ring", "red", "big", 2, 1), Object("ring", "blue", "big", 0, 1)
    asked = probes.questions([Scene(objects, "B A"), Scene(objects[:1], "K O T")])
    assert asked["color of a shape"][0] == [2, 2]  # the circles
    assert asked["color of a shape"][4] == [None, None]  # two rings, and none
    assert asked["cell of a shape"][0] == [1, 1]
    assert [lists[0] for lists in asked["color in a cell"]] == [None, 2, None, 2, None, 0]
    assert asked["count"] == [[2, 0]]
    assert asked["word"] == [[1, 10], [0, 14], [None, 19]]
    assert probes.most_frequent([1, 1, None, 0, 1, 0], 4) == 50


def test_layers_are_those_of_the_model():
    model = init_weights(create_model(Setup())).eval()
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = probes.layers(model, pixels)
    assert list(found)[:2] == ["pixels", "encoder 0"] and list(found)[-2:] == ["abstractor 2", "visual tokens"]
    with torch.no_grad():
        assert torch.equal(found["patch features"], model.vit(pixels)[:, 1:].flatten(1))
        assert torch.equal(found["visual tokens"], model.encode_images(pixels)[:, :-1].flatten(1))
    assert not any(module._forward_hooks for module in model.modules())


def test_page(tmp_path, monkeypatch):
    lab = Lab(argparse.Namespace(out=tmp_path, jobs=1, seeds=2, images=40, scale=1.0))
    monkeypatch.setattr(probes, "N_TRAIN", N_TRAIN)
    monkeypatch.setattr(probes, "N_TEST", N_TEST)
    setups = probes.SETUPS | {"random abstractor": Setup(), "all random": Setup()}
    monkeypatch.setattr(probes, "models", lambda lab, seed: [(n, init_weights(create_model(s))) for n, s in setups.items()])
    for seed in lab.seeds:
        (tmp_path / f"seed{seed}").mkdir()
        probes.measure(lab, seed)
    probes.write_page(lab)
    page = (tmp_path / "probes.md").read_text()
    assert "| 16 queries: abstractor 1 | 2,048 |" in page and "| 64 patches: visual tokens | 4,096 |" in page
    assert "16 queries - 64 patches" in page and "What this does not show" in page
    numbers = json.loads((tmp_path / "probes.json").read_text())
    assert len(numbers["16 queries"]["pixels"]["count"]) == 2 and "pixels" not in numbers["64 queries"]
    assert (tmp_path / "probes.png").read_bytes().startswith(b"\x89PNG")


def test_scenes_have_all_classes():
    rng = random.Random(0)
    asked = probes.questions([make_scene(rng) for _ in range(1000)])
    assert [len(lists) for lists in asked.values()] == [6, 6, 6, 1, 3]
    assert {len(set(one) - {None}) for name in ("color of a shape", "color in a cell") for one in asked[name]} <= {5, 6}
