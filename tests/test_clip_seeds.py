"""Seeds from CLIP alone: what must hold for any CLIP and photo, and the script as a user runs it.

Equality with the released code is in test_parity.py.
"""
import copy
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import stage1_cam as stage1
from conftest import ROOT, draw_dataset, read_json, script, tiny_clip
from eval import (COCO_CLASSES, IGNORE, VOC_CLASSES, Dataset, find_dataset, read_label,
                  write_report)


@pytest.fixture(scope="module")
def model():
    """A CLIP with 10 blocks, so that "the last 8" are not all of them."""
    torch.manual_seed(1)
    return stage1.clip.CLIP(embed_dim=48, image_resolution=64, vision_layers=10, vision_width=64,
                            transformer_width=64, transformer_layers=1).requires_grad_(False)


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)


def of_names(classes, texts=None):
    return stage1.class_texts(Dataset(Path(), "any", classes, texts or {}))


# ==================================================================================== texts

def test_vocs_texts_have_four_synonyms_and_25_background_words():
    foreground, background = of_names(VOC_CLASSES)
    changed = {name: text for name, text in zip(VOC_CLASSES[1:], foreground) if name != text}
    assert changed == {"bird": "bird avian", "chair": "chair seat",
                       "tvmonitor": "tvmonitor screen",
                       "person": "person with clothes,people,human"}
    assert len(background) == 25 and background[0] == "ground" and background[-1] == "sign"


def test_cocos_texts_have_vocs_spelling_thirteen_synonyms_and_23_background_words():
    foreground, background = of_names(COCO_CLASSES)
    assert len(foreground) == 80 and len(background) == 23
    assert not {"keyboard", "sign"} & set(background)
    assert foreground[31] == "sknowboard" and foreground[78] == "hairdrier,blowdrier"
    changed = [t for n, t in zip(COCO_CLASSES[1:], foreground) if n != t]
    spelled = ["motorbike", "aeroplane", "sofa", "pottedplant", "diningtable"]
    assert len(changed) == 13 + len(spelled) and set(spelled) < set(changed)


def test_synonyms_of_a_dataset_of_ones_own(tmp_path):
    """classes.txt: `name: synonym, synonym`; a name without them is its own text."""
    folder = draw_dataset(tmp_path / "own", train=2, val=1)
    lines = ["background", "cat", "dog: dog, hound", "traffic light: street sign"]
    (folder / "classes.txt").write_text("\n".join(lines))
    data = find_dataset(str(folder))
    assert data.classes == ("background", "cat", "dog", "traffic light")
    foreground, background = stage1.class_texts(data)
    assert foreground == ["cat", "dog, hound", "street sign"]
    assert not {"street", "sign"} & set(background) and len(background) == 23
    assert data.image_labels(["train_0"]) == {"train_0": [1, 2]}


def test_one_template_in_lower_case_with_a_full_stop():
    tokens = stage1.text_tokens(["cat"], 77)
    assert torch.equal(tokens, stage1.clip.tokenize(["a clean origami cat."]))


# ================================================================================ the photo

@pytest.mark.parametrize("size, expected", [
    ((75, 110), (80, 112)), ((64, 304), (64, 304)), ((1, 17), (16, 32)), ((333, 500), (336, 512)),
    ((2048, 1024), (1024, 512)), ((5000, 3000), (1024, 624))])
def test_photos_are_stretched_to_multiples_of_16(size, expected):
    """Neither padded nor cropped; a long side over 1024 is reduced first."""
    image = np.full((*size, 3), 200, np.uint8)
    x = stage1.clip_input(image)[0]
    assert tuple(x.shape[1:]) == expected
    mean, std = (torch.tensor(v)[:, None, None] for v in (stage1.CLIP_MEAN, stage1.CLIP_STD))
    grey = x * std + mean
    assert (grey - 200).abs().max() < 1e-3


def test_positions_are_rounded_to_half(model):
    own = stage1.half_positions(model.visual, 5, 7)
    exact = stage1.clip.resize_positions(model.visual.positional_embedding, 5, 7)
    assert torch.equal(own, exact.half().float()) and not torch.equal(own, exact)
    native = stage1.half_positions(model.visual, 4, 4)  # the native grid is rounded as well
    assert torch.equal(native, model.visual.positional_embedding.half().float())


def test_open_blocks_are_clips_own(model):
    """With its attention in sight a block gives what it gave; attention rows sum to one."""
    block, x = model.visual.transformer.resblocks[3], torch.randn(2, 9, 64)
    after, attention = stage1.open_block(block, x, block.ln_1(x))
    torch.testing.assert_close(after, block(x), rtol=1e-5, atol=1e-5)
    assert attention.shape == (2, 9, 9)
    torch.testing.assert_close(attention.sum(2), torch.ones(2, 9))


