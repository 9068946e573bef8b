import base64
import io
import shutil
import socket
from pathlib import Path

import flatbuffers
import numpy as np
import pytest
import sklearn.datasets
from photos import png, with_header
from PIL import Image
from tensorflow.lite.python import schema_py_generated as schema
from tools import require_browser

from cvt_keras import Preprocessing, calibration_of
from cvt_keras.data import images
from cvt_keras.data.verified import NOT_VERIFIED
from cvt_keras.export.verify import TFLITE_FORMATS
from cvt_keras.export.web.server import Server
from cvt_keras.training.recipes import RESIZING

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


def _new_card(page, action):
    """Calls `action` and waits for a new card. Returns it."""
    cards = page.locator(".card")
    n = cards.count()
    action()
    _expect()(cards).to_have_count(n + 1, timeout=WAIT)
    return cards.first


def _choose(page, *files):
    return _new_card(page, lambda: page.set_input_files("#choose", list(files)))


def _probabilities(card):
    """The bars -> `{class name: probability}`."""
    rows = "rows => rows.map(row => [row.querySelector('.name').textContent, Number(row.dataset.probability)])"
    return dict(card.locator("li").evaluate_all(rows))


def _network_input(card):
    """The pixels of the network's input, `(height, width, 3)`."""
    read = "c => [c.height, c.width, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]"
    height, width, pixels = card.locator(".input canvas").evaluate(read)
    return np.array(pixels, "uint8").reshape(height, width, 4)[..., :3]


def _stretched(pixels):
    return images.stretch(pixels, (24, 40)).numpy()


def _keras(classifier, pixels):
    return calibration_of(classifier).probabilities(classifier.predict(pixels[None].astype("float32"), verbose=0))[0]


@pytest.fixture(scope="session")
def names(exported):
    return (exported / "export" / "labels.txt").read_text().splitlines()


# === Results ===


def test_uploaded_images_get_keras_probabilities(page, classifier, test_images, names):
    images = test_images[0][:3]
    files = [_file(_encoded(image), f"{i}.png") for i, image in enumerate(images)]
    page.set_input_files("#choose", files)
    cards = page.locator(".card")
    _expect()(cards).to_have_count(3, timeout=WAIT)
    for i, image in enumerate(images):
        card = cards.filter(has_text=f"{i}.png")
        np.testing.assert_array_equal(_network_input(card), image)
        assert not card.locator(".original").is_visible()  # it is the network's input
        probabilities, expected = _probabilities(card), _keras(classifier, image)
        assert set(probabilities) == set(names)
        np.testing.assert_allclose([probabilities[name] for name in names], expected, atol=1e-3)
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
        top = names[expected.argmax()]
        assert card.get_by_role("heading").text_content() == top
        assert card.locator("li .share").first.text_content() == f"{100 * probabilities[top]:.1f}%"
        widths = card.locator(".track span").evaluate_all("bars => bars.map(bar => parseFloat(bar.style.width) / 100)")
        np.testing.assert_allclose(widths, list(probabilities.values()), atol=1e-4)


def test_images_of_another_size_are_stretched_as_in_training(page, classifier, names):
    photo = images.decode((Path(sklearn.datasets.__file__).parent / "images" / "china.jpg").read_bytes())
    # Larger than one strip of `stretch`, smaller than the network's input, turned, narrower than a pixel of it, and a photo.
    for pixels in (_photo(1500, 2000), _photo(12, 20), _photo(40, 24), _photo(3000, 7), _photo(1, 1), photo):
        expected = _stretched(pixels)
        card = _choose(page, _file(_encoded(pixels, compress_level=1)))
        assert abs(_network_input(card).astype(int) - expected).max() <= (0 if pixels is photo else 1), pixels.shape
        probabilities = _probabilities(card)
        np.testing.assert_allclose([probabilities[name] for name in names], _keras(classifier, expected), atol=1e-3)
        height, width, _ = pixels.shape
        assert card.locator(".original").is_visible()
        stretched = "" if (height, width) == (12, 20) else ", stretched as in training"
        assert card.locator(".input").text_content() == f"Network input: 40 \N{MULTIPLICATION SIGN} 24{stretched}"


