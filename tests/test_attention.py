import keras
import numpy as np
import pytest
from keras import ops

from cvt_keras import CvT, Stage, Variant, build_classifier
from cvt_keras.attention import AttentionMap, _apply, _checked, _layers, attention_maps, grad_cam, rollout
from cvt_keras.errors import ArgumentError, UserError
from cvt_keras.quantized.model import quantize

STAGES = (Stage(dim=8, depth=1, heads=2, mlp_ratio=1.0), Stage(dim=16, depth=2, heads=2, mlp_ratio=1.0))
CLS = (*STAGES[:1], Stage(dim=16, depth=2, heads=2, mlp_ratio=1.0, cls_token=True))
NETWORKS = {
    "paper": Variant(CLS),
    "cls token in each stage": Variant(
        tuple(Stage(dim=8, depth=1, heads=2, cls_token=True, residual_convs=1) for _ in range(2)), norm="batch"
    ),
    "cifar": Variant(
        tuple(Stage(dim=8, depth=1, heads=2, stride_kv=4, pool=True, residual_convs=1, mlp_conv=True) for _ in range(2)),
        stem=(8,),
        whitening=2,
        norm="batch",
    ),
    "avg": Variant((Stage(dim=8, depth=2, heads=1, projection="avg"),)),
    "linear": Variant((Stage(dim=8, depth=1, heads=1, projection="linear", drop_path=0.5),)),
}


def _images(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0, 255, shape).astype("float32")


def _classifier(variant, input_shape=(None, None, 3), **kwargs):
    """A classifier of 4 classes with random weights that are large enough to make the images differ."""
    classifier = build_classifier(variant, 4, input_shape, **kwargs)
    random = np.random.default_rng(0)
    for variable in classifier.weights:
        if variable.path.endswith(("kernel", "moving_mean")):
            variable.assign(ops.convert_to_numpy(variable) + random.normal(0, 0.2, variable.shape))
    return classifier


@pytest.fixture(scope="module")
def paper():
    return _classifier(NETWORKS["paper"])


