"""The samples of tar files in the convention of WebDataset, also of damaged or hostile files.

    0001.jpg  0001.cls  0001.txt  0002.jpg  0002.cls ...      consecutive members of one stem

Nothing is extracted to a disk. A member that is a link or a device, that has an absolute name or
one with `..`, a name that is not UTF-8, or an impossible size ends the reading with its name.
"""

import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Generic, Self, TypeVar

from diffcore.training.data.collections.images import as_label
from diffcore.training.data.listing import printable
from diffcore.training.data.scan import SUFFIXES

__all__ = ["Fields", "Member", "Sample", "group_samples", "read_members"]

LARGEST = 2**28
"""Largest number of bytes of a member."""
LARGEST_HEADER = 2**20
"""Largest number of bytes of an extended header, such as a long name."""
EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)

Payload = TypeVar("Payload")


class _Header(tarfile.TarInfo):
    """A header that is refused where `tarfile` would end the archive without a message."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the mark at the end
            raise
        except tarfile.HeaderError:
            raise ValueError("it is truncated or damaged: a header is missing") from None
        if header.size < 0:
            raise ValueError(f"its member {printable(header.name)} has a negative size")
        if header.type in EXTENDED and header.size > LARGEST_HEADER:
            raise ValueError(f"it has a header of {header.size} bytes, expected less than 1 MB")
        return header


@dataclass(frozen=True)
class Member(Generic[Payload]):
    """A regular member of a tar file.

    Args:
        stem: path up to the first dot of its last part, by which members belong to a sample.
        extension: the rest in lower case without the dot, such as "jpg".
        payload: its bytes, or where they are.
    """

    stem: str
    extension: str
    payload: Payload


@dataclass(frozen=True)
class Sample(Generic[Payload]):
    """The members of one stem.

    Args:
        stem: the stem.
        image: payload of the image.
        label: label; None without one.
        caption: caption; None without one.
    """

    stem: str
    image: Payload
    label: int | None
    caption: str | None


@dataclass(frozen=True)
class Fields:
    """Which members of a sample are its image, label and caption.

    Args:
        image: extension of the image; "" for the only member that is an image.
        label: extension of the member with an integer label, or json.NAME for an entry of the
            member `json`; "" for none.
        caption: extension of the member with the caption, or json.NAME; "" for none.
    """

    image: str
    label: str
    caption: str

    def sample(
        self,
        stem: str,
        members: dict[str, Payload],
        read: Callable[[Payload], bytes],
    ) -> Sample[Payload]:
        """The sample of some members.

        Args:
            stem: stem of the members.
            members: payload of each member by its extension.
            read: reads the bytes of a payload.

        Returns:
            The sample.

        Raises:
            ValueError: It has no image or several, or its label or caption is missing or damaged.
        """
        images = [name for name in members if f".{name.rpartition('.')[2]}" in SUFFIXES]
        if self.image:
            images = [name for name in members if name == self.image]
        if len(images) != 1:
            found = f"{len(images)} images" if images else "no image"
            raise ValueError(
                f"its sample {printable(stem)} has {found} among {', '.join(sorted(members))!a}: "
                "expected one; set image to its extension, or leave the sample out"
            )
        label = caption = None
        where = f"its sample {printable(stem)}"
        if self.label:
            label = as_label(self._value(self.label, stem, members, read), where)
        if self.caption:
            caption = self._value(self.caption, stem, members, read)
            if not isinstance(caption, str):
                raise ValueError(f"{where} has the caption {str(caption)[:40]!a}, expected text")
            caption = caption.strip()
        return Sample(stem, members[images[0]], label, caption)

    def _value(
        self,
        field: str,
        stem: str,
        members: dict[str, Payload],
        read: Callable[[Payload], bytes],
    ) -> Any:
        """The text of a member, or an entry of the member `json`."""
        extension, _, entry = field.partition(".") if field.startswith("json.") else (field, "", "")
        if extension not in members:
            raise ValueError(
                f"its sample {printable(stem)} has no member .{extension}, but "
                f"{', '.join(sorted(members))!a}: set label or caption to another, or to ''"
            )
        try:
            text = read(members[extension]).decode("utf-8-sig")
            return json.loads(text)[entry] if entry else text
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"its sample {printable(stem)} has an unreadable .{field}: "
                f"{type(error).__name__}: {error}"
            ) from None


def read_members(
    file: Any, is_stream: bool, payload: Callable[[tarfile.TarFile, tarfile.TarInfo], Payload]
) -> Iterator[Member[Payload]]:
    """Read the regular members of a tar file, in order.

    Args:
        file: binary file; a stream may be compressed by gzip, bzip2 or xz.
        is_stream: True if the file can be read only forwards.
        payload: what is kept of a member.

    Yields:
        The members.

    Raises:
        ValueError: The file is damaged, truncated or hostile; the message is the reason, to be
            preceded by its name.
    """
    try:
        with tarfile.open(
            fileobj=file, mode="r|*" if is_stream else "r:", tarinfo=_Header
        ) as archive:
            while member := archive.next():
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                stem, extension = _checked_name(member)
                is_hidden = stem.rpartition("/")[2] == ""
                if not (member.isdir() or is_hidden):
                    yield Member(stem, extension, payload(archive, member))
    except (tarfile.TarError, EOFError, OverflowError, KeyError, UnicodeError) as error:
        raise ValueError(f"it cannot be read as a tar file: {error}") from None


def group_samples(
    members: Iterable[Member[Payload]], fields: Fields, read: Callable[[Payload], bytes]
) -> Iterator[Sample[Payload]]:
    """Join consecutive members of one stem.

    Args:
        members: members in the order of the file.
        fields: members that are the image, the label and the caption.
        read: reads the bytes of a payload.

    Yields:
        The samples.

    Raises:
        ValueError: A sample is incomplete, or has two members of one extension.
    """
    stem, found = "", dict[str, Payload]()
    for member in members:
        if member.stem != stem and found:
            yield fields.sample(stem, found, read)
            found = {}
        stem = member.stem
        if member.extension in found:
            raise ValueError(f"its sample {printable(stem)} has two members .{member.extension}")
        found[member.extension] = member.payload
    if found:
        yield fields.sample(stem, found, read)


def _checked_name(member: tarfile.TarInfo) -> tuple[str, str]:
    """Stem and extension of a member.

    Raises:
        ValueError: It is no regular file, or its name or size is not acceptable.
    """
    name = member.name
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise ValueError(
            f"its member {printable(name)} is a link, a device or a sparse file, expected a "
            "regular file"
        )
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ".." in parts or ":" in parts[0]:
        raise ValueError(f"its member {printable(name)} lies outside the archive: rename it")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"its member {name!a} has a name that is not UTF-8: rename it") from None
    if not 0 <= member.size <= LARGEST:
        raise ValueError(
            f"its member {printable(name)} has {member.size} bytes, expected at most {LARGEST}"
        )
    folder, slash, last = name.rpartition("/")
    first, _, extension = last.partition(".")
    return f"{folder}{slash}{first}", extension.lower()
