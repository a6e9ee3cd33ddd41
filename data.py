"""Images for both stages, and the few things that every script needs to run.

    python data.py                                    # what `shapes` looks like: out/shapes/data.png
    python data.py --data cifar10                     # downloaded once, to data/cifar10
    python data.py --data path/to/folder --size 128

A dataset is `shapes` (drawn below, no files), `cifar10`, `imagenet`, or any folder that holds
DIR/train/<class>/* and perhaps DIR/val/<class>/*, or just DIR/<class>/*. An image is uint8
[3, size, size]; a label is the index of its class among the sorted class names. The second half of
the file is what the scripts share to run: flags, processes, checkpoints, logs.
"""
import argparse
import contextlib
import functools
import math
import os
import pathlib
import re
import signal
import sys
import time
import timeit
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
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
WORKERS = 8                 # decoding processes for a larger one, each 4 batches ahead
HOLD_OUT = 50               # without val/, every 50th image is kept out of training and evaluated on
IMAGE_TYPES = set(Image.registered_extensions())


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

    Place, size, angle and both colours are random but a function of (split, row) alone. One distance
    function serves each class; the edge is antialiased over one pixel.
    """
    u = np.stack([np.random.default_rng((split == "val", i)).random(8) for i in rows]).astype(np.float32)
    u, labels = torch.from_numpy(u), torch.tensor(rows) % len(SHAPES)
    line = (torch.arange(size) + 0.5) * (2 / size) - 1
    radius = 0.5 + 0.25 * u[:, 0, None, None]
    angle = (u[:, 1, None, None] - 0.5) * (torch.pi / 6)
    x = line[None, None, :] - (u[:, 2, None, None] - 0.5) * 0.5
    y = line[None, :, None] - (u[:, 3, None, None] - 0.5) * 0.5
    x, y = (x * angle.cos() + y * angle.sin()) / radius, (y * angle.cos() - x * angle.sin()) / radius
    cover = torch.empty(len(u), 1, size, size)
    for k, distance in enumerate(SHAPES.values()):
        of_k = labels == k
        cover[of_k, 0] = (0.5 - distance(x[of_k], y[of_k]) * radius[of_k] * (size / 2)).clamp(0, 1)
    hue = (u[:, 4, None] * 6 + torch.tensor([0.0, 4.0, 2.0])) % 6
    ink = (0.8 * ((hue - 3).abs() - 1).clamp(0, 1))[:, :, None, None]           # vivid
    paper = (1 - 0.3 * u[:, 5:8])[:, :, None, None]                             # pale
    return ((paper + cover * (ink - paper)) * 255).round().to(torch.uint8)


# ---- image files --------------------------------------------------------------------------------

def open_image(file):
    """Any image that Pillow reads -> 8-bit RGB, upright; transparency goes on white."""
    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode[0] in "IF":                   # 16-bit or float greyscale: convert() would clip it
        grey = np.asarray(image, np.float32)
        grey = grey / 257 if image.mode[0] == "I" else grey * (255 if grey.max() <= 1 else 1)
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def center_crop(image, size):
    """Resize the shorter side to `size` and crop the centre -> uint8 [size, size, 3].

    As the published ImageNet-256 results do it (Dhariwal and Nichol 2021): halve by area while twice
    too large, then bicubic; a single bicubic step would alias.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image)[top:top + size, left:left + size]