@pytest.mark.parametrize("name", NETWORKS)
def test_the_layers_one_by_one_give_the_logits_of_the_model(name):
    classifier, images = _classifier(NETWORKS[name]), _images(2, 20, 28, 3)
    x = _checked(classifier, images)
    for layer in _layers(classifier):
        x = _apply(layer, x)
    np.testing.assert_allclose(ops.convert_to_numpy(x), ops.convert_to_numpy(classifier(images)), rtol=1e-6)
    maps = attention_maps(classifier, images)
    places = [(i, j) for i, stage in enumerate(NETWORKS[name].stages) for j in range(stage.depth)]
    assert [(block.stage, block.block) for block in maps] == places
    for block in maps:
        grids = (block.query_grid, block.key_grid)
        lengths = tuple(height * width + block.cls_token for height, width in grids)
        assert block.weights.shape[2:] == lengths and block.cls_token == NETWORKS[name].stages[block.stage].cls_token
    np.testing.assert_allclose(rollout(maps).sum(axis=(1, 2)), 1, rtol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_rows_of_attention_sum_to_1(precision):
    first, second, third = attention_maps(_classifier(NETWORKS["paper"], dtype=precision), _images(2, 16, 24, 3))
    assert (first.query_grid, first.key_grid, first.cls_token) == ((8, 12), (4, 6), False)
    assert (second.query_grid, second.key_grid, second.cls_token) == ((4, 6), (2, 3), True)
    assert first.weights.shape == (2, 2, 96, 24) and third.weights.shape == (2, 2, 25, 7)
    for block in (first, second, third):
        assert block.weights.dtype == "float32" and block.weights.std() > 1e-3
        np.testing.assert_allclose(block.weights.sum(axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_gives_nearly_the_same_map(precision, paper):
    images, half = _images(2, 16, 16, 3), _classifier(NETWORKS["paper"], dtype=precision)
    half.set_weights(paper.get_weights())
    for stage in range(2):
        expected, actual = grad_cam(paper, images, 1, stage), grad_cam(half, images, 1, stage)
        assert np.corrcoef(expected.ravel(), actual.ravel())[0, 1] > 0.98


def test_a_model_that_was_saved_has_the_same_maps(paper, tmp_path):
    images = _images(2, 16, 16, 3)
    before = [block.weights for block in attention_maps(paper, images)], grad_cam(paper, images)
    paper.save(tmp_path / "model.keras")
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    after = [block.weights for block in attention_maps(reloaded, images)], grad_cam(reloaded, images)
    for expected, actual in zip(before[0], after[0], strict=True):
        np.testing.assert_array_equal(expected, actual)
    np.testing.assert_array_equal(before[1], after[1])


def test_the_image_data_format_changes_nothing(paper):
    images, before = _images(2, 16, 16, 3), keras.config.image_data_format()
    expected = grad_cam(paper, images, 2)
    keras.config.set_image_data_format("channels_first")
    try:
        np.testing.assert_array_equal(grad_cam(paper, images, 2), expected)
        assert len(attention_maps(_classifier(NETWORKS["cifar"]), images)) == 2
    finally:
        keras.config.set_image_data_format(before)


# === Rollout ===


def _block(stage, query_grid, key_grid, cls_token=False, to=None):
    """A block whose queries attend to all keys equally, or to the key `to` only."""
    queries, keys = (height * width + cls_token for height, width in (query_grid, key_grid))
    weights = np.full((1, 2, queries, keys), 1 / keys) if to is None else np.tile(np.eye(keys)[to], (1, 2, queries, 1))
    return AttentionMap(stage, 0, weights, query_grid, key_grid, cls_token)


@pytest.mark.parametrize("cls_token", [False, True])
def test_uniform_attention_gives_a_uniform_map(cls_token):
    maps = [_block(0, (15, 10), (8, 3)), _block(1, (7, 5), (4, 3)), _block(2, (3, 2), (2, 1), cls_token)]
    np.testing.assert_allclose(rollout(maps), np.full((1, 15, 10), 1 / 150), rtol=1e-5)


def test_half_of_a_share_stays_and_half_follows_attention():
    # Four tokens share equally. The key covers the last two columns of the first row of the grid of 2 by 4.
    [shares] = rollout([_block(0, (2, 4), (2, 2), to=1)])
    np.testing.assert_allclose(shares, np.array([[1, 1, 5, 5], [1, 1, 1, 1]]) / 16, rtol=1e-6)
    # Through a later stage: half of its shares go to its token at (0, 1), which covers the same two.
    [shares] = rollout([_block(0, (2, 4), (2, 4)), _block(1, (2, 2), (2, 2), to=1)])
    np.testing.assert_allclose(shares, (np.array([[1, 1, 5, 5], [1, 1, 1, 1]]) / 16 + 1 / 8) / 2, rtol=1e-6)


def test_the_share_of_the_cls_token_is_left_out():
    [shares] = rollout([_block(0, (1, 2), (1, 2), cls_token=True, to=2)])
    np.testing.assert_array_equal(shares, [[0, 1]])
    with pytest.raises(ArgumentError, match="`maps`"):
        rollout([])


# === Grad-CAM ===


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_grad_cam_equals_its_closed_form_for_global_pooling_and_a_dense_layer(norm):
    classifier = _classifier(Variant(STAGES, norm=norm))
    network, images = classifier.layers[-1], _images(3, 16, 24, 3)
    tokens = network.get_layer("norm")(network.features(classifier.layers[1](images))["stage1"])
    kernel, bias = network.get_layer("head").get_weights()
    contributions = ops.convert_to_numpy(tokens) @ kernel / 24  # of each of the 4x6 tokens to each logit
    np.testing.assert_allclose(contributions.sum(axis=(1, 2)) + bias, classifier.predict(images, verbose=0), rtol=1e-3)
    for classes in ([3, 0, 2], [1, 1, 1]):
        expected = np.maximum([contributions[i, ..., c] for i, c in enumerate(classes)], 0)
        assert expected.max() > 0
        np.testing.assert_allclose(grad_cam(classifier, images, classes), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 1])
def test_channels_are_weighted_by_the_mean_gradient(paper, stage):
    images, layers = _images(1, 16, 16, 3), _layers(paper)
    # Stage 1 is the last one and has a cls token: its tokens are the input of its last block.
    cut = next(i for i, layer in enumerate(layers) if layer.name == ("stage0", "stage1_block1")[stage])
    x = _checked(paper, images)
    for layer in layers[:cut]:
        x = _apply(layer, x)
    grid, *cls_token = (ops.convert_to_numpy(part) for part in (x if isinstance(x, tuple) else (x,)))

    def logit(grid):
        x = (grid, *cls_token) if cls_token else grid
        for layer in layers[cut:]:
            x = _apply(layer, x)
        return ops.convert_to_numpy(x)[0, 2]

    step = 0.02 * np.eye(grid.shape[-1], dtype="float32")
    slopes = np.array([logit(grid + row) - logit(grid - row) for row in step]) / 0.04 / np.prod(grid.shape[1:3])
    expected = np.maximum(grid @ slopes, 0)
    actual = grad_cam(paper, images, 2, stage)
    assert actual.shape == ((1, 8, 8), (1, 4, 4))[stage]
    np.testing.assert_allclose(actual, expected, atol=0.02 * np.abs(grid @ slopes).max())


def test_classes_default_to_the_predicted_ones(paper):
    images = _images(2, 16, 16, 3)
    predicted = paper.predict(images, verbose=0).argmax(axis=1)
    np.testing.assert_array_equal(grad_cam(paper, images), grad_cam(paper, images, predicted))
    np.testing.assert_array_equal(grad_cam(paper, images, 3), grad_cam(paper, images, np.array([3, 3])))
    assert not np.array_equal(grad_cam(paper, images, 3), grad_cam(paper, images, 0))
    np.testing.assert_array_equal(grad_cam(paper, images, 3, -2), grad_cam(paper, images, 3, 0))


def test_what_does_not_fit_is_refused(paper, monkeypatch):
    images = _images(2, 16, 16, 3)
    fixed = _classifier(Variant(STAGES), (16, 16, 3))
    sequential = keras.Sequential([keras.Input((16, 16, 3)), keras.layers.Flatten()])
    for model, name in ((quantize(fixed), "QuantizedCvT"), (sequential, "Flatten"), (None, "NoneType")):
        for function in (attention_maps, grad_cam):
            with pytest.raises(ArgumentError, match=r"`model`.*int8") as error:
                function(model, images)
            assert name in error.value.summary and error.value.argument == "model"
    headless = CvT(Variant(STAGES), 0, (16, 16, 3))
    assert len(attention_maps(headless, images)) == 3
    with pytest.raises(ArgumentError, match=r"`model`.*num_classes=0"):
        grad_cam(headless, images)
    for wrong in (images[0], images[..., :1], _images(1, 24, 16, 3)):
        with pytest.raises(ArgumentError, match="`images`"):
            attention_maps(fixed, wrong)
    with pytest.raises(ValueError, match="at least 4x4"):
        attention_maps(paper, images[:, :3])
    for classes in (4, -1, [0, 4], [0, 1, 2], 1.0, "dog"):
        with pytest.raises(ArgumentError, match="`classes`"):
            grad_cam(paper, images, classes)
    for stage in (2, -3, 1.0):
        with pytest.raises(ArgumentError, match=f"`stage`.*stage={stage}"):
            grad_cam(paper, images, 0, stage)
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    with pytest.raises(UserError, match="torch"):
        grad_cam(paper, images)


# === Meaning ===


def _squares(n, seed):
    """Noise with a green or blue square of 4x4 pixels, or none. Returns images, labels, and rows and columns of the squares."""
    random = np.random.default_rng(seed)
    images, labels = random.uniform(96, 160, (n, 16, 16, 3)).astype("float32"), random.integers(0, 3, n)
    places = 4 * random.integers(0, 4, (n, 2))
    for image, label, (row, column) in zip(images, labels, places):
        if label:
            image[row : row + 4, column : column + 4, label] += 95
    return images, labels, places


@pytest.mark.parametrize("method", ["grad_cam", "rollout"])
def test_a_trained_network_looks_at_the_object(method):
    stage = Stage(dim=16, depth=1, heads=1, mlp_ratio=2.0, stride_kv=1, residual_convs=1)
    classifier = build_classifier(Variant((stage,), activation="gelu", norm="batch", identity_init=True), 3, (16, 16, 3))
    # SGD leaves attention uniform: the class is in the tokens of the object. With Adam, attention finds the object, and writes
    # its class to all tokens.
    sgd, adam = keras.optimizers.SGD(0.1, momentum=0.9), keras.optimizers.Adam(5e-3)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    classifier.compile(sgd if method == "grad_cam" else adam, loss)
    images, labels, _ = _squares(1024, seed=0)
    classifier.fit(images, labels, batch_size=64, epochs=3, verbose=0)
    images, labels, places = _squares(96, seed=1)
    images, labels, places = (part[labels > 0] for part in (images, labels, places))
    assert np.mean(classifier.predict(images, verbose=0).argmax(axis=1) == labels) > 0.9
    maps = grad_cam(classifier, images, labels) if method == "grad_cam" else rollout(attention_maps(classifier, images))
    assert maps.shape[1:] == (8, 8)
    inside = [image[row : row + 2, column : column + 2].sum() for image, (row, column) in zip(maps, places // 2)]
    assert np.sum(inside) / maps.sum() > 3 * 4 / 64