def test_a_run_that_crops_gets_the_middle(exported, open_page, serve):
    crop = Preprocessing(image_size=(24, 40), resize="crop", crop_pct=0.875, interpolation="bicubic")
    page = open_page(serve(exported, resizing={name: getattr(crop, name) for name in RESIZING}))
    for pixels in (_photo(300, 200), _photo(24, 40)):  # the second is enlarged
        card = _choose(page, _file(_encoded(pixels)))
        assert abs(_network_input(card).astype(int) - images.fit(pixels, crop).numpy()).max() <= 1
        assert card.locator(".original").is_visible()
        assert (
            card.locator(".input").text_content() == "Network input: 40 \N{MULTIPLICATION SIGN} 24, the middle, as in training"
        )


def test_the_caption_of_a_rotated_photo_has_its_upright_size(page):
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "WEBP"):  # the browser rotates the first, the page the second
        card = _choose(page, _file(_encoded(_photo(40, 60), kind, exif=exif), f"photo.{kind}"))
        assert "40 \N{MULTIPLICATION SIGN} 60" in card.locator(".original").text_content()


def test_every_model_file_gives_litert_probabilities(page, exported, test_images, names, litert):
    image = test_images[0][0]
    card = _choose(page, _file(_encoded(image)))
    results = []
    for kind in (*TFLITE_FORMATS[1:], TFLITE_FORMATS[0]):
        page.locator(f"label[for={kind}]").click()
        time = card.locator(".time")
        _expect()(time).to_contain_text(f"ms with {kind} ", timeout=WAIT)
        assert float(time.text_content().split()[0]) > 0
        expected = litert(exported / "export" / "tflite" / f"{kind}.tflite", [image])[0]
        probabilities = _probabilities(card)
        assert card.get_by_role("heading").text_content() == names[expected.argmax()]
        # WebAssembly rounds the integers in another order: the difference is a few steps of 1/256.
        atol = 0.02 if kind == "int8" else 1e-3
        np.testing.assert_allclose([probabilities[name] for name in names], expected, atol=atol)
        results.append((str(probabilities), time.text_content()))
    for column in zip(*results):
        assert len(set(column)) == 4


def test_the_page_runs_without_relaxed_simd(exported, open_page, serve, test_images, names, litert):
    # LiteRT detects it by whether a small module compiles.
    script = """{ const real = WebAssembly.instantiate;
      WebAssembly.instantiate = (module, ...more) =>
        module.byteLength < 1000 ? Promise.reject(new Error("unknown opcode")) : real(module, ...more); }"""
    page = open_page(serve(exported), script=script)
    loaded = page.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name.rpartition("/")[2] for name in loaded if name.endswith(".wasm")] == ["litert_wasm_compat_internal.wasm"]
    probabilities = _probabilities(_choose(page, _file(_encoded(test_images[0][0]))))
    expected = litert(exported / "export" / "tflite" / "float32.tflite", test_images[0][:1])[0]
    np.testing.assert_allclose([probabilities[name] for name in names], expected, atol=1e-3)


def test_the_page_has_the_precise_clock(page):
    assert page.evaluate("crossOriginIsolated")


def test_the_time_is_the_median_of_five_runs_of_a_warm_network(open_page, server, test_images):
    page = open_page(server)
    page.evaluate("""async () => {
      const { Network } = await import("/network.js");
      const [real, times] = [Network.prototype.run, [2, 2, 2, 2, 2, 9, 1, 5, 7, 3]];
      window.runs = 0;
      Network.prototype.run = async function (pixels) {
        return { ...(await real.call(this, pixels)), milliseconds: times[runs++] };
      };
    }""")
    page.locator("label[for=int8]").click()
    _expect()(page.get_by_role("status")).to_have_text("int8 is ready.", timeout=WAIT)
    assert page.evaluate("runs") == 5
    card = _choose(page, _file(_encoded(test_images[0][0])))
    assert card.locator(".time").text_content() == "5.00 ms with int8 (median of 5 runs)"