class Images:
    """One split: images uint8 [3, size, size] and a class index each.

    A split of up to RESIDENT_BYTES is decoded at once into `pixels` [n, 3, size, size]; a larger one is
    read file by file. `flip` says whether a mirrored image is still one of its class.
    """

    def __init__(self, classes, labels, size, files=None, pixels=None, flip=True):
        self.classes, self.size, self.flip, self.pixels, self.bad = classes, size, flip, pixels, set()
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        if files is not None:
            # fixed-width bytes: a list of a million strings would be copied into every worker
            self.files = np.array([os.fsencode(file) for file in files])
            if len(files) * 3 * size * size <= RESIDENT_BYTES:
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    self.pixels = torch.cat(list(pool.map(self.read_all, torch.arange(len(files)).split(100))))

    def __len__(self):
        return len(self.labels)

    @property
    def resident(self):
        return self.pixels is not None

    def to(self, device):
        self.pixels, self.labels = self.pixels.to(device), self.labels.to(device)

    def __getitems__(self, rows):
        """Rows int64 [m] -> uint8 [m, 3, size, size], int64 [m]."""
        return self.pixels[rows] if self.resident else self.read_all(rows), self.labels[rows]

    def read_all(self, rows):
        return torch.stack([torch.from_numpy(self.read(row)).permute(2, 0, 1) for row in rows.tolist()])

    def read(self, row):
        """Decode one file; an unreadable one is named once and the next readable one stands in for it."""
        while True:
            file = os.fsdecode(self.files[row])
            try:
                return center_crop(open_image(file), self.size)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                if row not in self.bad:
                    print(f"unreadable image {file} ({error}): the next one stands in for it", file=sys.stderr)
                self.bad.add(row)
            if len(self.bad) > len(self) / 100:
                raise SystemExit(f"error: {len(self.bad)} of {len(self):,} images cannot be read, among them {file}: "
                                 f"repair or remove them")
            row = (row + 1) % len(self)


def list_folder(folder, classes=None):
    """<folder>/<class>/<image files> -> class names, paths, labels, all sorted."""
    def names(path, keep):
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if keep(entry) and entry.name[0] != ".")

    classes = classes or names(folder, lambda entry: entry.is_dir())
    files, labels = [], []
    for label, name in enumerate(classes):
        path = os.path.join(folder, name)
        found = names(path, lambda entry: os.path.splitext(entry.name)[1].lower() in IMAGE_TYPES) if os.path.isdir(path) else []
        files += [os.path.join(path, file) for file in found]
        labels += [label] * len(found)
    return classes, files, labels


def load(data, data_dir="", size=0):
    """A dataset by name or folder -> (train, val), two `Images`; stops and names what is missing."""
    size = size or SIZES.get(data, 256)
    if data == "shapes" and not data_dir:
        return [Images(list(SHAPES), torch.arange(count) % len(SHAPES), size, flip=False,
                       pixels=draw_shapes(split, range(count), size)) for split, count in SHAPES_COUNT.items()]
    folder = data_dir or (os.path.join("data", data) if data in ("cifar10", "imagenet") else data)
    train_folder, val_folder = os.path.join(folder, "train"), os.path.join(folder, "val")
    if data == "cifar10" and not os.path.isdir(train_folder):
        return load_cifar10(folder, size)
    if not os.path.isdir(folder):
        raise SystemExit(f"error: no folder {folder}: expected {train_folder}/<class>/<image files>, or --data shapes, "
                         f"cifar10 or imagenet with --data-dir")
    train_folder = train_folder if os.path.isdir(train_folder) else folder
    classes, files, labels = list_folder(train_folder)
    if len(set(labels)) < 2:
        raise SystemExit(f"error: {train_folder} holds {len(files)} images in {len(set(labels))} classes: expected "
                         f"{train_folder}/<class>/<image files> with two classes or more")
    if os.path.isdir(val_folder):
        _, val_files, val_labels = list_folder(val_folder, classes)
        if not val_files:
            raise SystemExit(f"error: {val_folder} holds no image of the classes in {train_folder}: fill or remove it")
    else:
        val_files, val_labels = files[::HOLD_OUT], labels[::HOLD_OUT]
        del files[::HOLD_OUT], labels[::HOLD_OUT]
    return Images(classes, labels, size, files), Images(classes, val_labels, size, val_files)


