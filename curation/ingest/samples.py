"""Files that share a name, grouped into samples: an image with what describes it."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from infra.corpus.names import suffix_of

IMAGE_SUFFIXES = frozenset(
    (
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif", "avifs"),
        *("jp2", "j2k", "jpx", "ico", "tga", "ppm", "pgm", "pbm", "pnm", "heic", "heif", "jxl"),
    )
)
"""Of files that claim to be images, whether they can be decoded or not."""
SIDECAR_SUFFIXES = frozenset(["txt", "json", "cls", "caption", "npy", "npz", "pkl", "pickle", "pth", "pyd", "ten"])
"""Of files that describe a sample; files of any other suffix may turn out to be its image."""
_MOST_HELD = 16  # images behind one key that are held until it is known whether they are several samples


@dataclass(frozen=True)
class Member:
    """One file of a sample."""

    name: str
    """Its path in the source or the shard."""
    extension: str
    size: int
    data: bytes | None
    """None where it is larger than was asked for."""
    offset: int | None = None
    """Where its content begins in a plain tar."""
    unreadable: str | None = None
    """Why it cannot be read: it is a link, a pipe or the like."""
    is_annotation: bool = False
    """Whether it describes the image of its name although its suffix is an image's."""

    @property
    def is_sidecar(self) -> bool:
        return self.is_annotation or suffix_of(self.name) in SIDECAR_SUFFIXES

    @property
    def claims_to_be_image(self) -> bool:
        return not self.is_annotation and suffix_of(self.name) in IMAGE_SUFFIXES


@dataclass
class Sample:
    """Files that belong together."""

    key: str
    members: list[Member] = field(default_factory=list)
    folder_class: str | None = None

    def image(self) -> Member | None:
        """The member that is, or claims to be, the image: one with an image's suffix, or the shortest other one that
        is no sidecar."""
        return min(
            (each for each in self.members if not each.is_sidecar),
            key=lambda each: (not each.claims_to_be_image, each.extension.count("."), each.extension),
            default=None,
        )

    def text(self, extension: str) -> str | None:
        """The content of a sidecar as text; None where there is none or it is not UTF-8."""
        for member in self.members:
            if member.extension.lower() == extension and member.data is not None:
                try:
                    return member.data.decode()
                except UnicodeDecodeError:
                    return None
        return None


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member: split at the first dot of its base name, as in WebDataset.

    WebDataset does not write extensions that begin with an underscore.
    """
    folder, slash, base = _relative(name).rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem:
        return folder + slash + base, "bin"
    return folder + slash + stem, extension.lstrip("_") or "bin"


def _relative(name: str) -> str:
    """A member's name without what makes it absolute or begins at the archive's own folder: /, ./ and repetitions."""
    while name.startswith(("/", "./")):
        name = name.removeprefix("/").removeprefix("./")
    return name


def stored_key(name: str) -> str:
    """A key for a name without its extension: no dot in its last part, which would end it in a tar, no empty part.

    Keys that this changes keep apart by a hash of the name.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    key = "/".join([*parts[:-1], parts[-1].replace(".", "_")]) if parts else "_"
    if key == name or ".." in parts:  # climbing names are refused as they are
        return name
    return f"{key}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def stem_of(name: str, annotation_suffixes: Iterable[str] = ()) -> str:
    """A file's name without its suffix, or without that of an annotation."""
    for suffix in annotation_suffixes:
        if name.lower().endswith(f".{suffix}"):
            return name[: -len(suffix) - 1]
    stem, suffix = posixpath.splitext(name)
    return name if suffix == "." else stem


def group_stem(stem: str, members: Sequence[Member]) -> Iterator[Sample]:
    """Files of one name but for their suffix as samples, one an image: of several, each has its suffix in its key.

    All share the sidecars. Of several sidecars of one suffix (`a.txt` beside `a.TXT`) the first one counts; the others
    are samples without an image.
    """
    named = [replace(each, extension=_extension_behind(stem, each.name)) for each in members]
    images = [each for each in named if not each.is_sidecar]
    sidecars = {each.extension: each for each in reversed(named) if each.is_sidecar}
    for image in images:
        name = _relative(image.name) if len(images) > 1 else stem
        yield Sample(stored_key(name), [image, *sidecars.values()])
    if not images:
        yield Sample(stored_key(stem), list(sidecars.values()))
    for each in named:
        if each.is_sidecar and each is not sidecars[each.extension]:
            yield Sample(stored_key(_relative(each.name)), [each])


def _extension_behind(stem: str, name: str) -> str:
    return _relative(name)[len(stem) :].removeprefix(".").lstrip("_").lower() or "bin"


def group_members(members: Iterable[Member]) -> Iterator[Sample]:
    """Members of a tar as samples, in order.

    Members that follow one another with the same name up to its first dot are one sample (WebDataset) if one of them is
    its image: the only one, or the only one without further dots (`x.jpg` beside `x.seg.png`). Otherwise each image is
    a sample of its own (`img.0001.jpg`, `img.0002.jpg`; `y.jpg`, `y.png`), with the files of the same name but for the
    suffix.
    """
    group = _Group("")
    for member in members:
        key = split_name(member.name)[0]
        if key != group.key:
            yield from group.samples()
            group = _Group(key)
        yield from group.add(member)
    yield from group.samples()


class _Group:
    """Members with the same name up to the first dot that follow one another."""

    def __init__(self, key: str) -> None:
        self.key = key
        self._members: list[Member] = []
        self._by_stem = False

    def add(self, member: Member) -> Iterator[Sample]:
        """Take a member; return the samples that are complete without it."""
        if self._members and (self._repeats(member) or (self._by_stem and not self._continues(member))):
            yield from self.samples()
            self._members = []
        self._members.append(member)
        images = [each for each in self._members if each.claims_to_be_image]
        if len(images) > _MOST_HELD and all("." in each.extension for each in images):
            self._by_stem = True  # so many of a key without a plain image are no annotations of one
            last = self._members.pop()
            yield from self.samples()
            self._members = [last]

    def _repeats(self, member: Member) -> bool:
        return any(each.extension == member.extension for each in self._members)

    def _continues(self, member: Member) -> bool:
        return stem_of(member.name) == stem_of(self._members[-1].name)

    def samples(self) -> Iterator[Sample]:
        """What the members are samples of."""
        images = [each for each in self._members if each.claims_to_be_image]
        plain = [each for each in images if "." not in each.extension]
        if self._by_stem or len(plain) > 1 or (not plain and len(images) > 1):
            stems: dict[str, list[Member]] = {}
            for each in self._members:
                stems.setdefault(_relative(stem_of(each.name)), []).append(each)
            for stem, members in stems.items():
                yield from group_stem(stem, members)
        elif self._members:
            yield Sample(stored_key(self.key), list(self._members))