def test_bitmaps_tensors_and_models_are_freed(open_page, server, test_images):
    """JavaScript does not free them by itself."""
    page = open_page(server)
    page.evaluate("""async () => {
      const { Network } = await import("/network.js");
      const { Tensor } = await import("@litertjs/core");
      window.bitmaps = [];
      window.deleted = new Set();
      const real = createImageBitmap;
      window.createImageBitmap = async (...options) => { bitmaps.push(await real(...options)); return bitmaps.at(-1); };
      for (const kind of [Network, Tensor]) {
        const real = kind.prototype.delete;
        kind.prototype.delete = function () { deleted.add(this); real.call(this); };
      }
    }""")
    _choose(page, _file(_encoded(test_images[0][0])))
    assert page.evaluate("bitmaps.map((bitmap) => bitmap.width)") == [0]
    assert page.evaluate("deleted.size") == 5 * 2  # input and output of each run
    page.locator("label[for=int8]").click()
    _expect()(page.locator(".time")).to_contain_text("ms with int8 ", timeout=WAIT)
    assert page.evaluate("[...deleted].map((one) => one.name).filter(Boolean)") == ["float32"]


def test_a_run_with_two_files_eleven_classes_and_no_samples(exported, open_page, serve, tmp_path, test_images):
    export = tmp_path / "run" / "export"
    shutil.copytree(exported / "export", export, ignore=shutil.ignore_patterns("float32.tflite", "dynamic_int8.tflite"))
    with open(export / "labels.txt", "a") as file:
        file.write("an eleventh\n")
    page = open_page(serve(export.parent))
    radios = page.get_by_role("group", name="Model file").get_by_role("radio")
    assert radios.evaluate_all("radios => radios.map(radio => radio.value)") == ["float16", "int8"]
    assert page.get_by_role("radio", name="float16").is_checked()
    assert not page.locator("#sampled").is_visible()
    assert _choose(page, _file(_encoded(test_images[0][0]))).locator("li").count() == 5


# === Ways to choose an image ===


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
    page.evaluate("() => { window.addEventListener('drop', (event) => { window.prevented = event.defaultPrevented; }); }")
    card = _new_card(page, lambda: drag("drop"))
    assert page.evaluate("window.prevented")  # otherwise a browser opens the image in place of the page
    _expect()(page.locator("#drop.over")).to_have_count(0)
    np.testing.assert_array_equal(_network_input(card), test_images[0][1])
    assert card.locator(".file").text_content() == "dropped.png"


def test_paste(page, test_images):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    copy = """async (data) => {
      const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
      await navigator.clipboard.write([new ClipboardItem({ "image/png": new Blob([bytes], { type: "image/png" }) })]);
    }"""
    page.evaluate(copy, base64.b64encode(_encoded(test_images[0][2])).decode())
    card = _new_card(page, lambda: page.keyboard.press("Control+V"))
    np.testing.assert_array_equal(_network_input(card), test_images[0][2])
    page.evaluate("navigator.clipboard.writeText('hello')")
    page.keyboard.press("Control+V")
    _expect()(page.get_by_role("status")).to_have_text("The clipboard holds no image.")


def test_a_sample(page, names, test_images):
    pixels, labels = test_images
    buttons = page.locator("#samples").get_by_role("button")
    _expect()(buttons).to_have_count(10)
    assert page.get_by_role("heading", name="Or try a test image").is_visible()
    assert buttons.all_text_contents() == names
    card = _new_card(page, page.get_by_role("button", name="cat", exact=True).click)
    np.testing.assert_array_equal(_network_input(card), pixels[list(labels).index(3)])
    assert card.locator(".file").text_content() == "test image, labelled cat"


def test_an_unsure_answer_says_so(exported, open_page, serve, monkeypatch, test_images, classifier):
    first = float(_keras(classifier, test_images[0][0]).max())
    monkeypatch.setattr(Server, "threshold", lambda server: first + 1e-3)
    page = open_page(serve(exported))
    card = _choose(page, _file(_encoded(test_images[0][0])))
    assert card.locator(".unsure").text_content() == f"Unsure: the probability is below {100 * (first + 1e-3):.1f}%"
    assert page.get_by_role("status").text_content().endswith("%, unsure")
    page.evaluate("""async () => {
      const { Network } = await import("/network.js");
      Network.prototype.run = async () => ({ probabilities: [1, ...Array(9).fill(0)], milliseconds: 1 });
    }""")
    assert not _choose(page, _file(_encoded(test_images[0][1]))).locator(".unsure").is_visible()


