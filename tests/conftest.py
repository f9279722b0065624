import os

import pytest
import torch
from hypothesis import settings

# two pytest workers share two cores; more threads would only get in each other's way
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

settings.register_profile("april", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("april")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
