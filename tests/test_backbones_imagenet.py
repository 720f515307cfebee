import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.io import savemat
from shared_data import real

from backbones.__main__ import main
from backbones.config import ClassifierConfig, ImageData, load_config
from backbones.errors import InputError
from backbones.imagenet import ImageNet, create_loader
from backbones.labels import wordnet_ids
from backbones.preprocess import ClassifierPreprocess, ImageError, classifier_pixels, decode
from backbones.published import ALIASES, RELEASES, protocol
from backbones.samples import Sample, list_samples

CONFIG = Path(__file__).parents[1] / "configs" / "imagenet" / "cspresnet50.yaml"


def folders(root: Path, names, images=2) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", (40, 40), (hash(name) % 255, i, 0)).save(root / name / f"{i}.JPEG")
    return root


def flat(root: Path, count=4) -> Path:
    root.mkdir()
    for i in range(count):
        Image.new("RGB", (40, 40)).save(root / f"ILSVRC2012_val_{i + 1:08d}.JPEG")
    return root


def targets(data: ImageData, num_classes: int) -> list[int]:
    return [sample.target for sample in list_samples(data, "val", num_classes)[0]]


def test_wordnet_ids_are_imagenets():
    path = Path(timm.__file__).parent / "data" / "_info" / "imagenet_synsets.txt"
    assert list(wordnet_ids()) == path.read_text().split()
    assert list(wordnet_ids()) == sorted(set(wordnet_ids()))


def test_subset_of_imagenet_keeps_imagenets_indices(tmp_path):
    root = folders(tmp_path / "val", ["n01440764", "n03888257"])
    assert targets(ImageData(root=str(root)), 1000) == [0, 0, 701, 701]
    assert targets(ImageData(root=str(tmp_path)), 1000) == [0, 0, 701, 701]  # its split is found
    assert targets(ImageData(root=str(root)), 2) == [0, 0, 1, 1]  # of a model with two classes they are the classes


def test_numbers_are_indices_and_names_are_sorted(tmp_path):
    assert targets(ImageData(root=str(folders(tmp_path / "a", ["0", "999", "10"], 1))), 1000) == [0, 10, 999]
    samples, classes = list_samples(ImageData(root=str(folders(tmp_path / "b", ["dog", "cat"], 1))), "val", 2)
    assert classes == ["cat", "dog"]
    assert [Path(sample.name).parent.name for sample in samples] == ["cat", "dog"]


def test_flat_folder_with_ground_truth(tmp_path):
    root = flat(tmp_path / "val")
    truths = {
        "wnids.txt": "n03888257\nn01440764\nn01440764\nn03888257\n",
        "indices.txt": "701\n0\n0\n701\n",
        "caffe.txt": "".join(f"ILSVRC2012_val_{i + 1:08d}.JPEG {c}\n" for i, c in enumerate([701, 0, 0, 701])),
        "kaggle.csv": "ImageId,PredictionString\n"
        + "".join(
            f"ILSVRC2012_val_{i + 1:08d},{c} 1 2 3 4\n"
            for i, c in enumerate(["n03888257", "n01440764", "n01440764", "n03888257"])
        ),
    }
    for name, text in truths.items():
        (tmp_path / name).write_text(text)
        data = ImageData(root=str(root), ground_truth=str(tmp_path / name))
        assert targets(data, 1000) == [701, 0, 0, 701], name


def test_devkit_ids_go_through_meta_mat(tmp_path):
    root = flat(tmp_path / "val")
    truth = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("1\n2\n2\n1\n")
    data = ImageData(root=str(root), ground_truth=str(truth))
    with pytest.raises(InputError, match="may hold class indices .* or ILSVRC2012 ids .*data.label_ids=index"):
        targets(data, 1000)
    assert targets(data.model_copy(update={"label_ids": "index"}), 1000) == [1, 2, 2, 1]
    kind = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("num_children", "i4")]
    synsets = np.array([(1, "n02119789", 0), (2, "n02100735", 0), (1001, "n02084071", 9)], dtype=kind)
    savemat(tmp_path / "meta.mat", {"synsets": synsets.reshape(-1, 1)})
    expected = [wordnet_ids().index(wnid) for wnid in ("n02119789", "n02100735", "n02100735", "n02119789")]
    assert targets(data, 1000) == expected


