"""Makes the front page's picture of a batch, `_static/four.png`, anew: five minutes of one CPU core.

Four photographs on a ViT-B/32, one averaged float32 gradient, neither labels nor the position embedding's gradient known
(Theorem 5); the same client as in results/spans.csv. The picture has what the attack returned, at half the size.
"""
import sys
import time
from pathlib import Path

from torch.nn import functional as F
from torchvision.utils import save_image

from april_nb.data import format_of, photos
from april_nb.federated import client_update
from april_nb.metrics import best_assignment, psnr
from april_nb.spans import spans
from april_nb.vit import vit

if __name__ == "__main__":
    format = format_of("vit_b_32")
    n, (private, labels) = format.normalisation, photos(format).batch(range(4))
    server, start = vit("vit_b_32", "B"), time.monotonic()
    answer, = spans(server, [client_update(server, n(private).float(), labels, withheld=("positions",))])
    returned = n.inverse(answer.images)
    returned = returned[best_assignment(returned, private)]
    scores = psnr(returned, private).tolist()
    print(f"{time.monotonic() - start:.0f} s, {answer.verdict}: {', '.join(f'{p:.0f} dB' for p in scores)}")
    if min(scores) < 100: sys.exit("not all of them came back: no picture is written")
    save_image(F.avg_pool2d(returned.float(), 2), Path(__file__).resolve().parent.parent / "_static" / "four.png", padding=4, pad_value=1)
