"""Images for both stages, then the little that every script needs: settings, processes, files.

A dataset is `shapes` (drawn below), `cifar10`, `imagenet`, or a folder that holds DIR/train/<class>/* and
perhaps DIR/val/<class>/*, or just DIR/<class>/*. An image is uint8 [3, size, size], its label an index into
the sorted class names.
"""
import argparse, concurrent.futures, contextlib, ctypes, functools, hashlib, io, itertools, json, os, pathlib
import re, shutil, signal, sys, sysconfig, time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps

SHAPES_COUNT = {"train": 20_000, "val": 2_000}
MAX_BAD = 0.01              # share of unreadable images above which a run stops
HOLD_OUT = 50               # without val/, every 50th image is kept out of training and evaluated on
IMAGE_TYPES = set(Image.registered_extensions())
RANK, WORLD = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
CAUGHT = []                 # numbers of the signals that came

# ---- shapes: ten classes drawn from distance functions -----------------------------------------------------
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
    "stripes": lambda x, y: torch.maximum(box(x, y, 0.9, 0.9),
                                          (torch.remainder(y + 0.3, 0.6) - 0.3).abs() - 0.17),
    "triangle": lambda x, y: polygon(x, y - 0.2, 3, 0.53).amax(0),
}

def draw_shapes(split, rows, size=32):
    """Draw the given rows of a split -> uint8 [n, 3, size, size]; row i has class i % 10. Place, size,
    angle and both colours are random, but a function of (split, row) alone."""
    u = np.stack([np.random.default_rng((split == "val", i)).random(8) for i in rows])
    u, labels = torch.tensor(u, dtype=torch.float32), torch.tensor(rows) % len(SHAPES)
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

# ---- image files -------------------------------------------------------------------------------------------
# a third faster than Pillow's; the bare operator, since the function around it is deprecated and warns
DECODE_JPEG = getattr(torch.ops.image, "decode_jpeg", None)

def read_image(file):
    """Any image that Pillow reads -> uint8 [3, h, w] in RGB, upright; transparency goes on white."""
    raw = np.fromfile(file, np.uint8)
    image = Image.open(io.BytesIO(raw))                 # the header alone; refuses an image bomb
    plain = image.format == "JPEG" and image.mode in ("L", "RGB") and image.getexif().get(0x0112, 1) == 1
    if plain and DECODE_JPEG:
        return DECODE_JPEG(torch.from_numpy(raw), torchvision.io.ImageReadMode.RGB.value, False)
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":                           # 16-bit or float greyscale: convert() would clip it
        grey = np.asarray(image, np.float32)
        grey = grey / 257 if image.mode[0] == "I" else grey * (255 if grey.max() <= 1 else 1)
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

