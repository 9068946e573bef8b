import pytest


@pytest.fixture
def server(serving):
    serving.reset()
    yield serving
    serving.reset()
