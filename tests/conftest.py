import os
import subprocess
import sys

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


SCRIPT = """
import sys, torch
from safetensors.torch import save_file
from torchvision.transforms.functional import to_pil_image
from transformers import ViTConfig, ViTForImageClassification
assert not any(m.startswith('april') for m in sys.modules)
folder = sys.argv[1]
torch.manual_seed(5)
config = ViTConfig(image_size=32, patch_size=8, num_hidden_layers=3, num_attention_heads=4, hidden_size=96,
                   intermediate_size=96, num_labels=10)
config.save_pretrained(folder)
model = ViTForImageClassification(config)
pixels = torch.rand(1, 3, 32, 32)
to_pil_image(pixels[0]).save(folder + '/x.png')
mean, std = (torch.tensor(t).view(3, 1, 1) for t in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
model((pixels - mean) / std, labels=torch.tensor([7])).loss.backward()
save_file({n: p.detach() for n, p in model.named_parameters()}, folder + '/weights.safetensors')
save_file({n: p.grad for n, p in model.named_parameters()}, folder + '/update.safetensors')
"""


@pytest.fixture
def foreign_client(tmp_path):
    """A folder with what a script leaves that never imports this package: configuration, image, weights and update."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tmp_path
