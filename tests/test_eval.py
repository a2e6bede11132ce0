"""The dataset folder, label PNGs, scores, and what bad input says."""
import shutil

import numpy as np
import pytest
from PIL import Image

from conftest import CLASSES, draw_dataset, script
from eval import (IGNORE, check_inputs, colour_map, confusion, find_dataset, read_image, read_label, score_folder, scores,
                  write_label, write_text, write_whole)


@pytest.fixture()
def folder(dataset, tmp_path):
    """A copy of the drawn dataset that a test may break."""
    return shutil.copytree(dataset, tmp_path / "drawn")


# ================================================================================================================ labels

def test_palette_is_vocs():
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert all(tuple(colour_map()[k]) == v for k, v in known.items())


def test_label_png_round_trip(tmp_path):
    label = np.random.default_rng(0).integers(0, 256, (7, 9)).astype(np.uint8)
    write_label(tmp_path / "a" / "x.png", label)
    with Image.open(tmp_path / "a" / "x.png") as im:
        assert im.mode == "P" and im.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
    assert np.array_equal(read_label(tmp_path / "a" / "x.png"), label)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.png"]


def test_bad_label_pngs_are_refused(tmp_path):
    path = tmp_path / "x.png"
    for mode in ("RGB", "RGBA", "1"):
        Image.new(mode, (4, 3)).save(path)
        with pytest.raises(ValueError, match="mode"):
            read_label(path)
    write_label(path, np.full((3, 4), 9))
    with pytest.raises(ValueError, match="class number 9"):
        read_label(path, classes=4)
    with pytest.raises(ValueError, match="4x3 pixels"):
        read_label(path, size=(3, 5))
    write_label(path, np.full((3, 4), IGNORE))
    assert (read_label(path, classes=4, size=(3, 4)) == IGNORE).all()
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="not a readable label PNG"):
        read_label(path)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x"
    write_text(path, "old")

    def half(f):
        f.write(b"ne")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, half)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


# =============================================================================================================== dataset

def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (6, 4), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    image.save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").shape == (6, 4, 3)


def test_dataset_is_read(dataset):
    data = find_dataset(str(dataset))
    assert data.name == "drawn" and data.classes == CLASSES and data.training_split() == "train"
    assert data.ids("train") == [f"train_{i}" for i in range(6)] and data.ids("train", 2) == ["train_0", "train_1"]
    assert data.image_labels(["train_0", "train_1", "train_2"]) == {"train_0": [1, 2], "train_1": [2], "train_2": [1, 3]}


def test_labels_from_annotations_count_difficult_objects(folder):
    labels = find_dataset(str(folder)).image_labels(["train_0"])
    (folder / "image_labels.txt").unlink()
    objects = "".join(f"<object><name>{n}</name><difficult>{d}</difficult><part><name>head</name></part></object>"
                      for n, d in (("dog", 1), ("cat", 0), ("cat", 0)))
    write_text(folder / "Annotations" / "train_0.xml", f"<annotation>{objects}</annotation>")
    data = find_dataset(str(folder))
    assert data.image_labels(["train_0"]) == labels
    with pytest.raises(ValueError, match="train_1"):
        data.image_labels(["train_1"])
    write_text(folder / "Annotations" / "train_1.xml", "<annotation>")
    with pytest.raises(ValueError, match="not a readable annotation"):
        data.image_labels(["train_1"])


def test_bad_datasets_are_refused(folder):
    data, lists = find_dataset(str(folder)), folder / "ImageSets" / "Segmentation"
    with pytest.raises(ValueError, match="no such list"):
        data.ids("test")
    for text, said in (("a\nb\na\n", "a stands twice"), ("a b\n", "no image id"), ("../a\n", "no image id"), ("\n", "empty")):
        write_text(lists / "odd.txt", text)
        with pytest.raises(ValueError, match=said):
            data.ids("odd")
    write_text(folder / "image_labels.txt", "train_0 cat, unicorn\n")
    with pytest.raises(ValueError, match="unicorn"):
        data.image_labels(["train_0"])
    with pytest.raises(ValueError, match="train_5"):
        data.image_labels(["train_5"])
    with pytest.raises(ValueError, match="no folder with JPEGImages"):
        find_dataset("nowhere")
    write_text(folder / "classes.txt", "background\ncat\ncat\n")
    with pytest.raises(ValueError, match="different class names"):
        find_dataset(str(folder))


