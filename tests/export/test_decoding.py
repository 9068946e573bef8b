"""The decoder of the SavedModel returns the pixels of `data/images.py`, or refuses the file."""

import warnings

import numpy as np
import pytest
import tensorflow as tf
from photos import PHOTO, REENCODED, chunk, encoded, exif, odd_photos, photos, png, with_chunk, with_header

from cvt_keras.data import images
from cvt_keras.errors import ImageError
from cvt_keras.export.decoding import decode

INVALID = tf.errors.InvalidArgumentError
PHOTOS = photos()
SMALL = encoded(np.arange(8 * 5 * 3, dtype="uint8").reshape(8, 5, 3), "JPEG", quality=95)


@pytest.fixture(scope="module")
def graph():
    """The decoder in a graph, as in the SavedModel: `bytes` -> an array."""
    function = tf.function(decode, input_signature=[tf.TensorSpec((), tf.string)], autograph=False)
    return lambda data: function(tf.constant(data)).numpy()


def test_pixels_equal_those_of_training(graph):
    for kind, data in {**PHOTOS, "a larger jpeg": PHOTO.read_bytes()}.items():
        if kind not in REENCODED:
            np.testing.assert_array_equal(graph(data), images.decode(data), err_msg=kind)


def test_every_png_type_equals_training(graph):
    depths = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
    for colours, depth in ((kind, bits) for kind, choices in depths.items() for bits in choices):
        keys = {3: bytes(range(min(2**depth, 256))), 0: b"\0\1", 2: b"\0\7\0\7\0\7"}
        for key in (None, keys[colours]) if colours in keys and depth < 16 else (None,):
            data = png(depth, colours, key=key)
            np.testing.assert_array_equal(graph(data), images.decode(data), err_msg=f"{depth} bits, type {colours}")
    data = with_chunk(encoded(np.full((2, 2, 3), 7, "uint8")), b"tRNS", b"\0\7\0\7\0\7")
    assert (graph(data) == 255).all() and (images.decode(data) == 255).all()


def test_files_that_tensorflow_reads_differently_are_refused(graph):
    for data in (*map(PHOTOS.get, REENCODED), *odd_photos().values()):
        assert images.decode(data).size
        with pytest.raises(INVALID):
            graph(data)


@pytest.mark.parametrize(
    "data, name",
    [
        (PHOTOS["webp"], "a WebP"),
        (PHOTOS["gif"], "a GIF"),
        (PHOTOS["bmp"], "a BMP"),
        (PHOTOS["tiff"], "a TIFF"),
        (b"MM\0*" + bytes(8), "a TIFF"),
        (b"\0\0\0\x1cftypavif" + bytes(20), "an AVIF"),
        (b"\0\0\0\x1cftypheic" + bytes(20), "a HEIC"),
        (b"hello", "something else"),
        (b"", "something else"),
    ],
)
def test_other_formats_are_named(data, name, graph):
    with pytest.raises(INVALID) as raised:
        graph(data)
    assert "cvt-keras classify re-encodes others" in raised.value.message and f"[{name}]" in raised.value.message


def _jpeg_with(*segments):
    """A JPEG with further APP1 segments at its start."""
    head = b"".join(b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment for segment in segments)
    return SMALL[:2] + head + SMALL[2:]


_GOOD = exif(6)
_MAKE = (0x010F, 2, 20)  # the camera maker's name, 20 letters: too long for its entry, so stored outside it


_EXIF_FILES = [
    with_chunk(PHOTOS["png"], b"tEXt", b"Raw profile type exif\0\nexif\n 1\n00"),
    *(_jpeg_with(exif(orientation)) for orientation in (0, 1, 6, 9, 65535)),
    *(_jpeg_with(_GOOD[:length]) for length in range(0, len(_GOOD), 3)),
    _jpeg_with(exif(6, prefix=b"XX\0*")),
    _jpeg_with(exif(6, "<", prefix=b"II\0*")),
    _jpeg_with(exif(6, kind=4)),
    _jpeg_with(exif(6, "<", kind=4)),
    _jpeg_with(exif(6, kind=2)),
    _jpeg_with(exif(6, kind=1)),
    _jpeg_with(exif(6, kind=99)),
    _jpeg_with(exif(6, count=0)),
    _jpeg_with(exif(6, count=2)),
    _jpeg_with(exif(6, count=3)),
    _jpeg_with(exif(6, before=[(*_MAKE, 0)])),
    _jpeg_with(exif(6, before=[(*_MAKE, 9_999)])),
    _jpeg_with(exif(6, before=[(0x010F, 2, 5_000, 0)])),
    _jpeg_with(exif(6, before=[(0x0112, 3, 1, 3 << 16)])),
    _jpeg_with(b"Exif\0\0" + _GOOD),
    _jpeg_with(b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='6'/>", exif(3)),
    _jpeg_with(b"Exif\0\0"),
    _jpeg_with(b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    _jpeg_with(b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
    with_chunk(encoded(np.arange(60, dtype="uint8").reshape(5, 4, 3)), b"eXIf", exif(5)[6:]),
    with_chunk(encoded(np.arange(60, dtype="uint8").reshape(5, 4, 3)), b"eXIf", exif(8)[6:], before=b"IEND"),
]


@pytest.mark.filterwarnings("ignore")  # Pillow warns about broken EXIF data
def test_exif_data_are_read_as_in_training_even_if_broken(graph):
    for place, data in enumerate(_EXIF_FILES):
        np.testing.assert_array_equal(graph(data), images.decode(data), err_msg=f"entry {place}")


@pytest.mark.parametrize(
    "data, text",
    [
        (_jpeg_with(exif(6, kind=5)), "unsupported type"),
        (_jpeg_with(_GOOD[:20], b"Exif\0\0" + _GOOD[20:]), "several segments"),
        (png(16, 0, key=b"\0\7"), "transparent colour"),
        (with_chunk(PHOTOS["rgba png"], b"tRNS", b"\0\0", before=b"IEND"), "wrong order"),
        (with_chunk(with_chunk(PHOTOS["png"], b"eXIf", b"a"), b"eXIf", b"b"), "wrong order"),
        (PHOTOS["png"][:33] + b"".join([chunk(b"teXt", b"")] * 20_001) + chunk(b"eXIf", b""), "too many chunks"),
        (SMALL[:2] + b"\xff\xfe\0\2" * 1_001 + SMALL[2:], "header of a JPEG is broken"),
        (SMALL[:20] + b"junk" + SMALL[20:], "header of a JPEG is broken"),
    ],
)
def test_odd_files_are_refused(data, text, graph):
    with pytest.raises(INVALID) as raised:
        graph(data)
    assert text in raised.value.message


def test_pixels_are_limited_as_in_training(graph):
    over = with_header(png(8, 0), 8193, 8192)
    with pytest.raises(INVALID) as raised:
        graph(over)
    assert f"at most {images.MAX_PIXELS:,} pixels" in raised.value.message and "[8193] [x] [8192]" in raised.value.message
    with pytest.raises(ImageError):
        images.decode(over)


def test_broken_exif_data_never_crash(graph):
    random = np.random.default_rng(0)
    good = exif(6, "<", before=[(0x0100, 4, 1, 8), (*_MAKE, 40), (0x0110, 5, 1, 44)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(200):
            data = bytearray(good)
            for place in random.integers(6, len(data), size=random.integers(1, 4)):
                data[place] = random.integers(256)
            data = _jpeg_with(bytes(data))
            try:
                pixels = graph(data)
            except INVALID as error:
                assert "unsupported type" in error.message
                continue
            np.testing.assert_array_equal(pixels, images.decode(data))