def load_cifar10(folder, size):
    """CIFAR-10 by torchvision, downloaded on first use, upscaled to `size`."""
    try:
        parts = [torchvision.datasets.CIFAR10(folder, train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"error: no CIFAR-10 in {folder} and no download ({error}): connect once, or put the images at "
                         f"{folder}/train/<class>/ and {folder}/val/<class>/")
    return [Images(part.classes, part.targets, size, pixels=torch.from_numpy(np.stack(
        [center_crop(Image.fromarray(image), size) for image in part.data])).permute(0, 3, 1, 2).contiguous()) for part in parts]


# ---- the order of the batches -------------------------------------------------------------------

@functools.lru_cache(2)
def shuffled(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def order(n, start, count, seed):
    """Rows at positions start..start+count of an endless stream of shuffled epochs over n rows.

    A function of its arguments: no state to save, the same for any number of workers and processes.
    """
    rows, position, end = [], start, start + count
    while position < end:
        epoch, offset = divmod(position, n)
        rows.append(shuffled(n, seed, epoch)[offset:offset + end - position])
        position += len(rows[-1])
    return torch.from_numpy(np.concatenate(rows))


def feed(source, schedule, device):
    """Yield source[rows] on the device for every `rows` that the generator `schedule` yields.

    A resident source is indexed where it lies; any other is read ahead by worker processes.
    """
    if source.resident:
        source.to(device)
        for rows in schedule:
            yield source.__getitems__(rows.to(device))
    else:
        loader = torch.utils.data.DataLoader(
            source, batch_sampler=schedule, num_workers=WORKERS, prefetch_factor=4, persistent_workers=True,
            pin_memory=device.type == "cuda", collate_fn=tuple, worker_init_fn=ignore_ctrl_c)
        for batch in loader:
            yield [part.to(device, non_blocking=True) for part in batch]


def ignore_ctrl_c(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # the main process saves and ends the workers


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

    BATCH_SIZE = 64 is --batch-size 64; True, False and None (unset) are --compile/--no-compile; the comment
    at the line's end is the flag's help. A typo ends with argparse's message and status 2.
    """
    parser = argparse.ArgumentParser(description=script["__doc__"], allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, comment in fenced(script):
        default = script[name]
        if default is None or isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, tuple):
            kind = {"nargs": "+", "type": type(default[0]) if default else str, "metavar": "X"}
        else:
            kind = {"type": type(default), "metavar": "X"}
        parser.add_argument("--" + name.lower().replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{comment} [{default}]".replace("%", "%%"), **kind)
    return {key: tuple(value) if isinstance(value, list) else value for key, value in vars(parser.parse_args(argv)).items()}


def settings(script, given, presets, preset):
    """The block's constants, under the preset's row, under the given flags -> a namespace in lower case.

    The row is --preset's, else the one named `preset`, else ImageNet's.
    """
    preset = given.get("preset") or (preset if preset in presets else "imagenet")
    one_of(SimpleNamespace(preset=preset), preset=presets)
    block = {name: script[name] for name, _ in fenced(script)} | presets[preset]
    return SimpleNamespace(**{name.lower(): value for name, value in block.items()} | {"preset": preset} | given)


def one_of(cfg, **choices):
    """Stop if a setting is none of its choices."""
    for name, values in choices.items():
        if getattr(cfg, name) not in values:
            raise SystemExit(f"error: --{name.replace('_', '-')} {getattr(cfg, name)}: choose one of {', '.join(values)}")


# ---- processes ----------------------------------------------------------------------------------

def start(cfg):
    """Choose the device, join the group if torchrun started this process -> rank, world size, device, autocast.

    Settles cfg.bf16 and cfg.compile where they are unset.
    """
    rank, world, device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), cfg.device
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    torch.set_float32_matmul_precision("high")
    cfg.bf16 = bf16_pays(device) if cfg.bf16 is None else cfg.bf16
    cfg.compile = device.type == "cuda" if cfg.compile is None else cfg.compile
    return rank, world, device, torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16)


def say(*args, **kwargs):
    """print() in the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(*args, **kwargs, flush=True)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def share(cfg, world):
    """The update's batch, batch_size x accum images, over the processes -> micro-batch, micro-steps.

    The batch stays what was asked for whatever the number of processes, or this stops.
    """
    total = cfg.batch_size * cfg.accum
    steps = -(-cfg.accum // world)
    if total % (steps * world):
        near = round(total / (steps * world)) or 1
        raise SystemExit(f"error: a batch of {total} does not divide over {world} processes x {steps} "
                         f"micro-steps; the nearest that does is {near * steps * world}")
    return total // (steps * world), steps


def schedule(n, micro, steps, start, stop, rank, world, seed):
    """Rows of this process's micro-batches, updates start..stop, in the order they are used."""
    for k in range(start * steps, stop * steps):
        yield order(n, (k * world + rank) * micro, micro, seed)


def bf16_pays(device):
    """Whether bfloat16 is faster here: on GPUs since Ampere; on a CPU by timing a matrix product."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    a, b = torch.ones(512, 512), torch.ones(512, 512, dtype=torch.bfloat16)
    return min(timeit.repeat(lambda: b @ b, number=1)) < 0.7 * min(timeit.repeat(lambda: a @ a, number=1))


class Signals:
    """Ctrl-C and SIGTERM ask for a save at the next step; a second one ends the process at once."""

    def __init__(self):
        self.caught = 0
        signal.signal(signal.SIGINT, self.catch), signal.signal(signal.SIGTERM, self.catch)

    def catch(self, number, frame):
        if self.caught:
            raise KeyboardInterrupt
        self.caught = number

    def check(self, step, save):
        """Save and leave if any process has caught one: status 0 after SIGTERM, a scheduler's, else 1."""
        if dist.is_initialized():                       # all must agree before one leaves the loop
            caught = torch.tensor(self.caught)
            dist.all_reduce(caught, dist.ReduceOp.MAX)
            self.caught = int(caught)
        if self.caught:
            save(step)
            say(f"\nsaved at step {step:,}; go on with --resume")
            sys.exit(0 if self.caught == signal.SIGTERM else 1)


def guard(main):
    """Run a script's main(); Ctrl-C, a full disk or an exhausted GPU ends in one line and status 1."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: out of GPU memory; halve --batch-size and double --accum ({str(error).split('. ')[1]})")
    except OSError as error:
        sys.exit(f"error: {error.strerror or error}: {error.filename or 'writing failed'}; what was saved before is intact")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---- checkpoints and logs -----------------------------------------------------------------------

def replace_file(path, write):
    """Write a file beside `path` and rename it over: a kill or a full disk leaves the old one whole."""
    partial = f"{path}.{os.getpid()}.part"
    try:
        with open(partial, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:            # torch.save turns an OSError into a RuntimeError
        raise SystemExit(f"error: cannot write {path}: {error.args[-1]}; what was saved before is intact")
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def new_array(path, dtype, shape):
    """Create a .npy file and map it; its space is taken now, so that a full disk stops here, not in a crash later."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):                      # not on macOS
        with open(path, "r+b") as f:
            os.posix_fallocate(f.fileno(), 0, os.path.getsize(path))
    return array


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


def newest(name, made_by):
    """The youngest out/*/<name>."""
    found = sorted(pathlib.Path("out").glob(f"*/{name}"), key=os.path.getmtime)
    if not found:
        raise SystemExit(f"error: no out/*/{name} here: run {made_by} first, or name a run with --out")
    return str(found[-1])


def folder_of(dataset):
    return os.path.join("out", os.path.basename(os.path.normpath(dataset)))


def run_folder(given, name, made_by, default):
    """The run's folder that the flags mean: --out, else out/<data>, else with --resume the newest run's."""
    if "out" in given or "data" in given:
        return given.get("out") or folder_of(given["data"])
    return os.path.dirname(newest(name, made_by)) if given.get("resume") else default


def begin(cfg, given, name, made_by):
    """Make the run's folder -> the checkpoint to go on from, or None; refuse to start over on top of one.

    With --resume the settings are the checkpoint's, but for the flags given now, which are named.
    """
    path = os.path.join(cfg.out, name)
    os.makedirs(cfg.out, exist_ok=True)
    if cfg.resume:
        state = load_checkpoint(path, made_by)
        for key, old in state["config"].items():
            if key in given and given[key] != old:
                say(f"resume: {key} was {old}, is now {given[key]}")
            elif key not in given and key not in ("resume", "out", "device"):
                setattr(cfg, key, old)
        say(f"resuming {path} at step {state['step']:,}")
        return state
    if os.path.exists(path) and not cfg.overwrite:
        raise SystemExit(f"error: {path} exists: go on with --resume, start elsewhere with --out DIR, "
                         f"or replace it with --overwrite")


class Log:
    """A CSV row per logged step, one terminal line that updates, and TensorBoard where it is installed.

    `values` holds the latest of every column. Only the first process writes.
    """

    def __init__(self, path, step, total):
        self.path, self.total, self.values, self.columns, self.board = path, total, {"step": step}, None, None
        self.step, self.clock, self.shown, self.in_a_row = step, time.perf_counter(), 0.0, 0
        self.writes = os.environ.get("RANK", "0") == "0"
        if self.writes:
            lines = pathlib.Path(path).read_text().splitlines(True) if step and os.path.exists(path) else []
            if lines:                                       # a resumed run drops what came after its checkpoint
                self.columns = lines[0].strip().split(",")
                lines[1:] = [line for line in lines[1:] if int(line.split(",")[0]) <= step]
            replace_file(path, lambda f: f.write("".join(lines).encode()))
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(os.path.dirname(path), purge_step=step)

    @contextlib.contextmanager
    def aside(self):
        """Time spent in here does not count as training."""
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    def finite(self, step, *norms):
        """Whether to apply an update with gradients of these norms; the tenth in a row that is not finite stops the run.

        The norms are those of the averaged gradients, so all processes decide alike.
        """
        finite = all(map(math.isfinite, norms))
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.values["skipped"] = self.values.get("skipped", 0) + (not finite)
        if not finite:
            say(f"\nstep {step}: gradient not finite, update skipped")
        if self.in_a_row == 10:
            raise SystemExit("error: ten updates in a row were not finite; the checkpoint is from before: go on with "
                             "--resume and a lower --lr, or --no-bf16")
        return finite

    def row(self, step, batch, show, **values):
        """Log `values` after `step` updates of `batch` images; the terminal line shows the columns in `show`."""
        now, seconds = time.perf_counter(), 0.0
        if step > self.step:
            seconds, self.step, self.clock = (now - self.clock) / (step - self.step), step, now
            self.values["images/s"] = batch / seconds
        self.values |= {"step": step, **values}
        if not self.writes:
            return
        with open(self.path, "a") as f:
            if not self.columns:
                self.columns = list(self.values)
                f.write(",".join(self.columns) + "\n")
            row = [self.values.get(column, "") for column in self.columns]
            f.write(",".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in row) + "\n")
        for key, value in self.values.items() if self.board else ():
            self.board.add_scalar(key, value, step)
        line = "  ".join([f"step {step:,}/{self.total:,}", f"{(self.total - step) * seconds / 60:.1f} min left",
                          f"{self.values.get('images/s', 0):.0f} images/s", *(f"{key} {self.values[key]:.4g}" for key in show if key in self.values)])
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="" if step < self.total else "\n", flush=True)
        elif now - self.shown > 10 or step == self.total:
            self.shown = now
            print(line, flush=True)


def main(argv=None):
    cfg = SimpleNamespace(**{"data": DATA, "data_dir": DATA_DIR, "size": SIZE, "out": OUT} | flags(globals(), argv))
    train, val = load(cfg.data, cfg.data_dir, cfg.size)
    out = cfg.out or folder_of(cfg.data)
    os.makedirs(out, exist_ok=True)
    counts = np.bincount(train.labels, minlength=len(train.classes))
    print(f"{cfg.data}: {len(train):,} training and {len(val):,} validation images, {train.size}x{train.size}, "
          f"{len(train.classes)} classes of {counts.min():,} to {counts.max():,}: "
          + ", ".join(train.classes[:10]) + (", ..." if len(train.classes) > 10 else ""))
    pixels, _ = train.__getitems__(order(len(train), 0, 80, seed=0))
    save_grid(os.path.join(out, "data.png"), pixels, columns=10)
    print(f"80 of them: {os.path.join(out, 'data.png')}")


if __name__ == "__main__":
    guard(main)
