"""Where the images of a data set are: the layouts of `data.root`, each recognised by what is there; no torch here.

    <root>/<split>/<class>/*.JPEG or <root>/<class>/*.JPEG   ImageFolder: WordNet ids, numbers, or any names
    <root>/<split>/*.JPEG or <root>/*.JPEG                   flat, with `data.ground_truth`
    <root>.tar, <root>/*.tar or <root>/<split>/*.tar         archives of either, read where they are, or
                                                             WebDataset shards: KEY.jpg with KEY.cls or KEY.json
    <root>/*.parquet, <root>/data/*.parquet or               Hugging Face: columns `image` and `label`
    <root>/<split>/*.parquet

Where the names of archives or Parquet files name splits, as in `imagenet-val-0000.tar`, those of the split are read.
An image has one name whatever split it is found for, so that two splits' names tell whether they share images.
"""

import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from backbones.errors import InputError
from backbones.files import IMAGE_SUFFIXES, is_image, list_images
from backbones.labels import WORDNET_ID, wordnet_ids
from backbones.preprocess import ImageError

SPLITS = ("train", "val", "valid", "validation", "test")
IMAGE_KINDS = ", ".join(IMAGE_SUFFIXES)


@dataclass(frozen=True)
class Member:
    """A file in an uncompressed archive. It is opened for each read: workers and threads share no position."""

    archive: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            ImageError: the archive is gone or ends too early.
        """
        try:
            with open(self.archive, "rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise ImageError(f"cannot read {self.archive}: {error.strerror}") from None
        if len(content) < self.size:
            raise ImageError(f"{self.archive} ends in the middle of the image: fetch the archive again")
        return content


@dataclass(frozen=True)
class Row:
    """A row of a `datasets.Dataset`, which is mapped into memory, so that any row is near."""

    table: Any
    index: int

    def read(self) -> bytes:
        """The image's bytes.

        Raises:
            ImageError: the row has none.
        """
        image = self.table[self.index]["image"]
        if image is None or image["bytes"] is None:
            raise ImageError("the row holds no image bytes: embed the images in the Parquet files")
        content: bytes = image["bytes"]
        return content


Source = Path | Member | Row


@dataclass(frozen=True)
class Found:
    """An image: what messages and reports call it, where it is, and the name of its class, if the layout says it."""

    name: str
    source: Source
    label: str | None = None


@dataclass(frozen=True)
class Listing:
    """The images of a split, and their classes in an order that is the same for every split."""

    where: str
    images: list[Found]
    classes: list[str]


def find_images(root: Path, split: str, *, flat: bool) -> Listing:
    """The images of a split in whatever layout `root` has.

    Args:
        flat: classes come from elsewhere, so that folders mean nothing. Images are sorted by name then.

    Raises:
        InputError: nothing there, no such split, or images without a class.
    """
    if root.is_file() and ".tar" in root.suffixes:
        return _read_archives([root], split, root, flat=flat)
    if not root.is_dir():
        raise InputError(f"data.root={root} is no folder and no .tar file: give the data set's folder")
    folder = root / split
    for place in (folder,) if folder.is_dir() else (root, root / "data"):
        if tables := _visible(place, "*.parquet"):
            if flat:
                raise InputError(f"{root} has its own labels: leave out data.ground_truth")
            return _read_parquet(_files_of_split(tables, split, root), split, root)
    if not folder.is_dir():
        if not _visible(root, "*.tar"):
            _refuse_other_splits(root, split)
        folder = root
    if archives := _visible(folder, "*.tar"):
        return _read_archives(archives, split, folder, flat=flat)
    return _read_folder(folder, flat=flat)


def _visible(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def _refuse_other_splits(root: Path, split: str) -> None:
    if others := [name for name in SPLITS if (root / name).is_dir()]:
        raise _no_split(root, split, others, "folder")


def _no_split(where: Path, split: str, others: Iterable[str], what: str) -> InputError:
    return InputError(f"{where} has no {what} {split!r} but {', '.join(others)}: set data.split or data.train_split")


def _files_of_split(files: Sequence[Path], split: str, where: Path) -> list[Path]:
    """The files whose names name the split; all of them if none names any."""
    named = {file: {split, *SPLITS}.intersection(re.split(r"[-_.]", file.name)) for file in files}
    others = set().union(*named.values())
    if not others:
        return list(files)
    if split not in others:
        raise _no_split(where, split, sorted(others), "file of split")
    return [file for file in files if split in named[file]]


def _read_folder(folder: Path, *, flat: bool) -> Listing:
    if flat:
        images = [Found(str(path), path) for path in list_images(folder)]
        if not images:
            raise InputError(f"no images ({IMAGE_KINDS}) in {folder}: is it the right folder?")
        return Listing(str(folder), images, [])
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        some = any(list_images(folder))
        problem = "images but no class folders" if some else "no images"
        remedy = "give data.ground_truth=FILE" if some else "give a folder of class folders as data.root"
        raise InputError(f"{folder} has {problem}: {remedy}")
    images = [Found(str(path), path, name) for name in names for path in list_images(folder / name)]
    if not images:
        raise InputError(f"no images ({IMAGE_KINDS}) below {folder}: is it the right folder?")
    return Listing(str(folder), images, names)


def _read_archives(archives: Sequence[Path], split: str, where: Path, *, flat: bool) -> Listing:
    files = [entry for archive in _files_of_split(archives, split, where) for entry in _members(archive)]
    images = [(path, member) for path, member in files if is_image(path)]
    if not images:
        raise InputError(f"no images ({IMAGE_KINDS}) in {where}: unpack archives that lie in it")
    image_keys = {_key(path, member) for path, member in images}
    labels = {
        _key(path, member): (path, member)
        for path, member in sorted(files, key=lambda entry: entry[0].suffix, reverse=True)  # .cls goes before .json
        if path.suffix in (".cls", ".json") and _key(path, member) in image_keys
    }
    if labels and flat:
        raise InputError(f"{where} has its own labels: leave out data.ground_truth")
    # The webdataset library reads shards from beginning to end only; single images are needed here.
    return _shards(images, labels, where) if labels else _tree(images, split, where, flat=flat)


Entry = tuple[PurePosixPath, Member]
Key = tuple[Path, str]


def _members(archive: Path) -> Iterator[Entry]:
    try:
        with tarfile.open(archive, "r:") as tar:
            for info in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep what is known of every file
                path = PurePosixPath(info.name)
                if info.isreg() and not any(part.startswith(".") for part in path.parts):
                    yield path, Member(archive, info.offset_data, info.size)
    except tarfile.TarError as error:
        raise InputError(f"{archive} is no uncompressed tar archive ({error}): decompress or unpack it") from None
    except OSError as error:
        raise InputError(f"cannot read {archive}: {error.strerror}") from None


def _key(path: PurePosixPath, member: Member) -> Key:
    """What the files of one WebDataset sample share: the shard, the folder, and the name up to its first dot."""
    return member.archive, str(path.with_name(path.name.partition(".")[0]))


def _shards(images: Sequence[Entry], labels: dict[Key, Entry], where: Path) -> Listing:
    samples: dict[Key, list[Entry]] = {}
    for path, member in images:
        samples.setdefault(_key(path, member), []).append((path, member))
    found = []
    for key, entries in samples.items():
        path, member = _sample_image(entries)
        name = f"{member.archive}/{path}"
        if key not in labels:
            raise InputError(f"{name} has no .cls or .json beside it: give every image its label")
        found.append(Found(name, member, _shard_label(*labels[key])))
    classes = {str(image.label) for image in found}
    return Listing(str(where), found, sorted(classes))


def _sample_image(entries: Sequence[Entry]) -> Entry:
    """A sample's image: its only one, or KEY.jpg beside such as KEY.mask.png."""
    plain = [entry for entry in entries if entry[0].name.count(".") == 1]
    for choice in (entries, plain):
        if len(choice) == 1:
            return choice[0]
    (first, member), (second, _), *_ = entries
    raise InputError(f"{member.archive}/{first} and {second.name} are images of one sample: keep one of them")


