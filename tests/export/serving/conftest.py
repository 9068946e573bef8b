import shutil

import pytest
from double import Double


@pytest.fixture(scope="session")
def serving(exported, tmp_path_factory):
    """A double that has three versions of the export on disk."""
    folder = tmp_path_factory.mktemp("models")
    for version in "123":
        shutil.copytree(exported / "export" / "saved_model" / "1", folder / version)
    with Double(folder) as double:
        yield double


@pytest.fixture
def server(serving):
    serving.reset()
    yield serving
    serving.reset()