def test_a_sequence_of_77_is_an_image_too(model):
    """The released code takes 77 tokens for a text and runs the last block twice; ours does not."""
    wide = np.random.default_rng(1).integers(0, 256, (64, 304, 3), dtype=np.uint8)
    x, positions = stage1.clip_input(wide), stage1.half_positions(model.visual, 4, 19)
    tokens, attentions = stage1.patch_tokens(model.visual, x, positions)  # of 76 patches
    assert tokens.shape == (1, 77, 64) and len(attentions) == 9
    expected = model.visual.embed(x, positions)
    for block in model.visual.transformer.resblocks[:-1]:
        expected = block(expected)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


# ================================================================================= Grad-CAM

def probability(visual, x, texts, k, change):
    """p_k when `change` (1, 1 + N, C) is added to ln_1's output in the last block."""
    block = visual.transformer.resblocks[-1]
    a = block.ln_1(x) + change
    y = x + block.attn(a)
    y = y + block.mlp(block.ln_2(y))
    feature = visual.ln_post(y)[:, 1:].mean(1) @ visual.proj
    cosine = torch.nn.functional.cosine_similarity(feature, texts)
    return (10 * cosine).softmax(0)[k]


def test_weights_are_the_mean_gradients_of_the_probability(model):
    """Against differences in float64: raising channel c at all N patches raises p_k by N w_kc."""
    visual = copy.deepcopy(model.visual).double()
    torch.manual_seed(2)
    x, texts = torch.randn(1, 13, 64).double(), torch.randn(6, 48).double()
    texts = torch.nn.functional.normalize(texts, dim=1)
    found = stage1.grad_cam(visual, x, texts, 2, 10.0)
    assert not any(p.grad is not None or p.requires_grad for p in visual.parameters())
    for k in (0, 1):
        for c in (0, 31, 63):
            step = torch.zeros(1, 13, 64).double()
            step[:, 1:, c] = 1e-4
            rise = probability(visual, x, texts, k, step) - probability(visual, x, texts, k, -step)
            expected = rise / 2e-4 / 12
            torch.testing.assert_close(found["weights"][k, c], expected, rtol=1e-5, atol=1e-12)
    activations = visual.transformer.resblocks[-1].ln_1(x)[0, 1:]
    torch.testing.assert_close(found["raw"], found["weights"] @ activations.T)


def test_no_gradient_below_the_last_block(model, photo):
    x = stage1.clip_input(photo)
    positions = stage1.half_positions(model.visual, 5, 6)
    with torch.enable_grad():
        tokens, attentions = stage1.patch_tokens(model.visual, x, positions)
    assert not tokens.requires_grad and not any(a.requires_grad for a in attentions)


def test_maps_are_stretched_to_just_under_one():
    maps = torch.rand(3, 4, 5) + 2
    out = stage1.min_max(stage1.min_max(maps))
    assert (out.amin((1, 2)) == 0).all() and (out.amax((1, 2)) < 1).all()
    assert ((out.amax((1, 2)) * 255).byte() == 254).all()
    assert (stage1.min_max(torch.zeros(1, 2, 2)) == 0).all()


# ================================================================================= affinity

def test_balanced_attention_is_nearly_doubly_stochastic():
    A = stage1.balance(torch.rand(20, 20) + 0.1)
    torch.testing.assert_close(A.sum(1), torch.ones(20))
    torch.testing.assert_close(A.sum(0), torch.ones(20), rtol=1e-3, atol=1e-3)


def test_affinity_is_of_the_last_eight_blocks_patches():
    attentions = [torch.rand(1, 7, 7).softmax(2) for _ in range(10)]
    A = stage1.affinity(attentions)
    torch.testing.assert_close(A, A.T)
    changed = [torch.zeros(1, 7, 7)] * 2 + attentions[2:]  # the first two do not count
    assert torch.equal(stage1.affinity(changed), A)
    for attention in changed:
        attention[:, 0], attention[:, :, 0] = 9, 9  # nor does the class token
    assert torch.equal(stage1.affinity(changed), A)


def slow_boxes(cam, threshold):
    """box_mask by scipy's component labels and plain loops."""
    ndimage = pytest.importorskip("scipy.ndimage")
    levels = (cam.numpy() * 255).astype(np.uint8)
    numbers, _ = ndimage.label(levels > int(threshold * levels.max()), np.ones((3, 3)))
    mask = np.zeros(levels.shape, bool)
    for rows, columns in ndimage.find_objects(numbers):
        for y in range(rows.start, min(rows.stop, levels.shape[0] - 1)):
            for x in range(columns.start, min(columns.stop, levels.shape[1] - 1)):
                mask[y, x] = True
    return mask


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("threshold", [0.4, 0.7])
def test_boxes_by_scipys_labels(seed, threshold):
    torch.manual_seed(seed)
    h, w = torch.randint(1, 12, (2,)).tolist()
    cam = stage1.min_max(torch.rand(1, h, w) ** (1 + seed % 5))[0]
    assert np.array_equal(stage1.box_mask(cam, threshold).numpy(), slow_boxes(cam, threshold))


