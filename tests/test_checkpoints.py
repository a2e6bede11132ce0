"""A checkpoint that is not what a run has written is one line, whoever reads it.

Each row of DAMAGES is done to the checkpoint of each stage, and read by all who read it: the run
that goes on, stage 2's --checkpoint, and --images of stages 2 and 3.
"""
import functools
import math
import sys

import pytest
import torch
import torchvision

import eval as evaluation
import stage1_cam as stage1
import stage2_weakclip as stage2
import stage3_segment as stage3
from conftest import draw_dataset, tiny_clip
from test_faults import RESNET, SMALL, TinyResNet

COMMANDS = {"1_cam": (stage1, RESNET), "2_weakclip": (stage2, ["--scales", "1", "--no-crf"]),
            "3_segment": (stage3, [*RESNET, "--scales", "1", "--no-crf"])}


def put(*keys, value):
    """A damage: saved[key][key]... = value."""
    def damage(saved):
        for key in keys[:-1]:
            saved = saved[key]
        saved[keys[-1]] = value
    return damage


def drop(*keys):
    """A damage: saved[key][key]... is not there."""
    def damage(saved):
        for key in keys[:-1]:
            saved = saved[key]
        del saved[keys[-1]]
    return damage


def weight(change):
    """A damage to the first weight, which is never a whole number."""
    def damage(saved):
        name = next(iter(saved["model"]))
        saved["model"][name] = change(saved["model"][name])
    return damage


def moment(change):
    """A damage to what the optimizer keeps of the first parameter."""
    def damage(saved):
        state = saved["optimizer"]["state"]
        state[0] = {name: change(tensor) for name, tensor in state[0].items()}
    return damage


def renamed(saved):
    """A damage: a weight under another name."""
    name = next(iter(saved["model"]))
    saved["model"]["another"] = saved["model"].pop(name)


def spoilt(number):
    """A change of a tensor: one of its numbers is this one."""
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = number
        return tensor
    return change


def bigger(tensor):
    """A change of a tensor: another shape."""
    return torch.zeros(*tensor.shape, 2)


# name -> (what is done, who must notice)
EVERYONE, RESUMED = "everyone", "the run that goes on"
DAMAGES = {
    "step is a text": (put("step", value="3"), EVERYONE),
    "step is negative": (put("step", value=-1), EVERYONE),
    "step is 0": (put("step", value=0), EVERYONE),
    "step is huge": (put("step", value=10 ** 12), EVERYONE),
    "step is beyond the run": (put("step", value=5), RESUMED),
    "step is no whole number": (put("step", value=2.5), EVERYONE),
    "step is True": (put("step", value=True), EVERYONE),
    "step is a tensor": (put("step", value=torch.tensor(4)), EVERYONE),
    "no step": (drop("step"), EVERYONE),
    "no model": (drop("model"), EVERYONE),
    "model is a list": (put("model", value=[torch.ones(1)]), EVERYONE),
    "model is empty": (put("model", value={}), EVERYONE),
    "model is of numbers": (put("model", value={"a": 1.0}), EVERYONE),
    "a weight has another name": (renamed, EVERYONE),
    "a weight has another shape": (weight(bigger), EVERYONE),
    "a weight is float64": (weight(torch.Tensor.double), EVERYONE),
    "a weight is float16": (weight(torch.Tensor.half), EVERYONE),
    "a weight is int64": (weight(torch.Tensor.long), EVERYONE),
    "a weight is complex": (weight(lambda tensor: torch.complex(tensor, tensor)), EVERYONE),
    "a weight is NaN": (weight(spoilt(math.nan)), EVERYONE),
    "a weight is infinite": (weight(spoilt(-math.inf)), EVERYONE),
    "no optimizer": (drop("optimizer"), EVERYONE),
    "optimizer is a list": (put("optimizer", value=[]), EVERYONE),
    "optimizer without state": (drop("optimizer", "state"), EVERYONE),
    "state is a list": (put("optimizer", "state", value=[]), EVERYONE),
    "state is empty": (put("optimizer", "state", value={}), RESUMED),
    "state of a text": (put("optimizer", "state", "a", value={"a": torch.ones(1)}), EVERYONE),
    "state of a parameter too many": (put("optimizer", "state", 999, value={"a": torch.ones(1)}),
                                      RESUMED),
    "state of one is empty": (put("optimizer", "state", 0, value={}), EVERYONE),
    "state of one has other names": (put("optimizer", "state", 0, value={"a": torch.ones(1)}),
                                     RESUMED),
    "state of one has another shape": (moment(bigger), RESUMED),
    "state of one is float64": (moment(torch.Tensor.double), EVERYONE),
    "state of one is NaN": (moment(spoilt(math.nan)), EVERYONE),
    "no facts": (drop("facts"), EVERYONE),
    "facts is a text": (put("facts", value="1_cam"), EVERYONE),
    "facts are empty": (put("facts", value={}), EVERYONE),
    "stage is a number": (put("facts", "stage", value=2), EVERYONE),
    "stage is another": (put("facts", "stage", value="4_other"), EVERYONE),
    "no classes": (drop("facts", "classes"), EVERYONE),
    "classes are a text": (put("facts", "classes", value="cat"), EVERYONE),
    "classes are none": (put("facts", "classes", value=[]), EVERYONE),
    "classes are numbers": (put("facts", "classes", value=[0, 1, 2, 3]), EVERYONE),
    "classes are fewer": (put("facts", "classes", value=["background", "cat"]), EVERYONE),
}
OF_STAGE_2 = {
    "no clip": (drop("facts", "clip"), EVERYONE),
    "clip is another": (put("facts", "clip", value="0" * 64), EVERYONE),
    "crop is a text": (put("facts", "crop", value="64"), EVERYONE),
    "crop is odd": (put("facts", "crop", value=63), EVERYONE),
    "crop is huge": (put("facts", "crop", value=32 << 40), EVERYONE),
    "switches are a list": (put("facts", "switches", value=[]), EVERYONE),
    "switches are none": (put("facts", "switches", value={}), EVERYONE),
    "a switch too many": (put("facts", "switches", "colour", value=True), EVERYONE),
    "a switch is a tensor": (put("facts", "switches", "drop_path", value=torch.ones(2)), EVERYONE),
    "a switch is out of range": (put("facts", "switches", "drop_path", value=-1.0), EVERYONE),
}
OF_STAGE_3 = {
    "no arch": (drop("facts", "arch"), EVERYONE),
    "arch is a number": (put("facts", "arch", value=18), EVERYONE),
    "arch is no network": (put("facts", "arch", value="list_models"), EVERYONE),
    "arch is another": (put("facts", "arch", value="resnet50"), EVERYONE),
}
ROWS = [(stage, name, *row) for stage in COMMANDS for name, row in DAMAGES.items()]
ROWS += [("2_weakclip", name, *row) for name, row in OF_STAGE_2.items()]
ROWS += [("3_segment", name, *row) for name, row in OF_STAGE_3.items()]


