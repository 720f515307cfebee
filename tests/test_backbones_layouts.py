"""The same images in every layout are the same samples."""

import gc
import io
import json
import pickle
import random
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from backbones.config import ClassifierConfig, ImageData, load_config
from backbones.errors import InputError
from backbones.labels import wordnet_ids
from backbones.preprocess import ImageError
from backbones.samples import Sample, list_samples
from backbones.train import run_train

CONFIG = Path(__file__).parents[1] / "configs" / "imagenet" / "cspresnet50.yaml"
WNIDS = ("n01440764", "n03888257")  # classes 0 and 701
Files = dict[str, bytes]


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def tree(prefix: str = "") -> Files:
    return {f"{prefix}{wnid}/{wnid}_{i}.png": png(10 * k + i) for k, wnid in enumerate(WNIDS) for i in range(3)}


def write_tar(path: Path, files: Files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in random.Random(0).sample(sorted(files.items()), len(files)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(root: Path, num_classes: int = 1000, split: str = "val", **values) -> list[Sample]:
    return list_samples(ImageData(root=str(root), **values), split, num_classes)[0]


def content(found: list[Sample]) -> set[tuple[int, bytes]]:
    loaded = [(sample.target, sample.load()) for sample in found]
    return {(target, body if isinstance(body, bytes) else body.read_bytes()) for target, body in loaded}


EXPECTED = {(target, png(10 * k + i)) for k, target in enumerate((0, 701)) for i in range(3)}
OTHER = {"train/n01440764/x.png": png(99)}


def make_class_archives(folder: Path) -> Path:
    for wnid in WNIDS:
        files = {name.split("/")[1]: body for name, body in tree().items() if name.startswith(wnid)}
        write_tar(folder / "set" / f"{wnid}.tar", files)
    return folder / "set"


def make_shards(root: Path) -> Path:
    root.mkdir()
    with webdataset.ShardWriter(f"file:{root}/imagenet-val-%06d.tar", maxcount=2, verbose=0) as writer:
        for key, (target, body) in enumerate(sorted(EXPECTED)):
            writer.write({"__key__": f"image{key:04d}", "png": body, "cls": target, "json": {"label": 5}})
    write_tar(root / "imagenet-train-000000.tar", {"a.png": png(99), "a.cls": b"3"})
    return root


def make_parquet(root: Path, *, names: list[str] | None = None, folder: str = "data") -> Path:
    (root / folder).mkdir(parents=True)
    rows = sorted(EXPECTED)
    labels = [WNIDS.index(wordnet_ids()[target]) for target, _ in rows] if names else [target for target, _ in rows]
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    images = [{"bytes": body, "path": f"ILSVRC2012_val_{i + 1:08d}.png"} for i, (_, body) in enumerate(rows)]
    table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    for i in range(2):
        table.shard(2, i).to_parquet(root / folder / f"validation-{i:05d}-of-00002.parquet")
    table.remove_columns("label").add_column("label", [-1] * len(rows)).to_parquet(
        root / folder / "test-00000-of-00001.parquet"
    )
    return root


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: write_tar(p / "x.tar", tree()),
        lambda p: write_tar(p / "x.tar", tree("./val/") | OTHER),
        lambda p: write_tar(p / "x.tar", tree("imagenette/val/")),
        lambda p: write_tar(p / "x.tar", tree("imagenette/val/") | {f"imagenette/{k}": v for k, v in OTHER.items()}),
        lambda p: write_tar(p / "x.tar", tree() | {"n01440764/._hidden.png": b"", "readme.txt": b"?"}),
        lambda p: write_tar(p / "set" / "x-val.tar", tree()) and write_tar(p / "set" / "x-train.tar", OTHER).parent,
        lambda p: write_tar(p / "set" / "val" / "0.tar", tree()).parents[1],
        make_class_archives,
        lambda p: make_shards(p / "set"),
    ],
    ids=[
        "classes",
        "splits",
        "wrapped",
        "wrapped-splits",
        "stray",
        "tar-a-split",
        "split-folder",
        "tar-a-class",
        "wds",
    ],
)
def test_archives_are_as_folders(tmp_path, make):
    found = samples(make(tmp_path))
    assert content(found) == EXPECTED
    assert len(found) == len(EXPECTED) == len({sample.name for sample in found})
    assert content(pickle.loads(pickle.dumps(found))) == EXPECTED  # for workers
    for sample in found:
        assert sample.name.startswith(str(tmp_path))