def center_crop(x, size):
    """Resize the shorter side to `size`, crop the centre: uint8 [3, h, w] -> uint8 [3, size, size]. As the
    published ImageNet-256 results do it (Dhariwal, Nichol 2021): halve by averaging, then bicubic."""
    x = x[None]
    while min(x.shape[2:]) >= 2 * size:
        x = F.interpolate(x, (x.shape[2] // 2, x.shape[3] // 2), mode="bilinear")       # 2x2 averages
    scale = size / min(x.shape[2:])
    height, width = round(x.shape[2] * scale), round(x.shape[3] * scale)
    top, left = (height - size) // 2, (width - size) // 2
    x = F.interpolate(x, (height, width), mode="bicubic", antialias=True)
    return x[0, :, top:top + size, left:left + size].contiguous()

class Images:
    """One split: images[rows] is uint8 [n, 3, size, size] and classes int64 [n], for rows int64 [n]. Made of
    `pixels`, or of `files` below `folder`, each read when it is asked for. `flip`: a mirrored image is still
    one of its class."""
    def __init__(self, classes, labels, size, pixels=None, folder="", files=(), flip=True):
        self.classes, self.labels, self.size, self.flip = classes, torch.tensor(labels), size, flip
        self.pixels, self.folder, self.files = pixels, folder, files
        self.bad = {}                               # unreadable rows, with those that stand in for them
    def __len__(self):
        return len(self.labels)
    def __getitem__(self, rows):
        if self.pixels is not None:
            return self.pixels[rows], self.labels[rows]
        return torch.stack([self.read(row) for row in rows.tolist()]), self.labels[rows]
    def read(self, row):
        """One file's pixels; one that cannot be read is named once, and the next of its class stands in."""
        file = os.path.join(self.folder, self.files[row])
        try:
            return center_crop(read_image(file), self.size)
        except Exception as error:                  # a damaged file may raise anything
            if row not in self.bad:
                same = (self.labels == self.labels[row]).nonzero().flatten().tolist()
                self.bad[row] = same[(same.index(row) + 1) % len(same)]
                print(f"unreadable image {file} ({error!r:.150}): the next stands in", file=sys.stderr)
        if len(self.bad) > MAX_BAD * len(self):
            raise SystemExit(f"error: {len(self.bad)} of {len(self):,} images cannot be read, like {file}: "
                             f"repair or remove them")
        return self.read(self.bad[row])
    def identity(self):
        """A hash of what a copy keeps: class and file names, and the contents of a hundred images."""
        digest = hashlib.sha256("\0".join([*self.classes, *self.files]).encode(errors="surrogateescape"))
        digest.update(self.labels.numpy())
        for row in range(0, len(self), -(-len(self) // 100)):
            file = self.files and os.path.join(self.folder, self.files[row])
            digest.update(pathlib.Path(file).read_bytes() if file else self.pixels[row].numpy())
        return digest.hexdigest()

def list_folder(folder, classes=()):
    """Images in class folders, or in one folder -> class names, paths from `folder` on, labels; sorted."""
    def below(name):                                    # but for the pictures in a run's folder
        return sorted(os.path.join(root, file)[len(folder) + 1:]
                      for root, _, files in os.walk(os.path.join(folder, name))
                      if not {"vae.csv", "diffusion.csv"} & {*files} for file in files
                      if file[0] != "." and os.path.splitext(file)[1].lower() in IMAGE_TYPES)
    there = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    found = {name: below(name) for name in classes or there}
    if not any(found.values()) and len(classes) < 2:
        found = {(classes or [os.path.basename(folder)])[0]: below("")}
    unused = [name for name in dict.fromkeys([*found, *there]) if not found.get(name)]
    if unused:
        print(f"{folder}: empty or no class: {', '.join(unused[:5])}{', ...' * (len(unused) > 5)}")
    classes = classes or [name for name in found if found[name]]
    labels = np.arange(len(classes)).repeat([len(found[name]) for name in classes])
    return classes, [file for name in classes for file in found[name]], labels

def load(data, data_dir="", size=32, expected=()):
    """A dataset by name, or a folder -> train and val, two `Images`; of the `expected` classes, if any."""
    if data == "shapes" and not data_dir:
        return [Images(list(SHAPES), np.arange(n) % 10, size, draw_shapes(split, range(n), size), split,
                       flip=False) for split, n in SHAPES_COUNT.items()]
    folder = data_dir or (os.path.join("data", data) if data in ("cifar10", "imagenet") else data)
    train, val = os.path.join(folder, "train"), os.path.join(folder, "val")
    if data == "cifar10" and not os.path.isdir(train):
        return load_cifar10(folder, size)
    train = os.path.abspath(train if os.path.isdir(train) else folder)
    classes, files, labels = list_folder(train) if os.path.isdir(train) else ([], [], [])
    if len(files) < 2:
        raise SystemExit(f"error: {len(files)} images in {train}: expected {folder}/train/<class>/*")
    if expected and classes != expected:
        raise SystemExit(f"error: {train} has other classes than the run, {', '.join(expected[:10])}")
    if os.path.isdir(val):
        _, val_files, val_labels = list_folder(val, classes)
    else:
        val, val_files, val_labels = train, files[::HOLD_OUT], labels[::HOLD_OUT]
        del files[::HOLD_OUT]
        labels = np.delete(labels, np.s_[::HOLD_OUT])
    if not val_files:
        raise SystemExit(f"error: {val} holds no image of the classes in {train}: fill or remove it")
    return (Images(classes, labels, size, folder=train, files=files),
            Images(classes, val_labels, size, folder=val, files=val_files))

def load_cifar10(folder, size):
    """CIFAR-10 by torchvision, downloaded on first use, upscaled to `size`."""
    try:
        if RANK == 0:
            torchvision.datasets.CIFAR10(folder, download=True)
        from_first(None)                            # the others wait
        parts = [torchvision.datasets.CIFAR10(folder, train) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"error: no CIFAR-10 at {folder}/train/<class>/, and no download: {error}")
    crop = lambda image: center_crop(torch.from_numpy(image).permute(2, 0, 1), size)
    return [Images(part.classes, part.targets, size, torch.stack([*map(crop, part.data)])) for part in parts]

# ---- batches -----------------------------------------------------------------------------------------------
@functools.lru_cache(2)
def shuffled(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)
def order(n, start, count, seed):
    """Rows start..start+count of an endless stream of shuffled epochs: no state to save, or to share."""
    return torch.tensor([shuffled(n, seed, k // n)[k % n] for k in range(start, start + count)])
def schedule(n, micro, steps, start, stop, rank, world, seed):
    """Rows of this process's micro-batches, updates start..stop, in the order they are used."""
    for k in range(start * steps, stop * steps):
        yield order(n, (k * world + rank) * micro, micro, seed)

def share(cfg, world):
    """Share the update's batch, batch_size x accum, out over the processes -> micro-batch, micro-steps."""
    total, steps = cfg.batch_size * cfg.accum, -(-cfg.accum // world)
    micro = round(total / (steps * world)) or 1
    if micro * steps * world != total:
        raise SystemExit(f"error: {world} processes cannot share {total} images, but {micro * steps * world}")
    return micro, steps

def threads(count):
    """A pool of threads. A torch operation in one of them stays on its core; the caller's go on as before."""
    torch.get_num_threads()             # settles the caller's number before that of new threads changes
    return concurrent.futures.ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

def feed(source, schedule, device, workers):
    """Yield source[rows] on the device for every `rows` of the schedule; threads read a few batches ahead."""
    schedule, workers, pin = iter(schedule), min(workers, os.cpu_count()), device.type == "cuda"
    def fetch(rows):
        return [part.pin_memory() if pin else part for part in source[rows]]
    pool = threads(workers)
    try:
        ahead = [pool.submit(fetch, rows) for rows in itertools.islice(schedule, 2 * workers)]
        while ahead:
            batch = ahead.pop(0).result()
            ahead += [pool.submit(fetch, rows) for rows in itertools.islice(schedule, 1)]
            yield [part.to(device, non_blocking=pin) for part in batch]
    finally:
        pool.shutdown(cancel_futures=True)

def to_float(pixels):
    """uint8 [0, 255] -> float32 [-1, 1]"""
    return pixels.float() / 127.5 - 1
def to_uint8(x):
    """float [-1, 1] -> uint8 [0, 255]; anything beyond is clamped first, or it would wrap around."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
def grid(pixels, columns):
    """uint8 [n, 3, h, w] -> one picture, `columns` images a row"""
    picture = torchvision.utils.make_grid(pixels.cpu(), columns, padding=2, pad_value=255)
    return Image.fromarray(picture.permute(1, 2, 0).numpy())

def write_png(path, image):
    """An image uint8 [3, h, w]; renamed into place, so that what has its name is whole."""
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{path}.part", "png")
    os.replace(f"{path}.part", path)

# ---- settings: the fenced block of constants at a script's top, as flags -----------------------------------
CALL = "resume", "overwrite", "out", "device", "bench", "eval", "export", "init", "vae"   # not of a saved run

def fenced(script):
    """(NAME, comment) of every constant in the block; `script` is the globals() of its file."""
    block = re.split(r"^# -+$", pathlib.Path(script["__file__"]).read_text(), flags=re.M)[1]
    return re.findall(r"^([A-Z0-9_]+) = .*?# (.*)$", block, re.M)

def flags(script, argv):
    """Parse a script's constants as flags -> a dict of those given, and of a call's that were edited. The
    comment is the help, and says first what is allowed: "from 0 to 1; ...", "one of a, b; ..."."""
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", description=script["__doc__"],
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    block = fenced(script)
    for name, comment in block:
        default, choices = script[name], re.match(r"one of ([^;]+)", comment)
        first = (default or ("",))[0] if isinstance(default, tuple) else default
        kind = {"type": type(first), "choices": choices and choices[1].split(", ")}
        if first is None or isinstance(first, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, tuple):                # a pair of bounds, or of any length
            kind["nargs"] = 2 if isinstance(first, float) else "+"
        parser.add_argument("--" + name.lower().replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{comment} [{default}]".replace("%", "%%"), **kind)
    edited = {name.lower(): script[name] for name, _ in block if name.lower() in CALL and script[name]}
    parsed = vars(parser.parse_args(argv)).items()
    given = edited | {key: tuple(value) if isinstance(value, list) else value for key, value in parsed}
    for name, comment in block:
        key, bounds = name.lower(), re.match(r"from (\S+?)(?: to (\S+))?;", comment)
        for value in np.atleast_1d(given[key]) if bounds and key in given else ():
            if not float(bounds[1]) <= value <= float(bounds[2] or sys.float_info.max):
                parser.error(f"argument --{key.replace('_', '-')}: {value} is not {bounds[0][:-1]}")
    return given

def settings(script, given, preset="", state=None):
    """Four layers, each over the one before: block, preset, what a resumed run saved, flags -> a namespace.
    The row of PRESETS is --preset's, else the saved one, else that named `preset`, else ImageNet's."""
    saved = {key: value for key, value in state["config"].items() if key not in CALL} if state else {}
    for key in [key for key in saved if given.get("resume") and saved[key] != given.get(key, saved[key])]:
        print(f"resume: {key} was {saved[key]}, is now {given[key]}")
    presets = script.get("PRESETS", {"imagenet": {}})
    row = given.get("preset") or saved.get("preset") or (preset if preset in presets else "imagenet")
    block = {name: script[name] for name, _ in fenced(script)} | presets[row] | {"PRESET": row}
    return argparse.Namespace(**{name.lower(): value for name, value in block.items()} | saved | given)

# ---- processes and signals ---------------------------------------------------------------------------------
def guard(main):
    """Run a script's main(); Ctrl-C, a full disk or an exhausted GPU ends in one line and status 1."""
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")      # folders may have any name
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        main()
    except SystemExit:
        time.sleep(3 if RANK else 0)    # what stops all is said by the first, and torchrun ends the others
        raise
    except KeyboardInterrupt:
        sys.exit("stopped")
    except torch.OutOfMemoryError:
        sys.exit("error: out of GPU memory: give --grad-checkpoint, or halve --batch-size and double --accum")
    except OSError as error:
        sys.exit(f"error: {error}; what was saved before is intact")
    if dist.is_initialized():           # not after an error: it would wait for the others
        dist.destroy_process_group()

def start(cfg):
    """Choose the device, join torchrun's group, settle unset cfg.bf16 and cfg.compile -> device, autocast."""
    try:
        device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)           # last: on GPU 0 every process would take memory
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"error: --device {cfg.device} is not there: {str(error).splitlines()[0]}")
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True               # shapes stay: it tries once what is fastest
    if device.type == "cpu" and sys.platform == "linux":
        # keep freed memory: glibc would return it to the system, and new pages took up to half of a step
        libc, M_MMAP_MAX, M_TRIM_THRESHOLD = ctypes.CDLL(None), -4, -1
        libc.mallopt(M_MMAP_MAX, 0), libc.mallopt(M_TRIM_THRESHOLD, -1)
    if cfg.bf16 is None:                # where it is faster: CPUs with instructions for it, GPUs since Ampere
        on_cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        cfg.bf16 = on_cpu if device.type == "cpu" else on_gpu
    cfg.compile = device.type == "cuda" if cfg.compile is None else cfg.compile
    headers = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
    if cfg.compile and not (headers and any(map(shutil.which, ("cc", "gcc", "clang")))):
        print("going on without torch.compile: it needs a C compiler and Python's headers (gcc, python3-dev)")
        cfg.compile = False
    # a weight is used once a pass: autocast's cache would only keep a second copy of it
    return device, torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16, cache_enabled=False)

def total(x, op=dist.ReduceOp.SUM):
    """A tensor's sum, or what else `op` makes of it, over all processes, in its place."""
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x
def from_first(value):
    """Any value of the first process, on all."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]
def gather(x):
    """Tensors of one shape, in the order of processes -> one, on the CPU of the first process."""
    if not dist.is_initialized():
        return x.cpu()
    parts = [torch.empty_like(x, device="cpu") for _ in range(WORLD)]
    dist.gather(x.cpu(), parts if RANK == 0 else None)
    return torch.cat(parts)

def catch_signals():
    """From now on Ctrl-C and SIGTERM are noted for `stop_asked`; a second one ends the process at once."""
    def catch(number, frame):
        if CAUGHT:
            raise KeyboardInterrupt
        CAUGHT.append(number)
    signal.signal(signal.SIGINT, catch), signal.signal(signal.SIGTERM, catch)
def stop_asked():
    """The signal that any process has caught, or 0: all must agree before one leaves its loop."""
    return int(total(torch.tensor(max(CAUGHT, default=0)), dist.ReduceOp.MAX))
def leave(number, message):
    """End a run that a signal stopped: with status 0 after SIGTERM, a scheduler's pre-emption, else 1."""
    print(message)
    sys.exit(0 if number == signal.SIGTERM else 1)

def say(line, last=False):
    """Progress: a line every five seconds, and the last."""
    if last or time.monotonic() > getattr(say, "next", 0):
        say.next = time.monotonic() + 5
        print(line)

# ---- files and checkpoints ---------------------------------------------------------------------------------
def seal(state):
    """A hash of all in a checkpoint but its tensors' values: what lacks a part or was edited is refused where
    it is read, not deep in the code. A script that edits one means it: state["seal"] = data.seal(state)."""
    about = json.dumps(state | {"seal": ""}, skipkeys=True, default=lambda x: str(getattr(x, "shape", x)))
    return hashlib.sha256(about.encode()).hexdigest()

def replace_file(path, write):
    """Write a file beside `path` and rename it over: a kill or a full disk leaves the old one whole."""
    partial = f"{path}.part"
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

def save_checkpoint(path, made_by, cfg, step, parts, **more):
    """From the first process, what `load_checkpoint` reads; `parts` are modules and optimisers by name."""
    if RANK == 0:
        state = dict(made_by=made_by, config=vars(cfg), step=step, **more)
        state |= {name: part.state_dict() for name, part in parts.items()}
        replace_file(path, lambda f: torch.save(state | {"seal": seal(state)}, f))

def lock(file):
    """Keep other processes from this open file until it is closed, or its process killed."""
    with contextlib.suppress(ImportError, OSError):     # Windows and some network disks have none
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"error: another run writes {file.name}: wait for it, or give another --out")

def load_checkpoint(path, made_by):
    """A checkpoint, mapped to the CPU, without running code from it; stops if `made_by` did not write it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        whole = isinstance(state, dict) and state.get("seal") == seal(state)
    except FileNotFoundError:
        raise SystemExit(f"error: no {path}: run {made_by} first, or point to another run with --out")
    except Exception as error:
        raise SystemExit(f"error: {path} is truncated or no checkpoint ({type(error).__name__})")
    if not whole or state.get("made_by") != made_by:
        raise SystemExit(f"error: {path} is not a checkpoint as {made_by} saved it; flags change a setting")
    return state

def begin(path, given, made_by):
    """The checkpoint to go on from with --resume, else None; refuses to start over on top of one."""
    if given.get("resume"):
        state = load_checkpoint(path, made_by)
        if given.get("max_steps", state["step"]) < state["step"]:
            raise SystemExit(f"error: {path} is at step {state['step']:,} already: give a larger --max-steps")
        print(f"resuming {path} at step {state['step']:,}")
        return state
    if os.path.exists(path) and not given.get("overwrite"):
        raise SystemExit(f"error: {path} exists: go on with --resume, or give --out DIR or --overwrite")

def restore(parts, state):
    """Load the state of every part; stops in one line where it does not fit the settings."""
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise SystemExit(f"error: the {name} there does not fit: {str(error).splitlines()[-1].strip()}")

def folder_of(dataset):
    return os.path.join("out", os.path.basename(os.path.abspath(dataset)))
def newest(name, made_by):
    """The youngest out/*/<name>."""
    found = sorted(pathlib.Path("out").glob(f"*/{name}"), key=os.path.getmtime)
    if not found:
        raise SystemExit(f"error: no out/*/{name} here: run {made_by} first, or name a run with --out")
    return str(found[-1])
