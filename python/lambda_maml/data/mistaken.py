"""What a file is that cannot be what its name says, and what helps."""

from __future__ import annotations

from pathlib import Path

_ARCHIVES = {
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
}
_FORMATS = {
    b"\x93NUMPY": "a NumPy .npy file", b"\x89HDF\r\n": "an HDF5 file", b"MATLAB": "a MATLAB file",
    b"%!PS": "a PostScript file", b"%PDF": "a PDF file",
}  # fmt: skip
_PICTURES = {
    b"\x89PNG": ("a PNG picture", ".png"), b"\xff\xd8\xff": ("a JPEG picture", ".jpg"),
    b"GIF8": ("a GIF picture", ".gif"),
}  # fmt: skip


def mistaken(path: Path, picture: bool = False) -> str | None:
    """What the file really is and what to do, as the end of a sentence; None where its first bytes do not tell.

    picture: its name promises a picture, so that PNG, JPEG and GIF are none, but for another ending.

    >>> mistaken(Path("CIFAR_FS_train.pickle"))
    'it is a pointer of git-lfs, not the file itself: run `git lfs pull` in its repository'
    """
    with path.open("rb") as file:
        head = file.read(1024)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "it is empty: copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs, not the file itself: run `git lfs pull` in its repository"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<script")) or b"<html" in text[:512]:
        return (
            "it is a web page, saved in place of the file (Google Drive sends one where a file was fetched too often "
            "or is too large to scan): open the link in a browser and download the file itself"
        )
    if text.startswith((b"<?xml", b"<error", b'{"error', b'{"message')):
        return "it is a server's error message, saved in place of the file: download the file again"
    for start, what in _ARCHIVES.items():
        if head.startswith(start):
            return f"it is {what}: unpack it first"
    if head[257:262] == b"ustar":
        return "it is a tar archive: unpack it first"
    for start, what in _FORMATS.items():
        if head.startswith(start):
            return f"it is {what}: give the file that its name promises"
    for start, (what, ending) in _PICTURES.items():
        if head.startswith(start) and not picture:
            return f"it is {what}: give the file that its name promises"
        if head.startswith(start) and path.suffix.lower().replace("jpeg", "jpg") != ending:
            return f"it is {what}: let its name end in {ending}"
    return None