def test_an_unpacked_split_goes_before_the_archive_it_came_from(tmp_path):
    write_tar(tmp_path / "set" / "x-val.tar", OTHER)
    write_tar(tmp_path / "set" / "._x-train.tar", {})
    for name, body in tree("set/val/").items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(body)
    assert content(samples(tmp_path / "set")) == EXPECTED


def test_flat_archive_goes_by_the_names_order(tmp_path):
    files = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": png(i) for i in range(20)}
    archive = write_tar(tmp_path / "ILSVRC2012_img_val.tar", files)
    truth = tmp_path / "truth.txt"
    truth.write_text("".join(f"{i}\n" for i in range(20)))
    found = samples(archive, ground_truth=str(truth))
    assert [sample.load() for sample in found] == [png(i) for i in range(20)]
    assert [sample.target for sample in found] == list(range(20))
    with pytest.raises(InputError, match=r"ILSVRC2012_val_00000001.JPEG is in no class folder: give data.ground_truth"):
        samples(archive)
    with pytest.raises(InputError, match=r"has no file of split 'train' but val: set data.split or data.train_split"):
        samples(archive, split="train")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the library's own
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_are_read_as_their_own_library_does(tmp_path):
    root = make_shards(tmp_path / "set")
    urls = [f"file:{path}" for path in sorted(root.glob("*val*.tar"))]
    reference = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    expected = [(int(row["cls"]), row["png"]) for row in reference]
    del reference
    gc.collect()
    assert [(sample.target, sample.load()) for sample in samples(root)] == expected
    assert len(urls) == 3


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.jpg": b"", "a.json": b'{"label": 7}'}, 7),
        ({"a.jpg": b"", "a.json": b'{"label": "n01773157"}'}, 72),
        ({"a.jpg": b"", "a.cls": b"7\n", "b.jpg": b""}, "b.jpg has no .cls or .json beside it"),
        ({"a.jpg": b"", "a.json": b'{"other": 7}'}, "a.json holds no label"),
        ({"a.jpg": b"", "a.json": b"[]"}, "a.json holds no label"),
        ({"a.jpg": b"", "a.cls": b"\xff"}, "a.cls holds no label"),
        ({"a.jpg": b"", "a.cls": b"-1"}, "a.cls holds no label: choose a data.split that has labels"),
        ({"a.jpg": b"", "a.cls": b"1000"}, "/1000 is no class of a model with num_classes=1000"),
        ({"a.cls": b"1"}, "no images"),
        ({"n01440764.tar": b""}, "no images .* unpack archives that lie in it"),
    ],
)
def test_shard_labels(tmp_path, files, expected):
    archive = write_tar(tmp_path / "x.tar", files)
    if isinstance(expected, int):
        assert [sample.target for sample in samples(archive)] == [expected]
    else:
        with pytest.raises(InputError, match=expected):
            samples(archive)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.jpg": b"1", "a.mask.png": b"2", "a.cls": b"1"}, b"1"),  # KEY.jpg is the image
        ({"a.input.jpg": b"1", "a.cls": b"1"}, b"1"),
        ({"a.jpg": b"1", "a.png": b"2", "a.cls": b"1"}, "images of one sample: keep one of them"),
        ({"x/a.left.jpg": b"1", "x/a.right.jpg": b"2", "x/a.cls": b"1"}, r"x/a\.\w+\.jpg and a\.\w+\.jpg are images"),
    ],
)
def test_a_shards_sample_has_one_image(tmp_path, files, expected):
    archive = write_tar(tmp_path / "x.tar", files)
    if isinstance(expected, bytes):
        assert [sample.load() for sample in samples(archive)] == [expected]
    else:
        with pytest.raises(InputError, match=expected):
            samples(archive)


