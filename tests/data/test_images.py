"""Odd images, one by one: the table below says what a run makes of each, the tests check it."""

import contextlib
import errno
import os

import numpy as np
import pytest
from PIL import Image

from odc.data.datasets import open_dataset
from odc.data.images import ImageSet, UnreadableImage, read_image

WIDTH, HEIGHT = 40, 30
RAMP = np.linspace(0, 255, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)  # dark to light, 0 to 255
GRAY = np.repeat(RAMP.round().astype(np.uint8)[..., None], 3, 2)
COLOURS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def jpeg(path, **options):
    Image.fromarray(GRAY).save(path, "JPEG", quality=95, **options)


def saved(image, **options):
    """A function that saves an image under a path, whose end decides the format."""
    return lambda path: image.save(path, **options)


# --- what each odd file is made of ---------------------------------------------------------------

ALPHA = Image.fromarray(RAMP.round().astype(np.uint8))
PALETTE = ALPHA.convert("P")
PALETTE.putpalette([level for level in range(256) for _ in range(3)])
SIXTEEN_BITS = (RAMP * 257).round()
FRAMES = [Image.new("L", (WIDTH, HEIGHT), level) for level in (50, 250, 150)]
TURNED = Image.Exif()
TURNED[0x0112] = 6  # "turn me by 90 degrees"


def truncated_jpeg(path):
    jpeg(path)
    path.write_bytes(path.read_bytes()[:-200])


def sixteen_bits_big_endian(path):
    content = SIXTEEN_BITS.astype(">u2").tobytes()
    path.write_bytes(f"P5 {WIDTH} {HEIGHT} 65535\n".encode() + content)


def broken_png(path):
    Image.fromarray(COLOURS).save(path, "PNG")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def on_white(colours):
    """What a viewer shows of an image that is as opaque as it is light in RAMP."""
    opacity = RAMP.round()[..., None] / 255
    return colours * opacity + 255 * (1 - opacity)


# Pillow would start Ghostscript for it.
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
UNKNOWN = "not an image in a known format"
READ, UNREADABLE, LEFT_OUT = "read", "cannot be read", "not listed"

# The name, how it is made, what the run does, and the pixels that it reads or the reason.
TABLE = [
    ("plain.jpg", jpeg, READ, GRAY),
    ("cmyk.jpg", saved(Image.fromarray(GRAY).convert("CMYK"), quality=95), READ, GRAY),
    ("one-bit.png", saved(Image.fromarray(GRAY[..., 0] > 127)), READ, np.where(GRAY > 127, 255, 0)),
    # Scaled; Pillow alone would make it white.
    ("16-bit.png", saved(Image.fromarray(SIXTEEN_BITS.astype(np.uint16))), READ, GRAY),
    ("16-bit.pgm", sixteen_bits_big_endian, READ, GRAY),
    ("transparent-palette.png", saved(PALETTE, transparency=bytes(range(256))), READ,
     on_white(GRAY)),
    ("alpha.png", saved(Image.merge("RGBA", [*Image.fromarray(COLOURS).split(), ALPHA])), READ,
     on_white(COLOURS)),
    ("half-transparent.png", saved(Image.merge("LA", [ALPHA] * 2)), READ, on_white(GRAY)),
    ("gray-and-alpha.png", saved(ALPHA.convert("LA")), READ, GRAY),
    ("animated.gif", saved(FRAMES[0], save_all=True, append_images=FRAMES[1:], duration=40),
     READ, np.full_like(GRAY, 50)),  # the first frame
    ("webp.webp", saved(Image.fromarray(COLOURS), lossless=True), READ, COLOURS),
    ("tiff.tif", saved(Image.fromarray(COLOURS)), READ, COLOURS),
    ("turned-by-exif.jpg", lambda path: jpeg(path, exif=TURNED), READ, np.rot90(GRAY, -1)),
    ("one-pixel.png", saved(Image.fromarray(GRAY[-1:, -1:])), READ, GRAY[-1:, -1:]),
    # Contents decide, not the name.
    ("png-called.jpg", saved(Image.fromarray(COLOURS), format="PNG"), READ, COLOURS),
    ("with space.jpg", jpeg, READ, GRAY),
    ("line\nbreak.jpg", jpeg, READ, GRAY),
    ("ünïcødé-图片.jpg", jpeg, READ, GRAY),
    (os.fsdecode(b"not-utf8-\xe9\xff.jpg"), jpeg, READ, GRAY),
    ("UPPER.JPG", jpeg, READ, GRAY),
    ("zero-bytes.jpg", lambda path: path.touch(), UNREADABLE, UNKNOWN),
    ("truncated.jpg", truncated_jpeg, UNREADABLE, "truncated"),
    ("text.jpg", lambda path: path.write_text("<html>404</html>"), UNREADABLE, UNKNOWN),
    ("floats.tif", saved(Image.fromarray(RAMP.astype(np.float32))), UNREADABLE, "floating-point"),
    ("broken.png", broken_png, UNREADABLE, "broken data"),
    # 20,000 x 20,000 pixels would be 1.2 GB.
    ("bomb.ppm", lambda path: path.write_bytes(b"P6 20000 20000 255\n..."), UNREADABLE, "pixels"),
    ("dangling-link.jpg", lambda path: path.symlink_to("nowhere"), LEFT_OUT, None),
    ("postscript.jpg", lambda path: path.write_bytes(POSTSCRIPT), UNREADABLE, UNKNOWN),
    ("pipe.jpg", os.mkfifo, LEFT_OUT, None),
    (".hidden.jpg", jpeg, LEFT_OUT, None),
]


