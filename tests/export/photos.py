"""Photos in every format and variant that people send, as bytes."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import sklearn.datasets
from PIL import ExifTags, Image, ImageOps

# A real photo, which comes with scikit-learn.
PHOTO = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"


def encoded(image, kind="PNG", **options):
    """Encodes a Pillow image or an array of pixels to the bytes of a file."""
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation, endian=">", kind=3, count=1, before=(), prefix=None):
    """EXIF data with an orientation.

    Args:
        orientation: the value.
        endian: ">" or "<", as in `struct`.
        kind: the TIFF type of the value.
        count: the number of values.
        before: earlier entries: (tag, type, count, value or offset).
        prefix: replaces the prefix of TIFF.
    """
    value = struct.pack(f"{endian}HH", orientation, 0) if kind == 3 else struct.pack(f"{endian}I", orientation)
    entries = [struct.pack(f"{endian}HHII", *entry) for entry in before]
    entries.append(struct.pack(f"{endian}HHI", ExifTags.Base.Orientation, kind, count) + value)
    start = prefix or {">": b"MM\0*", "<": b"II*\0"}[endian]
    head = start + struct.pack(f"{endian}IH", 8, len(entries))
    return b"Exif\0\0" + head + b"".join(entries) + bytes(4)


def chunk(name, data):
    """Makes a chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunk(png, name, data, before=b"IDAT"):
    """Inserts a chunk into a PNG, before the first chunk of type `before`."""
    at = png.index(before) - 4
    return png[:at] + chunk(name, data) + png[at:]


def with_header(png, width, height):
    """Replaces the size in the header of a PNG."""
    header = struct.pack(">II", width, height) + png[24:29]
    return png[:8] + chunk(b"IHDR", header) + png[33:]


def png(depth, colours, width=37, height=23, key=None, seed=0):
    """A PNG of noise, of any bit depth and colour type (0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA).

    Args:
        depth: bits per channel.
        colours: the colour type of PNG.
        width, height: in pixels.
        key: the data of a tRNS chunk; `None` means no such chunk.
        seed: seed of the noise.
    """
    random = np.random.default_rng(seed)
    row_bytes = -(-width * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colours] * depth // 8)
    rows = b"".join(b"\0" + random.bytes(row_bytes) for _ in range(height))
    chunks = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))]
    if colours == 3:
        chunks.append(chunk(b"PLTE", random.bytes(3 * 2**depth)))
    if key is not None:
        chunks.append(chunk(b"tRNS", key))
    return b"".join([b"\x89PNG\r\n\x1a\n", *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


def photos(size=(203, 131)):
    """Name -> bytes: one scene in each format and variant that the project reads, upright after its orientation is applied.

    A SavedModel refuses those in `REENCODED`, and the client decodes them.
    """
    scene = Image.open(PHOTO).resize(size)
    grey = np.asarray(scene.convert("L")).astype("uint16")
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0]).astype("uint8")
    rgba = np.dstack([np.asarray(scene), ramp])
    palette = scene.quantize(200)
    palette_with_alpha = scene.quantize(200)
    palette_with_alpha.info["transparency"] = bytes(range(0, 200))
    undo = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    undo |= {7: "TRANSVERSE", 8: "ROTATE_270"}
    kinds = {
        "jpeg": encoded(scene, "JPEG", quality=85),
        "jpeg 4:2:2": encoded(scene, "JPEG", quality=85, subsampling=1),
        "jpeg 4:4:4": encoded(scene, "JPEG", quality=85, subsampling=0),
        "progressive jpeg": encoded(scene, "JPEG", progressive=True),
        "grey jpeg": encoded(scene.convert("L"), "JPEG"),
        "rgb jpeg": encoded(scene, "JPEG", keep_rgb=True),
        "png": encoded(scene),
        "grey png": encoded(scene.convert("L")),
        "1-bit png": encoded(scene.convert("1")),
        "2-bit grey png": png(2, 0),
        "4-bit grey png": png(4, 0),
        "rgba png": encoded(rgba),
        "grey png with alpha": encoded(Image.fromarray(rgba).convert("LA")),
        "palette png": encoded(palette),
        "palette png with alpha": encoded(palette_with_alpha),
        "4-bit palette png with alpha": png(4, 3, key=bytes(range(0, 240, 15))),
        "png with a transparent colour": png(8, 0, key=b"\0\5"),
        "2-bit png with a transparent grey": png(2, 0, key=b"\0\1"),
        "16-bit grey png": encoded(grey * 257),
        "12-bit grey png": encoded(grey * 16),
        "16-bit rgb png": png(16, 2),
        "16-bit rgba png": png(16, 6),
        "16-bit grey png with alpha": png(16, 4),
        "png turned by exif": encoded(scene.transpose(Image.Transpose.ROTATE_90), exif=exif(6)),
        "cmyk jpeg": encoded(ImageOps.invert(scene.convert("RGB")).convert("CMYK"), "JPEG"),
        "jpeg without its last bytes": encoded(scene, "JPEG", quality=85)[:-2],
        "16-bit rgb png with a transparent colour": png(16, 2, key=bytes(6)),
        "gif": encoded(scene, "GIF"),
        "bmp": encoded(scene, "BMP"),
        "tiff": encoded(scene, "TIFF"),
        "webp": encoded(scene, "WEBP", lossless=True),
    }
    for orientation, turn in undo.items():
        turned = scene.transpose(Image.Transpose[turn]) if turn else scene
        endian = "<" if orientation % 2 else ">"
        kinds[f"jpeg of orientation {orientation}"] = encoded(turned, "JPEG", exif=exif(orientation, endian))
    return kinds


REENCODED = (
    "cmyk jpeg",
    "jpeg without its last bytes",
    "16-bit rgb png with a transparent colour",
    "gif",
    "bmp",
    "tiff",
    "webp",
)


def odd_photos():
    """Name -> bytes: JPEGs and PNGs that training reads and the client sends unchanged, but a SavedModel refuses."""
    scene = Image.open(PHOTO).resize((61, 47))
    jpeg, plain = encoded(scene, "JPEG"), encoded(scene)
    kinds = {
        f"jpeg with an orientation of TIFF type {kind}": encoded(scene, "JPEG", exif=exif(6, "<", kind=kind))
        for kind in (5, 8, 9, 11)  # RATIONAL, SSHORT, SLONG and FLOAT
    }
    kinds["jpeg with three orientations"] = encoded(scene, "JPEG", exif=exif(6, "<", count=3))
    kinds["jpeg of 1,200 segments"] = jpeg[:2] + b"\xff\xfe\0\6abcd" * 1_200 + jpeg[2:]
    turned = with_chunk(plain, b"eXIf", exif(6)[6:])
    kinds["png with EXIF data twice"] = with_chunk(turned, b"eXIf", exif(6)[6:])
    at = turned.index(b"IDAT") - 4
    kinds["png of 20,000 chunks"] = turned[:at] + chunk(b"tEXt", b"a\0b") * 20_000 + turned[at:]
    kinds["png with a wrong checksum of its pixels"] = plain[:-13] + bytes([plain[-13] ^ 1]) + plain[-12:]
    return kinds