class World:
    """Finished runs of all stages, and what their training loop was called with."""

    def __init__(self, folder, patch):
        self.folder, self.patch = folder, patch
        self.data = draw_dataset(folder / "drawn", train=4, val=1)
        self.photos = folder / "drawn" / "JPEGImages"
        self.clip = folder / "clip.pt"
        torch.save(tiny_clip().state_dict(), self.clip)
        patch.setattr(torchvision.models, "resnet18", TinyResNet)
        self.fits, self.saved = {}, {}
        for stage, (module, _) in COMMANDS.items():
            with pytest.MonkeyPatch.context() as own:
                own.setattr(module, "fit", self.recorder(stage, stage1.fit))
                self.main(stage)
            self.saved[stage] = torch.load(self.path(stage))

    def recorder(self, stage, real):
        """The training loop, which leaves behind what it was called with."""
        def fit(*args, **kwargs):
            self.fits[stage] = (args, kwargs)
            real(*args, **kwargs)
        return fit

    def path(self, stage):
        """The stage's checkpoint."""
        return self.folder / "runs" / "drawn" / stage / "checkpoint.pt"

    def arguments(self, stage):
        """What its command line is given."""
        given = ["--data", self.data, "--runs", self.folder / "runs", *SMALL, *COMMANDS[stage][1]]
        return [str(word) for word in [*given, *(["--clip", self.clip] if "2" in stage else [])]]

    def main(self, stage, *options):
        """Run its command in this process."""
        with pytest.MonkeyPatch.context() as own:
            own.setattr(sys, "argv", [stage, *self.arguments(stage), *map(str, options)])
            evaluation.run(COMMANDS[stage][0].main)

    def readers(self, stage):
        """{who reads its checkpoints: function}."""
        args, kwargs = self.fits[stage]
        readers = {RESUMED: functools.partial(stage1.fit, *args, **kwargs)}
        parsed = COMMANDS[stage][0].parse_args(self.arguments(stage))
        parsed.images = self.photos
        if stage == "2_weakclip":
            machine = stage1.Machine("cpu", False)
            readers["--checkpoint"] = functools.partial(stage2.open_checkpoint, self.path(stage),
                                                        parsed, machine)
        if stage == "3_segment":
            readers["--images"] = functools.partial(stage3.label_photos, parsed)
        return readers


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The runs, made once."""
    with pytest.MonkeyPatch.context() as patch:
        yield World(tmp_path_factory.mktemp("world"), patch)


def copied(value):
    """A copy whose dicts can be changed; tensors stay the same."""
    return {key: copied(part) for key, part in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("stage, name, damage, who", ROWS, ids=[f"{r[0]}-{r[1]}" for r in ROWS])
def test_a_checkpoint_of_another_form_is_one_line(stage, name, damage, who, world):
    saved = copied(world.saved[stage])
    damage(saved)
    torch.save(saved, world.path(stage))
    for reader, read in world.readers(stage).items():
        if who == EVERYONE or reader == who:
            with pytest.raises(ValueError) as said:
                read()
            line = str(said.value)  # the file, what is wrong, and the mend
            assert line.startswith(str(world.path(stage))) and ";" in line, (reader, line)
            assert "\n" not in line and len(line) < 600, (reader, line)


@pytest.mark.parametrize("stage", COMMANDS)
def test_a_sound_checkpoint_is_read_by_all(stage, world):
    torch.save(world.saved[stage], world.path(stage))
    for read in world.readers(stage).values():
        read()


@pytest.mark.parametrize("stage", COMMANDS)
def test_rates_and_decay_are_the_commands(stage, world):
    """Of the optimizer only what it has gathered comes from the file."""
    saved = copied(world.saved[stage])
    saved["optimizer"]["param_groups"] = [{"weight_decay": "x", "params": [5]}]
    torch.save(saved, world.path(stage))
    args, kwargs = world.fits[stage]
    before = [{**group, "params": None} for group in args[2].param_groups]
    stage1.fit(*args, **kwargs)
    assert before == [{**group, "params": None} for group in args[2].param_groups]


@pytest.mark.parametrize("stage, options", [
    ("1_cam", []), ("2_weakclip", []), ("2_weakclip", ["--checkpoint"]),
    ("2_weakclip", ["--images"]), ("3_segment", []), ("3_segment", ["--images"])])
def test_the_commands_end_with_that_line(stage, options, world, capsys):
    """Each command on a checkpoint with a NaN: status 2, one line; and nothing is made of it."""
    saved = copied(world.saved[stage])
    weight(spoilt(math.nan))(saved)
    torch.save(saved, world.path(stage))
    folder = world.path(stage).parent
    stage1.mark_unfinished(folder)
    files = {"--checkpoint": world.path(stage), "--images": world.photos}
    given = [word for option in options for word in (option, files[option])]
    if "--checkpoint" in options:
        given += ["--runs", world.folder / "other"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        world.main(stage, *given)
    lines = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    assert end.value.code == 2 and lines[-1].startswith(str(world.path(stage))), lines
    assert "infinite or no number); if a run left it so, delete it" in lines[-1]
    assert "Traceback" not in "".join(lines)
    assert not (world.folder / "other").exists() and not stage1.is_finished(folder)


# ============================================================================= released checkpoints

@pytest.fixture(scope="module")
def released():
    """The state dict of a released checkpoint."""
    clip_model = tiny_clip()
    tokens = stage2.name_tokens(("background", "cat"), clip_model.context_length)
    model = stage2.WeakCLIP(clip_model, tokens, stage2.RELEASED, crop=64)
    return {stage2.released_name(name): tensor for name, tensor in model.state_dict().items()
            if name != "clip.logit_scale"}


def every(change):
    """A damage to all tensors."""
    def damage(saved):
        saved["state_dict"] = {name: change(t) for name, t in saved["state_dict"].items()}
    return damage


def rows(name, n):
    """A damage: the first n rows of a tensor are left."""
    def damage(saved):
        saved["state_dict"][name] = saved["state_dict"][name][:n]
    return damage


RELEASED = {
    "a list": put("state_dict", value=[torch.ones(1)]),
    "a tensor": put("state_dict", value=torch.ones(3)),
    "empty": put("state_dict", value={}),
    "numbered": put("state_dict", value={1: torch.ones(1)}),
    "flat": every(lambda tensor: tensor.flatten()),
    "scalars": every(lambda tensor: tensor.flatten()[0]),
    "NaN": every(lambda tensor: tensor * math.nan if tensor.is_floating_point() else tensor),
    "whole numbers": every(torch.Tensor.long),
    "another name": put("state_dict", "another", value=torch.ones(1)),
    "no classes": rows("decode_head.conv_seg.weight", 0),
    "no positions": rows("backbone.positional_embedding", 0),
    "one position": rows("backbone.positional_embedding", 1),
    "positions of no square": rows("backbone.positional_embedding", 11),
    "no text positions": rows("text_encoder.positional_embedding", 0),
    "few text positions": rows("text_encoder.positional_embedding", 9),
    "a context too few": put("state_dict", "contexts", value=torch.ones(1, 8, 3)),
    "no contexts": put("state_dict", "contexts", value=torch.ones(0, 8, 64)),
    "no decoder": put("state_dict", "neck.fpn_convs.0.conv.weight", value=torch.ones(0, 1, 3, 3)),
    "no co-attention": put("state_dict", "context_decoder.text_proj.1.weight",
                           value=torch.ones(0, 64)),
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_checkpoint_of_another_form_is_one_line(name, released, tmp_path):
    saved = {"meta": {"iter": 10}, "state_dict": dict(released)}
    path = tmp_path / "released.pth"
    args = stage2.parse_args(["--data", "x"])
    machine = stage1.Machine("cpu", False)
    torch.save(saved, path)
    classes = ("background", "cat")
    assert stage2.open_checkpoint(path, args, machine, classes)[2] == 10
    RELEASED[name](saved)
    torch.save(saved, path)
    with pytest.raises(ValueError) as said:
        stage2.open_checkpoint(path, args, machine, classes)
    line = str(said.value)
    assert line.startswith(str(path)) and "\n" not in line and len(line) < 600, line