@pytest.mark.parametrize("folder", ["data", "."])
@pytest.mark.parametrize("names", [None, list(WNIDS)])
def test_parquet_folder(tmp_path, names, folder):
    root = make_parquet(tmp_path / "set", names=names, folder=folder)
    found = samples(root, split="validation")
    assert content(found) == EXPECTED
    first, second = (root / folder / f"validation-{i:05d}-of-00002.parquet" for i in range(2))
    for place, name in (
        (1, f"{first}[1] ILSVRC2012_val_00000002.png"),
        (3, f"{second}[0] ILSVRC2012_val_00000004.png"),
    ):
        assert found[place].name == name
        assert found[place].load() == sorted(EXPECTED)[place][1]
    assert content(pickle.loads(pickle.dumps(found))) == EXPECTED
    with pytest.raises(InputError, match="has no file of split 'val' but test, validation: set data.split"):
        samples(root)
    with pytest.raises(InputError, match="set:test has images without a label: choose a data.split that has labels"):
        samples(root, split="test")


def test_parquet_classes_of_its_own_and_imagenets_in_english(tmp_path):
    root = make_parquet(tmp_path / "own", names=["zebra", "ant"])
    found, classes = list_samples(ImageData(root=str(root)), "validation", 2)
    assert classes == ["zebra", "ant"]  # in the order of the labels, which is not that of the alphabet
    assert {sample.target for sample in found} == {0, 1}
    found, classes = list_samples(ImageData(root=str(root)), "validation", 3, ["ant", "bee", "zebra"])
    assert {sample.target for sample in found} == {0, 2}
    english = ["tench, Tinca tinca", *map(str, range(998)), "toilet tissue, toilet paper, bathroom tissue"]
    root = make_parquet(tmp_path / "english", names=english)
    found, classes = list_samples(ImageData(root=str(root)), "validation", 1000)
    assert classes == list(wordnet_ids())
    assert [sample.target for sample in found] == [0, 0, 0, 1, 1, 1]


def test_parquet_in_folders_of_splits(tmp_path):
    rows = {"train": [3, 1], "val": [2]}
    for split, labels in rows.items():
        (tmp_path / split).mkdir()
        images = [{"bytes": png(label), "path": None} for label in labels]
        pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / split / "0.parquet")
    for split, labels in rows.items():
        assert [(sample.target, sample.load()) for sample in samples(tmp_path, 5, split)] == [
            (label, png(label)) for label in labels
        ]
    with pytest.raises(InputError, match="has no folder 'test' but train, val"):
        samples(tmp_path, 5, "test")


@pytest.mark.parametrize("kind", ["parquet", "tar", "shard"])
def test_files_that_name_no_split_give_both_splits_the_same_names(tmp_path, kind):
    """So that training, which compares the names, refuses to evaluate on what it learns from."""
    if kind == "parquet":
        images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(4)]
        pq.write_table(pa.table({"image": images, "label": [0, 1, 2, 3]}), tmp_path / "images.parquet")
    elif kind == "tar":
        write_tar(tmp_path / "x.tar", {name.replace("n0", "c"): body for name, body in tree().items()})
    else:
        write_tar(tmp_path / "x.tar", {"a.png": png(0), "a.cls": b"0", "b.png": png(1), "b.cls": b"1"})
    classes = 2 if kind == "tar" else 4
    train, val = ([sample.name for sample in samples(tmp_path, classes, split)] for split in ("train", "val"))
    assert train == val
    data = ["data.root=" + str(tmp_path), f"num_classes={classes}", f"output={tmp_path / 'run'}"]
    small = ["weights=null", "model=cspresnet10", "preprocess.resize=32", "preprocess.crop=32", "device=cpu"]
    with pytest.raises(InputError, match="has no separate 'val' folder to evaluate on"):
        run_train(load_config(ClassifierConfig, CONFIG, data + small))


def test_parquet_without_the_librarys_metadata(tmp_path):
    (tmp_path / "set").mkdir()
    images = [{"bytes": png(i), "path": None} for i in range(3)] + [{"bytes": None, "path": "elsewhere.png"}]
    pq.write_table(pa.table({"image": images, "label": [3, 1, 2, 2]}), tmp_path / "set" / "val.parquet")
    found = samples(tmp_path / "set", 5)
    assert [sample.target for sample in found] == [3, 1, 2, 2]
    assert found[2].load() == png(2)
    assert found[0].name.endswith("set/val.parquet[0]")
    with pytest.raises(ImageError, match="holds no image bytes"):
        found[3].load()
    pq.write_table(pa.table({"picture": images}), tmp_path / "set" / "val.parquet")
    with pytest.raises(InputError, match=r"cannot read .*give columns image \(bytes, path\) and label"):
        samples(tmp_path / "set", 5)
    (tmp_path / "set" / "val.parquet").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"cannot read .*set"):
        samples(tmp_path / "set", 5)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    (tmp_path / "val.parquet").touch()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'cspnet\[huggingface\]'"):
        samples(tmp_path)


