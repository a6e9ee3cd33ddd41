"""Images for both stages: the drawn `shapes`, CIFAR-10, or a folder of images.

A dataset has `classes`, `targets` (the class of every image), `mirror` (is a mirrored image still
one of its class?), `caption(i)`, and `dataset[i]`: an image uint8 [3, size, size] and its class.
"""
import collections
import dataclasses
import functools
import glob
import itertools
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import hypot, maximum, minimum
from torch.utils.data import default_collate
from torchvision.transforms.functional import pil_to_tensor

# ---- shapes: ten classes, each the inside of a curve that is given by its distance function -----
def box(x, y, w, h):
    return maximum(x.abs() - w, y.abs() - h)

def polygon(x, y, sides, inradius):                 # distances to the lines of its edges
    angles = [torch.pi * (0.5 + 2 * k / sides) for k in range(sides)]
    return torch.stack([x * np.cos(a) + y * np.sin(a) - inradius for a in angles])

# distance to the outline, negative inside, in units of the shape's radius; x points right, y down
SHAPES = {
    "circle": lambda x, y: hypot(x, y) - 0.9,
    "crescent": lambda x, y: maximum(hypot(x + 0.15, y) - 0.95, 0.8 - hypot(x - 0.35, y)),
    "cross": lambda x, y: minimum(box(x, y, 0.95, 0.32), box(x, y, 0.32, 0.95)),
    "frame": lambda x, y: box(x, y, 0.67, 0.67).abs() - 0.17,
    "half-disc": lambda x, y: maximum(hypot(x, y - 0.45) - 1, y - 0.45),
    "ring": lambda x, y: (hypot(x, y) - 0.73).abs() - 0.2,
    "square": lambda x, y: box(x, y, 0.8, 0.8),
    "star": lambda x, y: polygon(x, -y, 5, 0.36).topk(2, dim=0).values[1],  # outside one edge
    "stripes": lambda x, y: maximum(box(x, y, 0.9, 0.9), ((y + 0.3) % 0.6 - 0.3).abs() - 0.17),
    "triangle": lambda x, y: polygon(x, y - 0.2, 3, 0.53).amax(dim=0)
}
COLOURS = ["red", "gold", "lime", "green", "cyan", "blue", "purple", "pink", "red"]    # by hue
PLACES = ["at the top left", "at the top", "at the top right", "on the left", "in the middle",
          "on the right", "at the bottom left", "at the bottom", "at the bottom right"]

def name_of(position, names):
    """The name at a position in [0, len(names)); none within 0.12 of the border between two."""
    border = round(position)
    near = abs(position - border) < 0.12 and 0 < border < len(names)
    return "" if near else names[int(position)]