def test_bad_inputs_are_found_before_work_starts(folder):
    data, ids = find_dataset(str(folder)), ["train_0", "train_1"]
    check_inputs(data, ids, folder / "seeds")
    seed, image = folder / "seeds" / "train_1.png", folder / "JPEGImages" / "train_1.jpg"
    good_seed, good_image = seed.read_bytes(), image.read_bytes()
    write_label(seed, np.zeros((5, 5)))
    with pytest.raises(ValueError, match="5x5 pixels"):
        check_inputs(data, ids, folder / "seeds")
    seed.unlink()
    with pytest.raises(ValueError, match="1 of 2 label PNGs missing, first train_1.png"):
        check_inputs(data, ids, folder / "seeds")
    seed.write_bytes(good_seed)
    image.write_bytes(good_image[:len(good_image) // 2])
    with pytest.raises(ValueError, match="train_1.jpg: not a readable image"):
        check_inputs(data, ids)
    image.unlink()
    with pytest.raises(ValueError, match="no such image"):
        check_inputs(data, ids)


# ================================================================================================================ scores

def test_scores_against_a_slow_count():
    rng = np.random.default_rng(0)
    truth, mask = rng.integers(0, 4, (40, 50)).astype(np.uint8), rng.integers(0, 4, (40, 50)).astype(np.uint8)
    truth[:4], mask[:, :5] = IGNORE, IGNORE
    s = scores(confusion(truth, mask, 5))
    valid = truth != IGNORE
    for k in range(4):
        both, either = ((truth == k) & (mask == k))[valid].sum(), ((truth == k) | (mask == k))[valid].sum()
        assert np.isclose(s["iou"][k], 100 * both / either)
        assert np.isclose(s["false_negatives"][k], 100 * ((truth == k) & (mask != k))[valid].sum() / either)
        assert np.isclose(s["false_positives"][k], 100 * ((truth != k) & (mask == k))[valid].sum() / either)
    assert np.isnan(s["iou"][4]) and np.isclose(s["miou"], np.mean(s["iou"][:4]))
    assert np.isclose(s["pixel_accuracy"], 100 * (truth == mask)[valid].mean())


def test_perfect_masks_score_100_and_say_of_how_many(dataset, tmp_path):
    data = find_dataset(str(dataset))
    shutil.copy(dataset / "SegmentationClass" / "val_0.png", tmp_path)
    row = score_folder(data, tmp_path, "val")
    assert (row["n"], row["of"], row["truth"], row["miou"], row["pixel_accuracy"]) == (1, 2, "SegmentationClass", 100, 100)
    assert score_folder(data, tmp_path / "none", "val") is None


def test_one_matrix_for_the_whole_dataset(dataset):
    """The mean of per-image IoUs would be another number."""
    data, seeds = find_dataset(str(dataset)), dataset / "seeds"
    matrix = sum(confusion(read_label(data.truth_path(i)), read_label(seeds / f"{i}.png"), 4) for i in data.ids("train"))
    assert score_folder(data, seeds, "train")["miou"] == scores(matrix)["miou"]


# ========================================================================================================== command line

def test_check_and_masks(dataset):
    said = script("eval.py", "--data", dataset, "--check")
    assert "train          6 images, 6 true masks" in said
    said = script("eval.py", "--data", dataset, "--masks", dataset / "seeds", "--split", "train")
    assert "6 of    6" in said and "truth SegmentationClass" in said and "traffic light" in said


@pytest.mark.parametrize("options, said", [
    (("--data", "nowhere"), "no folder with JPEGImages"), (("--data", "{}", "--masks", "nowhere"), "no PNG of"),
    (("--data", "{}", "--runs", "nowhere"), "no masks with a truth"), (("--data", "{}", "--submit"), "no such list")])
def test_bad_calls_are_one_line(dataset, options, said):
    line = script("eval.py", *(o.format(dataset) for o in options), ok=False)
    assert said in line


def test_a_check_of_nothing_is_not_passed(folder):
    lists = folder / "ImageSets" / "Segmentation"
    (lists / "train.txt").rename(lists / "training.txt")
    assert "train.txt: no such list (there is training, val)" in script("eval.py", "--data", folder, "--check", ok=False)
    shutil.rmtree(lists)
    lists.mkdir()
    assert "no such list (there is none)" in script("eval.py", "--data", folder, "--check", ok=False)


def test_server_archive(tmp_path):
    import tarfile
    folder = draw_dataset(tmp_path / "drawn")
    lists = folder / "ImageSets" / "Segmentation"
    shutil.copy(lists / "val.txt", lists / "test.txt")
    shutil.copytree(folder / "SegmentationClass", tmp_path / "runs" / "drawn" / "3_segment" / "masks" / "test")
    script("eval.py", "--data", folder, "--runs", tmp_path / "runs", "--submit")
    archive = tmp_path / "runs" / "drawn" / "submission.tar.gz"
    with tarfile.open(archive) as tar:
        assert sorted(tar.getnames()) == [f"results/VOC2012/Segmentation/comp6_test_cls/val_{i}.png" for i in (0, 1)]
    archive.unlink()  # a list of which a mask is missing is not packed
    (tmp_path / "runs" / "drawn" / "3_segment" / "masks" / "test" / "val_1.png").unlink()
    line = script("eval.py", "--data", folder, "--runs", tmp_path / "runs", "--submit", ok=False)
    assert "1 of 2 label PNGs missing, first val_1.png" in line and not archive.exists()
