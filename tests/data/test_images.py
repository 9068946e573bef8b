import io
import struct
import threading
import zlib

import numpy as np
import pytest
import tensorflow as tf
from labelled_images import noise, resized
from PIL import Image, UnidentifiedImageError, features
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from cvt_keras import VARIANTS, Preprocessing
from cvt_keras.conversion.configs import published_preprocessing
from cvt_keras.data import file_types, images
from cvt_keras.errors import ImageError

WHITE = [255, 255, 255]


def encoded(image, kind, **options):
    """The bytes of an image file, from a Pillow image or an array."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format=kind, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour_type, rows, *chunks):
    """A PNG with a depth and colour type that Pillow does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def quarters():
    """An image with quarters in red, green, blue and yellow, which show its orientation."""
    pixels = np.empty((32, 48, 3), "uint8")
    pixels[:16, :24], pixels[:16, 24:] = (220, 30, 30), (30, 200, 30)
    pixels[16:, :24], pixels[16:, 24:] = (30, 30, 200), (220, 220, 40)
    return pixels


def corners(pixels):
    return [pixels[y, x].astype(int) for y in (2, -3) for x in (2, -3)]


# === Kinds of files ===


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_keep_their_pixels(kind):
    [pixels] = noise(1, (6, 5, 3))
    picture = images.read(encoded(pixels, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert (picture.pixels.dtype, picture.cut_off) == (np.uint8, False)
    np.testing.assert_array_equal(picture.pixels, pixels)


@pytest.mark.parametrize(
    "kind", ["JPEG", "WEBP", pytest.param("AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason=""))]
)
def test_lossy_formats_keep_their_colours(kind):
    pixels = images.decode(encoded(quarters(), kind, quality=95))
    np.testing.assert_allclose(corners(pixels), corners(quarters()), atol=12)


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 2}])
def test_all_kinds_of_jpeg_are_read(options):
    data = encoded(quarters(), "JPEG", **options)
    np.testing.assert_allclose(images.decode(data), np.asarray(Image.open(io.BytesIO(data))), atol=0)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_jpegs_decode_as_with_tensorflows_accurate_dct(options):
    data = encoded(noise(1, (37, 45, 3))[0], "JPEG", **options)
    np.testing.assert_array_equal(images.decode(data), tf.io.decode_jpeg(data, dct_method="INTEGER_ACCURATE"))


def test_the_first_of_several_pictures_is_decoded():
    """MPO files, which stereo cameras and phones write; animations; TIFF files with several pages."""
    for kind in ("MPO", "GIF", "TIFF", "WEBP", "PNG"):
        data = encoded(quarters(), kind, save_all=True, append_images=[Image.new("RGB", (48, 32))])
        assert Image.open(io.BytesIO(data)).n_frames == 2
        np.testing.assert_allclose(corners(images.decode(data)), corners(quarters()), atol=12)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF"])
def test_a_palette_gives_its_colours(kind):
    data = encoded(Image.fromarray(quarters()).quantize(16), kind)
    assert Image.open(io.BytesIO(data)).mode == "P"
    np.testing.assert_array_equal(images.decode(data), quarters())


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF"])
def test_one_bit_pixels_are_black_and_white(kind):
    data = encoded(Image.fromarray(np.eye(8, dtype=bool)), kind)
    np.testing.assert_array_equal(images.decode(data), np.repeat(np.eye(8, dtype="uint8")[..., None] * 255, 3, axis=-1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP"])
def test_grey_is_three_equal_channels(kind):
    grey = np.full((8, 8), 77, "uint8")
    np.testing.assert_array_equal(images.decode(encoded(grey, kind)), np.full((8, 8, 3), 77))


def test_cmyk_is_converted_to_rgb():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for kind in ("JPEG", "TIFF"):
        np.testing.assert_allclose(images.decode(encoded(red, kind))[4, 4], (255, 0, 0), atol=3)


def test_a_gif_is_white_outside_its_frame():
    data = bytearray(encoded(Image.fromarray(quarters()).quantize(16), "GIF"))
    data[6:10] = struct.pack("<HH", 60, 50)  # the size of the screen
    frame = data.index(b"\x2c\0\0\0\0" + struct.pack("<HH", 48, 32))
    data[frame + 1 : frame + 5] = struct.pack("<HH", 10, 12)
    expected = np.full((50, 60, 3), 255)
    expected[12:44, 10:58] = quarters()
    np.testing.assert_array_equal(images.decode(bytes(data)), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK"])
def test_copying_in_strips_keeps_all_pixels(mode):
    [pixels] = noise(1, (300, 5, len(mode) if mode != "L" else 1))
    image = Image.fromarray(np.squeeze(pixels), mode)
    np.testing.assert_array_equal(images._array(image), np.asarray(image))


# === 16 bits ===


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("brightest", "shift"), [(65535, 8), (4096, 8), (4095, 4), (255, 4)])
def test_16_bit_grey_keeps_its_upper_8_or_12_bits(kind, brightest, shift):
    grey = np.linspace(0, brightest, 64).astype("uint16").reshape(8, 8)
    np.testing.assert_array_equal(images.decode(encoded(grey, kind))[..., 1], grey >> shift)


def test_16_bit_colours_keep_their_upper_8_bits():
    data = png(1, 1, 16, 2, [struct.pack(">3H", 0x1234, 0x80FF, 0xFFFF)])
    assert images.decode(data).tolist() == [[[0x12, 0x80, 0xFF]]]


@pytest.mark.parametrize(("mode", "value"), [("I", 70_000), ("F", 0.5)])
def test_32_bit_pixels_raise(mode, value):
    with pytest.raises(ImageError, match="whose range is unknown"):
        images.decode(encoded(Image.new(mode, (4, 4), value), "TIFF"))


# === Transparency ===


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparent_pixels_are_blended_with_white(kind):
    rgba = np.array([[[0, 0, 0, 0], [100, 0, 200, 255], [10, 20, 30, 128]]], "uint8")
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    half = [(value * 128 + 255 * 127 + 127) // 255 for value in (10, 20, 30)]
    assert images.decode(encoded(rgba, kind, **options)).tolist() == [[WHITE, [100, 0, 200], half]]


def test_transparent_grey_is_blended_with_white():
    grey_alpha = Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 128)])
    assert images.decode(encoded(grey_alpha, "PNG")).tolist() == [[[(100 * 128 + 255 * 127 + 127) // 255] * 3]]


def test_a_transparent_palette_entry_becomes_white():
    palette = Image.fromarray(quarters()).quantize(16)
    transparent = palette.getpixel((0, 0))
    for options in ({"transparency": transparent}, {"transparency": bytes(0 if i == transparent else 255 for i in range(16))}):
        pixels = images.decode(encoded(palette, "PNG", **options))
        assert pixels[0, 0].tolist() == WHITE
        np.testing.assert_array_equal(pixels[16:], quarters()[16:])
    assert images.decode(encoded(palette, "GIF", transparency=transparent))[0, 0].tolist() == WHITE


def test_a_transparent_colour_becomes_white():
    data = encoded(quarters(), "PNG", transparency=(220, 30, 30))
    pixels = images.decode(data)
    assert pixels[0, 0].tolist() == WHITE
    np.testing.assert_array_equal(pixels[16:], quarters()[16:])


@pytest.mark.parametrize(
    ("depth", "row", "transparent", "opaque"),
    [
        (1, b"\x40", 1, 0),
        (2, b"\x90", 1, 170),
        (4, b"\x75", 5, 119),
        (8, b"\x07\x05", 5, 7),
        (16, b"\x70\x00\x17\x70", 6000, 112),
    ],
)
def test_a_transparent_grey_becomes_white_at_each_depth(depth, row, transparent, opaque):
    data = png(2, 1, depth, 0, [row], chunk(b"tRNS", struct.pack(">H", transparent)))
    assert images.decode(data).tolist() == [[[opaque] * 3, WHITE]]


# === Orientation ===


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, "rgby"),
        (2, "gryb"),
        (3, "ybgr"),
        (4, "byrg"),
        (5, "rbgy"),
        (6, "bryg"),
        (7, "ygbr"),
        (8, "gyrb"),
        (0, "rgby"),
        (9, "rgby"),
    ],
)
def test_photos_are_rotated_to_their_exif_orientation(kind, orientation, expected):
    """`expected`: the colours of the quarters, row by row."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = images.decode(encoded(quarters(), kind, exif=exif))
    assert pixels.shape == ((48, 32, 3) if orientation in (5, 6, 7, 8) else (32, 48, 3))
    names = dict(zip("rgby", corners(quarters())))
    assert "".join(min(names, key=lambda name: abs(names[name] - corner).sum()) for corner in corners(pixels)) == expected


def test_orientation_is_not_taken_from_xmp():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    exif = Image.Exif()
    exif[0x010F] = "a camera"  # makes Pillow look for an orientation
    assert images.decode(encoded(quarters(), "JPEG", xmp=xmp, exif=exif)).shape == (32, 48, 3)
    assert images.decode(encoded(quarters(), "TIFF", tiffinfo={700: xmp})).shape == (32, 48, 3)


def test_broken_exif_data_is_ignored():
    data = encoded(quarters(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    assert images.decode(data).shape == (32, 48, 3)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_broken_metadata_gives_no_warnings(kind, recwarn, capfd):
    images._formats.cache_clear()  # pytest removes the filter after each test
    data = encoded(quarters(), kind, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff") if kind == "JPEG" else two_orientations()
    assert images.decode(data).shape == (32, 48, 3)
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


def two_orientations():
    """A TIFF whose tag 274 has two values; one is allowed."""
    data = bytearray(encoded(quarters(), "TIFF", tiffinfo={274: 1}))
    entry = data.index(struct.pack("<HHI", 274, 3, 1))
    data[entry + 4 : entry + 8] = struct.pack("<I", 2)
    with pytest.warns(UserWarning, match="tag 274"):
        Image.open(io.BytesIO(data)).load()
    return bytes(data)


# === Broken files ===


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_jpeg_without_its_last_bytes_is_read(options):
    whole = encoded(noise(1, (100, 120, 3))[0], "JPEG", **options)
    picture = images.read(whole[:-2])
    assert picture.cut_off
    np.testing.assert_array_equal(picture.pixels, images.decode(whole))
    assert images.read(whole[:-20]).cut_off
    assert not images.read(whole).cut_off
    assert not images.read(whole + b"what a camera writes after it").cut_off


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}])
@pytest.mark.parametrize("size", [(8, 8), (32, 40), (33, 49)])
@pytest.mark.parametrize("kind", ["noise", "grey", "black", "grey below"])
def test_a_jpeg_without_its_end_marker_is_read_whatever_it_shows(options, size, kind):
    [pixels] = noise(1, (*size, 3))
    pixels[{"noise": size[0], "grey below": size[0] // 3}.get(kind, 0) :] = 0 if kind == "black" else 128
    whole = encoded(pixels, "JPEG", **options)
    for data in (whole[:-2], whole[:-1]):
        np.testing.assert_array_equal(images.decode(data), images.decode(whole))


def scans(data):
    """The offset of each scan of a JPEG."""
    return [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xda"]


def test_a_progressive_jpeg_needs_only_its_first_scan():
    photo = Image.fromarray(noise(1, (6, 8, 3))[0]).resize((120, 100))
    whole = encoded(photo, "JPEG", progressive=True)
    second, third = scans(whole)[1:3]
    errors = []
    for end in (second + 20, third + 20, (third + len(whole)) // 2, len(whole) - 50):
        picture = images.read(whole[:end])
        assert picture.cut_off
        errors.append(abs(picture.pixels.astype(int) - images.decode(whole)).mean())
    assert errors[0] < 25 and errors == sorted(errors, reverse=True)
    with pytest.raises(ImageError, match="broken"):
        images.read(whole[: second - 20])


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"restart_marker_blocks": 2}])
def test_a_jpeg_may_lack_at_most_a_twentieth_of_its_blocks(options):
    whole = encoded(noise(1, (320, 320, 3))[0], "JPEG", **options)
    [header] = scans(whole)
    for missing in (0.02, 0.04):
        assert images.read(whole[: -int(missing * (len(whole) - header))]).cut_off
    for missing in (0.06, 0.3):
        with pytest.raises(ImageError, match="broken"):
            images.read(whole[: -int(missing * (len(whole) - header))])


def test_a_broken_jpeg_with_an_end_marker_raises(monkeypatch):
    def fail(self):
        raise OSError("broken data stream")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(ImageError, match="broken data stream"):
        images.read(encoded(quarters(), "JPEG"))


def test_a_jpeg_with_a_thumbnail_may_lack_its_last_bytes():
    exif = b"Exif\0\0" + encoded(noise(1, (8, 8, 3))[0], "JPEG")
    whole = encoded(noise(1, (100, 120, 3))[0], "JPEG", exif=exif)
    assert images.read(whole[:-2]).cut_off
    with pytest.raises(ImageError, match="broken"):
        images.read(whole[: len(whole) // 2])


def test_half_a_jpeg_padded_with_zeros_is_broken():
    whole = encoded(noise(1, (100, 120, 3))[0], "JPEG")
    with pytest.raises(ImageError, match="broken"):
        images.read(whole[: len(whole) // 2] + bytes(len(whole)))
    assert images.read(whole[:-2] + bytes(1000)).cut_off
    assert not images.read(whole + bytes(1000)).cut_off


@pytest.mark.parametrize("size", [(100, 120, 3), (32, 40, 3)])
def test_half_a_jpeg_is_broken(size):
    whole = encoded(noise(1, size)[0], "JPEG")
    header = whole.rfind(b"\xff\xda")
    with pytest.raises(ImageError, match="broken"):
        images.read(whole[: header + (len(whole) - header) // 2])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.5, 0.02])
def test_other_formats_are_broken_without_their_last_bytes(kind, share):
    whole = encoded(noise(1, (40, 40, 3))[0], kind)
    with pytest.raises(ImageError, match="broken") as error:
        images.read(whole[: int(len(whole) * share)])
    assert "\n" not in error.value.summary and not error.value.summary.endswith(".")


@pytest.mark.parametrize("data", [b"", b"no image", b"<html></html>", b"%PDF-1.7", b"\0" * 100])
def test_other_files_raise(data):
    with pytest.raises(ImageError, match="empty" if not data else "not a readable"):
        images.read(data)
    assert not file_types.is_image(data)


@pytest.mark.parametrize(
    ("brand", "reason"),
    [
        (b"heic", "install pillow-heif"),
        (b"avif", "does not read AVIF"),
        (b"mif1\0\0\0\0mif1heic", "install pillow-heif"),
        (b"mif1\0\0\0\0mif1avif", "does not read AVIF"),
        (b"mif1", "install pillow-heif"),
    ],
)
def test_a_missing_plugin_is_named(monkeypatch, brand, reason):
    data = b"\0\0\0\x18ftyp" + brand + bytes(100)
    monkeypatch.setattr(images, "_formats", lambda: ["JPEG"])
    with pytest.raises(ImageError, match=reason):
        images.read(data)
    monkeypatch.setattr(images, "_formats", lambda: ["JPEG", "AVIF", "HEIF"])
    monkeypatch.setattr("PIL.Image.open", unidentified)
    with pytest.raises(ImageError, match="its header can't be read"):
        images.read(data)


def unidentified(file, formats):
    raise UnidentifiedImageError("no image")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_is_image_knows_the_first_bytes_of_each_format(kind):
    assert file_types.is_image(encoded(quarters(), kind)[:64])


@pytest.mark.parametrize(
    "text", [b"BMW and Audi are the two classes of this set", b"BM" + bytes(30), b"RIFF\0\0\0\0WAVEfmt ", b"\0\0\0\x18ftypmp42"]
)
def test_is_image_is_false_for_other_files_that_begin_alike(text):
    assert not file_types.is_image(text)


def test_the_size_is_checked_before_decoding(monkeypatch):
    huge = png(8_193, 8_192, 8, 2, [b""])
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="too large"):
        images.read(huge)
    monkeypatch.setattr(images, "MAX_PIXELS", 10)
    with pytest.raises(ImageError, match="says 48 x 32 pixels"):
        images.read(encoded(quarters(), "GIF"))


def test_a_cameras_raw_file_raises():
    with pytest.raises(ImageError, match="raw"):
        images.read(encoded(quarters(), "TIFF", tiffinfo={254: 1}))


# === Memory ===


def test_room_limits_the_pixels_decoded_at_the_same_time():
    room = images.Room(limit=100)
    order = []

    def hold(n):
        with room.place() as reserve:
            reserve(n)
            order.append(n)

    with room.place() as reserve:
        reserve(60)
        second = threading.Thread(target=hold, args=(50,))
        second.start()
        hold(40)
        assert second.is_alive() and order == [40]
    second.join(10)
    hold(101)  # larger than the limit: only while nothing else is decoded
    assert order == [40, 50, 101] and room.used == 0


def test_pixels_are_reserved_before_decoding(monkeypatch):
    class Stop(Exception):
        pass

    def stop(n):
        assert n == 32 * 48
        raise Stop

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError) as error:
        images.read(encoded(quarters(), "JPEG"), stop)
    assert isinstance(error.value.__cause__, Stop)


@pytest.mark.parametrize(("cores", "threads"), [(2, 2), (64, 8), (None, 1)])
def test_threads_is_one_per_core_up_to_eight(monkeypatch, cores, threads):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert images.threads() == threads


# === Resizing ===


def test_stretch_antialiases_and_ignores_the_aspect_ratio():
    photos = noise(2, (30, 20, 3))
    for size in ((8, 8), (40, 40), (8, 40)):
        stretched = images.stretch(photos, size)
        assert (stretched.dtype, stretched.shape) == (np.uint8, (2, *size, 3))
        np.testing.assert_array_equal(stretched, [resized(photo, size) for photo in photos])


def test_stretch_returns_images_of_that_size_unchanged():
    photos = noise(2, (8, 8, 3))
    np.testing.assert_array_equal(images.stretch(photos, (8, 8)), photos)


@pytest.mark.parametrize("shape", [(8, 8, 3), (30, 20, 3)])
def test_stretch_in_a_graph_with_unknown_sizes(shape):
    [photo] = noise(1, shape)
    late = tf.function(lambda image: images.stretch(image, (8, 8)), input_signature=[tf.TensorSpec((None, None, 3), tf.uint8)])
    np.testing.assert_array_equal(late(photo), images.stretch(photo, (8, 8)))


# === Fitting to the network's size ===

SHAPES = [(1, 1), (1, 500), (500, 1), (31, 33), (64, 64), (65, 64), (57, 900), (73, 74), (74, 73), (640, 480), (99, 101)]


def crop_to(*size, **fields):
    return Preprocessing(image_size=size, resize="crop", **fields)


def smooth(height, width):
    """A photo of smooth shapes with some noise."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([128 + 100 * np.sin(x / 37 + channel) * np.cos(y / 53 - channel) for channel in range(3)], axis=-1)
    return np.clip(waves + np.random.default_rng(0).normal(0, 8, waves.shape), 0, 255).astype("uint8")


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(image_size=(64, 64)),
        crop_to(64, 64),
        crop_to(64, 64, crop_pct=1.0),
        crop_to(32, 80, crop_pct=0.9),
        crop_to(31, 17, crop_pct=0.5),
    ],
)
def test_fit_gives_the_same_for_what_a_cache_stores_and_in_a_graph(preprocessing, interpolation):
    preprocessing = preprocessing.replace(interpolation=interpolation)
    signature = [tf.TensorSpec((None, None, 3), tf.uint8)]
    fit, shrink = (
        tf.function(lambda image, of=of: of(image, preprocessing), input_signature=signature)
        for of in (images.fit, images.shrink)
    )
    for shape in SHAPES:
        [photo] = noise(1, (*shape, 3))
        expected = images.fit(photo, preprocessing)
        assert (expected.dtype, expected.shape) == (np.uint8, (*preprocessing.image_size, 3))
        stored = images.shrink(photo, preprocessing)
        np.testing.assert_array_equal(images.fit(stored, preprocessing), expected)
        np.testing.assert_array_equal(shrink(photo), stored)
        late = fit(photo)
        np.testing.assert_array_equal(late, expected)
        [batched] = images.fit(photo[None], preprocessing)
        np.testing.assert_array_equal(batched, expected)
    assert fit.get_concrete_function().output_shapes == (*preprocessing.image_size, 3)


