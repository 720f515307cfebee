"""What a batch job can be of: every kind of input gives the same images, by names that can be read again."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifacts import picture

from backbones.errors import InputError
from backbones.files import write_json
from backbones.preprocess import ImageError
from serving.jobs.inputs import File, list_files
from serving.jobs.parts import GROUP, read_list, write_list

NAMES = ["a/1.jpg", "a/b c/2?.PNG", "z%20.jpg", "ä.jpg"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images whose names a URI has to quote, each with bytes of its own; and what is no image of it."""
    root = tmp_path / "in"
    for name in [*NAMES, ".hidden/3.jpg", "a/.4.jpg", "a/notes.txt"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def uri(path: Path) -> str:
    return f"file://{path}"


def contents(files: list[File]) -> list[bytes]:
    read = [file.read() for file in files]
    return [item if isinstance(item, bytes) else Path(item).read_bytes() for item in read]


def check(files: list[File], names: list[str] = NAMES) -> None:
    assert [file.name for file in files] == names
    assert contents(files) == [name.encode() for name in NAMES]


@pytest.mark.parametrize("place", [str, uri])
def test_folders_and_globs(folder: Path, place) -> None:
    check(list(list_files(place(folder))))
    check(list(list_files(place(folder) + "/**/*")))
    for pattern, found in [
        ("*.jpg", NAMES[2:]),
        ("**/*.jpg", [NAMES[0], *NAMES[2:]]),
        ("a/**/[!1-9].PNG", []),
        ("a/*/?" + ("%3F" if place is uri else "[?]") + ".PNG", [] if place is uri else ["b c/2?.PNG"]),
        ("*/[0-9].*", ["a/1.jpg"]),
    ]:
        if found:
            assert [file.name for file in list_files(f"{place(folder)}/{pattern}")] == found
        else:
            with pytest.raises(InputError, match="no images"):
                list(list_files(f"{place(folder)}/{pattern}"))


def test_a_single_image_is_an_input(folder: Path) -> None:
    path = folder / NAMES[0]
    assert [(file.name, file.read()) for file in list_files(str(path))] == [(str(path), str(path))]
    assert contents(list(list_files(uri(path)))) == [b"a/1.jpg"]


@pytest.mark.parametrize("place", [str, uri])
@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "parquet"])
def test_manifests_of_paths(folder: Path, kind: str, place) -> None:
    """Relative to their own folder or to another, absolute, and URIs, whose names stay as they are given."""
    given = [NAMES[0], str(folder / NAMES[1]), uri(folder / "z%2520.jpg"), NAMES[3]]
    rows = [{"path": name, "label": str(i), "image_id": 10 + i} for i, name in enumerate(given)]
    for path, images in [(folder / f"list.{kind}", None), (folder.parent / f"list.{kind}", place(folder))]:
        if kind == "txt":
            path.write_text("\ufeff" + "\n\n".join(given) + "\n")
        elif kind == "csv":
            lines = [f'{10 + i},"{name}",{i}' for i, name in enumerate(given)]
            path.write_text("\r\n".join(["image_id,path,label", *lines]))
        elif kind == "jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        else:
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
        files = list(list_files(place(path), images))
        check(files, given)
        assert [file.image_id for file in files] == ([None] * 4 if kind == "txt" else [10, 11, 12, 13])
        assert [file.label for file in files] == ([None] * 4 if kind == "txt" else ["0", "1", "2", "3"])


@pytest.mark.parametrize("place", [str, uri])
def test_parquet_with_bytes_and_archives(folder: Path, place) -> None:
    table = pa.table({"bytes": [name.encode() for name in NAMES], "path": NAMES, "label": [3, 1, 2, 0]})
    pq.write_table(table, folder.parent / "rows.parquet", row_group_size=3)
    files = list(list_files(place(folder.parent / "rows.parquet")))
    check(files)
    assert [file.label for file in files] == ["3", "1", "2", "0"]
    pq.write_table(table, folder.parent / "ROWS.Parquet")
    pq.write_table(table.drop_columns(["path"]), folder.parent / "only.parquet")
    check(list(list_files(place(folder.parent / "on*.parquet"))), [f"only.parquet[0,{i}]" for i in range(4)])

    with tarfile.open(folder.parent / "s-0.tar", "w") as tar:
        for i, name in enumerate(NAMES):
            for member, data in [(f"{i}.jpg", name.encode()), (f"{i}.cls", b"%d\n" % i), (f"{i}.json", b"{}")]:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    options = "?use_mmap=1" if place is uri else ""
    check(list(list_files(place(folder.parent / "ROWS.Parquet") + options)))
    check(list(list_files(place(folder.parent / "RO?S.P*") + options)))
    files = list(list_files(place(folder.parent / "s-*.tar")))
    check(files, [f"s-0.tar/{i}.jpg" for i in range(4)])
    assert [file.label for file in files] == ["0", "1", "2", "3"]
    (folder.parent / "s-0.tar").write_bytes((folder.parent / "s-0.tar").read_bytes()[:600])
    with pytest.raises(ImageError, match="ends in the middle of s-0.tar/1.jpg|cannot be read"):
        files[1].read()


