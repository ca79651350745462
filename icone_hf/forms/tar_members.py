"""Images in tar files, read where they lie: nothing is unpacked.

An image is known by an address that says at which byte of the tar it begins and how long it is:
`member://OFFSET+SIZE/folder/00000.tar!/000000000.jpg`.
Reading one needs no index and no state, in any process. datasets opens such an address by fsspec, which finds
`MemberFileSystem` here; its own `tar://000000000.jpg::/folder/00000.tar` reads all headers of the tar for each image.
"""

import io
import os
import re
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote

import fsspec
from fsspec import AbstractFileSystem

from ..compat import forget_members
from ..errors import InputError

PROTOCOL = "member"
BLOCK = 512  # bytes: a tar consists of such


class Member(NamedTuple):
    """Name a file in a tar, and its place."""

    name: str
    offset: int
    size: int


def members_of(path: str) -> Iterator[Member]:
    """List the files of a tar, by its headers.

    Links, folders and devices are no files. Names are never used as paths.

    Raises:
        InputError: if it is no tar or is cut, naming it.
    """
    size, number = os.path.getsize(path), 0
    try:
        with tarfile.open(path, "r:") as tar:  # without compression: the only kind that can be read from the middle
            for info in tar:
                number += 1
                if info.offset_data + info.size > size:
                    raise tarfile.ReadError(f"{info.name} ends beyond the file's end")
                if info.isreg() and not info.issparse():
                    # Bytes that are no UTF-8 come as halves of characters, which Arrow can't hold.
                    name = info.name.encode(errors="surrogateescape").decode(errors="replace")
                    yield Member(name, info.offset_data, info.size)
                forget_members(tar)
            end = tar.offset
        # tarfile takes whatever is no header for the end. Every tool that has finished writes blocks of zeros there.
        with open(path, "rb") as file:
            file.seek(end)
            if file.read(BLOCK) != bytes(BLOCK):
                raise tarfile.ReadError("there is no block of zeros, which ends a tar")
    except (tarfile.TarError, EOFError) as error:
        raise InputError(
            f"{path} is no whole tar: after {number} files: {error}. Download or copy it again; if it is compressed, "
            "unpack it to a plain .tar."
        ) from error


def read_span(path: str, offset: int, size: int) -> bytes:
    """Read some bytes of a file.

    Raises:
        OSError: if there are fewer.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise OSError(f"{path} has {len(content)} bytes at {offset}, not {size}: it was changed or cut")
    return content


def address_of(path: str, member: Member) -> str:
    """Write the address of a file in a tar."""
    return f"{PROTOCOL}://{member.offset}+{member.size}{_quoted(os.path.abspath(path))}!/{_quoted(member.name)}"


def is_address(path: str | None) -> bool:
    """Say whether a path leads into a tar."""
    return bool(path) and str(path).startswith(f"{PROTOCOL}://")


def span_of(address: str) -> tuple[str, int, int]:
    """Read an address: the tar, where in it, and how many bytes.

    Raises:
        FileNotFoundError: if it is none.
    """
    match = re.fullmatch(r"(?:member://)?(\d+)\+(\d+)(/.*?)!/.*", address)
    if match is None:
        raise FileNotFoundError(f"{address!r} is no address of a file in a tar")
    return unquote(match[3]), int(match[1]), int(match[2])


def read_member(address: str) -> bytes:
    """Read a file in a tar by its address.

    Raises:
        OSError: if it is not there, or was cut.
    """
    return read_span(*span_of(address))


def _quoted(path: str) -> str:
    # fsspec takes some of these characters for patterns and for links of a chain; "!" ends the tar's own path.
    return re.sub(r"[%!*?\[\]:#]", lambda sign: f"%{ord(sign[0]):02X}", path)


class _Content(io.BytesIO):
    """Hold a file's bytes; datasets sets attributes on it."""


class MemberFileSystem(AbstractFileSystem):
    """Open addresses of files in tars, for fsspec."""

    protocol = PROTOCOL

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> _Content:
        if mode != "rb":
            raise ValueError(f"mode={mode!r}: files in a tar are only read")
        return _Content(read_member(path))

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Describe a file, as fsspec asks."""
        return {"name": path, "size": span_of(path)[2], "type": "file"}


fsspec.register_implementation(PROTOCOL, MemberFileSystem, clobber=True)
