"""What the checks of a data set find and know, and how they look at values that may be anything."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

Entry = dict[str, Any]
What = Literal["file", "image", "category", "annotation"]
Found = Iterator[tuple[str, str]]  # kind, message
WARNINGS = {
    "annotation-without-id", "area-disagrees", "box-larger-than-image", "box-partly-outside", "category-name-twice",
    "category-without-name", "category-without-objects", "crowd-without-rle", "file-turned", "image-without-size",
    "object-twice", "segmentation-empty", "segmentation-far-from-box",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """A defect: its kind, and the annotation, image, category or file that has it."""

    kind: str
    what: What
    id: Any
    message: str
    image_id: int | None = None

    @property
    def level(self) -> str:
        """`error` or `warning`."""
        return "warning" if self.kind in WARNINGS else "error"

    def __str__(self) -> str:
        image = f" of image {self.image_id}" if self.what == "annotation" and self.image_id is not None else ""
        return f"{self.level}: {self.what} {self.id}{image}: {self.kind}: {self.message}"


@dataclass
class Known:
    """What has been read so far: entries by id, each id's first, and objects seen."""

    images: dict[int, Entry] = field(default_factory=dict)
    categories: dict[int, Entry] = field(default_factory=dict)
    annotations: set[Any] = field(default_factory=set)
    objects: dict[Any, Any] = field(default_factory=dict)  # image, category, box -> annotation id
    file_names: dict[str, Any] = field(default_factory=dict)  # -> image id
    class_names: dict[str, Any] = field(default_factory=dict)  # -> category id

    def size(self, annotation: Entry) -> tuple[int, int] | None:
        """Height and width of an annotation's image, if they are known and sound."""
        image: Entry = self.images.get(hashable(annotation.get("image_id")), {})
        height, width = pixels(image.get("height")), pixels(image.get("width"))
        return None if height is None or width is None else (height, width)


def each(
    what: What, entries: list[Any], known: Known, check: Callable[[Entry, Any, Known], Iterator[Finding]]
) -> Iterator[Finding]:
    """What `check` finds of one entry after the other, called by its id or, without one, by its position."""
    for i, entry in enumerate(entries):
        position = f"at position {i}"
        if isinstance(entry, dict):
            yield from check(entry, position if entry.get("id") is None else entry["id"], known)
        else:
            yield Finding("entry-invalid", what, position, f"{short(entry)} is no object")


def box_of(entry: Entry) -> list[float] | None:
    """An annotation's bbox if it is four numbers, finite or not."""
    box = entry.get("bbox")
    return box if isinstance(box, list) and len(box) == 4 and all(map(is_number, box)) else None


def is_number(value: Any) -> TypeGuard[float]:
    """An integer or a float, finite or not; JSON's booleans are none, nor are integers that no float holds."""
    return isinstance(value, float) or (integer(value) is not None and abs(value) < 1e15)


def pixels(value: Any) -> int | None:
    """A side's length if it is a whole number above 0, such as 100 and 100.0."""
    return int(value) if is_number(value) and 0 < value < math.inf and value == int(value) else None


def integer(value: Any) -> int | None:
    """The value if it is an integer."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def hashable(value: Any) -> Any:
    """A value that a table can be asked for, whatever the JSON holds."""
    return value if isinstance(value, int | float | str) else None if value is None else str(value)


def short(value: object) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