def test_a_samples_result_is_marked_correct_or_wrong_in_words(exported, names, open_page, samples, serve):
    relabelled = [{**samples[0], "label": names[1]}, samples[1], {**samples[2], "label": "unknown to the network"}]
    page = open_page(serve(exported, samples=lambda: (relabelled, "")))
    _expect()(page.locator("#samples button")).to_have_count(3)
    page.set_viewport_size({"width": 1280, "height": 1800})
    # The network is right about all three images, whatever their label says.
    verdicts = []
    for i in range(3):
        card = _new_card(page, page.locator("#samples button").nth(i).click)
        verdicts.append(card.locator(".verdict").text_content() if card.locator(".verdict").is_visible() else None)
    wrong = f"\N{BALLOT X} wrong: the label is {names[1]}"
    assert verdicts == [wrong, "\N{CHECK MARK} correct", None]
    # Another model file updates the verdicts. This one answers class 0 for every image.
    page.evaluate("""async () => {
      const { Network } = await import("/network.js");
      Network.prototype.run = async () => ({ probabilities: [1, ...Array(9).fill(0)], milliseconds: 1 });
    }""")
    page.locator("label[for=float16]").click()
    _expect()(page.locator(".verdict:visible").first).to_have_text(wrong, timeout=WAIT)
    assert not _choose(page, _file(samples[0]["png"])).locator(".verdict").is_visible()


def test_samples_that_the_run_may_have_trained_on_are_not_called_test_images(exported, open_page, samples, serve):
    page = open_page(serve(exported, samples=lambda: (samples, NOT_VERIFIED)))
    _expect()(page.locator("#samples button")).to_have_count(10)
    assert page.locator("#samples-note").text_content() == NOT_VERIFIED
    assert page.get_by_role("heading", name="Or try an image").is_visible()
    card = _new_card(page, page.get_by_role("button", name="cat", exact=True).click)
    assert card.locator(".file").text_content() == "image, labelled cat"
    assert "test image" not in page.locator("body").inner_text()


def test_keyboard_alone(open_page, server, test_images, tmp_path):
    page = open_page(server)
    file = tmp_path / "typed.png"
    file.write_bytes(_encoded(test_images[0][3]))

    def outline():
        """Outline of the focused element, or of the label of a hidden input."""
        return page.evaluate(
            "(() => { const at = document.activeElement, shown = at.matches('input') ? at.labels[0] : at;"
            " return getComputedStyle(shown).outlineStyle; })()"
        )

    page.on("filechooser", lambda _: None)  # Playwright needs a while to listen to it
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "choose" and outline() == "solid"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    card = _new_card(page, lambda: chooser.value.set_files(file))
    np.testing.assert_array_equal(_network_input(card), test_images[0][3])
    _expect()(page.locator("#samples button")).to_have_count(10)
    page.keyboard.press("Tab")
    assert outline() == "solid"
    _new_card(page, lambda: page.keyboard.press("Enter"))
    for _ in range(10):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "float32" and outline() == "solid"
    page.keyboard.press("ArrowDown")
    _expect()(page.locator(".time").first).to_contain_text("ms with float16 ", timeout=WAIT)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "clear" and outline() == "solid"
    page.keyboard.press("Enter")
    _expect()(page.locator(".card")).to_have_count(0)
    assert page.evaluate("document.activeElement.id") == "choose"


def test_the_same_file_can_be_chosen_again(page, test_images):
    _choose(page, _file(_encoded(test_images[0][0])))
    assert page.evaluate("document.getElementById('choose').files.length") == 0  # else the browser sees no change


def test_an_answer_is_brought_into_view(page, test_images):
    page.set_viewport_size({"width": 390, "height": 500})
    card = _choose(page, _file(_encoded(test_images[0][0])))
    _expect()(card).to_be_in_viewport()


def test_the_status_of_several_images_counts_failures(page, test_images):
    good, bad = _encoded(test_images[0][0]), b"hello"
    status = page.get_by_role("status")
    for files, text in (
        ([good, bad, good], "3 images: 2 classified, 1 failed"),
        ([good] * 2, "2 images: 2 classified, 0 failed"),
    ):
        page.set_input_files("#choose", [_file(data, f"{i}.png") for i, data in enumerate(files)])
        _expect()(status).to_have_text(text, timeout=WAIT)


def test_the_results_are_busy_while_an_image_is_decoded(open_page, server, test_images):
    page = open_page(server)
    page.evaluate("""() => {
      const real = createImageBitmap;
      window.createImageBitmap = async (...options) => {
        await new Promise((resume) => (window.resume = resume));
        return real(...options);
      };
    }""")
    results = page.locator("#results")
    assert results.get_attribute("aria-busy") is None
    page.set_input_files("#choose", [_file(_encoded(test_images[0][0]))])
    _expect()(results).to_have_attribute("aria-busy", "true")
    page.evaluate("async () => { while (!window.resume) await new Promise(requestAnimationFrame); resume(); }")
    _expect()(page.locator(".card")).to_have_count(1)
    _expect()(results).not_to_have_attribute("aria-busy", "true")