class Shapes:
    """Twelve random numbers, seeded by (split, i), decide on image i and on its caption."""
    classes = list(SHAPES)
    mirror = False                      # a mirrored crescent is not in this dataset

    def __init__(self, split, size):
        count = 20_000 if split == "train" else 2_000
        rngs = [np.random.default_rng([split == "val", i]) for i in range(count)]
        self.u = torch.tensor(np.stack([rng.random(12) for rng in rngs]))
        self.targets = torch.arange(count) % len(SHAPES)
        self.images = torch.cat([self.draw(rows, size) for rows in torch.arange(count).split(500)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], self.targets[i]

    def draw(self, rows, size):
        u = self.u[rows].float()[:, :, None, None]
        radius = 0.5 + 0.25 * u[:, 0]
        angle = (u[:, 1] - 0.5) * (torch.pi / 6)
        line = (torch.arange(size) + 0.5) * (2 / size) - 1          # pixel centres in [-1, 1]
        x = line[None, :] - (u[:, 2] - 0.5) * 0.5
        y = line[:, None] - (u[:, 3] - 0.5) * 0.5
        across = (x * angle.cos() + y * angle.sin()) / radius
        down = (y * angle.cos() - x * angle.sin()) / radius
        cover = torch.empty(len(u), 1, size, size)                  # how much of a pixel is inside
        for k, distance in enumerate(SHAPES.values()):
            of_k = self.targets[rows] == k
            inside = -distance(across[of_k], down[of_k]) * radius[of_k]
            cover[of_k, 0] = (0.5 + inside * (size / 2)).clamp(0, 1)            # in pixels
        hue = (u[:, 4:5] * 6 + torch.tensor([0.0, 4.0, 2.0]).view(3, 1, 1)) % 6
        ink = 0.8 * ((hue - 3).abs() - 1).clamp(0, 1)               # from hue to RGB, vivid
        paper = 1 - 0.3 * u[:, 5:8]                                 # pale
        return to_uint8(2 * (paper + cover * (ink - paper)) - 1)

    def caption(self, i):
        """As in "a small red star at the top left". Each attribute is left out one time in ten, and
        always near the border between two names."""
        u = self.u[i].tolist()
        row = name_of(3 * u[3], range(3))                           # 0 to 2, or ""
        column = name_of(3 * u[2], range(3))
        place = "" if "" in (row, column) else PLACES[3 * row + column]
        size = name_of(2 * u[0], ["small", "large"])
        words = [size, name_of(8 * u[4] + 0.5, COLOURS), self.classes[self.targets[i]], place]
        instead = ["", "", "shape", ""]
        words = [words[k] if u[8 + k] >= 0.1 else instead[k] for k in range(4)]
        return " ".join(word for word in ["a", *words] if word)

# ---- CIFAR-10, and folders ----------------------------------------------------------------------
warnings.filterwarnings("ignore", module="PIL")     # of harmless flaws
SUFFIXES = (*torchvision.datasets.folder.IMG_EXTENSIONS, ".gif", ".jfif", ".avif", ".jp2")

def read_image(path):
    """Whatever Pillow reads -> an RGB image, upright by its EXIF, transparency on white."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode[0] in "IF":           # 16-bit or float greyscale, which convert() would clip
        grey = np.asarray(image, dtype=np.float32)
        top = {"I": 65535, "F": 1 if grey.max() <= 1 else 255}[image.mode[0]]
        image = Image.fromarray((grey * (255 / top)).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")

def center_crop(image, size):
    """-> uint8 [3, size, size], as for the published ImageNet results (Dhariwal and Nichol 2021):
    halve by boxes, then resize and crop; in one step, so that a thin image never becomes huge."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width = round(image.width * scale)
    height = round(image.height * scale)
    left = (width - size) // 2
    top = (height - size) // 2
    across = image.width / width        # pixels before resizing for one after it
    down = image.height / height
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return pil_to_tensor(image.resize((size, size), Image.BICUBIC, box))

class CIFAR10(torchvision.datasets.CIFAR10):
    mirror = True

    def caption(self, i):
        return self.classes[self.targets[i]]

@dataclasses.dataclass(eq=False)
class Folder:
    paths: np.ndarray
    targets: np.ndarray                 # indices into `classes`
    classes: list
    size: int
    held_out: bool = False              # then an image of any class replaces an unreadable one
    mirror: bool = True
    unreadable: set = dataclasses.field(default_factory=set)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        """An unreadable image is named once, and another of its class (or any) replaces it."""
        label = self.targets[i]
        while True:
            if i not in self.unreadable:
                try:
                    return center_crop(read_image(self.paths[i]), self.size), label
                except Exception as error:          # a damaged file may raise anything
                    if i not in self.unreadable:    # by another thread
                        sys.stderr.write(f"unreadable, replaced: {self.paths[i]}: {error!r}\n")
                    self.unreadable.add(i)
            same = np.flatnonzero((self.targets == label) | self.held_out)
            i = next((k for k in same if k not in self.unreadable), None)
            if i is None:
                sys.exit(f"error: no image of the class {self.classes[label]} can be read")

    def caption(self, i):
        """The first line of the .txt beside an image, or the name of its class."""
        file = Path(self.paths[i]).with_suffix(".txt")
        text = file.read_text("utf-8-sig", "replace") if file.exists() else ""
        return text.split("\n")[0].strip() or self.classes[self.targets[i]]

def find_images(folder):
    """<class>/* in a folder, or images alone -> paths, targets, classes; says what is left out"""
    found = sorted(glob.glob("**", root_dir=folder, recursive=True))        # no hidden ones
    images = [path for path in found if path.lower().endswith(SUFFIXES)]
    images = [path for path in images if os.sep in path] or images          # or without classes
    if not images:
        sys.exit(f"error: no images in {folder}: expected DIR/train/<class>/*, or DIR/<class>/*")
    folders = {os.path.dirname(path) for path in images}
    folders |= {str(parent) for path in folders for parent in Path(path).parents}
    left_out = sorted(set(found) - set(images) - folders)
    left_out = [path for path in left_out if not path.endswith(".txt")]         # captions
    if left_out:
        print(f"{folder}: left out {len(left_out):,} files or empty folders, like {left_out[:3]}")
    one_class = os.path.basename(os.path.abspath(folder))
    names = [path.split(os.sep)[0] if os.sep in path else one_class for path in images]
    classes, targets = np.unique(names, return_inverse=True)
    paths = np.array([os.path.join(folder, path) for path in images], dtype=object)
    return paths, targets, classes.tolist()

def load(name, size):
    """`shapes`, `cifar10`, `imagenet`, or a folder of images -> training and validation images."""
    if name == "shapes":
        return Shapes("train", size), Shapes("val", size)
    folder = f"data/{name}" if name in ("cifar10", "imagenet") else name
    root = f"{folder}/train" if os.path.isdir(f"{folder}/train") else folder
    if name == "cifar10" and root == folder:
        return load_cifar10(folder, size)
    paths, targets, classes = find_images(root)
    if os.path.isdir(f"{folder}/val"):
        val = Folder(*find_images(f"{folder}/val"), size, held_out=True)
        return Folder(paths, targets, classes, size), val
    # hold out every 50th image; the only image of a class is trained on as well
    held_out = np.arange(len(paths)) % 50 == 0
    kept = ~held_out | (np.bincount(targets)[targets] == 1)
    val = Folder(paths[held_out], targets[held_out], classes, size, held_out=True)
    return Folder(paths[kept], targets[kept], classes, size), val

def load_cifar10(folder, size):
    crop = functools.partial(center_crop, size=size)
    try:
        if os.environ.get("LOCAL_RANK", "0") == "0":                # one process of each machine
            CIFAR10(folder, download=True)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        return CIFAR10(folder, True, crop), CIFAR10(folder, False, crop)
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: no CIFAR-10 in {folder}/train/<class>/*, and no download: {error}")

# ---- the order of the rows: endless shuffled epochs, by the seed alone: the same after a resume --
@functools.lru_cache(2)                             # a batch may lie in two epochs
def shuffled(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)

def micro_batches(n, size, start, rank, world, seed):
    """This process's rows of every micro-batch, from the `start`-th on."""
    for k in itertools.count(start):
        first = (k * world + rank) * size
        yield [shuffled(n, seed, i // n)[i % n] for i in range(first, first + size)]

def prefetch(read, batches, threads):
    """Yield read(row) for all rows of a batch, stacked; threads read two batches ahead."""
    ahead = collections.deque()
    with ThreadPoolExecutor(max(1, threads)) as pool:       # Pillow lets go of Python's lock
        for rows in batches:
            ahead.append(pool.map(read, rows))
            if len(ahead) > 2:
                yield default_collate(list(ahead.popleft()))
        while ahead:
            yield default_collate(list(ahead.popleft()))

# ---- pixels -------------------------------------------------------------------------------------
def to_float(pixels):
    """uint8 [0, 255] -> float32 [-1, 1]"""
    return pixels.float() / 127.5 - 1

def to_uint8(x):
    """float [-1, 1] -> uint8 [0, 255]; clamped, or what lies beyond would wrap around"""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

def to_image(pixels):
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())

def grid(pixels, columns):
    return to_image(torchvision.utils.make_grid(pixels.cpu(), columns, pad_value=255))
