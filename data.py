"""Images for both stages, and the few things that every script needs to run.

    python data.py                                    # what `shapes` looks like: out/shapes/data.png
    python data.py --data cifar10                     # downloaded once, to data/cifar10
    python data.py --data path/to/folder --size 128

A dataset is `shapes` (drawn below), `cifar10`, `imagenet`, or a folder that holds DIR/train/<class>/*
and perhaps DIR/val/<class>/*, or just DIR/<class>/*. An image is uint8 [3, size, size], its label an
index into the sorted classes. The second half is what all scripts share: flags, processes, checkpoints.
"""
import argparse
import contextlib
import ctypes
import datetime
import functools
import hashlib
import io
import os
import pathlib
import re
import signal
import sys
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps

# -------------------------------------------------------------------------------------------------
DATA = "shapes"             # shapes, cifar10, imagenet, or a folder of images
DATA_DIR = ""               # where a named dataset lies; empty: data/<name>
SIZE = 0                    # pixels a side; 0: shapes 32, cifar10 64, all else 256
OUT = ""                    # folder for the picture; empty: out/<data>
# -------------------------------------------------------------------------------------------------
SIZES = {"shapes": 32, "cifar10": 64}
SHAPES_COUNT = {"train": 20_000, "val": 2_000}
RESIDENT_BYTES = 4e9        # a set up to this size is decoded once and lives on the device
MAX_BAD = 0.01              # share of unreadable images above which the run stops
HOLD_OUT = 50               # without val/, every 50th image is kept out of training and evaluated on
IMAGE_TYPES = set(Image.registered_extensions())
RANK = int(os.environ.get("RANK", 0))       # of this process, set by torchrun; the first one talks and writes


# ---- shapes: ten classes drawn from distance functions ------------------------------------------

def box(x, y, w, h):
    return torch.maximum(x.abs() - w, y.abs() - h)


def polygon(x, y, sides, inradius):
    """Signed distances [sides, ...] to the edge lines of a regular polygon; the first normal is +y."""
    angles = [torch.pi * (0.5 + 2 * k / sides) for k in range(sides)]
    return torch.stack([x * np.cos(a) + y * np.sin(a) - inradius for a in angles])


# Distance to the outline, in units of the shape's radius, negative inside; x points right, y down.
SHAPES = {
    "circle": lambda x, y: torch.hypot(x, y) - 0.9,
    "crescent": lambda x, y: torch.maximum(torch.hypot(x + 0.15, y) - 0.95, 0.8 - torch.hypot(x - 0.35, y)),
    "cross": lambda x, y: torch.minimum(box(x, y, 0.95, 0.32), box(x, y, 0.32, 0.95)),
    "frame": lambda x, y: box(x, y, 0.67, 0.67).abs() - 0.17,
    "half-disc": lambda x, y: torch.maximum(torch.hypot(x, y - 0.45) - 1, y - 0.45),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.73).abs() - 0.2,
    "square": lambda x, y: box(x, y, 0.8, 0.8),
    "star": lambda x, y: polygon(x, -y, 5, 0.36).topk(2, 0).values[1],     # outside one edge at most
    "stripes": lambda x, y: torch.maximum(box(x, y, 0.9, 0.9), (torch.remainder(y + 0.3, 0.6) - 0.3).abs() - 0.17),
    "triangle": lambda x, y: polygon(x, y - 0.2, 3, 0.53).amax(0),
}


def draw_shapes(split, rows, size=32):
    """Draw the given rows of a split -> uint8 [n, 3, size, size]; row i has class i % 10.

    Place, size, angle and both colours are random, but a function of (split, row) alone.
    """
    u = torch.tensor(np.stack([np.random.default_rng((split == "val", i)).random(8) for i in rows]), dtype=torch.float32)
    labels = torch.tensor(rows) % len(SHAPES)
    line = (torch.arange(size) + 0.5) * (2 / size) - 1
    radius = 0.5 + 0.25 * u[:, 0, None, None]
    angle = (u[:, 1, None, None] - 0.5) * (torch.pi / 6)
    x = line[None, None, :] - (u[:, 2, None, None] - 0.5) * 0.5
    y = line[None, :, None] - (u[:, 3, None, None] - 0.5) * 0.5
    x, y = (x * angle.cos() + y * angle.sin()) / radius, (y * angle.cos() - x * angle.sin()) / radius
    cover = torch.empty(len(u), 1, size, size)          # share of each pixel inside: edges are antialiased
    for k, distance in enumerate(SHAPES.values()):
        of_k = labels == k
        cover[of_k, 0] = (0.5 - distance(x[of_k], y[of_k]) * radius[of_k] * (size / 2)).clamp(0, 1)
    hue = (u[:, 4, None] * 6 + torch.tensor([0.0, 4.0, 2.0])) % 6
    ink = (0.8 * ((hue - 3).abs() - 1).clamp(0, 1))[:, :, None, None]           # vivid
    paper = (1 - 0.3 * u[:, 5:8])[:, :, None, None]                             # pale
    return ((paper + cover * (ink - paper)) * 255).round().to(torch.uint8)


