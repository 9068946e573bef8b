import os
import socket

import numpy as np
import pytest
import urllib3
from labelled_images import labelled, noise, write_image

from cvt_keras.data import tfds


@pytest.fixture(autouse=True)
def reached(monkeypatch):
    """Cuts the network off, and returns the list of addresses to which a connection was tried."""
    addresses = []

    def refuse(address, timeout, *args, **kwargs):
        assert timeout <= 5
        addresses.append(address)
        raise OSError("no network")

    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(urllib3.util.connection, "create_connection", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return addresses


@pytest.fixture
def cifar100_dir(write_tfds, tmp_path, monkeypatch):
    """A folder of TFDS with CIFAR-100 in 120 + 40 images of noise, of which 20 are held out."""
    monkeypatch.setattr(tfds, "VALIDATION_IMAGES", 20)
    names = [f"class {i}" for i in range(100)]
    train, test = (labelled(images, 100, id="", coarse_label=3) for images in np.split(noise(160), [120]))
    write_tfds(tmp_path, "cifar100", {"train": train, "test": test}, names)
    return tmp_path


@pytest.fixture
def small_cifar10_dir(write_tfds, tmp_path, monkeypatch):
    """A folder of TFDS with CIFAR-10 in 120 + 40 images of noise, of which 20 are held out."""
    monkeypatch.setattr(tfds, "VALIDATION_IMAGES", 20)
    train, test = (labelled(images, id="") for images in np.split(noise(160), [120]))
    write_tfds(tmp_path, "cifar10", {"train": train, "test": test})
    return tmp_path


@pytest.fixture
def photos(tmp_path):
    """A folder of 20 cats and 30 dogs."""
    for name, n in {"cat": 20, "dog": 30}.items():
        for i in range(n):
            write_image(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"
