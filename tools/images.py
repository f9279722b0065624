"""Names the images of the experiments by their official indices: `APRIL_DATA=… python tools/images.py` writes results/images/.

MNIST: position in the test split. CIFAR-10: position in the test batch, which the file names carry. ImageNet: the synset,
of which the data folder has one photograph each. `sha256` has the first 16 digits of the hash of the pixels, row by row
(of ImageNet's: of the JPEG file), for whoever wants to know whether two folders hold the same pictures.
"""
import csv
import hashlib
import sys
from pathlib import Path

from april_nb.data import FORMATS, load, sample

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("image_id", "official", "label", "sha256")


def named(images, i):
    """Official index and bytes of one image."""
    if images.name == "mnist": return i, images.pictures[i][0].tobytes()
    path = Path(images.pictures.samples[i][0])
    if images.name == "imagenet": return path.stem, path.read_bytes()
    return int(path.stem), images.pictures[i][0].tobytes()


def rows(images):
    """The 500 images of a data set from which all samples are taken, in the order of `image_id`."""
    for i in sorted(sample(images.labels, 500)):
        official, content = named(images, i)
        yield i, official, images.labels[i], hashlib.sha256(content).hexdigest()[:16]


if __name__ == "__main__":
    for name in FORMATS:
        images = load(name)
        if images.name != name: sys.exit("set APRIL_DATA to the folder of data sets")
        table, path = list(rows(images)), ROOT / "results" / "images" / f"{name}.csv"
        path.parent.mkdir(exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as file: csv.writer(file).writerows([COLUMNS, *table])
        print(f"{path.name}: {len(table)} images")