@pytest.mark.parametrize("name, make, answer, detail", TABLE, ids=[ascii(row[0]) for row in TABLE])
def test_table(tmp_path, name, make, answer, detail):
    Image.fromarray(COLOURS).save(tmp_path / "another.png")
    make(tmp_path / name)
    dataset = open_dataset(str(tmp_path))
    found = [i for i in range(len(dataset)) if dataset.name_of(i) == name]
    assert len(found) == (answer != LEFT_OUT)
    if answer == READ:
        image = dataset.load(found[0])
        assert image.mode == "RGB" and image.size == detail.shape[1::-1]
        tolerance = 4 if name.lower().endswith(".jpg") else 1  # JPEG is not exact
        assert np.abs(np.asarray(image).astype(int) - detail).max() <= tolerance
    if answer == UNREADABLE:
        with pytest.raises(UnreadableImage) as caught:
            dataset.load(found[0])
        assert detail in str(caught.value)


# --- errors that pass, and errors that stay ------------------------------------------------------


def fail(monkeypatch, error, times):
    """Let the next reads raise an error so many times; returns the list of all reads."""
    reads = []

    def read(path, *rest):
        reads.append(path)
        if len(reads) <= times:
            raise error
        return read_image(path, *rest)

    monkeypatch.setattr("odc.data.images.read_image", read)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return reads


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_an_error_that_passes_is_tried_again(tmp_path, monkeypatch, number):
    jpeg(tmp_path / "a.jpg")
    dataset = open_dataset(str(tmp_path))
    reads = fail(monkeypatch, OSError(number, os.strerror(number)), times=2)
    assert dataset.load(0).size == (WIDTH, HEIGHT) and len(reads) == 3
    reads = fail(monkeypatch, OSError(number, os.strerror(number)), times=9)
    with pytest.raises(UnreadableImage, match=os.strerror(number)):
        dataset.load(0)
    assert len(reads) == 3


@pytest.mark.parametrize("error", [
    FileNotFoundError(errno.ENOENT, "No such file"), PermissionError(errno.EACCES, "Not allowed"),
    OSError("image file is truncated"), ValueError("broken")])
def test_other_errors_are_not_tried_again(tmp_path, monkeypatch, error):
    jpeg(tmp_path / "a.jpg")
    reads = fail(monkeypatch, error, times=9)
    with pytest.raises(UnreadableImage):
        open_dataset(str(tmp_path)).load(0)
    assert len(reads) == 1
    reads = fail(monkeypatch, error, times=4)  # but an image that was read before is waited for
    assert open_dataset(str(tmp_path)).load(0, patient=True).size == (WIDTH, HEIGHT)
    assert len(reads) == 5


# --- what reading costs, and how exact it is ------------------------------------------------------


def test_large_photographs_are_read_and_bombs_are_not(tmp_path, monkeypatch):
    """Up to twice Pillow's warning limit a JPEG is decoded in a smaller size."""
    jpeg(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT - 1)
    assert read_image(tmp_path / "a.jpg").size == (WIDTH // 4, -(-HEIGHT // 4))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT // 2 - 1)
    with pytest.raises(Image.DecompressionBombError):
        read_image(tmp_path / "a.jpg")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_reading_leaves_no_file_open(tmp_path):
    jpeg(tmp_path / "good.jpg")
    truncated_jpeg(tmp_path / "bad.jpg")
    dataset = open_dataset(str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    for i in range(2):
        with contextlib.suppress(UnreadableImage):
            dataset.load(i)
    assert len(os.listdir("/proc/self/fd")) == before


def test_sixteen_bits_are_scaled_evenly(tmp_path):
    """0 stays black, 65535 is white, and each 8-bit level has 257 of the 16-bit ones."""
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / "levels.png")
    read = np.asarray(read_image(str(tmp_path / "levels.png")))[..., 0]
    assert np.array_equal(read, np.round(levels / 257).astype(np.uint8))


def test_how_far_mirror_images_lie():
    """Blobs that have one place in all images are far from mirrored ones, others are not."""
    random = np.random.default_rng(0)
    at = np.arange(32)
    for places, low, high in (((7, 10), 2.0, 1e9), ((5, 27), 0.9, 1.1)):
        across, down = random.uniform(*places, (2, 2000, 1, 1))
        blobs = np.exp(-((at - across) ** 2 + (at[:, None] - down) ** 2) / 20)
        images = ImageSet("folder", "train", ".", pixels=(255 * blobs).astype(np.uint8))
        assert low < images.mirror_ratio() < high
        assert images.take([0]).mirror_ratio() == 1
    broken = ImageSet("folder", "train", ".", names=np.array([b"none.png"] * 3))
    assert broken.mirror_ratio() == 1
