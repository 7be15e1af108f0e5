"""Using a stopped or finished run: export of a checkpoint, sampling from one, the best checkpoint, a longer run."""

import pytest

import evaluate
import sample
from runs import run_main
from test_train import (  # noqa: F401
    QUICK,
    assert_same_weights,
    lines_of,
    mixed,
    refusal,
    run_stage,
    same_threads,
    start,
    weights_of,
)
from tools import export, quantize

RUN = ("--batch", 4, "--micro-batch", 2, *QUICK)


@pytest.mark.parametrize("variant, more", [("owl2", ()), ("owl1", ("--train-abstractor", "--precision", "bf16"))])
def test_an_exported_checkpoint_equals_what_the_run_wrote(start, mixed, tmp_path, variant, more):  # noqa: F811
    """Bit for bit: everything trained, or an adapter and the abstractor; and sample.py reads it directly."""
    flags = ("--weights", start(variant), "--data", mixed, *RUN, *more)
    run_stage("train_stage2", *flags, "--out", tmp_path / "run", "--steps", 2)
    path = tmp_path / "run" / "checkpoints" / "step-00000002"
    code, _, err = run_main(export.main, "--checkpoint", path, "--out", tmp_path / "model")
    assert code == 0, err
    assert_same_weights(weights_of(tmp_path / "model"), weights_of(tmp_path / "run"))
    assert (tmp_path / "model" / "adapter").is_dir() == (variant == "owl1")
    code, _, err = run_main(evaluate.main, "--data", mixed, "--weights", path)
    assert code == 2 and "tools.export" in err
    answers = []
    for folder in (path, tmp_path / "run"):
        code, out, err = run_main(sample.main, "--weights", folder, "--prompt", "Say it.", "--max-new-tokens", 5)
        assert code == 0, err
        answers.append(out)
    assert answers[0] == answers[1]


def test_a_finished_run_becomes_longer(start, mixed, tmp_path, capsys):  # noqa: F811
    flags = ("--weights", start("owl2"), "--data", mixed, *RUN, "--out", tmp_path / "run")
    run_stage("train_stage2", *flags, "--steps", 4)
    run_stage("train_stage2", *flags, "--steps", 6, "--resume")
    assert "4 steps then, 6 now" in capsys.readouterr().err
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert "steps: 6 then, 5 now" in refusal(capsys, "train_stage2", *flags, "--steps", 5, "--resume")


def test_the_best_checkpoint_is_kept(start, mixed, tmp_path, capsys):  # noqa: F811
    """A learning rate that destroys the model: the first validation is the best."""
    flags = ("--weights", start("owl2"), "--data", mixed, "--val", mixed, *RUN, "--lr", 1, "--warmup", 1)
    flags = (*flags, "--out", tmp_path / "run", "--val-every", 1, "--save-every", 1, "--keep", 1, "--keep-best")
    run_stage("train_stage2", *flags, "--steps", 4)
    losses = {line["step"]: line["val_loss"] for line in lines_of(tmp_path / "run") if "val_loss" in line}
    best = min(losses, key=losses.get)
    kept = {int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {best, 4}
    assert (f"lowest ({losses[best]:.4f}) after step {best}" in capsys.readouterr().err) == (best != 4)


def test_tensorboard_gets_the_numbers_of_the_log(start, mixed, tmp_path, capsys, monkeypatch):  # noqa: F811
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ("--weights", start("owl2"), "--data", mixed, "--val", mixed, *RUN, "--tensorboard", "--steps", 2)
    run_stage("train_stage2", *flags, "--out", tmp_path / "run", "--val-every", 1)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    for name in ("loss", "val_loss", "lr"):
        logged = [(line["step"], line[name]) for line in lines_of(tmp_path / "run") if name in line]
        assert [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)] == logged
    capsys.readouterr()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install tensorboard" in refusal(capsys, "train_stage2", *flags, "--out", tmp_path / "other")


def test_errors_of_export_are_one_line(start, tmp_path, capsys):  # noqa: F811
    for checkpoint in (tmp_path, start("owl2")):
        code, out, err = run_main(export.main, "--checkpoint", checkpoint, "--out", tmp_path / "model")
        assert (code, out, err.count("\n")) == (2, "", 1) and str(checkpoint) in err


def test_quantize_names_the_command_that_merges(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    code, _, err = run_main(quantize.main, "--weights", tmp_path, "--out", tmp_path / "out", "--to", "int8")
    assert code == 2 and f"tools.merge --weights BASE --adapter {tmp_path}" in err


def test_missing_weights_are_reported_as_in_sampling(mixed, tmp_path, capsys):  # noqa: F811
    _, _, expected = run_main(sample.main, "--weights", tmp_path / "gone", "--prompt", "Say it.")
    for stage in ("train_stage1", "train_stage2"):
        flags = ("--weights", tmp_path / "gone", "--data", mixed, "--out", tmp_path / "out")
        assert refusal(capsys, stage, *flags) == expected.strip()