@pytest.mark.parametrize(
    "shape, image_size, stored",
    [
        ((480, 640), (224, 224), (256, 341)),
        ((640, 480), (224, 224), (341, 256)),
        ((200, 900), (224, 224), (200, 900)),
        ((480, 640), (56, 224), (192, 256)),
        ((100, 900), (56, 112), (64, 576)),
    ],
)
def test_shrink_covers_the_box_that_the_middle_is_cut_from_and_never_enlarges(shape, image_size, stored):
    [photo] = noise(1, (*shape, 3))
    assert images.shrink(photo, crop_to(*image_size)).shape == (*stored, 3)
    assert images.shrink(photo, Preprocessing(image_size=image_size)).shape == (*image_size, 3)


def test_crop_takes_the_middle():
    # One column is cut off on the left and two on the right; nothing is resized.
    [photo] = noise(1, (4, 7, 3))
    np.testing.assert_array_equal(images.fit(photo, crop_to(4, 4, crop_pct=1)), photo[:, 1:5])
    [photo] = noise(1, (8, 14, 3))
    np.testing.assert_array_equal(images.fit(photo, crop_to(2, 4, crop_pct=0.5)), images.stretch(photo, (4, 8))[1:3, 2:6])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_an_enlarged_image_is_the_middle_of_the_whole(interpolation):
    for height, width in ((30, 61), (61, 30), (3, 3), (63, 64)):
        [photo] = noise(1, (height, width, 3))
        tall, wide = max(64, 64 * height // width), max(64, 64 * width // height)
        top, left = (tall - 56) // 2, (wide - 56) // 2
        whole = images.stretch(photo, (tall, wide), interpolation).numpy().astype(int)
        middle = images.fit(photo, crop_to(56, 56, interpolation=interpolation)).numpy()
        assert np.abs(middle - whole[top : top + 56, left : left + 56]).max() <= 1


def test_an_enlarged_strip_takes_little_memory():
    strip = np.full((1, 2**24, 3), 7, "uint8")  # the whole would have 256 x 4,294,967,296 pixels
    fit = tf.function(
        lambda image: images.fit(image, crop_to(224, 224)), input_signature=[tf.TensorSpec((None, None, 3), tf.uint8)]
    )
    for middle in (images.fit(strip, crop_to(224, 224)), fit(strip)):
        np.testing.assert_array_equal(middle, np.full((224, 224, 3), 7))


def test_interpolation_is_used():
    photo = smooth(50, 70)
    for of in (images.fit, images.shrink):
        for resize in ("stretch", "crop"):
            preprocessing = Preprocessing(image_size=(20, 20), resize=resize)
            bilinear, bicubic = of(photo, preprocessing), of(photo, preprocessing.replace(interpolation="bicubic"))
            assert not np.array_equal(bilinear, bicubic)
    expected = tf.image.resize(photo, (20, 20), "bicubic", antialias=True)
    np.testing.assert_array_equal(images.stretch(photo, (20, 20), "bicubic"), tf.saturate_cast(tf.round(expected), tf.uint8))


PHOTOS = [
    (480, 640),
    (640, 480),
    (256, 341),
    (224, 224),
    (300, 301),
    (900, 1200),
    (257, 1031),
    (100, 150),
    (97, 61),
    (333, 500),
]


def test_published_weights_see_images_as_in_transformers():
    # preprocessor_config.json of microsoft/cvt-13, without what follows the resizing.
    config = {"crop_pct": 0.875, "do_resize": True, "resample": 3, "size": {"shortest_edge": 224}}
    processor = ConvNextImageProcessorPil(**config, do_rescale=False, do_normalize=False)
    published = published_preprocessing(VARIANTS["cvt_13"], 3, "CvT-13-224x224-IN-1k")
    for shape in PHOTOS:
        photo = smooth(*shape)
        [theirs] = processor(photo, return_tensors="np", input_data_format="channels_last")["pixel_values"]
        ours = images.fit(photo, published).numpy().astype(int)
        # Measured: 1 at most, 0.22 on average.
        assert np.abs(ours - theirs.transpose(1, 2, 0)).max() <= 2, shape


def test_threads_keep_the_order_and_take_few_items_ahead(monkeypatch):
    monkeypatch.setattr(images, "threads", lambda: 2)
    taken = []
    for ahead, waiting in ((0, 8), (20, 20)):
        results = images.in_threads(lambda i: i * 2, (taken.append(i) or i for i in range(50)), ahead)
        assert next(results) == 0
        assert len(taken) == waiting + 1
        assert list(results) == [*range(2, 100, 2)]
        taken.clear()


def test_an_error_in_a_thread_ends_the_results():
    results = images.in_threads(lambda i: 1 // (i - 2), range(50))
    assert [next(results), next(results)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)