# ---- image files --------------------------------------------------------------------------------

def read_image(file):
    """Any image that Pillow reads -> uint8 [3, h, w] in RGB, upright; transparency goes on white."""
    raw = np.fromfile(file, np.uint8)
    image = Image.open(io.BytesIO(raw))                 # the header alone; refuses an image bomb
    decode_jpeg = getattr(torchvision.io, "decode_jpeg", None)     # a third faster than Pillow's; to be removed some day
    if decode_jpeg and image.format == "JPEG" and image.mode in ("L", "RGB") and image.getexif().get(0x0112, 1) == 1:
        return decode_jpeg(torch.from_numpy(raw), "RGB")
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":                           # 16-bit or float greyscale: convert() would clip it
        grey = np.asarray(image, np.float32)
        grey = grey / 257 if image.mode[0] == "I" else grey * (255 if grey.max() <= 1 else 1)
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def center_crop(x, size):
    """Resize the shorter side to `size`, crop the centre: uint8 [3, h, w] -> uint8 [3, size, size].

    As the published ImageNet-256 results do it (Dhariwal and Nichol 2021): halve by averaging while twice too large, then
    bicubic. torch's uint8 kernels are several times as fast as Pillow's, and within rounding unless an odd side is halved.
    """
    x = x[None]
    while min(x.shape[2:]) >= 2 * size:
        x = F.interpolate(x, (x.shape[2] // 2, x.shape[3] // 2), mode="bilinear")       # 2x2 averages
    scale = size / min(x.shape[2:])
    height, width = round(x.shape[2] * scale), round(x.shape[3] * scale)
    top, left = (height - size) // 2, (width - size) // 2
    x = F.interpolate(x, (height, width), mode="bicubic", antialias=True)
    return x[0, :, top:top + size, left:left + size].contiguous()


class Images:
    """One split: images uint8 [3, size, size] and a class index each.

    A split of up to RESIDENT_BYTES is decoded at once into `pixels` [n, 3, size, size]; a larger one is read file
    by file. `flip` says whether a mirrored image is still one of its class. All that grows with the number of files
    is in tensors, which loader workers share instead of copying.
    """

    def __init__(self, classes, labels, size, pixels=None, folder="", names=None, flip=True):
        self.classes, self.size, self.flip, self.pixels, self.folder = classes, size, flip, pixels, folder
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.bad = torch.zeros(len(labels), dtype=torch.bool).share_memory_()
        if names is not None:
            self.names = torch.from_numpy(np.array(names).view(np.uint8).reshape(len(names), -1))
            if len(names) * 3 * size * size <= RESIDENT_BYTES:
                with ThreadPool() as pool:
                    self.pixels = torch.stack(pool.map(self.read, range(len(names)), chunksize=100))
                self.check()
        self.resident = self.pixels is not None

    def __len__(self):
        return len(self.labels)

    def __str__(self):
        listed = self.names.numpy() if self.folder else self.labels.numpy()
        return f"{len(self):,} images in {len(self.classes):,} classes, list {hashlib.sha256(listed).hexdigest()[:8]}"

    def to(self, device):
        self.pixels, self.labels = self.pixels.to(device), self.labels.to(device)

    def __getitems__(self, rows):
        """Rows int64 [m] -> uint8 [m, 3, size, size], int64 [m]."""
        pixels = self.pixels[rows] if self.resident else torch.stack([self.read(row) for row in rows.tolist()])
        return pixels, self.labels[rows]

    def file(self, row):
        name = os.fsdecode(self.names[row].numpy().tobytes().rstrip(b"\0"))
        return os.path.join(self.folder, self.classes[self.labels[row]], name)

    def read(self, row):
        """Decode one file; an unreadable one is named once and the next readable one stands in for it."""
        while True:
            try:
                return center_crop(read_image(self.file(row)), self.size)
            except Exception as error:                  # a damaged file may raise anything
                if not self.bad[row]:
                    print(f"unreadable image {self.file(row)} ({error!r:.150}): the next one stands in for it", file=sys.stderr)
                self.bad[row] = True
            if self.bad.sum() > MAX_BAD * len(self):
                return torch.zeros(3, self.size, self.size, dtype=torch.uint8)      # check() will stop the run
            row = (row + 1) % len(self)

    def check(self):
        """Stop if more than MAX_BAD of the files could not be read so far, by any worker."""
        if self.bad.sum() > MAX_BAD * len(self):
            raise SystemExit(f"error: {self.bad.sum()} of {len(self):,} images cannot be read, among them "
                             f"{self.file(self.bad.nonzero()[0, 0])}: repair or remove them")


def list_folder(folder, classes=None, keep=""):
    """<folder>/<class>/<image files> -> class names, file names (bytes, one width), labels, all sorted.

    The list is kept in the file `keep` and read from there while no class folder has changed.
    """
    with os.scandir(folder) as entries:
        changed = {entry.name: entry.stat().st_mtime_ns for entry in entries if entry.is_dir() and entry.name[0] != "."}
    classes = classes or sorted(changed)
    state = np.array([f"{os.path.join(folder, name)} {changed.get(name, 0)}" for name in classes])
    if os.path.exists(keep):
        kept = np.load(keep)
        if np.array_equal(kept["state"], state):
            return classes, kept["names"], kept["labels"]
    files = [(os.fsencode(file), label) for label, name in enumerate(classes) if name in changed
             for file in sorted(os.listdir(os.path.join(folder, name)))
             if file[0] != "." and os.path.splitext(file)[1].lower() in IMAGE_TYPES]
    names, labels = np.array([name for name, _ in files], "S"), np.array([label for _, label in files], np.int64)
    if keep and RANK == 0:
        replace_file(keep, lambda f: np.savez(f, state=state, names=names, labels=labels))
    return classes, names, labels


def load(data, data_dir="", size=0, keep=""):
    """A dataset by name or folder -> train and val, two `Images`; lists of files are kept in the folder `keep`."""
    size = size or SIZES.get(data, 256)
    if data == "shapes" and not data_dir:
        return [Images(list(SHAPES), torch.arange(count) % len(SHAPES), size, draw_shapes(split, range(count), size), flip=False)
                for split, count in SHAPES_COUNT.items()]
    folder = data_dir or (os.path.join("data", data) if data in ("cifar10", "imagenet") else data)
    train_folder, val_folder = os.path.join(folder, "train"), os.path.join(folder, "val")
    if data == "cifar10" and not os.path.isdir(train_folder):
        return load_cifar10(folder, size)
    if not os.path.isdir(folder):
        raise SystemExit(f"error: no folder {folder}: expected {train_folder}/<class>/<image files>, or --data shapes, "
                         f"cifar10 or imagenet with --data-dir")
    train_folder = train_folder if os.path.isdir(train_folder) else folder
    with first_process_first():
        classes, names, labels = list_folder(train_folder, keep=keep and os.path.join(keep, "files_train.npz"))
        held = np.zeros(len(names), bool)
        if os.path.isdir(val_folder):
            _, val_names, val_labels = list_folder(val_folder, classes, keep and os.path.join(keep, "files_val.npz"))
        else:
            held[::HOLD_OUT], val_folder, val_names, val_labels = True, train_folder, names[::HOLD_OUT], labels[::HOLD_OUT]
    if len(np.unique(labels)) < 2:
        raise SystemExit(f"error: {train_folder} holds {len(names)} images in {len(np.unique(labels))} classes: expected "
                         f"{train_folder}/<class>/<image files> with two classes or more")
    if not len(val_names):
        raise SystemExit(f"error: {val_folder} holds no image of the classes in {train_folder}: fill or remove it")
    return (Images(classes, labels[~held], size, folder=train_folder, names=names[~held]),
            Images(classes, val_labels, size, folder=val_folder, names=val_names))


def load_cifar10(folder, size):
    """CIFAR-10 by torchvision, downloaded on first use, upscaled to `size`."""
    try:
        with first_process_first():
            parts = [torchvision.datasets.CIFAR10(folder, train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"error: no CIFAR-10 in {folder} and no download ({error}): connect once, or put the images at "
                         f"{folder}/train/<class>/ and {folder}/val/<class>/")
    pixels = [[center_crop(image, size) for image in torch.from_numpy(part.data).permute(0, 3, 1, 2)] for part in parts]
    return [Images(part.classes, part.targets, size, torch.stack(images)) for part, images in zip(parts, pixels)]


# ---- batches ------------------------------------------------------------------------------------

@functools.lru_cache(2)
def shuffled(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def order(n, start, count, seed):
    """Rows at positions start..start+count of an endless stream of shuffled epochs over n rows.

    A function of its arguments: no state to save, the same for any number of workers and processes.
    """
    return torch.tensor([shuffled(n, seed, k // n)[k % n] for k in range(start, start + count)])


def schedule(n, micro, steps, start, stop, rank, world, seed):
    """Rows of this process's micro-batches, updates start..stop, in the order they are used."""
    for k in range(start * steps, stop * steps):
        yield order(n, (k * world + rank) * micro, micro, seed)


def share(cfg, world):
    """Share the update's batch, batch_size x accum images, out over the processes, or stop -> micro-batch, micro-steps."""
    total, steps = cfg.batch_size * cfg.accum, -(-cfg.accum // world)
    micro = round(total / (steps * world)) or 1
    if micro * steps * world != total:
        raise SystemExit(f"error: a batch of {total} does not divide over {world} processes x {steps} "
                         f"micro-steps; the nearest that does is {micro * steps * world}")
    return micro, steps


def feed(source, schedule, device, workers):
    """Yield source[rows] on the device for every `rows` that the generator `schedule` yields.

    A resident source is indexed where it lies; any other is read ahead by worker processes, four batches each.
    """
    if source.resident:
        source.to(device)
        for rows in schedule:
            yield source.__getitems__(rows.to(device))
    else:
        loader = torch.utils.data.DataLoader(
            source, batch_sampler=schedule, num_workers=min(workers, os.cpu_count()), prefetch_factor=4 if workers else None,
            pin_memory=device.type == "cuda", collate_fn=tuple, worker_init_fn=leave_signals)
        for batch in loader:
            yield [part.to(device, non_blocking=True) for part in batch]


def leave_signals(worker):
    """The main process saves and ends the workers; they must live until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.SIG_IGN)


def to_float(pixels):
    """uint8 [0, 255] -> float32 [-1, 1]"""
    return pixels.float() / 127.5 - 1


def to_uint8(x):
    """float [-1, 1] -> uint8 [0, 255]; anything beyond is clamped first, or it would wrap around."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def grid(pixels, columns):
    """uint8 [n, 3, h, w] -> one picture, uint8 [height, width, 3]"""
    return torchvision.utils.make_grid(pixels.cpu(), columns, padding=2, pad_value=255).permute(1, 2, 0).numpy()


def save_grid(path, pixels, columns):
    """uint8 [n, 3, h, w] -> a PNG with `columns` images a row."""
    replace_file(path, lambda f: Image.fromarray(grid(pixels, columns)).save(f, "png"))


# ---- flags --------------------------------------------------------------------------------------

def fenced(script):
    """(NAME, comment) of every constant in a script's fenced block."""
    block = re.split(r"^# -+$", pathlib.Path(script["__file__"]).read_text(), flags=re.M)[1]
    return re.findall(r"^([A-Z0-9_]+) = .*?# (.*)$", block, re.M)


def flags(script, argv):
    """Parse the fenced constants of a script, its globals(), as flags -> a dict of those given.

    BATCH_SIZE = 64 is --batch-size 64; True, False and None (unset) are --compile/--no-compile; the comment is the
    flag's help, and its choices if it begins with "one of". A typo ends with argparse's message and status 2.
    """
    parser = argparse.ArgumentParser(description=script["__doc__"], allow_abbrev=False, usage="%(prog)s [flags]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, comment in fenced(script):
        default, choices = script[name], re.match(r"one of ([^;]+)", comment)
        kind = {"type": type(default), "metavar": "X"}
        if default is None or isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, tuple):
            kind = {"nargs": "+", "type": type(default[0]) if default else str, "metavar": "X"}
        elif choices:
            kind = {"choices": choices[1].split(", ")}
        parser.add_argument("--" + name.lower().replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{comment} [{default}]".replace("%", "%%"), **kind)
    return {key: tuple(value) if isinstance(value, list) else value for key, value in vars(parser.parse_args(argv)).items()}


def settings(script, given, preset=""):
    """The block's constants, under the preset's row, under the given flags -> a namespace in lower case.

    The row of the script's PRESETS is --preset's, else the one named `preset`, else ImageNet's.
    """
    block, presets = {name: script[name] for name, _ in fenced(script)}, script.get("PRESETS")
    if presets:
        block["PRESET"] = given.get("preset") or (preset if preset in presets else "imagenet")
        block |= presets[block["PRESET"]]
    return argparse.Namespace(**{name.lower(): value for name, value in block.items()} | given)


# ---- processes ----------------------------------------------------------------------------------

def guard(main):
    """Run a script's main(); Ctrl-C, a full disk or an exhausted GPU ends in one line and status 1."""
    sys.stdout.reconfigure(line_buffering=True)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: out of GPU memory; give --grad-checkpoint, or halve --batch-size and double --accum "
                 f"({str(error).split('. ')[1]})")
    except OSError as error:
        sys.exit(f"error: {error.strerror or error}: {error.filename or 'writing failed'}; what was saved before is intact")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def start(cfg):
    """Choose the device, join torchrun's group, settle unset cfg.bf16 and cfg.compile -> rank, world size, device, autocast."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=1))    # the first process may scan or download for long
    torch.set_float32_matmul_precision("high")
    if device.type == "cpu" and sys.platform == "linux":
        # keep freed memory: else glibc returns large tensors' to the system, and new pages were up to half of a step's time
        libc, M_MMAP_MAX, M_TRIM_THRESHOLD = ctypes.CDLL(None), -4, -1
        libc.mallopt(M_MMAP_MAX, 0), libc.mallopt(M_TRIM_THRESHOLD, -1)
    if cfg.bf16 is None:                                # where it is faster: CPUs with instructions for it, GPUs since Ampere
        on_cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        cfg.bf16 = on_cpu if device.type == "cpu" else on_gpu
    cfg.compile = device.type == "cuda" if cfg.compile is None else cfg.compile
    # a weight is used once a pass: autocast's cache would only keep a second copy of it
    return RANK, world, device, torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16, cache_enabled=False)


def barrier():
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def first_process_first():
    """The first process does what follows alone, then all others: they find what it made."""
    if RANK > 0:
        barrier()
    yield
    if RANK == 0:
        barrier()


class Signals:
    """Ctrl-C and SIGTERM ask for a save at the next step; a second one ends the process at once."""

    def __init__(self, on=True):
        self.caught = 0
        if on:
            signal.signal(signal.SIGINT, self.catch), signal.signal(signal.SIGTERM, self.catch)

    def catch(self, number, frame):
        if self.caught:
            raise KeyboardInterrupt
        self.caught = number

    def check(self, step, save):
        """Save and leave if any process has caught one."""
        if dist.is_initialized():                       # all must agree before one leaves the loop
            caught = torch.tensor(self.caught)
            dist.all_reduce(caught, dist.ReduceOp.MAX)
            self.caught = int(caught)
        if self.caught:
            save(step)
            self.leave(f"saved at step {step:,}; go on with --resume")

    def leave(self, message):
        """End with status 0 after SIGTERM, a scheduler's pre-emption, else 1."""
        print(f"\n{message}")
        sys.exit(0 if self.caught == signal.SIGTERM else 1)


# ---- files and checkpoints ----------------------------------------------------------------------

def replace_file(path, write):
    """Write a file beside `path` and rename it over: a kill or a full disk leaves the old one whole."""
    partial = f"{path}.part"                            # what a kill left behind is overwritten
    try:
        with open(partial, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:            # torch.save turns an OSError into a RuntimeError
        raise SystemExit(f"error: cannot write {path}: {error.args[-1]}; what was saved before is intact")
    finally:
        pathlib.Path(partial).unlink(missing_ok=True)


def new_array(path, dtype, shape):
    """Create a .npy file of zeros; its space is taken now, so that a full disk stops here, not in a crash later."""
    try:
        np.lib.format.open_memmap(path, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):              # not on macOS
            with open(path, "r+b") as f:
                os.posix_fallocate(f.fileno(), 0, os.path.getsize(path))
    except OSError as error:
        pathlib.Path(path).unlink(missing_ok=True)
        raise SystemExit(f"error: cannot make {path}, {np.dtype(dtype).itemsize * np.prod(shape) / 1e9:.3g} GB: {error.strerror}")


def open_array(path):
    """Map a .npy file, without running code from it; writing to the array does not change the file."""
    try:
        return np.load(path, mmap_mode="c")             # "c", because torch warns of read-only arrays
    except (ValueError, EOFError) as error:
        raise SystemExit(f"error: {path} is truncated or no array ({error}): remove it, to make it again")


def write_rows(path, first, rows):
    """Overwrite rows of a .npy file, those from `first` on; other processes, on other machines too, may write others."""
    offset = open_array(path).offset
    with open(path, "r+b") as f:
        f.seek(offset + first * rows[0].nbytes)
        f.write(rows.tobytes())


def load_checkpoint(path, made_by):
    """torch.load to the CPU, without running code from the file; stops if `made_by` did not write it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"error: no checkpoint at {path}: run {made_by} first, or point to another run with --out")
    except Exception as error:
        raise SystemExit(f"error: {path} is truncated or no checkpoint ({type(error).__name__})")
    if not isinstance(state, dict) or state.get("made_by") != made_by:
        raise SystemExit(f"error: {path} is not a checkpoint of {made_by}")
    return state


def folder_of(dataset):
    return os.path.join("out", os.path.basename(os.path.normpath(dataset)))


def newest(name, made_by):
    """The youngest out/*/<name>."""
    found = sorted(pathlib.Path("out").glob(f"*/{name}"), key=os.path.getmtime)
    if not found:
        raise SystemExit(f"error: no out/*/{name} here: run {made_by} first, or name a run with --out")
    return str(found[-1])


def begin(cfg, given, name, made_by):
    """Make the run's folder -> the checkpoint to go on from, or None; refuse to start over on top of one.

    With --resume the settings are the checkpoint's, but for the flags given now, which are named.
    """
    path = os.path.join(cfg.out, name)
    os.makedirs(cfg.out, exist_ok=True)
    if cfg.resume:
        state = load_checkpoint(path, made_by)
        for key, old in state["config"].items():
            if key not in (*given, "overwrite", "out", "device"):       # these are the call's, not the run's
                setattr(cfg, key, old)
            elif key != "resume" and given.get(key, old) != old:
                print(f"resume: {key} was {old}, is now {given[key]}")
        print(f"resuming {path} at step {state['step']:,}")
        return state
    if os.path.exists(path) and not cfg.overwrite:
        raise SystemExit(f"error: {path} exists: go on with --resume, start elsewhere with --out DIR, "
                         f"or replace it with --overwrite")


def note(cfg, state, train):
    """Add the classes, the dataset and the version of the code to the settings; on resume, name what has changed."""
    scripts = [pathlib.Path(__file__).with_name(name).read_bytes() for name in ("data.py", "vae.py", "diffusion.py")]
    for key, now in (("dataset", str(train)), ("code", hashlib.sha256(b"".join(scripts)).hexdigest()[:8])):
        if state and state["config"][key] != now:
            print(f"resume: the {key} was {state['config'][key]}, is now {now}: the run goes on, but not as it would have")
        setattr(cfg, key, now)
    cfg.classes = train.classes


# -------------------------------------------------------------------------------------------------

def main(argv=None):
    cfg = settings(globals(), flags(globals(), argv))
    train, val = load(cfg.data, cfg.data_dir, cfg.size)
    picture = os.path.join(cfg.out or folder_of(cfg.data), "data.png")
    os.makedirs(os.path.dirname(picture), exist_ok=True)
    counts = np.bincount(train.labels, minlength=len(train.classes))
    print(f"{cfg.data}: {len(train):,} training and {len(val):,} validation images, {train.size}x{train.size}, "
          f"{len(train.classes)} classes of {counts.min():,} to {counts.max():,}: "
          + ", ".join(train.classes[:10]) + (", ..." if len(train.classes) > 10 else ""))
    save_grid(picture, train.__getitems__(order(len(train), 0, 80, seed=0))[0], columns=10)
    print(f"80 of them: {picture}")


if __name__ == "__main__":
    guard(main)