def test_a_screen_reader_reads_results_and_errors(page, test_images, names):
    status = page.get_by_role("status")
    card = _choose(page, _file(_encoded(test_images[0][0]), "cat.png"))
    top, share = card.get_by_role("heading").text_content(), card.locator(".share").first.text_content()
    unsure = ", unsure" if card.locator(".unsure").is_visible() else ""
    _expect()(status).to_have_text(f"cat.png: {top}, {share}{unsure}")
    _choose(page, _file(b"hello", "notes.txt", "text/plain"))
    _expect()(status).to_contain_text("notes.txt: This file is not an image that this page can read.")
    assert page.get_by_label("Choose images").get_attribute("type") == "file"
    assert page.get_by_role("img", name="Network input").count() == 1
    assert page.get_by_role("list").count() >= 2 and page.get_by_role("heading", level=1).count() == 1


# === What goes wrong ===


def test_bad_files_get_a_message_and_the_next_image_is_classified(page, test_images):
    damaged = "This PNG is damaged, or this browser can't read this kind of PNG."
    bad = [
        (b"hello", "This file is not an image that this page can read. It reads JPEG, PNG, GIF, BMP, WebP and AVIF."),
        (b"\x89PNG\r\n\x1a\n", damaged),
        (_encoded(_photo(99, 99))[:60], damaged),
        (_encoded(_photo(99, 99), "JPEG")[:300], "This JPEG is cut off: the end of the file is missing."),
        (b"RIFF\x10\0\0\0WEBPVP8X\xff", "This WebP is damaged, or this browser can't read this kind of WebP."),
        (with_header(png(8, 2), 50_000, 50_000), damaged),
        (with_header(png(8, 2), 8193, 8192), "The image is too large: 67.2 megapixels. The limit is 67."),
        (with_header(png(8, 2), 40_000, 1), "The image is too long: its longer side has 40,000 pixels. The limit is 32,767."),
    ]
    for i, (data, message) in enumerate(bad):
        card = _choose(page, _file(data, f"{i}.png"))
        assert card.locator(".file").text_content() == f"{i}.png"
        assert card.locator(".message").text_content().startswith(message)
    np.testing.assert_array_equal(_network_input(_choose(page, _file(_encoded(test_images[0][0])))), test_images[0][0])


def test_an_image_that_is_too_large_is_refused_before_decoding(open_page, server, tmp_path):
    page = open_page(server)
    page.evaluate("() => { window.createImageBitmap = () => { throw new Error('decoded'); }; }")
    card = _choose(page, _file(with_header(png(8, 2), 8193, 8192)))
    assert "67.2 megapixels" in card.text_content()
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(403_000_001)  # a sparse file
    card = _choose(page, tmp_path / "huge.png")
    assert "The file is too large: 404 MB. The limit is 403 MB." in card.text_content()
    assert "is damaged" in _choose(page, _file(_encoded(_photo(9, 9)))).text_content()  # createImageBitmap is patched


def test_an_image_of_the_largest_size_is_classified(page):
    card = _choose(page, _file(_encoded(np.full((8192, 8192), 77, "uint8"), compress_level=1)))
    assert (_network_input(card) == 77).all()


