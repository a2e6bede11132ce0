"""Folders as people have them: what is read otherwise than it stands is said.

What is unclear is refused in one line. Each kind of trouble has several cases, and so has each
oddity of VOC and COCO, which must pass.
"""
import re
import shutil
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
from conftest import draw_dataset, script
from eval import (IGNORE, VOC_CLASSES, annotated_objects, check_dataset, check_inputs, colour_map,
                  find_dataset, note_leaks, photo_files, read_cams, read_args, read_image,
                  read_label, read_list, read_log, score_folder, write_label, write_text)

CLASSES = ("background", "cat", "dog", "traffic light")


@pytest.fixture(autouse=True)
def nothing_said_yet():
    evaluation.note.cache_clear()


@pytest.fixture()
def folder(dataset, tmp_path):
    """A copy of the drawn dataset that a test may break."""
    return shutil.copytree(dataset, tmp_path / "drawn")


def refused(match, function, *given, **options):
    """The function raises ValueError: one line that matches."""
    with pytest.raises(ValueError, match=match) as caught:
        function(*given, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check(folder):
    check_dataset(find_dataset(folder))


def list_file(folder, name="train"):
    return folder / "ImageSets" / "Segmentation" / f"{name}.txt"


def change_masks(folder, change, where="SegmentationClass"):
    for path in sorted((folder / where).iterdir()):
        with Image.open(path) as stored:
            label = np.array(stored)
        write_label(path, change(label))


# ========================================================= numbers in label PNGs are not trusted

def test_masks_of_0_and_255_alone_are_refused_but_single_ones_pass(folder):
    change_masks(folder, lambda label: np.where(label > 0, IGNORE, 0))
    refused("no class in any; 255 is unsure", check, folder)
    data = find_dataset(folder)
    refused("SegmentationClass: .* no class in any", score_folder, data, folder / "seeds", "val")
    shutil.copy(folder / "seeds" / "val_0.png", folder / "SegmentationClass")
    score_folder(data, folder / "seeds", "val")
    change_masks(folder, lambda label: np.where(label > 0, IGNORE, 0), "seeds")
    refused("seeds: 2 masks and no class in any", score_folder, data, folder / "seeds", "val")
    refused("seeds: 6 label PNGs", check_inputs, data, data.ids("train"), folder / "seeds")


@pytest.mark.parametrize("form, said", [("JPEG", "JPEG, which changes class numbers"),
                                        ("BMP", "the file is BMP"), ("GIF", "the file is GIF"),
                                        ("TIFF", "the file is TIFF"), ("WEBP", "WebP")])
def test_a_label_of_another_format_is_refused_by_its_content(tmp_path, form, said):
    path = tmp_path / "x.png"
    Image.new("L", (9, 7), 1).save(path, form)
    refused(said, read_label, path)


def grey_png(path, values, bits):
    """A grey PNG of 1 to 16 bits, as Pillow cannot write it."""
    def chunk(kind, content):
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))
    rows = b""
    for row in values:
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        rows += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    header = struct.pack(">IIBBBBB", len(values[0]), len(values), bits, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_low_bit_depths_hold_class_numbers(tmp_path, bits):
    numbers = np.arange(6 * 9).reshape(6, 9) % min(2 ** bits, 21)
    picture = Image.fromarray(numbers.astype(np.uint8), mode="P")
    picture.putpalette(colour_map().tobytes())
    picture.save(tmp_path / "indexed.png", bits=bits)
    assert np.array_equal(read_label(tmp_path / "indexed.png", 21), numbers)
    if bits > 1:
        grey_png(tmp_path / "grey.png", numbers.tolist(), bits)
        assert np.array_equal(read_label(tmp_path / "grey.png", 21), numbers)


def test_masks_that_are_no_8_bit_numbers_are_refused(tmp_path):
    path = tmp_path / "x.png"
    grey_png(path, [[0, 1], [1, 0]], 1)
    refused("mode 1", read_label, path)
    grey_png(path, [[0, 1], [256, 65535]], 16)
    refused("mode I;?1?6?", read_label, path)
    for mode in ("RGB", "RGBA", "LA"):
        Image.new(mode, (4, 3)).save(path)
        refused(f"mode {mode}", read_label, path)


def test_a_palette_of_voc_colours_in_another_order_is_refused(tmp_path):
    path, numbers = tmp_path / "x.png", np.array([[0, 1], [2, 0]], np.uint8)

    def save(*colours):
        picture = Image.fromarray(numbers, mode="P")
        picture.putpalette(np.array(colours, np.uint8).tobytes())
        picture.save(path)
    voc = colour_map()
    save(voc[0], voc[8], voc[15])
    refused("number 1 have VOC's colour of 8", read_label, path)
    save(voc[15], voc[0], voc[8])
    refused("number 0 have VOC's colour of 15", read_label, path)
    for colours in ((voc[0], voc[1], voc[2]), ((0, 0, 0), (255, 0, 0), (0, 255, 0)),
                    ((0, 0, 0), (1, 1, 1), (2, 2, 2))):
        save(*colours)
        assert np.array_equal(read_label(path), numbers)


@pytest.mark.parametrize("change", [lambda label: label + (label > 0),
                                    lambda label: np.choose(label, [0, 2, 1, 3])])
def test_another_numbering_disagrees_with_the_image_labels(folder, change):
    def changed(label):
        return np.where((label > 0) & (label < 3), change(np.where(label < 3, label, 0)), label)
    for where in ("SegmentationClass", "seeds"):
        change_masks(folder, changed, where)
    data = find_dataset(folder)
    said = r"_\d.png: number \d is .*, and the labels of the image say .*disagree"
    refused(said, check, folder)
    refused(said, score_folder, data, folder / "seeds", "val")
    ids = data.ids("train")
    refused(said, check_inputs, data, ids, folder / "seeds", data.image_labels(ids))
    refused(said, check_inputs, data, ids, image_labels=data.image_labels(ids))  # as stage 1


def test_stages_refuse_another_numbering_before_they_train(folder):
    for where in ("SegmentationClass", "seeds"):
        change_masks(folder, lambda label: np.array([0, 2, 3, 1] + 252 * [IGNORE])[label], where)
    said = r"_\d.png: number \d is .*, and the labels of the image say .*disagree"
    for name, option in (("stage2_weakclip.py", "--seeds"), ("stage3_segment.py", "--masks")):
        line = script(name, "--data", folder, "--runs", folder / "r", option, folder / "seeds",
                      "--device", "cpu", ok=False)
        assert re.search(said, line) and not (folder / "r").exists()


def test_a_label_that_a_mask_lacks_is_no_disagreement(folder):
    """VOC's difficult objects are in the annotations and not always in the masks."""
    path = folder / "image_labels.txt"
    lines = [line + ", dog, traffic light" for line in path.read_text().splitlines()]
    write_text(path, "\n".join(lines))
    check(folder)


def test_one_true_mask_in_a_thousand_may_disagree(folder, capsys):
    data, image_id = find_dataset(folder), "train_0"
    held = {folder / f"{n}.png": (image_id, {0, 1}) for n in range(999)}
    held[folder / "odd.png"] = (image_id, {0, 3})
    evaluation.compare_classes(data, held, {image_id: [1]}, evaluation.TOLERATED)
    assert "odd.png: number 3 is traffic light" in capsys.readouterr().err
    refused("odd.png", evaluation.compare_classes, data, held, {image_id: [1]}, 0)


# ============================================================================= classes.txt

@pytest.mark.parametrize("text, said", [
    ("__ignore__\n_background_\ncat\n", "line 1: '__ignore__' is no class"),
    ("background\ncat\nvoid\n", "line 3: 'void' is no class"),
    ("cat\nbackground\ndog\n", "line 1: 'cat' stands where background"),
    ("cat\ndog\n", "line 1: 'cat' stands where background"),
    ("thing\ncat\nbackground\n", "line 1: 'thing' stands where background"),
    ("background\ncat\nbackground\n", "line 3: 'background'"),
    ("background\ncat\nCat\n", "line 3: 'Cat' stands in line 2 already; different class names"),
    ("background, cat, dog\n", "line 1.*one a line"), ("background\n", "1 names; 2 to 255"),
    ("1 background\n2 cat\n", "line 1: '1 background' would be number 0"),
    ("0 background\n1 cat\n3 dog\n", "line 3: '3 dog' would be number 2"), ("", "0 names"),
    ("background\nc\x1bat\n", "line 2")])
def test_classes_that_put_names_off_are_refused(folder, text, said):
    write_text(folder / "classes.txt", text)
    refused(said, find_dataset, folder)
    assert re.search(said, script("eval.py", "--data", folder, "--check", ok=False))


@pytest.mark.parametrize("text", [
    "\ufeffbackground\r\ncat\r\n\r\ndog\r\ntraffic light\r\n",
    "background\rcat\rdog\rtraffic light",
    "0 background\n1 cat\n2 dog\n3 traffic light",
    "0: background\n1: cat\n2: dog\n3: traffic light",
    "background,0\ncat,1\ndog,2\ntraffic light,3", "_background_\ncat\ndog\ntraffic light"])
def test_classes_as_other_tools_write_them(folder, text):
    write_text(folder / "classes.txt", text)
    assert find_dataset(folder).classes == CLASSES


def test_a_background_of_another_name_is_said(folder, capsys):
    write_text(folder / "classes.txt", "nothing\ncat\ndog\ntraffic light\n")
    assert find_dataset(folder).classes[0] == "nothing"
    assert "'nothing' is the background" in capsys.readouterr().err


def test_without_classes_the_numbers_are_vocs_and_labels_tell_if_not(folder, capsys):
    (folder / "classes.txt").unlink()
    assert find_dataset(folder).classes == VOC_CLASSES
    assert "the classes are VOC's 21" in capsys.readouterr().err
    path = folder / "image_labels.txt"
    path.write_text(path.read_text().replace("traffic light", "sheep"))
    refused("absent: VOC's 21", score_folder, find_dataset(folder), folder / "seeds", "val")
    folder.rename(folder.with_name("COCO2014"))
    refused("COCO's.*--prepare", find_dataset, folder.with_name("COCO2014"))


# ================================================================================= lists

LINES = [f"train_{i}" for i in range(6)]


@pytest.mark.parametrize("text, said", [
    ("\ufeff" + "\r\n".join(LINES), ""), ("\r".join(LINES) + "\r", ""),
    ("\n\n".join(f"  {i}\t" for i in LINES), ""),
    ("\n".join(f"{i}.jpg" for i in LINES), "'train_0.jpg' is train_0"),
    ("\n".join(f"{i}.JPG" for i in LINES), "'train_0.JPG' is train_0"),
    ("\n".join(f"/JPEGImages/{i}.jpg /SegmentationClassAug/{i}.png" for i in LINES), "file names"),
    ("\n".join(f"JPEGImages\\{i}.jpg,SegmentationClass\\{i}.png" for i in LINES), "file names"),
    ("\n".join(f"VOC/JPEGImages/{i}.jpeg" for i in LINES), "file names are read as ids"),
    ("\n".join(f"{i} {m}" for i, m in zip(LINES, [" 1", " 0"] * 3)) + "\nval_0 -1", "of one class"),
    ("._train_0.jpg\n.DS_Store\nThumbs.db\n" + "\n".join(LINES), "left out")])
def test_lists_as_other_tools_write_them(folder, capsys, text, said):
    list_file(folder).write_bytes(text.encode())
    data = find_dataset(folder)
    assert data.ids("train") == data.ids("train") == LINES
    told = capsys.readouterr().err
    assert len(told.splitlines()) <= 3 and said in told and bool(said) == bool(told)
    if said:
        assert str(list_file(folder)) in told


@pytest.mark.parametrize("content, said", [
    ("a\nb c\n", "line 2: 'b c' is no image id"), ("a\n../b\n", "line 2"), ("a\x07\n", "control"),
    ("x" * 240, "longer than 230 bytes"), ("é" * 120, "longer than 230 bytes"),
    ("a.jpg b.png\n", "more than one name"),
    ("a\nb\n\na.jpg\n", "a stands twice, in lines 1 and 4"),
    ("a 2\n", "no image id"), ("\n \n", "the list is empty"), ("a -1\n", "the list is empty"),
    ("x" * 5000, "5000 characters"),
    ("a\nb\n".encode("utf-16"), "save it as UTF-8"),
    ("ü\n".encode("latin-1"), "line 1 is not UTF-8"),
    ("a\n馬\n".encode("gbk"), "line 2 is not UTF-8")])
def test_lists_that_are_unclear_are_refused_with_file_and_line(tmp_path, content, said):
    path = tmp_path / "train.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refused(said, read_list, path).startswith(str(path))


@pytest.mark.parametrize("name", ["train_aug", "TrainAug", "train-aug"])
def test_another_spelling_of_trainaug_is_used_and_said(folder, capsys, name):
    shutil.copy(list_file(folder), list_file(folder, name))
    data = find_dataset(folder)
    assert data.training_split() == "trainaug" and data.ids("trainaug") == LINES
    assert f"{name}.txt: is used as the list trainaug" in capsys.readouterr().err
    shutil.copy(list_file(folder), list_file(folder, "train aug"))
    refused("either may be meant", data.ids, "trainaug")


def test_endings_and_letters_as_systems_write_them(folder):
    for where, ending in (("JPEGImages", ".JPG"), ("SegmentationClass", ".PNG"), ("seeds", ".PNG")):
        for path in list((folder / where).iterdir()):
            path.rename(path.with_suffix(ending))
            stem = unicodedata.normalize("NFD", "Köln")
        (folder / where / f"train_0{ending}").rename(folder / where / f"{stem}{ending}")
    for path in (list_file(folder), folder / "image_labels.txt"):
        path.write_text(path.read_text().replace("train_0", "Köln"), encoding="utf-8")
    check(folder)
    data = find_dataset(folder)
    ids = data.ids("train")
    check_inputs(data, ids, folder / "seeds", data.image_labels(ids))
    assert ids[0] == "Köln" and score_folder(data, folder / "seeds", "train")["n"] == 6
    assert evaluation.folder_digest(folder / "seeds", ids)
    shutil.copy(folder / "JPEGImages" / "train_1.JPG", folder / "JPEGImages" / "train_1.png")
    refused("either may be meant; remove one", data.image, "train_1")


def test_photos_in_other_formats_are_said_to_be_left_out(folder, capsys):
    for name in ("one.HEIC", "two.webp", "._three.heic", "notes.txt"):
        (folder / "JPEGImages" / name).write_bytes(b"some bytes")
    assert set(photo_files(folder / "JPEGImages")) == {*LINES, "val_0", "val_1"}
    assert "2 photos are left out, first one.HEIC: save them as JPEG" in capsys.readouterr().err


def test_files_that_systems_leave_are_no_data(folder):
    for name in ("._train_0.jpg", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / "JPEGImages" / name).write_bytes(b"\0\5\x16\7")
    (folder / "ImageSets" / "Segmentation" / "._train.txt").write_bytes(b"\0\5\x16\7")
    check(folder)
    assert set(photo_files(folder / "JPEGImages")) == {*LINES, "val_0", "val_1"}
    (folder / "JPEGImages" / "train_0.jpg").rename(folder / "JPEGImages" / "train_0.webp")
    refused("no such image.*there is train_0.webp: save it as", check, folder)


def test_ids_of_val_in_the_training_list_are_said(folder, capsys):
    write_text(list_file(folder, "trainaug"), "\n".join([*LINES, "val_1", "val_0"]))
    check(folder)
    assert "2 ids of val.txt stand in trainaug too, first val_0" in capsys.readouterr().err
    evaluation.note.cache_clear()
    note_leaks(find_dataset(folder), "train")
    assert not capsys.readouterr().err


# ============================================================================ image labels

@pytest.mark.parametrize("text", [
    "train_0 cat, traffic light", "train_0 cat\ntrain_0 traffic light",
    "train_0\tcat\ttraffic light",
    "train_0: cat; traffic light", "train_0,cat,traffic light", "train_0;cat;traffic light\r\n",
    "train_0.jpg cat|traffic light", "\ufefftrain_0 'cat', 'traffic light'",
    'train_0,"cat,traffic light"', "train_0 [\"cat\", 'traffic light']",
    "train_0 cat, cat, traffic light,"])
def test_image_labels_as_other_tools_write_them(folder, text):
    write_text(folder / "image_labels.txt", text)
    assert find_dataset(folder).image_labels(["train_0"]) == {"train_0": [1, 3]}


def test_names_parted_by_spaces_where_that_is_clear(folder, capsys):
    write_text(folder / "image_labels.txt", "train_0 cat dog\ntrain_1 cat traffic light\ntrain_2\n")
    data = find_dataset(folder)
    assert data.image_labels(["train_0", "train_2"]) == {"train_0": [1, 2], "train_2": []}
    assert "parted by spaces" in capsys.readouterr().err
    refused("line 2: class 'cat traffic light'", data.image_labels, ["train_1"])


@pytest.mark.parametrize("text, said", [
    ("train_0 1 3", "line 1: '1 3'.*do not tell whether they count the background"),
    ("\ntrain_0 Cat", "line 2: class 'Cat'; known are cat"), ("train_0 background", "'background'"),
    ("train_1 cat", "no image-level labels for train_0")])
def test_unclear_image_labels_are_refused_with_the_line(folder, text, said):
    write_text(folder / "image_labels.txt", text)
    refused(said, find_dataset(folder).image_labels, ["train_0"])


def test_pickled_labels_are_refused_with_code_that_converts_them(folder):
    labels = find_dataset(folder).image_labels(LINES)
    (folder / "image_labels.txt").unlink()
    rows = {i: np.isin([1, 2, 3], labels[i]).astype(np.float32) for i in LINES}
    np.save(folder / "cls_labels.npy", rows, allow_pickle=True)
    said = refused("cls_labels.npy: labels in a pickle", check, folder)
    code = said.split("converts it: ")[-1].split("convert it: ")[-1]
    assert len(code.split("; ")) == 4  # three lines, the first with the import
    exec(code, {})
    assert find_dataset(folder).image_labels(LINES) == labels


def xml(path, objects, head='<?xml version="1.0" encoding="UTF-8"?>'):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(f"{head}<annotation>{objects}</annotation>".encode())
    return path


@pytest.mark.parametrize("head, said", [
    ('<?xml version="1.0" encoding="ANSI"?>', "ANSI is no encoding.*save it as UTF-8"),
    ('<?xml version="1.0" encoding="GBK"?>', "GBK is no encoding.*save it as UTF-8"),
    ('<?xml version="1.0" encoding="x-none"?>', "x-none is no encoding"),
    ('<!DOCTYPE a [<!ENTITY b "cat">]>', "document type"), ("<b>", "not a readable annotation"),
    ('<!doctype html>', "document type"), ("GIF89a", "not a readable annotation")])
def test_xml_that_cannot_be_read_is_named(tmp_path, head, said):
    path = xml(tmp_path / "a" / "x.xml", "<object><name>cat</name></object>", head)
    assert refused(said, annotated_objects, path).startswith(str(path))


def test_xml_objects_are_direct_and_have_names(tmp_path):
    part = "<object><name>dog</name><part><name>head</name></part></object>"
    path = xml(tmp_path / "a" / "x.xml", f"<!-- <object> -->{part}<owner><name>cat</name></owner>")
    assert annotated_objects(path) == ["dog"]
    refused("that has a <name>", annotated_objects, xml(path, "<object><name> </name></object>"))
    cows = "<annotation><object><name>Kühe</name></object></annotation>"
    path.write_bytes(cows.encode("utf-16"))
    assert annotated_objects(path) == ["Kühe"]
    path.write_bytes(b" " * (evaluation.XML_BYTES + 1))
    refused("4 MiB", annotated_objects, path)


# ================================================================================= photos

def test_16_bits_become_8_by_value(tmp_path):
    path, ramp = tmp_path / "x.png", np.tile(np.linspace(0, 1, 64), (8, 1))
    for bits in (8, 10, 12, 14, 16):
        values = (ramp * (2 ** bits - 1)).astype(np.uint16)
        Image.fromarray(values).save(path)
        image = read_image(path)
        assert image.shape == (8, 64, 3) and np.abs(image[..., 0] - 255 * ramp).max() <= 1
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(path)
    assert not read_image(path).any()


def test_other_modes_keep_what_people_see(tmp_path):
    path = tmp_path / "x.png"
    for mode, colour in (("1", 1), ("L", 200), ("P", 3), ("RGB", (1, 2, 3))):
        picture = Image.new(mode, (5, 4), colour)
        picture.save(path)
        assert np.array_equal(read_image(path), np.asarray(picture.convert("RGB")))
    Image.new("CMYK", (5, 4), (0, 0, 0, 255)).save(tmp_path / "x.jpg")
    assert read_image(tmp_path / "x.jpg").max() < 5
    Image.new("RGBA", (5, 4), (255, 0, 0, 0)).save(path)  # hidden red
    assert (read_image(path) == 255).all()
    Image.new("LA", (5, 4), (40, 255)).save(path)
    assert (read_image(path) == 40).all()
    Image.new("P", (5, 4), 0).save(path, transparency=0)
    assert (read_image(path) == 255).all()


@pytest.mark.parametrize("form", ["BMP", "GIF", "TIFF", "WEBP", "EPS"])
def test_a_photo_of_another_format_is_refused_by_its_content(tmp_path, form):
    Image.new("RGB", (5, 4)).save(tmp_path / "x.jpg", form)
    said = "not a readable image: the file is .*; save it as JPEG or PNG"
    refused(said, read_image, tmp_path / "x.jpg")


def test_files_that_are_no_photo_are_called_what_they_are(tmp_path):
    path = tmp_path / "x.jpg"
    for content, said in ((b"<!DOCTYPE html>", "web page"), (b"version https://git-lfs", "Git LFS"),
                          (b"", "empty"), (b"\0\0\0\x18ftypheic", "HEIC"),
                          (b"abc", "no known kind")):
        path.write_bytes(content)
        refused(said, read_image, path)
    grey_png(path, [[0]], 8)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 100_000, 100_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    refused("100000x100000 pixels; make it smaller", read_image, path)


def turn(path, value=6):
    with Image.open(path) as stored:
        exif = stored.getexif()
        exif[0x0112] = value
        stored.save(path, exif=exif, quality=95)


def test_exif_turns_are_counted_and_named(folder, capsys):
    turn(folder / "JPEGImages" / "train_0.jpg")
    refused("train_0.png: .*has the photo an EXIF turn", check, folder)
    write_label(folder / "SegmentationClass" / "train_0.png",
                np.rot90(read_label(folder / "SegmentationClass" / "train_0.png"), -1))
    check(folder)
    assert "1 of 6 photos have an EXIF turn" in capsys.readouterr().err


def test_odd_exif_is_no_turn(tmp_path):
    path = tmp_path / "x.jpg"
    for exif in (b"MM\0*\0\0\0\x08\0\x01\x01\x12\xff\xff\xff\xff", b"", b"II*\0" + b"\xff" * 40):
        Image.new("RGB", (6, 4)).save(path, exif=b"Exif\0\0" + exif)
        assert read_image(path).shape == (4, 6, 3)


# ============================================================== one's own photos, all the way

SENTENCE = ("a great spotted woodpecker with a red nape that feeds its young in an old hollow birch "
            "at the edge of the wood behind our house in the last week of May")
NAMES = {2: ("background", SENTENCE),
         200: ("background", SENTENCE, "red-backed shrike (male)", "Köln's cathedral",
               *(f"thing number {k}" for k in range(4, 200)))}


def own_photos(folder):
    """Photos of 50 to 5,000 pixels of every kind that people have -> {id: displayed (H, W)}."""
    rng = np.random.default_rng(0)

    def noise(height, width, channels=3):
        pixels = rng.integers(0, 255, (max(1, height // 9), max(1, width // 9), channels), np.uint8)
        return Image.fromarray(pixels.squeeze()).resize((width, height), Image.BILINEAR)
    folder.mkdir(parents=True)
    noise(50, 50, 1).save(folder / "grey.jpg")
    noise(70, 60).convert("CMYK").save(folder / "print.jpeg")
    noise(60, 90).save(folder / "turned.JPG")
    turn(folder / "turned.JPG")
    deep = np.asarray(noise(64, 80, 1)).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    noise(55, 75, 4).save(folder / "alpha.png")
    noise(50, 5000).save(folder / "wide.jpg")
    return {"grey": (50, 50), "print": (70, 60), "turned": (90, 60), "deep": (64, 80),
            "alpha": (55, 75), "wide": (50, 5000)}


@pytest.mark.parametrize("classes", NAMES)
def test_photos_of_ones_own_go_through_the_stages(tmp_path, clip_file, call, classes):
    root, names = tmp_path / "mine", NAMES[classes]
    sizes = own_photos(root / "JPEGImages")
    lines = [f"{image_id} {names[1 + k % (classes - 1)]}" for k, image_id in enumerate(sizes)]
    write_text(root / "classes.txt", "\n".join(names))
    write_text(root / "image_labels.txt", "\n".join(lines))
    write_text(list_file(root), "\n".join(sizes))
    small = ["--data", root, "--runs", tmp_path / "runs", "--device", "cpu", "--crop", 64,
             "--iters", 1, "--batch-size", 2]
    network = ["--weights", "none", "--arch", "resnet18"]
    call("eval.py", "--data", root, "--check")
    call("stage1_cam.py", *small, *network)
    call("stage2_weakclip.py", *small, "--clip", clip_file, "--scales", 1, "--label-filter")
    call("stage3_segment.py", *small, *network, "--scales", 1, "--no-crf")  # there is no val: train is predicted
    folder = tmp_path / "runs" / "mine"
    made = ["1_cam/seeds", "2_weakclip/masks/train", "3_segment/masks/train"]
    for stage, option in (("2_weakclip", ("--clip", clip_file)), ("3_segment", ())):
        call({"2": "stage2_weakclip.py", "3": "stage3_segment.py"}[stage[0]], *small[:6], *option,
             "--images", root / "JPEGImages", "--scales", 1, "--no-crf")
        made.append(f"{stage}/images/JPEGImages")
    for place in made:
        for image_id, size in sizes.items():
            read_label(folder / place / f"{image_id}.png", classes, size)
    for image_id, (H, W) in sizes.items():
        with Image.open(folder / made[-1] / f"{image_id}.jpg") as picture:
            assert picture.size == (round(800 * W / max(H, W)), round(800 * H / max(H, W)))
    assert "no masks with a truth" in call("eval.py", *small[:4], ok=False)
    page = (folder / "report.html").read_text()
    assert SENTENCE in page


def test_a_name_that_no_context_holds_is_refused(tmp_path, clip_file, call):
    root = draw_dataset(tmp_path / "drawn")
    for path in (root / "classes.txt", root / "image_labels.txt"):
        path.write_text(path.read_text().replace("traffic light", 3 * SENTENCE))
    line = call("stage2_weakclip.py", "--data", root, "--runs", tmp_path, "--seeds", root / "seeds",
                "--clip", clip_file, "--device", "cpu", ok=False)
    assert "tokens" in line and SENTENCE in line


# ================================================================ our own files, when damaged

@pytest.mark.parametrize("text, said", [
    ("{", "no record of a run"), ("[]", "no record of a run"), ('{"options": 3}', "options"),
    ('{"options": {"limit": "x"}}', "limit"), ('{"provenance": {"iters": []}}', "iters"),
    ("[" * 99999, "damaged")])
def test_a_damaged_record_is_named(tmp_path, text, said):
    write_text(tmp_path / "args.json", text)
    refused(f"args.json: .*{said}", read_args, tmp_path)


def test_a_damaged_log_is_named_with_its_line(tmp_path):
    write_text(tmp_path / "log.jsonl", '{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1, "loss": 2.0}]
    for line in ('{"loss": 1}', '{"step": 1, "loss": "x"}', '{"step": 1, "loss": NaN}', "{}}"):
        write_text(tmp_path / "log.jsonl", '{"step": 1, "loss": 2.0}\n' + line + "\n")
        refused("log.jsonl: line 2", read_log, tmp_path / "log.jsonl")


def test_damaged_cams_are_named(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, keys=np.array([1], np.uint8), cam=np.zeros((1, 3, 4), np.float16))
    assert read_cams(path)["cam"].shape == (1, 3, 4)
    content = path.read_bytes()
    for bad in (content[:80], b"", content[:60] + b"\xff\xff" + content[62:]):
        path.write_bytes(bad)
        refused("x.npz: not a readable file of CAMs", read_cams, path)
    np.savez(path, keys=np.array([1], object), cam=np.zeros((1, 3, 4)))
    refused("x.npz: not a readable file of CAMs", read_cams, path)


# ==================================================== what VOC 2012 and COCO 2014 really contain

def test_oddities_of_voc_and_coco_pass(tmp_path, capsys):
    """Grey, CMYK and turned photos, ids with many zeros, photos without objects, void borders."""
    root = draw_dataset(tmp_path / "real")
    ids = [f"COCO_train2014_{i:012d}" for i in range(6)]
    for where in ("JPEGImages", "SegmentationClass"):
        for path in list((root / where).glob("train_*")):
            path.rename(path.with_name(ids[int(path.stem[-1])] + path.suffix))
    names = (root / "image_labels.txt").read_text()
    for i, image_id in enumerate(ids):
        names = names.replace(f"train_{i}", image_id)
    names = re.sub(rf"{ids[3]}.*", ids[3], names)  # a photo without any of the classes
    write_text(root / "image_labels.txt", names)
    write_text(list_file(root), "\n".join(ids) + "\n")
    for image_id, mode in zip(ids, ("L", "CMYK")):
        path = root / "JPEGImages" / f"{image_id}.jpg"
        with Image.open(path) as stored:
            stored.convert(mode).save(path, quality=95)
    masks = root / "SegmentationClass"
    write_label(masks / f"{ids[3]}.png", np.zeros_like(read_label(masks / f"{ids[3]}.png")))
    label = read_label(masks / f"{ids[4]}.png")
    write_label(masks / f"{ids[4]}.png", np.where(label > 0, IGNORE, 0))  # nothing but void
    check(root)
    told = capsys.readouterr()
    assert not told.err and "6 images, 6 true masks" in told.out


def test_every_fault_is_one_line_and_status_2(folder):
    path = folder / "JPEGImages" / "train_0.jpg"
    path.write_bytes(path.read_bytes()[:300])
    line = script("eval.py", "--data", folder, "--check", ok=False)
    assert line.startswith(str(path)) and "cut off or damaged; copy it anew" in line
