"""Class indices from what names the classes: folders, ground-truth files, ImageNet's ids, ReaL; no torch here."""

import csv
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from backbones.errors import InputError
from backbones.files import read_json

WORDNET_ID = re.compile(r"n\d{8}")
VALIDATION_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


@cache
def wordnet_ids() -> tuple[str, ...]:
    """The 1000 WordNet ids of ILSVRC2012 in class order, which is their sorted order."""
    return tuple(Path(__file__).with_name("imagenet_wnids.txt").read_text().split())


def class_names(num_classes: int) -> list[str]:
    """Names for a model without names of its own: WordNet ids if it has ImageNet's 1000 classes, else numbers."""
    return list(wordnet_ids()) if num_classes == 1000 else [str(i) for i in range(num_classes)]


def class_indices(
    names: Sequence[str], where: str, num_classes: int, classes: Sequence[str] | None
) -> tuple[list[int], list[str]]:
    """The class index of each name in a data set, and the names of all classes.

    Numbers are class indices. Other names are those of `classes`, what the model was trained on, if it is known.
    WordNet ids are ImageNet's if the model has 1000 classes. In these cases some of the classes will do.
    Otherwise the names are the classes, in their order.

    Raises:
        InputError: names that the model does not have.
    """
    if all(name.isdecimal() for name in names):
        indices = [int(name) for name in names]
        if max(indices) >= num_classes:
            raise InputError(
                f"{where}/{max(indices)} is no class of a model with num_classes={num_classes}: number from 0"
            )
        return indices, list(classes or class_names(num_classes))
    if classes is not None and set(names) <= set(classes):
        return [classes.index(name) for name in names], list(classes)
    if num_classes == 1000 and all(WORDNET_ID.fullmatch(name) for name in names):
        return [_index_of(name, where) for name in names], class_names(1000)
    if classes is not None:
        foreign = min(set(names) - set(classes))
        raise InputError(
            f"{where}/{foreign} is none of the model's classes, {', '.join(classes[:5])}…: wrong data set?"
        )
    if len(names) != num_classes:
        raise InputError(
            f"{where} has {len(names)} classes but num_classes={num_classes}: "
            f"set num_classes={len(names)}, or name the classes by number"
        )
    return list(range(len(names))), list(names)


def _index_of(wnid: str, where: object) -> int:
    try:
        return wordnet_ids().index(wnid)
    except ValueError:
        raise InputError(f"{where}: {wnid} is none of ImageNet-1k's WordNet ids") from None


def ground_truth(names: Sequence[str], where: str, truth: Path, kind: str, num_classes: int) -> list[int]:
    """The class indices of images, by their names or, if the file has none, in their order.

    Args:
        kind: what integers are, `index`, `ilsvrc2012`, or `auto` to find out.

    Raises:
        InputError: a file that cannot be read, does not fit the images, or may mean two things.
    """
    try:
        lines = [line.strip() for line in truth.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read data.ground_truth={truth}: {error}") from None
    if not lines:
        raise InputError(f"data.ground_truth={truth} is empty: one line an image")
    labels = lines
    if named := dict(_named_labels(lines)):
        stems = [Path(name).stem for name in names]
        if missing := [stem for stem in stems if stem not in named]:
            raise InputError(f"{truth} has no class for {missing[0]} and {len(missing) - 1} more images of {where}")
        labels = [named[stem] for stem in stems]
    elif len(lines) != len(names):
        raise InputError(f"{truth} has {len(lines)} lines but {where} has {len(names)} images: one line an image")
    return _targets(labels, truth, kind, num_classes)


def _named_labels(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of file stem and label from `name label` lines or from a CSV such as Kaggle's LOC_val_solution.csv."""
    for row in csv.reader(lines) if "," in lines[0] else map(str.split, lines):
        if len(row) >= 2 and row[0] != "ImageId":
            yield Path(row[0]).stem, (row[1].split() or [""])[0]


def _targets(labels: Sequence[str], truth: Path, kind: str, num_classes: int) -> list[int]:
    """Class indices of WordNet ids, of class indices, or of ILSVRC2012 ids (1...1000, in the devkit's own order)."""
    if all(WORDNET_ID.fullmatch(label) for label in labels):
        return [_index_of(label, truth) for label in labels]
    wrong = next((label for label in labels if not label.isdecimal()), None)
    if wrong is not None:
        raise InputError(f"{truth}: {wrong!r} is neither a class number nor a WordNet id")
    numbers = [int(label) for label in labels]
    meta = truth.with_name("meta.mat")
    if kind == "auto":
        # Only class indices have a 0; only the devkit ships a meta.mat.
        kind = "index" if num_classes != 1000 or 0 in numbers else "ilsvrc2012" if meta.is_file() else "auto"
    if kind == "auto":
        raise InputError(
            f"{truth} may hold class indices (0...999) or ILSVRC2012 ids (1...1000): say data.label_ids=index, "
            f"or data.label_ids=ilsvrc2012 with the devkit's meta.mat beside it"
        )
    if kind == "ilsvrc2012":
        numbers = [_devkit_index(number, truth, meta) for number in numbers]
    if max(numbers) >= num_classes:
        raise InputError(f"{truth}: class {max(numbers)} is not in 0...{num_classes - 1}")
    return numbers


def _devkit_index(number: int, truth: Path, meta: Path) -> int:
    ids = _devkit_order(meta)
    if number not in ids:
        raise InputError(f"{truth}: {number} is no ILSVRC2012 id of {meta}")
    return ids[number]


@cache
def _devkit_order(meta: Path) -> dict[int, int]:
    """ILSVRC2012 id -> class index, from the development kit's meta.mat."""
    from scipy.io import loadmat  # needed for this file alone

    try:
        rows = loadmat(meta, squeeze_me=True)["synsets"]
        ids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows if row["num_children"] == 0}
    except Exception as error:  # of whatever kind: SciPy's own for files cut short is a bare Exception
        raise InputError(f"cannot read {meta} ({error}): put the devkit's meta.mat beside the ground truth") from None
    return {number: _index_of(wnid, meta) for number, wnid in ids.items()}


def real_labels(path: Path, names: Sequence[str]) -> list[tuple[int, ...]]:
    """The reassessed labels (Beyer et al. 2020) of images of ImageNet's validation set, by the number in their names.

    An image may have several labels or none.

    Raises:
        InputError: a file that is no list of class indices, or names without a number or with one too large.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not all(_are_indices(row) for row in rows):
        raise InputError(f"data.real_labels={path} is no list of lists of class indices 0...999: give ReaL's real.json")
    labels = []
    for name in names:
        numbers = VALIDATION_NUMBER.findall(name)
        if not numbers:
            raise InputError(f"{name} has no number ILSVRC2012_val_…, which ReaL goes by: leave out data.real_labels")
        number = int(numbers[-1])
        if not 1 <= number <= len(rows):
            raise InputError(f"data.real_labels={path} has {len(rows)} rows and none for {name}: is it whole?")
        labels.append(tuple(rows[number - 1]))
    return labels


def _are_indices(row: object) -> bool:
    return isinstance(row, list) and all(isinstance(label, int) and 0 <= label < 1000 for label in row)
