import pytest


@pytest.fixture(scope="module")
def one_thread():
    """For small tensors a second thread of torch costs more than it brings."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
