"""What a stage's folder says is true: who made what lies there, of what, and that it is all there.

Each test is a way that was found to make it say something else.
"""
import json
import os
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
import stage1_cam as stage1
import stage2_weakclip as stage2
import stage3_segment as stage3
from eval import write_json, write_label
from test_checkpoints import COMMANDS, World


def contents(folder):
    """{file: what it holds}."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Finished runs of all stages."""
    with pytest.MonkeyPatch.context() as patch:
        yield World(tmp_path_factory.mktemp("world"), patch)


@pytest.fixture()
def refused(world, capsys):
    """refused(stage, options...): the one line that its command ends with; no file is changed."""
    def call(stage, *options):
        before = contents(world.folder / "runs")
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            world.main(stage, *options)
        said = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
        assert end.value.code == 2 and "Traceback" not in "".join(said)
        assert contents(world.folder / "runs") == before
        return said[-1]
    return call


RECORDS = [None, {}, {"options": {}}, {"options": {}, "digests": []},
           {"digests": {}}, {"options": None, "digests": None}, {"finished": True}]


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("stage", COMMANDS)
def test_without_its_record_a_folder_is_nobodys(stage, record, world, refused):
    """Else another command, with other options, would take its checkpoint and masks for its own."""
    path = world.path(stage).parent / "args.json"
    kept = path.read_bytes()
    path.unlink()
    if record is not None:
        path.write_text(json.dumps(record))
    try:
        said = refused(stage, "--seed", "7")
        assert str(path) in said and "--overwrite" in said
    finally:
        path.write_bytes(kept)


def test_finished_is_true_and_no_other_word(world, tmp_path):
    for word in ("false", 1, "True", [0]):
        write_json(tmp_path / "args.json", {"finished": word})
        assert not stage1.is_finished(tmp_path)


def test_a_command_does_not_delete_its_own_input(world, refused):
    """--overwrite deletes the folder, and then there would be nothing to learn from."""
    for stage, option in (("2_weakclip", "--seeds"), ("3_segment", "--masks")):
        mine = world.path(stage).parent / "mine"
        shutil.copytree(world.data / "seeds", mine)
        assert f"{option} {mine}: lies in" in refused(stage, "--overwrite", option, mine)
        shutil.rmtree(mine)
    own = world.path("2_weakclip")
    assert "--checkpoint" in refused("2_weakclip", "--overwrite", "--checkpoint", own)


def test_photos_are_not_deleted_for_their_masks(world, refused, tmp_path):
    photos = world.path("3_segment").parent / "images" / "holiday"
    photos.mkdir(parents=True)
    (photos / "beach.jpg").write_bytes((world.photos / "train_0.jpg").read_bytes())
    assert "lies in" in refused("3_segment", "--images", photos)


def test_a_folder_has_one_name(world, tmp_path):
    """By a link's name two commands could be at work in it, each with a lock of its own."""
    (tmp_path / "real").mkdir()
    (tmp_path / "1_cam").symlink_to(tmp_path / "real")
    machine = SimpleNamespace(main=True, wait=lambda: None)
    with pytest.raises(ValueError, match="1_cam: a link"):
        with stage1.work_on(tmp_path / "1_cam", None, machine):
            pass
    (tmp_path / "runs").symlink_to(tmp_path / "real")  # a folder above may be one
    with stage1.work_on(tmp_path / "runs" / "1_cam", None, machine):
        with pytest.raises(ValueError, match="another command is at work there .process"):
            with stage1.work_on(tmp_path / "real" / "1_cam", None, machine):
                pass