def _with_unknown_operation(file):
    """Damages a .tflite file in a way that only the runtime detects, when it loads the file."""
    model = schema.ModelT.InitFromPackedBuf(file, 0)
    model.subgraphs[0].operators[-1].opcodeIndex = 10_000
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def test_a_model_file_that_fails_gets_a_message_and_the_old_one_stays(exported, open_page, serve, tmp_path, test_images):
    run_dir = tmp_path / "run"
    shutil.copytree(exported / "export", run_dir / "export")
    page = open_page(serve(run_dir))
    page.expected = ["404"]
    page.requests.clear()
    file = run_dir / "export" / "tflite" / "float16.tflite"
    whole = file.read_bytes()
    noise = np.random.default_rng(0).bytes(len(whole) // 4)
    before = _probabilities(_choose(page, _file(_encoded(test_images[0][0]))))
    failing = {
        None: "float16.tflite can't be loaded: the file no longer exists.",
        b"": "float16.tflite can't be run: it is not a TFLite file",
        b"hello, this is no model": "float16.tflite can't be run: it is not a TFLite file",
        whole[: len(whole) // 3]: "float16.tflite can't be run: it is cut off or damaged",
        whole[:64] + noise + whole[64 + len(noise) :]: "float16.tflite can't be run: ",
        _with_unknown_operation(whole): "float16.tflite can't be run: ",
    }
    for damaged, message in failing.items():
        file.unlink() if damaged is None else file.write_bytes(damaged)
        error = _new_card(page, page.locator("label[for=float16]").click)
        assert error.locator(".file").text_content() == "float16"
        assert error.locator(".message").text_content().startswith(message)
        _expect()(page.get_by_role("radio", name="float32")).to_be_checked(timeout=WAIT)
        after = _choose(page, _file(_encoded(test_images[0][0])))
        assert _probabilities(after) == before and "with float32 " in after.text_content()
    assert not [url for url in page.requests if "float32" in url]  # the file may be gone as well
    file.write_bytes(whole)
    page.locator("label[for=float16]").click()
    _expect()(page.locator(".time").first).to_contain_text("ms with float16 ", timeout=WAIT)


def test_a_first_model_file_that_fails_can_be_chosen_again(exported, open_page, serve, tmp_path, test_images):
    run_dir = tmp_path / "run"
    shutil.copytree(exported / "export", run_dir / "export")
    file = run_dir / "export" / "tflite" / "float32.tflite"
    whole = file.read_bytes()
    file.write_bytes(b"hello")
    page = open_page(serve(run_dir), status="float32: float32.tflite can't be run: it is not a TFLite file")
    assert not page.get_by_role("radio", name="float32").is_checked()
    card = _choose(page, _file(_encoded(test_images[0][0])))
    assert card.locator(".message").text_content() == "No model file is loaded. Choose one under Model file."
    file.write_bytes(whole)
    page.locator("label[for=float32]").click()
    _expect()(page.get_by_role("status")).to_have_text("float32 is ready.", timeout=WAIT)


def test_the_page_works_on_without_its_server(exported, open_page, samples, serve, test_images):
    server = serve(exported, samples=lambda: (samples, ""))
    page = open_page(server)
    page.expected = ["net::ERR_"]
    _expect()(page.locator("#samples img")).to_have_count(10)
    server.stop()
    no_answer = "can't be loaded: the server does not answer. Is it still running?"
    error = _new_card(page, page.locator("label[for=int8]").click)
    assert error.locator(".message").text_content() == f"int8.tflite {no_answer}"
    _expect()(page.get_by_role("radio", name="float32")).to_be_checked()
    assert "with float32 " in _choose(page, _file(_encoded(test_images[0][0]))).text_content()
    error = _new_card(page, page.get_by_role("button", name="cat", exact=True).click)
    assert error.locator(".file").text_content() == "test image, labelled cat"
    assert error.locator(".message").text_content() == f"samples/3.png {no_answer}"
    serve(exported, port=server.server_port)
    page.locator("label[for=int8]").click()
    _expect()(page.locator(".time")).to_contain_text("ms with int8 ", timeout=WAIT)


def test_a_page_that_can_not_load_the_run_says_so(exported, open_page, serve, monkeypatch):
    server = serve(exported)
    monkeypatch.setattr(server, "labels", lambda: 1 / 0)  # the connection breaks off
    page = open_page(server, status="Something went wrong: run.json can't be loaded: the server does not answer.")
    page.expected = ["net::ERR_"]
    assert page.get_by_role("status").text_content().startswith("Something")


def test_a_failing_network_is_not_blamed_on_the_image(open_page, server, test_images):
    page = open_page(server)
    page.evaluate("""async () => {
      const { Network } = await import("/network.js");
      Network.prototype.run = () => { throw new Error("no memory"); };
    }""")
    card = _choose(page, _file(_encoded(test_images[0][0])))
    assert card.locator(".message").text_content() == "float32.tflite can't be run: no memory"


def test_an_error_that_the_runtime_only_prints_is_shown(open_page, server, test_images):
    """Without memory, LiteRT prints an error and returns an output of any values."""
    # LiteRT resets `Module` once it is loaded.
    keep = "set: (value) => { kept = value; window.runtime ??= value; }, get: () => kept"
    page = open_page(server, script=f"{{ let kept; Object.defineProperty(globalThis, 'Module', {{ {keep} }}); }}")
    page.evaluate("""async () => {
      const { CompiledModel } = await import("@litertjs/core");
      const real = CompiledModel.prototype.run;
      CompiledModel.prototype.run = function (input) {
        runtime.printErr("ERROR: [litert_compiled_model.cc:164] Failed to allocate tensors");
        return real.call(this, input);
      };
    }""")
    card = _choose(page, _file(_encoded(test_images[0][0])))
    assert card.locator(".message").text_content() == "float32.tflite can't be run: Failed to allocate tensors"


def test_the_page_can_not_ask_another_host(open_page, server):
    page = open_page(server)
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.5)
        url = f"http://127.0.0.1:{other.getsockname()[1]}/"
        page.expected = [url]
        page.evaluate("(url) => fetch(url, { mode: 'no-cors', signal: AbortSignal.timeout(1000) }).catch(() => {})", url)
        page.evaluate("(url) => { new Image().src = url; document.body.append(Object.assign(new Image(), {src: url})); }", url)
        with pytest.raises(TimeoutError):
            other.accept()


# === Looks ===


def test_the_page_fits_every_width(page):
    _expect()(page.locator("#samples button")).to_have_count(10)
    _choose(page, _file(_encoded(_photo(300, 900)), f"{'a long name ' * 5}{'without_a_space' * 5}.png"))
    _choose(page, _file(b"hello", f"{'notes' * 30}.txt"))
    for width in (320, 360, 390, 800, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        sizes = page.locator("label, button").evaluate_all("all => all.map(one => one.getBoundingClientRect().height)")
        assert min(sizes) >= 24  # WCAG 2.2's least for a finger


@pytest.mark.parametrize("width", [390, 1280])
def test_the_networks_input_and_the_samples_keep_their_shape(width, page):
    page.set_viewport_size({"width": width, "height": 844})
    card = _choose(page, _file(_encoded(_photo(30, 30))))
    for picture in (card.locator(".input canvas"), page.locator("#samples img").first):
        box = picture.bounding_box()
        assert box["width"] / box["height"] == pytest.approx(40 / 24, rel=0.02)


def test_the_preview_of_a_strip_is_visible(page):
    for height, width in ((3, 4000), (4000, 3)):
        preview = _choose(page, _file(_encoded(np.full((height, width), 77, "uint8")))).locator(".original canvas")
        assert preview.evaluate("canvas => [canvas.width, canvas.height]") == [
            max(side * 640 // 4000, 40) for side in (width, height)
        ]
        assert preview.bounding_box()["height"] >= 12


def test_without_javascript_the_page_says_that_it_needs_it(chromium, server):
    # With Playwright's java_script_enabled=False, Chromium still parses <noscript> as if scripts were on.
    flags = [*require_browser().FLAGS, "--blink-settings=scriptEnabled=false"]
    with chromium.browser_type.launch(executable_path=require_browser().CHROMIUM, args=flags) as browser:
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.goto(server.url)
        line = page.locator("noscript p")
        assert line.text_content() == "This page needs JavaScript." and 0 <= line.bounding_box()["y"] < 100
        assert not page.get_by_role("status").text_content()


def test_text_has_contrast_in_light_and_dark(page):
    def luminance(colour):
        parts = np.array([float(part) for part in colour.split("(")[1].rstrip(")").split(",")[:3]]) / 255
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    read = """(element) => {
      const ink = getComputedStyle(element).color;
      while (getComputedStyle(element).backgroundColor === "rgba(0, 0, 0, 0)") element = element.parentElement;
      return [ink, getComputedStyle(element).backgroundColor];
    }"""
    _choose(page, _file(b"hello", "notes.txt"))
    _new_card(page, page.locator("#samples button").first.click)
    texts = ["h1", "header p", "#drop label", "#ways", "#status", "legend", "fieldset span"]
    texts += [".verdict", ".card .message", ".error .file"]
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # without transitions
        for text in texts:
            ink, paper = map(luminance, page.locator(text).first.evaluate(read))
            assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5, (scheme, text)  # WCAG 2.2, AA
        paper = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
        assert (luminance(paper) < 0.1) == (scheme == "dark")
    page.emulate_media(reduced_motion="no-preference")