def test_coco_and_labels_of_folders(folder: Path) -> None:
    images = [{"id": i, "file_name": name} for i, name in enumerate(NAMES)]
    write_json(folder.parent / "c.json", {"images": images, "categories": [{"id": 1}], "annotations": []})
    files = list(list_files(str(folder.parent / "c.json"), str(folder)))
    check(files)
    assert [file.image_id for file in files] == [0, 1, 2, 3]
    labelled = list_files(str(folder), folders_are_labels=True)
    assert [next(labelled).label for _ in range(2)] == ["a", "a"]
    with pytest.raises(InputError, match="z%20.jpg is in no class folder: give the folder above"):
        next(labelled)


def test_what_cannot_be_read_is_an_image_error(folder: Path) -> None:
    (file,) = list_files(uri(folder / NAMES[0]))
    (folder / NAMES[0]).unlink()
    with pytest.raises(ImageError, match="a/1.jpg cannot be read: No such file"):
        file.read()
    pq.write_table(pa.table({"bytes": pa.array([None], pa.binary())}), folder / "none.parquet")
    (file,) = list_files(str(folder / "none.parquet"))
    with pytest.raises(ImageError, match=r"none.parquet\[0,0\] holds no bytes"):
        file.read()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.csv", "file\na.jpg\n", "l.csv has no column path but file: rename one of them"),
        ("l.jsonl", '{"path": "a.jpg"}\n{"file": "b.jpg"}\n', "l.jsonl, line 2 has no column path but file"),
        ("l.jsonl", '["a.jpg"]\n', "l.jsonl, line 1 is no JSON object"),
        ("l.jsonl", "{\n", "cannot read .*l.jsonl .*: give a text file in UTF-8 of jsonl"),
        ("l.jsonl", '{"path": 3}\n', "line 1: path=3 is no text"),
        ("l.csv", "path,image_id\na.jpg,x\n", "line 2: image_id='x' is no whole number"),
        ("l.csv", "path\n", "no images .* an empty list"),
        ("l.parquet", "text", "cannot read .*l.parquet .*: give a Parquet file"),
        ("l.tar", "text" * 500, "l.tar is no uncompressed tar archive"),
        ("l.json", "{}", "l.json is not in COCO's format"),
        ("l.xml", "", "l.xml is no image .*, no list of paths"),
    ],
)
def test_broken_lists_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        list(list_files(str(tmp_path / name)))


def test_places_that_cannot_be_reached(tmp_path: Path) -> None:
    for place, message in [
        ("ftp://host/a.jpg", "cannot reach ftp://host/: "),
        (f"file://{tmp_path}/none", "no input at file://"),
        (f"{tmp_path}/none/*.jpg", "no images"),
    ]:
        with pytest.raises(InputError, match=message):
            list(list_files(place))
    pq.write_table(pa.table({"image": ["a.jpg"]}), tmp_path / "l.parquet")
    with pytest.raises(InputError, match="has no column path or bytes but image: rename one of them"):
        list(list_files(str(tmp_path / "l.parquet")))


def test_a_written_list_is_read_from_anywhere(tmp_path: Path) -> None:
    files = [File(f"{i}.jpg", b"/\xe9/%d" % i, (i, 2 * i) if i % 2 else None, i, "x") for i in range(GROUP + 10)]
    listing = write_list(iter(files), tmp_path / "l.parquet")
    assert (listing.images, listing.labels, listing.has_ids) == (GROUP + 10, {"x"}, True)
    for start in (0, 1, GROUP - 1, GROUP, GROUP + 9, GROUP + 10):
        assert list(read_list(tmp_path / "l.parquet", start)) == files[start:]
    again = write_list(iter(files), tmp_path / "again.parquet")
    assert again == listing
    files[5] = File("5.jpg", b"/other/5", (5, 10), 5, "x")
    assert write_list(iter(files), tmp_path / "again.parquet").sha256 != listing.sha256


def test_pictures_are_read_as_the_predictor_takes_them(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture("red"))
    (file,) = list_files(uri(tmp_path / "a.png"))
    assert file.read() == picture("red")