@pytest.mark.parametrize("kind", ["empty", "cut short", "version 7.3", "text", "of something else"])
def test_a_broken_meta_mat_is_named(tmp_path, kind):
    truth, meta = tmp_path / "truth.txt", tmp_path / "meta.mat"
    truth.write_text("1\n2\n2\n1\n")
    savemat(meta, {"synsets": np.arange(4)})
    whole = meta.read_bytes()
    bodies = {"empty": b"", "cut short": whole[:150], "text": b"text" * 100, "of something else": whole}
    meta.write_bytes(bodies.get(kind, b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(400)))
    with pytest.raises(InputError, match=f"cannot read {meta} .*: put the devkit's meta.mat beside"):
        targets(ImageData(root=str(flat(tmp_path / "val")), ground_truth=str(truth)), 1000)


def test_a_ground_truth_is_of_the_validation_images_alone(tmp_path):
    """As ILSVRC2012 comes: training images in folders of classes, validation images in one."""
    folders(tmp_path / "train", ["n01440764", "n03888257"])
    flat(tmp_path / "val")
    (tmp_path / "truth.txt").write_text("n03888257\nn01440764\nn01440764\nn03888257\n")
    data = ImageData(root=str(tmp_path), ground_truth=str(tmp_path / "truth.txt"))
    (train, classes), (val, val_classes) = (list_samples(data, split, 1000) for split in ("train", "val"))
    assert [sample.target for sample in train] == [0, 0, 701, 701]
    assert [sample.target for sample in val] == [701, 0, 0, 701]
    assert classes == val_classes


