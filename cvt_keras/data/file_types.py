"""Tells images by their first bytes, and hidden and system files by their names. Imports nothing."""

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
GIF = (b"GIF87a", b"GIF89a")
# The brand after "ftyp" in the two formats that use the container of MP4 videos.
AVIF, HEIF = (b"avif", b"avis"), (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
READABLE = "JPEG, PNG, GIF, BMP, TIFF, WebP or AVIF"  # with the Pillow from PyPI
# Files and folders that operating systems and NAS devices create among a user's images; in lower case.
_CLUTTER = (
    *("__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information"),
    *("thumbs.db", "desktop.ini"),
)


def is_image(head):
    """Whether a file begins like an image in a format that `images.read` knows. The image may be broken.

    Args:
        head: its first bytes, 32 or more.
    """
    if head.startswith(b"BM"):  # a text may begin so, too: check the size of the header
        return int.from_bytes(head[14:18], "little") in (12, 16, 40, 52, 56, 64, 108, 124)
    if head.startswith(b"RIFF"):
        return head[8:12] == b"WEBP"
    return head.startswith((JPEG, PNG, *GIF, *TIFF)) or (head[4:8] == b"ftyp" and head[8:12] in (*AVIF, *HEIF))


def is_hidden(name):
    """Whether a file or folder of this name is hidden."""
    return name.startswith(".")


def is_clutter(name):
    """Whether a file or folder of this name was created by an operating system or a NAS, such as Thumbs.db."""
    return name.lower() in _CLUTTER