def test_a_long_winding_region_is_one_region():
    """A snake through the whole grid: numbers have far to go."""
    cam = torch.zeros(9, 9)
    cam[::2, :8] = 1
    cam[1::4, 7], cam[3::4, 0] = 1, 1
    assert stage1.box_mask(cam, 0.4)[:8, :8].all() and not stage1.box_mask(cam, 0.4)[8].any()


def test_a_region_in_the_last_row_and_column_alone_is_lost():
    cam = torch.zeros(5, 6)
    cam[4, 2:5], cam[1, 5] = 0.9, 0.9
    assert not stage1.box_mask(cam, 0.4).any()
    assert not stage1.box_mask(torch.zeros(5, 6), 0.4).any()


def test_evidence_comes_from_the_boxes_and_goes_everywhere():
    cams, A = torch.rand(2, 3, 4), torch.rand(12, 12)
    masks = torch.zeros(2, 3, 4, dtype=torch.bool)
    masks[0, 1, 1:3] = True
    out = stage1.class_aware_affinity(A, cams, masks)
    expected = A[:, 5] * cams[0, 1, 1] + A[:, 6] * cams[0, 1, 2]  # cells (1, 1) and (1, 2)
    torch.testing.assert_close(out[0].flatten(), expected)
    assert not out[1].any()


# ============================================================================= CRF and seed

def test_dark_colours_wrap_to_the_bright_end():
    """Blue, green, red; the means 104.008, 116.669, 122.675 are taken off and cut to a byte."""
    image = np.array([[[123, 117, 105], [122, 116, 104], [0, 0, 0], [255, 255, 255]]], np.uint8)
    wrapped = stage1.wrapped_colours(image)[:, 0].T.tolist()
    # trunc(-0.008) is 0, trunc(-104.008) is -104, which as a byte is 152
    assert wrapped == [[0, 0, 0], [0, 0, 0], [152, 140, 134], [150, 138, 132]]


def test_scores_begin_with_what_no_class_claims():
    cams = torch.rand(2, 3, 4)
    scores = stage1.clip_scores(cams, (3, 4))
    assert scores.dtype == torch.float16 and torch.equal(scores[1:], cams.half())
    assert torch.equal(scores[0], 1 - cams.half().amax(0))


def test_doubtful_pixels_are_unsure():
    Q = torch.tensor([[0.95, 0.9499, 0.04], [0.05, 0.0501, 0.96]])[:, None]
    assert stage1.confident_labels(Q, [7]).tolist() == [[0, IGNORE, 7]]


def test_settings_of_the_published_numbers():
    assert stage1.CLIP_CRF == ((1, 3), (67, 3, 4)) and stage1.CONFIDENCE == 0.95
    assert stage1.BOX_THRESHOLD == {"VOC2012": 0.4, "COCO2014": 0.7}


def test_a_photo_without_classes_is_background(model, photo, dataset):
    data, machine = find_dataset(str(dataset)), stage1.Machine("cpu", False)
    texts = stage1.encode_classes(model, data)
    arrays, label = stage1.clip_seed(model, texts, photo, [], 0.4, machine)
    assert label.shape == (70, 90) and not label.any()
    assert arrays["cam"].shape == (0, 18, 23) and arrays["keys"].shape == (0,)


def test_more_classes_leave_less_for_each(model, photo, dataset):
    """The softmax is over the photo's own classes and all background words."""
    data, machine = find_dataset(str(dataset)), stage1.Machine("cpu", False)
    texts = stage1.encode_classes(model, data)
    one, _ = stage1.clip_seed(model, texts, photo, [2], 0.4, machine)
    two, _ = stage1.clip_seed(model, texts, photo, [1, 2], 0.4, machine)
    assert len(texts[0]) == 3 and len(texts[1]) == 25
    assert 0 < two["probs"][1] < one["probs"][0] < 1 and two["keys"].tolist() == [1, 2]


# =============================================================================== the script

@pytest.fixture(scope="module")
def run(dataset, clip_file, tmp_path_factory):
    """(folder of stage 1, the command's options) after `--method clip`."""
    runs = tmp_path_factory.mktemp("clip_seeds")
    options = ["--data", dataset, "--runs", runs, "--method", "clip", "--clip", clip_file]
    script("stage1_cam.py", *options)
    return runs / dataset.name / "1_cam", options


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