def test_broken_archives(tmp_path):
    (tmp_path / "text.tar").write_text("no archive" * 100)
    with pytest.raises(InputError, match="no uncompressed tar archive .*: decompress or unpack it"):
        samples(tmp_path / "text.tar")
    archive = write_tar(tmp_path / "x.tar", tree())
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.add(archive, "x")
    with pytest.raises(InputError, match="no uncompressed tar archive"):
        samples(tmp_path / "x.tar.gz")
    found = samples(archive)
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(ImageError, match=r"x.tar ends in the middle of the image"):
        [sample.load() for sample in found]
    archive.unlink()
    with pytest.raises(ImageError, match=r"cannot read .*x.tar"):
        found[0].load()


def test_labels_of_its_own_and_a_ground_truth_do_not_mix(tmp_path):
    truth = tmp_path / "truth.txt"
    truth.write_text("1\n")
    for root in (make_shards(tmp_path / "shards"), make_parquet(tmp_path / "parquet")):
        with pytest.raises(InputError, match="has its own labels: leave out data.ground_truth"):
            samples(root, ground_truth=str(truth))


def test_real_labels_go_by_the_number_in_the_name(tmp_path):
    root, file = tmp_path / "val" / "n01440764", tmp_path / "real.json"
    root.mkdir(parents=True)
    for number in (3, 1):
        (root / f"ILSVRC2012_val_{number:08d}.JPEG").touch()
    file.write_text(json.dumps([[5, 6], [9], []]))
    found = samples(tmp_path, real_labels=str(file))
    assert [(sample.name[-6], sample.real) for sample in found] == [("1", (5, 6)), ("3", ())]
    assert samples(tmp_path)[0].real is None
    parquet = make_parquet(tmp_path / "set")
    file.write_text(json.dumps([[i] for i in range(6)]))
    data = ImageData(root=str(parquet), split="validation", real_labels=str(file))
    assert [sample.real for sample in list_samples(data, "validation", 1000)[0]] == [(i,) for i in range(6)]


@pytest.mark.parametrize(
    ("text", "name", "num_classes", "message"),
    [
        ("[[1]]", "ILSVRC2012_val_00000002", 1000, "has 1 rows and none for .*00000002.JPEG"),
        ("[[1]]", "ILSVRC2012_val_00000000", 1000, "has 1 rows and none for"),
        ("[[1]]", "image", 1000, "image.JPEG has no number ILSVRC2012_val_"),
        ("[[1]]", "ILSVRC2012_val_00000001", 10, "ImageNet's 1000 classes, num_classes=10"),
        ('{"a": 1}', "ILSVRC2012_val_00000001", 1000, "no list of lists of class indices"),
        ("[[1000]]", "ILSVRC2012_val_00000001", 1000, "no list of lists of class indices"),
        ("nothing", "ILSVRC2012_val_00000001", 1000, "is not JSON"),
    ],
)
def test_real_labels_that_do_not_fit(tmp_path, text, name, num_classes, message):
    (tmp_path / "val" / "0").mkdir(parents=True)
    (tmp_path / "val" / "0" / f"{name}.JPEG").touch()
    (tmp_path / "real.json").write_text(text)
    with pytest.raises(InputError, match=message):
        samples(tmp_path, num_classes, real_labels=str(tmp_path / "real.json"))


def test_training_images_need_no_real_labels(tmp_path):
    (tmp_path / "train" / "0").mkdir(parents=True)
    (tmp_path / "train" / "0" / "image.JPEG").touch()
    (tmp_path / "real.json").write_text("[]")
    assert samples(tmp_path, split="train", real_labels=str(tmp_path / "real.json"))[0].real is None