def test_processes_that_outlive_a_killed_one_do_not_hold_its_lock(tmp_path):
    lock = stage1.take_lock(tmp_path / "1_cam")
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        lock.close()  # as the system does when a process is killed
        for _ in range(100):  # the child may not have got so far
            try:
                stage1.take_lock(tmp_path / "1_cam").close()
                break
            except ValueError:
                time.sleep(0.05)
        else:
            raise AssertionError("the child holds the lock")
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_half_files_of_another_command_at_work_stay(tmp_path):
    """--images has a folder and a lock of its own in the stage's folder."""
    names = [".args.json.7.part", "masks/val/.a.png.7.part", "images/holiday/.a.png.7.part"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    stage1.clear_leftovers(tmp_path)
    assert [(tmp_path / name).exists() for name in names] == [False, False, True]
    stage1.clear_leftovers(tmp_path / "images" / "holiday")
    assert not (tmp_path / names[2]).exists()


def test_a_checkpoint_that_a_training_replaces_is_noticed(world, monkeypatch):
    """What was loaded is one file, and its digest in the record would be another's."""
    saved = world.saved["2_weakclip"]

    def replacing(path):
        torch.save({**saved, "step": saved["step"] + 1}, path)
        return saved
    args = stage2.parse_args(world.arguments("2_weakclip"))
    machine = stage1.Machine("cpu", False)
    monkeypatch.setattr(stage2, "read_checkpoint", replacing)
    with pytest.raises(ValueError, match="checkpoint.pt: has changed while"):
        stage2.open_checkpoint(world.path("2_weakclip"), args, machine)
    monkeypatch.setattr(stage3, "read_checkpoint", replacing)
    args = stage3.parse_args([*world.arguments("3_segment"), "--images", str(world.photos)])
    with pytest.raises(ValueError, match="checkpoint.pt: has changed while"):
        stage3.label_photos(args)
    for stage in ("2_weakclip", "3_segment"):
        torch.save(world.saved[stage], world.path(stage))


@pytest.mark.parametrize("stage", ["2_weakclip", "3_segment"])
def test_labels_that_change_while_they_are_learned_from_are_noticed(stage, world, monkeypatch,
                                                                     capsys, tmp_path):
    """Stage 2's masks made anew while stage 3 learns from them: it has seen both kinds."""
    module = COMMANDS[stage][0]
    seeds = world.data / "seeds"
    victim = sorted(seeds.iterdir())[0]
    kept = victim.read_bytes()
    real = module.train

    def changing(*args):
        real(*args)
        write_label(victim, 255 - np.zeros(evaluation.read_label(victim).shape, np.uint8))
    monkeypatch.setattr(module, "train", changing)
    option = "--seeds" if stage == "2_weakclip" else "--masks"
    given = ["--runs", tmp_path, option, seeds]
    try:
        with pytest.raises(SystemExit):
            world.main(stage, *given)
        assert "seeds: has changed while this command" in capsys.readouterr().err
        folder = tmp_path / "drawn" / stage
        assert not stage1.is_finished(folder) and not (folder / "masks").exists()
        with pytest.raises(SystemExit):  # and it does not go on from there
            world.main(stage, *given)
        assert "give --overwrite to start afresh" in capsys.readouterr().err
    finally:
        victim.write_bytes(kept)


@pytest.mark.parametrize("stage", COMMANDS)
def test_no_mask_is_made_of_what_is_no_number(stage, world, capsys):
    """Weights can be finite and so large that what they make of a photo is not."""
    saved = dict(world.saved[stage])
    saved["model"] = {name: tensor * 1e30 if tensor.is_floating_point() else tensor
                      for name, tensor in saved["model"].items()}
    torch.save(saved, world.path(stage))
    folder = world.path(stage).parent
    made = sorted(folder.rglob("*.png" if stage != "1_cam" else "*.npz"))
    made = [path for path in made if path.name != "preview.png"]
    kept = {path: path.read_bytes() for path in made}
    for path in made:
        path.unlink()
    try:
        with pytest.raises(SystemExit):
            world.main(stage)
        said = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
        assert "answer is infinite or no number" in said, said
        assert not any(path.exists() for path in made) and not stage1.is_finished(folder)
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
        torch.save(world.saved[stage], world.path(stage))
        stage1.mark_finished(folder)


@pytest.mark.parametrize("option, value", [("--seed", 2 ** 31), ("--iters", 10 ** 10),
                                           ("--crop", 32 << 20)])
def test_numbers_that_no_run_can_have(option, value, refused):
    assert f"{option} {value}: at most" in refused("1_cam", option, value)


def test_another_option_is_told_whole_and_another_input_in_short(tmp_path):
    options = {"set": ["boundary_weight=0"]}
    before = {"options": {"set": ["boundary_weight=1"]}, "digests": {"seeds": 64 * "a"}}
    with pytest.raises(ValueError, match="boundary_weight=1.*boundary_weight=0"):
        stage1.refuse_another_run(tmp_path, before, options, before["digests"], ())
    with pytest.raises(ValueError, match="seeds = a{16}, now it is b{16}: what it is made of has changed"):
        stage1.refuse_another_run(tmp_path, before, before["options"], {"seeds": 64 * "b"}, ())
