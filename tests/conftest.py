import pytest


@pytest.fixture(scope="module")
def one_thread():
    """For small tensors a second thread of torch costs more than it brings."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# With few tests each, and minutes of compilation: last, one process would run them while the others wait.
LONG = ("test_emulator", "test_cuda_build", "test_build", "test_long_runs", "test_parallel")


def pytest_collection_modifyitems(items):
    def place(item):
        return LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG)

    items.sort(key=place)