def test_it_leaves_the_files_of_the_classifier(run, dataset):
    folder, data = run[0], find_dataset(str(dataset))
    ids = data.ids("train")
    names = {p.name for p in folder.iterdir()}
    assert {"args.json", "log.jsonl", "preview.png", "cams", "seeds"} <= names
    assert "checkpoint.pt" not in names  # nothing was trained
    for i, labels in data.image_labels(ids).items():
        H, W = data.image(i).shape[:2]
        label = read_label(folder / "seeds" / f"{i}.png", 4, (H, W))
        assert set(np.unique(label)) <= {0, IGNORE, *labels}
        with np.load(folder / "cams" / f"{i}.npz") as z:
            assert z["keys"].dtype == np.uint8 and z["keys"].tolist() == labels
            assert z["cam"].dtype == np.float16 and 0 <= z["cam"].min() <= z["cam"].max() <= 1
            assert z["cam"].shape == (len(labels), -(-H // 4), -(-W // 4))
            assert z["before"].shape == z["boxes"].shape == (len(labels), -(-H // 16), -(-W // 16))
    said = read_json(folder / "args.json")
    assert said["options"]["method"] == "clip" and said["options"]["iters"] is None
    assert len(said["digests"]["clip"]) == 64 and said["provenance"]["iters"] == 0
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ids
    assert all(0 <= line["unsure"] <= 1 for line in lines)


def test_the_report_shows_one_photos_way_from_gradient_to_seed(run, dataset, tmp_path):
    data, folder = find_dataset(str(dataset)), tmp_path / run[0].parent.name
    shutil.copytree(run[0], folder / "1_cam")
    write_report(data, folder, [])
    page = (folder / "report.html").read_text()
    story = page[page.index('<section id="Seeds">'):page.index('<section id="Pictures">')]
    captions = ["image", "what spoke for", "its boxes", "after the affinity", "seed"]
    places = [story.index(f"<figcaption>{caption}") for caption in captions]
    assert places == sorted(places) and story.count("<img") == 5
    assert "CLIP is asked" in page and "A classifier learns" not in page
    for path in (folder / "1_cam" / "cams").iterdir():  # as a classifier leaves them
        with np.load(path) as z:
            np.savez(path, keys=z["keys"], cam=z["cam"])
    write_report(data, folder, [])
    assert 'id="Seeds"' not in (folder / "report.html").read_text()


def test_what_exists_is_done(run, tmp_path):
    """A run that lost seeds on the way makes them again, and only them, to the same bits."""
    folder = tmp_path / run[0].parent.name / "1_cam"
    shutil.copytree(run[0], folder)
    stage1.mark_unfinished(folder)
    for name in ("preview.png", "seeds/train_1.png", "seeds/train_4.png"):
        (folder / name).unlink()
    kept = folder / "seeds" / "train_2.png"
    before = kept.stat().st_mtime_ns
    options = [*run[1], "--runs", tmp_path]
    script("stage1_cam.py", *options)
    assert contents(folder) == contents(run[0]) and kept.stat().st_mtime_ns == before
    assert "finished" in script("stage1_cam.py", *options)


def test_another_clip_or_method_is_refused(run, tmp_path):
    torch.manual_seed(5)
    other = {k: v + 0.01 for k, v in tiny_clip().state_dict().items()}
    torch.save(other, tmp_path / "other.pt")
    options = [*run[1], "--clip", tmp_path / "other.pt"]
    assert "made with clip =" in script("stage1_cam.py", *options, ok=False)
    options = [*run[1], "--method", "classifier", "--weights", "none"]
    assert "1_cam was made with" in script("stage1_cam.py", *options, ok=False)


def test_the_classifier_is_the_default_and_another_patch_is_refused(dataset, tmp_path):
    args = stage1.parse_args(["--data", "x"])
    assert (args.method, args.clip) == ("classifier", "ViT-B/16")
    options = ["--data", dataset, "--runs", tmp_path, "--method", "clip", "--clip", "ViT-L/14"]
    assert "made for patch 16" in script("stage1_cam.py", *options, ok=False)


def test_options_of_training_are_not_read(run):
    assert "finished" in script("stage1_cam.py", *run[1], "--iters", 7, "--crop", 64, "--lr", 3)


def test_two_processes_share_the_photos(run, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--master_port", port, ROOT / "stage1_cam.py", *run[1], "--runs", tmp_path]
    r = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT,
                       env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert r.returncode == 0, r.stderr
    assert contents(tmp_path / run[0].parent.name / "1_cam") == contents(run[0])
