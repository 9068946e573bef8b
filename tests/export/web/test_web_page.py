import base64
import io
import shutil
import socket
import struct
import zlib
from pathlib import Path

import flatbuffers
import keras
import numpy as np
import pytest
import sklearn.datasets
from PIL import Image
from tensorflow.lite.python import schema_py_generated as schema
from tools import require_browser

from cvt_keras.data import images, sources
from cvt_keras.data.verified import NOT_VERIFIED
from cvt_keras.export.verify import TFLITE_FORMATS

WAIT = 30_000  # milliseconds: the machine may be busy


def _encoded(pixels, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def _photo(height, width):
    """Pixels with the gradients, edges and noise of a photo."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    image = 255 * np.stack([x, y, (1 + np.sin(40 * x * y)) / 2], axis=-1)
    image[(x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.05] = 250, 20, 40
    return (image + random.normal(0, 12, image.shape)).clip(0, 255).astype("uint8")


def _file(data, name="photo.png", kind="image/png"):
    return {"name": name, "mimeType": kind, "buffer": data}


def _expect():
    from playwright.sync_api import expect

    return expect


def _given(page, give):
    """Calls `give` and waits -> the card that appears."""
    cards = page.locator(".card")
    n = cards.count()
    give()
    _expect()(cards).to_have_count(n + 1, timeout=WAIT)
    return cards.first


def _chosen(page, *files):
    return _given(page, lambda: page.set_input_files("#choose", list(files)))


def _probabilities(card):
    """The bars -> `{class name: probability}`."""
    rows = "rows => rows.map(row => [row.querySelector('.name').textContent, Number(row.dataset.probability)])"
    return dict(card.locator("li").evaluate_all(rows))


def _seen(card):
    """The pixels that the network sees, `(size, size, 3)`."""
    read = "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    pixels = np.array(card.locator(".seen canvas").evaluate(read), "uint8")
    size = int((len(pixels) / 4) ** 0.5)
    return pixels.reshape(size, size, 4)[..., :3]


def _stretched(pixels):
    return images.stretch(pixels, 32).numpy()


def _keras(classifier, pixels):
    return keras.ops.convert_to_numpy(keras.ops.softmax(classifier.predict(pixels[None].astype("float32"), verbose=0)))[0]


@pytest.fixture(scope="session")
def names(exported):
    return (exported / "export" / "labels.txt").read_text().splitlines()


# === Answers ===


def test_uploaded_images_get_keras_probabilities(page, classifier, test_images, names):
    images = test_images[0][:3]
    files = [_file(_encoded(image), f"{i}.png") for i, image in enumerate(images)]
    page.set_input_files("#choose", files)
    cards = page.locator(".card")
    _expect()(cards).to_have_count(3, timeout=WAIT)
    for i, image in enumerate(images):
        card = cards.filter(has_text=f"{i}.png")
        np.testing.assert_array_equal(_seen(card), image)
        found, expected = _probabilities(card), _keras(classifier, image)
        assert set(found) == set(names)
        np.testing.assert_allclose([found[name] for name in names], expected, atol=1e-3)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        top = names[expected.argmax()]
        assert card.get_by_role("heading").text_content() == top
        assert card.locator("li .share").first.text_content() == f"{100 * found[top]:.1f}%"
        widths = card.locator(".track span").evaluate_all("bars => bars.map(bar => parseFloat(bar.style.width) / 100)")
        np.testing.assert_allclose(widths, list(found.values()), atol=1e-4)


def test_images_of_another_size_are_stretched_as_in_training(page, classifier, names):
    for height, width in ((1500, 2000), (20, 50), (31, 33), (3000, 7), (1, 1)):
        pixels = _photo(height, width)
        expected = _stretched(pixels)
        card = _chosen(page, _file(_encoded(pixels)))
        assert abs(_seen(card).astype(int) - expected).max() <= 1, (height, width)
        found = _probabilities(card)
        np.testing.assert_allclose([found[name] for name in names], _keras(classifier, expected), atol=1e-3)
        assert ("stretched as in training" in card.text_content()) == (height != width)


@pytest.mark.parametrize("photo", ["china.jpg", "flower.jpg"])
def test_photos_are_classified_as_keras_does(photo, page, classifier, names):
    data = (Path(sklearn.datasets.__file__).parent / "images" / photo).read_bytes()
    card, expected = _chosen(page, _file(data, photo, "image/jpeg")), _stretched(images.decode(data))
    np.testing.assert_array_equal(_seen(card), expected)
    found = _probabilities(card)
    np.testing.assert_allclose([found[name] for name in names], _keras(classifier, expected), atol=1e-3)


def test_grey_images_are_classified_as_keras_does(page, classifier, names):
    for digit in sklearn.datasets.load_digits().images[:3]:
        pixels = (digit * 255 / 16).astype("uint8")  # (8, 8)
        expected = _stretched(np.repeat(pixels[..., None], 3, axis=-1))
        card = _chosen(page, _file(_encoded(pixels), "digit.png"))
        assert abs(_seen(card).astype(int) - expected).max() <= 1
        found = _probabilities(card)
        np.testing.assert_allclose([found[name] for name in names], _keras(classifier, expected), atol=1e-3)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])  # the browser turns the first, the page the second
def test_a_turned_photo_has_its_upright_sides(kind, page):
    exif = Image.Exif()
    exif[0x0112] = 6
    card = _chosen(page, _file(_encoded(_photo(40, 60), kind, exif=exif), f"photo.{kind}"))
    assert "40 \N{MULTIPLICATION SIGN} 60" in card.locator(".given").text_content()


def test_every_model_file_answers_as_litert_does(page, exported, test_images, names, litert):
    image = test_images[0][0]
    card = _chosen(page, _file(_encoded(image)))
    answers = []
    for kind in (*TFLITE_FORMATS[1:], TFLITE_FORMATS[0]):
        page.locator(f"label[for={kind}]").click()
        cost = card.locator(".cost")
        _expect()(cost).to_contain_text(f"ms with {kind},", timeout=WAIT)
        assert float(cost.text_content().split()[0]) > 0
        expected = litert(exported / "export" / "tflite" / f"{kind}.tflite", [image])[0]
        found = _probabilities(card)
        assert card.get_by_role("heading").text_content() == names[expected.argmax()]
        # Integers are rounded in another order there: by a few steps of 1/256.
        np.testing.assert_allclose([found[name] for name in names], expected, atol=0.02 if kind == "int8" else 1e-3)
        answers.append((found, cost.text_content()))
    for which in range(2):
        assert len({str(answer[which]) for answer in answers}) == 4


def test_it_runs_without_relaxed_simd(exported, open_page, serve, test_images, names, litert):
    """Which is told by a small module that a browser takes or not."""
    script = """{ const real = WebAssembly.instantiate;
      WebAssembly.instantiate = (module, ...more) =>
        module.byteLength < 1000 ? Promise.reject(new Error("unknown opcode")) : real(module, ...more); }"""
    page = open_page(serve(exported), script=script)
    loaded = page.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name.rpartition("/")[2] for name in loaded if name.endswith(".wasm")] == ["litert_wasm_compat_internal.wasm"]
    found = _probabilities(_chosen(page, _file(_encoded(test_images[0][0]))))
    expected = litert(exported / "export" / "tflite" / "float32.tflite", test_images[0][:1])[0]
    np.testing.assert_allclose([found[name] for name in names], expected, atol=1e-3)


def test_the_clock_is_a_fine_one(page):
    assert page.evaluate("crossOriginIsolated")


def test_the_time_is_the_median_of_five_runs(page, test_images):
    page.evaluate("""async () => {
      const { Network } = await import("/network.js");
      const [real, times] = [Network.prototype.run, [9, 1, 5, 7, 3]];
      Network.prototype.run = async function (pixels) {
        return { ...(await real.call(this, pixels)), milliseconds: times.shift() };
      };
    }""")
    card = _chosen(page, _file(_encoded(test_images[0][0])))
    assert card.locator(".cost").text_content() == "5.00 ms with float32, the median of 5 runs"


def test_a_network_is_warm_before_it_answers(page):
    page.evaluate("""async () => {
      const { Network } = await import("/network.js");
      const real = Network.prototype.run;
      window.runs = 0;
      Network.prototype.run = function (pixels) { runs++; return real.call(this, pixels); };
    }""")
    page.locator("label[for=int8]").click()
    _expect()(page.get_by_role("status")).to_have_text("int8 is ready.", timeout=WAIT)
    assert page.evaluate("runs") == 5


def test_nothing_is_left_in_memory(page, test_images):
    """What JavaScript does not free by itself: images, and LiteRT's tensors and models."""
    page.evaluate("""async () => {
      const { Network } = await import("/network.js");
      const { Tensor } = await import("@litertjs/core");
      window.bitmaps = [];
      window.deleted = new Set();
      const real = createImageBitmap;
      window.createImageBitmap = async (...given) => { bitmaps.push(await real(...given)); return bitmaps.at(-1); };
      for (const kind of [Network, Tensor]) {
        const real = kind.prototype.delete;
        kind.prototype.delete = function () { deleted.add(this); real.call(this); };
      }
    }""")
    _chosen(page, _file(_encoded(test_images[0][0])))
    assert page.evaluate("bitmaps.map((bitmap) => bitmap.width)") == [0]
    assert page.evaluate("deleted.size") == 5 * 2  # of each run, what goes in and what comes out
    page.locator("label[for=int8]").click()
    _expect()(page.locator(".cost")).to_contain_text("ms with int8,", timeout=WAIT)
    assert page.evaluate("[...deleted].map((one) => one.name).filter(Boolean)") == ["float32"]


def test_only_the_files_that_there_are_can_be_chosen(exported, open_page, serve, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(exported / "export", run_dir / "export")
    for kind in ("float32", "dynamic_int8"):
        (run_dir / "export" / "tflite" / f"{kind}.tflite").unlink()
    page = open_page(serve(run_dir))
    radios = page.get_by_role("group", name="Model file").get_by_role("radio")
    assert radios.evaluate_all("radios => radios.map(radio => radio.value)") == ["float16", "int8"]
    assert page.get_by_role("radio", name="float16").is_checked()
    assert not page.locator("#sampled").is_visible()


def test_of_many_classes_the_five_most_probable_are_shown(exported, open_page, serve, tmp_path, test_images):
    run_dir = tmp_path / "run"
    shutil.copytree(exported / "export", run_dir / "export")
    with open(run_dir / "export" / "labels.txt", "a") as file:
        file.write("an eleventh\n")
    card = _chosen(open_page(serve(run_dir)), _file(_encoded(test_images[0][0])))
    assert card.locator("li").count() == 5


# === Ways to give an image ===


def test_drop(page, test_images, tmp_path):
    file = tmp_path / "dropped.png"
    file.write_bytes(_encoded(test_images[0][1]))
    box = page.locator("#drop").bounding_box()
    at = {"x": box["x"] + 20, "y": box["y"] + 20, "data": {"items": [], "files": [str(file)], "dragOperationsMask": 1}}
    browser = page.context.new_cdp_session(page)

    def drag(kind):
        browser.send("Input.dispatchDragEvent", {"type": kind, **at})

    drag("dragEnter")
    drag("dragOver")
    _expect()(page.locator("#drop.over")).to_have_count(1)
    page.evaluate("() => { window.addEventListener('drop', (event) => { window.kept = event.defaultPrevented; }); }")
    card = _given(page, lambda: drag("drop"))
    assert page.evaluate("window.kept")  # else a browser with a window leaves the page for the image
    _expect()(page.locator("#drop.over")).to_have_count(0)
    np.testing.assert_array_equal(_seen(card), test_images[0][1])
    assert card.locator(".file").text_content() == "dropped.png"


def test_paste(page, test_images):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    copy = """async (data) => {
      const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
      await navigator.clipboard.write([new ClipboardItem({ "image/png": new Blob([bytes], { type: "image/png" }) })]);
    }"""
    page.evaluate(copy, base64.b64encode(_encoded(test_images[0][2])).decode())
    card = _given(page, lambda: page.keyboard.press("Control+V"))
    np.testing.assert_array_equal(_seen(card), test_images[0][2])
    page.evaluate("navigator.clipboard.writeText('hello')")
    page.keyboard.press("Control+V")
    _expect()(page.get_by_role("status")).to_have_text("There is no image to paste.")


def test_a_sample(page, samples, cifar10_dir):
    source = sources.load("cifar10", str(cifar10_dir))
    buttons = page.locator("#samples").get_by_role("button")
    _expect()(buttons).to_have_count(10)
    assert buttons.all_text_contents() == list(source.class_names)
    card = _given(page, page.get_by_role("button", name="cat", exact=True).click)
    np.testing.assert_array_equal(_seen(card), source.test.images[list(source.test.labels).index(3)])
    assert card.locator(".file").text_content() == "test image, labelled cat"


def test_a_samples_answer_is_marked_right_or_wrong_in_words(exported, names, open_page, samples, serve):
    """The network knows them all; of two it is told otherwise."""
    told = [{**samples[0], "label": names[1]}, samples[1], {**samples[2], "label": "of no network"}]
    page = open_page(serve(exported, samples=lambda: (told, "")))
    _expect()(page.locator("#samples button")).to_have_count(3)
    page.set_viewport_size({"width": 1280, "height": 1800})
    marks = []
    for i in range(3):
        card = _given(page, page.locator("#samples button").nth(i).click)
        marks.append(card.locator(".mark").text_content() if card.locator(".mark").is_visible() else None)
    assert marks == [f"\N{BALLOT X} wrong, it is labelled {names[1]}", "\N{CHECK MARK} right", None]
    # Another network's answer has a mark of its own.
    page.evaluate("""async () => {
      const { Network } = await import("/network.js");
      Network.prototype.run = async () => ({ probabilities: [1, ...Array(9).fill(0)], milliseconds: 1 });
    }""")
    page.locator("label[for=float16]").click()
    _expect()(page.locator(".mark:visible").first).to_have_text(f"\N{BALLOT X} wrong, it is labelled {names[1]}", timeout=WAIT)
    assert not _chosen(page, _file(samples[0]["png"])).locator(".mark").is_visible()


def test_samples_that_may_have_been_trained_on_are_not_called_test_images(exported, open_page, samples, serve):
    page = open_page(serve(exported, samples=lambda: (samples, NOT_VERIFIED)))
    _expect()(page.locator("#samples button")).to_have_count(10)
    assert page.locator("#samples-note").text_content() == NOT_VERIFIED
    card = _given(page, page.get_by_role("button", name="cat", exact=True).click)
    assert card.locator(".file").text_content() == "image, labelled cat"
    assert "test image" not in page.locator("body").inner_text()


def test_keyboard_alone(page, test_images, tmp_path):
    file = tmp_path / "typed.png"
    file.write_bytes(_encoded(test_images[0][3]))

    def outline():
        """Of what has the focus, or of the label that stands for it."""
        return page.evaluate(
            "(() => { const at = document.activeElement, shown = at.matches('input') ? at.labels[0] : at;"
            " return getComputedStyle(shown).outlineStyle; })()"
        )

    page.on("filechooser", lambda _: None)  # Playwright needs a while to listen to it
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "choose" and outline() == "solid"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    card = _given(page, lambda: chooser.value.set_files(file))
    np.testing.assert_array_equal(_seen(card), test_images[0][3])
    _expect()(page.locator("#samples button")).to_have_count(10)
    page.keyboard.press("Tab")
    assert outline() == "solid"
    _given(page, lambda: page.keyboard.press("Enter"))
    for _ in range(10):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "float32" and outline() == "solid"
    page.keyboard.press("ArrowDown")
    _expect()(page.locator(".cost").first).to_contain_text("ms with float16,", timeout=WAIT)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "clear" and outline() == "solid"
    page.keyboard.press("Enter")
    _expect()(page.locator(".card")).to_have_count(0)
    assert page.evaluate("document.activeElement.id") == "choose"


def test_the_same_file_can_be_chosen_again(page, test_images):
    _chosen(page, _file(_encoded(test_images[0][0])))
    assert page.evaluate("document.getElementById('choose').files.length") == 0  # else the browser sees no change


def test_an_answer_is_brought_into_view(page, test_images):
    page.set_viewport_size({"width": 390, "height": 500})
    card = _chosen(page, _file(_encoded(test_images[0][0])))
    _expect()(card).to_be_in_viewport()


def test_of_several_images_the_status_counts_answers_and_failures(page, test_images):
    good, bad = _encoded(test_images[0][0]), b"hello"
    status = page.get_by_role("status")
    for files, said in (([good, bad, good], "3 images: 2 answered, 1 failed"), ([good] * 2, "2 images: 2 answered, 0 failed")):
        page.set_input_files("#choose", [_file(data, f"{i}.png") for i, data in enumerate(files)])
        _expect()(status).to_have_text(said, timeout=WAIT)


def test_while_it_works_it_is_busy(page, test_images):
    page.evaluate("""() => {
      const real = createImageBitmap;
      window.createImageBitmap = async (...given) => { await new Promise((go) => (window.go = go)); return real(...given); };
    }""")
    answers = page.locator("#answers")
    assert answers.get_attribute("aria-busy") is None
    page.set_input_files("#choose", [_file(_encoded(test_images[0][0]))])
    _expect()(answers).to_have_attribute("aria-busy", "true")
    page.evaluate("async () => { while (!window.go) await new Promise(requestAnimationFrame); go(); }")
    _expect()(page.locator(".card")).to_have_count(1)
    _expect()(answers).not_to_have_attribute("aria-busy", "true")


def test_a_screen_reader_is_told(page, test_images, names):
    status = page.get_by_role("status")
    card = _chosen(page, _file(_encoded(test_images[0][0]), "told.png"))
    top, share = card.get_by_role("heading").text_content(), card.locator(".share").first.text_content()
    _expect()(status).to_have_text(f"told.png: {top}, {share}")
    _chosen(page, _file(b"hello", "notes.txt", "text/plain"))
    _expect()(status).to_contain_text("notes.txt: This is not an image that can be read here.")
    assert page.get_by_label("Choose images").get_attribute("type") == "file"
    assert page.get_by_role("img", name="What the network sees").count() == 1
    assert page.get_by_role("list").count() >= 2 and page.get_by_role("heading", level=1).count() == 1


# === What goes wrong ===


def _png_that_says(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_bad_files_get_a_message_and_the_page_goes_on(page, test_images):
    broken = "This PNG is broken, or of a kind that this browser can't read."
    bad = [
        (b"hello", "This is not an image that can be read here. JPEG, PNG, GIF, BMP, WebP and AVIF images can."),
        (b"\x89PNG\r\n\x1a\n", broken),
        (_encoded(_photo(99, 99))[:60], broken),
        (_encoded(_photo(99, 99), "JPEG")[:300], "This JPEG is cut off: the end of the file is missing."),
        (b"RIFF\x10\0\0\0WEBPVP8X\xff", "This WebP is broken, or of a kind that this browser can't read."),
        (_png_that_says(50_000, 50_000), broken),
        (_png_that_says(8193, 8192), "The image is too large: it has 67.2 megapixels, the limit is 67."),
        (_png_that_says(40_000, 1), "The image is too long: its longer side has 40,000 pixels, the limit is 32,767."),
    ]
    for i, (data, why) in enumerate(bad):
        card = _chosen(page, _file(data, f"{i}.png"))
        assert card.locator(".file").text_content() == f"{i}.png"
        assert card.locator(".why").text_content().startswith(why)
        np.testing.assert_array_equal(_seen(_chosen(page, _file(_encoded(test_images[0][i])))), test_images[0][i])


def test_what_is_too_large_is_refused_before_it_is_decoded(page, tmp_path):
    page.evaluate("() => { window.createImageBitmap = () => { throw new Error('decoded'); }; }")
    card = _chosen(page, _file(_png_that_says(8193, 8192)))
    assert "67.2 megapixels" in card.text_content()
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(403_000_001)  # a hole, which takes no space
    card = _chosen(page, tmp_path / "huge.png")
    assert "The file is too large: it has 404 MB, the limit is 403." in card.text_content()
    assert "is broken" in _chosen(page, _file(_encoded(_photo(9, 9)))).text_content()  # the stand-in is in its place


def test_a_picture_at_the_limit_is_taken(page):
    card = _chosen(page, _file(_encoded(np.full((8192, 8192), 77, "uint8"), compress_level=1)))
    assert (_seen(card) == 77).all()


def _with_an_operation_that_is_not_there(file):
    """A .tflite file whose damage comes to light as the runtime loads it, and not before."""
    model = schema.ModelT.InitFromPackedBuf(file, 0)
    model.subgraphs[0].operators[-1].opcodeIndex = 10_000
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def test_a_model_file_that_fails_gets_a_message_and_the_page_goes_on(exported, open_page, serve, tmp_path, test_images):
    run_dir = tmp_path / "run"
    shutil.copytree(exported / "export", run_dir / "export")
    page = open_page(serve(run_dir))
    page.expected = ["404"]
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    file = run_dir / "export" / "tflite" / "float16.tflite"
    whole = file.read_bytes()
    noise = np.random.default_rng(0).bytes(len(whole) // 4)
    before = _probabilities(_chosen(page, _file(_encoded(test_images[0][0]))))
    failing = {
        None: "float16.tflite can't be had: it is not there any more.",
        b"": "float16.tflite can't be run: it is no TFLite file",
        b"hello, this is no model": "float16.tflite can't be run: it is no TFLite file",
        whole[: len(whole) // 3]: "float16.tflite can't be run: it is cut off or damaged",
        whole[:64] + noise + whole[64 + len(noise) :]: "float16.tflite can't be run: ",
        _with_an_operation_that_is_not_there(whole): "float16.tflite can't be run: ",
    }
    for damaged, why in failing.items():
        file.unlink() if damaged is None else file.write_bytes(damaged)
        trouble = _given(page, page.locator("label[for=float16]").click)
        assert trouble.locator(".file").text_content() == "float16"
        assert trouble.locator(".why").text_content().startswith(why)
        _expect()(page.get_by_role("radio", name="float32")).to_be_checked(timeout=WAIT)
        after = _chosen(page, _file(_encoded(test_images[0][0])))
        assert _probabilities(after) == before and "with float32," in after.text_content()
    assert not [url for url in asked if "float32" in url]  # which may be gone as well
    file.write_bytes(whole)
    page.locator("label[for=float16]").click()
    _expect()(page.locator(".cost").first).to_contain_text("ms with float16,", timeout=WAIT)


def test_a_first_model_file_that_fails_can_be_chosen_again(exported, open_page, serve, tmp_path, test_images):
    run_dir = tmp_path / "run"
    shutil.copytree(exported / "export", run_dir / "export")
    file = run_dir / "export" / "tflite" / "float32.tflite"
    whole = file.read_bytes()
    file.write_bytes(b"hello")
    page = open_page(serve(run_dir), status="float32: float32.tflite can't be run: it is no TFLite file")
    assert not page.get_by_role("radio", name="float32").is_checked()
    card = _chosen(page, _file(_encoded(test_images[0][0])))
    assert card.locator(".why").text_content() == "No model file is loaded: choose one that can be."
    file.write_bytes(whole)
    page.locator("label[for=float32]").click()
    _expect()(page.get_by_role("status")).to_have_text("float32 is ready.", timeout=WAIT)


def test_while_the_server_is_away_the_page_goes_on(exported, open_page, samples, serve, test_images):
    server = serve(exported, samples=lambda: (samples, ""))
    page = open_page(server)
    page.expected = ["net::ERR_"]
    _expect()(page.locator("#samples img")).to_have_count(10)
    server.stop()
    away = "can't be had: the server does not answer. Is it still running?"
    trouble = _given(page, page.locator("label[for=int8]").click)
    assert trouble.locator(".why").text_content() == f"int8.tflite {away}"
    _expect()(page.get_by_role("radio", name="float32")).to_be_checked()
    assert "with float32," in _chosen(page, _file(_encoded(test_images[0][0]))).text_content()
    trouble = _given(page, page.get_by_role("button", name="cat", exact=True).click)
    assert trouble.locator(".file").text_content() == "test image, labelled cat"
    assert trouble.locator(".why").text_content() == f"samples/3.png {away}"
    serve(exported, port=server.server_port)
    page.locator("label[for=int8]").click()
    _expect()(page.locator(".cost")).to_contain_text("ms with int8,", timeout=WAIT)


def test_what_can_not_be_loaded_at_all_is_told(exported, open_page, serve, monkeypatch):
    server = serve(exported)
    monkeypatch.setattr(server, "labels", lambda: 1 / 0)  # the answer breaks off
    page = open_page(server, status="Something went wrong: run.json can't be had: the server does not answer.")
    page.expected = ["net::ERR_"]
    assert page.get_by_role("status").text_content().startswith("Something")


def test_a_network_that_fails_is_told_from_an_image_that_does(page, test_images):
    page.evaluate("""async () => {
      const { Network } = await import("/network.js");
      Network.prototype.run = () => { throw new Error("no memory"); };
    }""")
    card = _chosen(page, _file(_encoded(test_images[0][0])))
    assert card.locator(".why").text_content() == "float32.tflite can't be run: no memory"


def test_the_page_may_ask_no_other_host(page):
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.5)
        url = f"http://127.0.0.1:{other.getsockname()[1]}/"
        page.expected = [url]
        page.evaluate("(url) => fetch(url, { mode: 'no-cors', signal: AbortSignal.timeout(1000) }).catch(() => {})", url)
        page.evaluate("(url) => { new Image().src = url; document.body.append(Object.assign(new Image(), {src: url})); }", url)
        with pytest.raises(TimeoutError):
            other.accept()


# === Looks ===


def test_nothing_sticks_out_at_any_width(page):
    _expect()(page.locator("#samples button")).to_have_count(10)
    _chosen(page, _file(_encoded(_photo(300, 900)), f"{'a long name ' * 5}{'without_a_space' * 5}.png"))
    _chosen(page, _file(b"hello", f"{'notes' * 30}.txt"))
    for width in (320, 360, 390, 800, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        sizes = page.locator("label, button").evaluate_all("all => all.map(one => one.getBoundingClientRect().height)")
        assert min(sizes) >= 24  # WCAG 2.2's least for a finger


@pytest.mark.parametrize("height, width", [(3, 4000), (4000, 3)])
def test_the_preview_of_a_strip_can_be_seen(height, width, page):
    preview = _chosen(page, _file(_encoded(np.full((height, width), 77, "uint8")))).locator(".given canvas")
    assert preview.evaluate("canvas => [canvas.width, canvas.height]") == [
        max(side * 640 // 4000, 40) for side in (width, height)
    ]
    assert preview.bounding_box()["height"] >= 12


def test_without_javascript_there_is_a_line_that_says_so(chromium, server):
    # With Playwright's java_script_enabled=False a page is still parsed as one with scripts.
    flags = [*require_browser().FLAGS, "--blink-settings=scriptEnabled=false"]
    with chromium.browser_type.launch(executable_path=require_browser().CHROMIUM, args=flags) as browser:
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.goto(server.url)
        line = page.locator("noscript p")
        assert line.text_content() == "This page needs JavaScript." and 0 <= line.bounding_box()["y"] < 100
        assert not page.get_by_role("status").text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(scheme, open_page, server):
    page = open_page(server, color_scheme=scheme)
    _chosen(page, _file(b"hello", "notes.txt"))
    _given(page, page.locator("#samples button").first.click)

    def luminance(colour):
        parts = np.array([float(part) for part in colour.split("(")[1].rstrip(")").split(",")[:3]]) / 255
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    read = """(one) => {
      const ink = getComputedStyle(one).color;
      while (getComputedStyle(one).backgroundColor === "rgba(0, 0, 0, 0)") one = one.parentElement;
      return [ink, getComputedStyle(one).backgroundColor];
    }"""
    for text in (
        "h1",
        "header p",
        "#drop label",
        "#ways",
        "#status",
        "legend",
        "fieldset span",
        ".mark",
        ".card .why",
        ".trouble .file",
    ):
        ink, paper = map(luminance, page.locator(text).first.evaluate(read))
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5, text
    paper = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
    assert (luminance(paper) < 0.1) == (scheme == "dark")