def _shard_label(path: PurePosixPath, member: Member) -> str:
    name = f"{member.archive}/{path}"
    try:
        content = member.read().decode()
        label = content if path.suffix == ".cls" else json.loads(content)["label"]
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{name} holds no label ({error}): write a class index into it") from None
    label = str(label).strip()
    if not label or label == "-1":
        raise InputError(f"{name} holds no label: choose a data.split that has labels")
    return label


def _tree(images: Sequence[Entry], split: str, where: Path, *, flat: bool) -> Listing:
    """Archives as folders: a class is a folder at the top, or in the split's folder, or one of ImageNet's own
    archives of a class, `n01440764.tar`."""
    splits = {split, *SPLITS}
    found = [(path.parts, Found(f"{member.archive}/{path}", member)) for path, member in images]
    tops = {parts[0] for parts, _ in found}
    while len(tops) == 1 and not tops & splits and all(len(parts) > 2 for parts, _ in found):
        found = [(parts[1:], image) for parts, image in found]  # without a folder round everything
        tops = {parts[0] for parts, _ in found}
    if others := tops & splits:
        if split not in others:
            raise _no_split(where, split, sorted(others), "folder")
        found = [(parts[1:], image) for parts, image in found if parts[0] == split]
    found.sort(key=lambda entry: entry[1].name)
    if flat:
        return Listing(str(where), [image for _, image in found], [])
    labelled = [replace(image, label=_folder_of(parts, image)) for parts, image in found]
    return Listing(str(where), labelled, sorted({str(image.label) for image in labelled}))


def _folder_of(parts: Sequence[str], image: Found) -> str:
    assert isinstance(image.source, Member)
    label = parts[0] if len(parts) > 1 else image.source.archive.stem
    if len(parts) == 1 and not WORDNET_ID.fullmatch(label):
        raise InputError(f"{image.name} is in no class folder: give data.ground_truth=FILE")
    return label


def _read_parquet(files: Sequence[Path], split: str, root: Path) -> Listing:
    """Parquet cannot be read by the row; `datasets` keeps an Arrow copy in its cache, which can."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"{root} holds Parquet files: pip install 'cspnet[huggingface]' to read them") from None
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        table = datasets.Dataset.from_parquet([str(file) for file in files])
        table = table.select_columns(["image", "label"]).cast_column("image", datasets.Image(decode=False))
        rows = [(file, i) for file in files for i in range(pq.read_metadata(file).num_rows)]
    except (ValueError, TypeError, OSError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise InputError(f"cannot read {root} ({reason}): give columns image (bytes, path) and label") from None
    where = f"{root}:{split}"
    labels = table.data.column("label").to_pylist()
    if any(label is None or label == -1 for label in labels):
        raise InputError(f"{where} has images without a label: choose a data.split that has labels")
    feature = table.features["label"]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    if names and (len(names), names[0], names[-1].split(",")[0]) == (1000, "tench, Tinca tinca", "toilet tissue"):
        names = list(wordnet_ids())  # ImageNet-1k in English; its order is the WordNet ids'
    paths = pc.struct_field(table.data.column("image"), "path").to_pylist()
    images = [
        Found(f"{file}[{row}] {path or ''}".rstrip(), Row(table, i), names[label] if names else str(label))
        for i, ((file, row), label, path) in enumerate(zip(rows, labels, paths, strict=True))
    ]
    return Listing(where, images, list(names or sorted(set(map(str, labels)))))