@pytest.mark.parametrize(
    ("make", "values", "num_classes", "message"),
    [
        (lambda p: p, {"root": None}, 2, "data.root is not set"),
        (lambda p: p, {"root": "nowhere"}, 2, "data.root=nowhere is no folder"),
        (lambda p: p, {}, 2, "has no images: give a folder of class folders"),
        (flat, {}, 2, "has images but no class folders: give data.ground_truth=FILE"),
        (lambda p: folders(p, ["a", "b"], 0), {}, 2, "no images .* below"),
        (lambda p: folders(p, ["a", "b"]), {}, 3, "has 2 classes but num_classes=3: set num_classes=2"),
        (lambda p: folders(p, ["0", "7"]), {}, 5, "/7 is no class of a model with num_classes=5"),
        (lambda p: folders(p, ["n00000000"]), {}, 1000, "n00000000 is none of ImageNet-1k's WordNet ids"),
        (flat, {"ground_truth": "nothing.txt"}, 2, "cannot read data.ground_truth=nothing.txt"),
        (flat, {"ground_truth": "empty.txt"}, 2, "is empty: one line an image"),
        (flat, {"ground_truth": "one.txt"}, 2, "has 1 lines but .* has 4 images"),
        (flat, {"ground_truth": "cat.txt"}, 2, "'cat' is neither a class number nor a WordNet id"),
    ],
)
def test_bad_data_is_an_error_with_a_remedy(tmp_path, monkeypatch, make, values, num_classes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("1\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "cat.txt").write_text("cat\n" * 4)
    root = tmp_path / "data"
    if make(root) == root and not root.exists():
        root.mkdir()
    with pytest.raises(InputError, match=message):
        targets(ImageData(**{"root": str(root), **values}), num_classes)


def test_eval_command_writes_a_result(tmp_path, capsys):
    root = folders(tmp_path / "data" / "val", ["n01440764", "n03888257"])
    main(["eval", str(CONFIG), f"data.root={root.parent}", "weights=null", "model=cspresnet10", "data.workers=0",
          "preprocess.resize=32", "preprocess.crop=32", f"output={tmp_path / 'run'}"])  # fmt: skip
    assert "top-1" in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert result["images"] == 4
    assert set(result["per_class"]) == {"n01440764", "n03888257"}
    assert result["preprocess"]["crop"] == 32
    assert result["versions"]["torch"]


def test_eval_command_says_a_mistake_in_a_line(tmp_path, capsys):
    root = folders(tmp_path / "data" / "val", ["0", "1"])
    (root / "1" / "0.JPEG").write_bytes(b"broken")
    arguments = [str(CONFIG), f"data.root={root}", "weights=null", "model=cspresnet10", f"output={tmp_path / 'run'}"]
    for workers in (0, 1):  # a worker wraps the error in its traceback
        with pytest.raises(SystemExit) as stop:
            main(["eval", *arguments, f"data.workers={workers}", "preprocess.resize=32", "preprocess.crop=32"])
        assert stop.value.code == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith(f"error: {root / '1' / '0.JPEG'} cannot be decoded")
    assert not list((tmp_path / "run").iterdir())


def test_a_missing_split_is_not_the_other_one(tmp_path):
    folders(tmp_path / "train", ["cat", "dog"])
    with pytest.raises(InputError, match="has no folder 'val' but train: set data.split"):
        list_samples(ImageData(root=str(tmp_path)), "val", 2)


def test_names_go_by_what_the_model_was_trained_on(tmp_path):
    root = folders(tmp_path / "data", ["dog", "ant"], 1)
    data = ImageData(root=str(root))
    samples, classes = list_samples(data, "val", 3, ["dog", "cat", "ant"])
    assert [(Path(sample.name).parent.name, sample.target) for sample in samples] == [("ant", 2), ("dog", 0)]
    assert classes == ["dog", "cat", "ant"]
    with pytest.raises(InputError, match="/ant is none of the model's classes, dog, cat…: wrong data set"):
        list_samples(data, "val", 2, ["dog", "cat"])


def test_hidden_folders_and_files_do_not_count(tmp_path):
    root = folders(tmp_path / "data", ["a", "b", ".ipynb_checkpoints"], 1)
    (root / "a" / "._0.JPEG").write_bytes(b"")
    assert targets(ImageData(root=str(root)), 2) == [0, 1]


def test_real_subset_of_ten_classes():
    data = ImageData(root=str(real("imagenette")))
    samples, _ = list_samples(data, "val", 1000)
    index = json.loads((real("imagenette") / "wnid_to_imagenet_index.json").read_text())
    assert len(samples) == 500
    assert {(Path(sample.name).parent.name, sample.target) for sample in samples} == set(index.items())


def test_published_protocols_are_in_the_configs():
    configs = [load_config(ClassifierConfig, path) for path in CONFIG.parent.glob("*.yaml")]
    published = [config for config in configs if ALIASES.get(config.model, config.model) in RELEASES]
    assert len(published) >= 3
    for config in published:
        assert config.preprocess == protocol(config.model), config.model


SMALL = ClassifierPreprocess(resize=32, crop=24)


def noise(root: Path, count: int, broken: tuple[int, ...] = ()) -> list[Sample]:
    """Images of class i % 2 in a class folder each, some of which are text."""
    for i in range(count):
        path = root / str(i % 2) / f"{i:03d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i in broken:
            path.write_text("no image")
        else:
            Image.effect_noise((40 + i, 50), 90).convert("RGB").save(path)
    return list_samples(ImageData(root=str(root)), "val", 2)[0]


def draw(pixels, index):
    """An augmentation that depends on the index alone."""
    return np.roll(pixels[:24, :24], index, axis=0)


@pytest.mark.parametrize("augment", [None, draw])
def test_loader_gives_the_images_asked_for_in_order_whatever_the_workers(tmp_path, augment):
    samples = noise(tmp_path, 11)
    dataset = ImageNet(samples, SMALL, augment)
    assert dataset.targets.tolist() == [0] * 6 + [1] * 5
    assert dataset.targets.dtype == torch.int64
    indices = [7, 3, 10, 0, 5, 1, 8]
    batches = {workers: list(create_loader(dataset, 3, workers, indices)) for workers in (0, 2)}
    for workers, found in batches.items():
        assert torch.cat([index for _, index in found]).tolist() == indices, workers
        assert [tuple(pixels.shape) for pixels, _ in found] == [(3, 24, 24, 3), (3, 24, 24, 3), (1, 24, 24, 3)]
        assert {(pixels.dtype, index.dtype) for pixels, index in found} == {(torch.uint8, torch.int64)}
    pixels = torch.cat([pixels for pixels, _ in batches[0]])
    assert torch.equal(pixels, torch.cat([pixels for pixels, _ in batches[2]]))
    for index, one in zip(indices, pixels, strict=True):
        image = decode(samples[index].load())
        expected = classifier_pixels(image, SMALL) if augment is None else draw(np.asarray(image), index)
        np.testing.assert_array_equal(one, expected)
    assert torch.cat([index for _, index in create_loader(dataset, 4, 0)]).tolist() == list(range(11))
    assert len(list(create_loader(dataset, 4, 0, []))) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_left_out_or_stop_the_run_with_their_name(tmp_path, workers):
    samples = noise(tmp_path, 10, broken=(1, 4, 6, 8))  # by class, then by name: 0 2 4 6 8 1 3 5 7 9
    batches = list(create_loader(ImageNet(samples, SMALL, on_error="skip"), 2, workers))
    assert [index.tolist() for _, index in batches] == [[0, 1], [], [], [6, 7], [8, 9]]
    for pixels, index in batches:
        assert (pixels.shape, pixels.dtype) == ((len(index), 24, 24, 3), torch.uint8)
        assert (index.shape, index.dtype) == ((len(pixels),), torch.int64)
    stopping = create_loader(ImageNet(samples, SMALL), 2, workers)
    with pytest.raises(ImageError) as error:
        list(stopping)
    assert str(error.value).startswith(f"{samples[2].name} cannot be decoded")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_in_archives_are_named_when_broken_or_too_thin(tmp_path, workers):
    archive = tmp_path / "x.tar"
    noise(tmp_path / "val", 2, broken=(1,))
    Image.new("RGB", (30_000, 1)).save(tmp_path / "val" / "0" / "thin.png")
    with tarfile.open(archive, "w") as tar:
        tar.add(tmp_path / "val", "val")
    samples, _ = list_samples(ImageData(root=str(archive)), "val", 2)
    for index, message in [(1, "0/thin.png: image of 30000x1 pixels is too long"), (2, "1/001.JPEG: image cannot be")]:
        with pytest.raises(ImageError, match=f"^{archive}/val/{message}"):
            list(create_loader(ImageNet(samples, ClassifierPreprocess(resize=4000, crop=24)), 1, workers, [index]))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_draws_none_of_the_trainers_random_numbers(tmp_path, workers):
    loader = create_loader(ImageNet(noise(tmp_path, 2), SMALL), 1, workers)
    before = torch.get_rng_state()
    assert len(list(loader)) == 2
    assert torch.equal(torch.get_rng_state(), before)


COLORS = {"torchvision": (255, 0, 0), "opencv": (0, 0, 255)}


class Painted(ImageNet):
    """Its decoders give their colour, in whatever process they run."""

    def __getitem__(self, index):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("backbones.preprocess._decode_jpeg", lambda _, name: Image.new("RGB", (40, 40), COLORS[name]))
            return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("decoder", ["torchvision", "opencv"])
def test_decoders_reach_the_workers(tmp_path, decoder, workers):
    loader = create_loader(Painted(noise(tmp_path, 2), SMALL, decoder=decoder), 2, workers)
    [(pixels, _)] = loader
    assert (pixels == torch.tensor(COLORS[decoder])).all()
