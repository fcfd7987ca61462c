"""Odd images, one by one: the table below says what a run makes of each, the tests check it."""

import errno
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from odc.data.datasets import open_dataset
from odc.data.images import UnreadableImage, read_image
from tests.processes import ROOT

WIDTH, HEIGHT = 40, 30
RAMP = np.linspace(0, 255, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)  # dark to light, 0 to 255
GRAY = np.repeat(RAMP.round().astype(np.uint8)[..., None], 3, 2)
COLOURS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def jpeg(path):
    Image.fromarray(GRAY).save(path, "JPEG", quality=95)


# --- what each odd file is made of ---------------------------------------------------------------


def truncated_jpeg(path):
    jpeg(path)
    path.write_bytes(path.read_bytes()[:-200])


def cmyk(path):
    Image.fromarray(GRAY).convert("CMYK").save(path, "JPEG", quality=95)


def one_bit(path):
    Image.fromarray(GRAY[..., 0] > 127).save(path, "PNG")


def sixteen_bits(path):
    Image.fromarray((RAMP * 257).round().astype(np.uint16)).save(path, "PNG")


def sixteen_bits_big_endian(path):
    content = (RAMP * 257).round().astype(">u2").tobytes()
    path.write_bytes(f"P5 {WIDTH} {HEIGHT} 65535\n".encode() + content)


def palette_with_transparency(path):
    image = Image.fromarray(RAMP.round().astype(np.uint8)).convert("P")
    image.putpalette([level for level in range(256) for _ in range(3)])
    image.save(path, "PNG", transparency=bytes(range(256)))


def alpha(path):
    Image.fromarray(np.dstack([COLOURS, RAMP.round().astype(np.uint8)]), "RGBA").save(path, "PNG")


def half_transparent_gray(path):
    ramp = RAMP.round().astype(np.uint8)
    Image.merge("LA", [Image.fromarray(ramp)] * 2).save(path, "PNG")


def gray_and_alpha(path):
    Image.fromarray(GRAY[..., 0]).convert("LA").save(path, "PNG")


def animated_gif(path):
    frames = [Image.new("L", (WIDTH, HEIGHT), level) for level in (50, 250, 150)]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], duration=40, loop=0)


def webp(path):
    Image.fromarray(COLOURS).save(path, "WEBP", lossless=True)


def tiff(path):
    Image.fromarray(COLOURS).save(path, "TIFF")


def floats(path):
    Image.fromarray(RAMP.astype(np.float32) / 255).save(path, "TIFF")


def turned_by_exif(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    Image.fromarray(GRAY).save(path, "JPEG", quality=95, exif=exif)


def bomb(path, edge=20000):
    """A PNG of 20,000 x 20,000 black pixels in 400 kB: decoded, 1.6 GB."""
    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
    packer = zlib.compressobj(9)
    row = b"\0" * (1 + edge)
    pixels = b"".join(packer.compress(row) for _ in range(edge)) + packer.flush()
    header = struct.pack(">IIBBBBB", edge, edge, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def large(path):
    """Half as large as what Pillow refuses by itself."""
    bomb(path, 9500)


def one_pixel(path):
    Image.fromarray(GRAY[-1:, -1:]).save(path, "PNG")


def dangling_link(path):
    path.symlink_to("nowhere")


def postscript(path):
    """Pillow would start Ghostscript for it."""
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
                     b"showpage\n%%EOF\n")


def broken_png(path):
    Image.fromarray(COLOURS).save(path, "PNG")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def on_white(colours):
    """What a viewer shows of an image that is as opaque as it is light in RAMP."""
    opacity = RAMP.round()[..., None] / 255
    return colours * opacity + 255 * (1 - opacity)


UNKNOWN = "not an image in a known format"
READ, UNREADABLE, LEFT_OUT = "read", "cannot be read", "not listed"

# The name, how it is made, what the run does, and the pixels that it reads or the reason.
TABLE = [
    ("plain.jpg", jpeg, READ, GRAY),
    ("cmyk.jpg", cmyk, READ, GRAY),
    ("one-bit.png", one_bit, READ, np.where(GRAY > 127, 255, 0)),
    ("16-bit.png", sixteen_bits, READ, GRAY),  # scaled; Pillow alone would make it white
    ("16-bit.pgm", sixteen_bits_big_endian, READ, GRAY),
    ("palette-with-transparency.png", palette_with_transparency, READ, on_white(GRAY)),
    ("alpha.png", alpha, READ, on_white(COLOURS)),
    ("half-transparent.png", half_transparent_gray, READ, on_white(GRAY)),
    ("gray-and-alpha.png", gray_and_alpha, READ, GRAY),
    ("animated.gif", animated_gif, READ, np.full_like(GRAY, 50)),  # the first frame
    ("webp.webp", webp, READ, COLOURS),
    ("tiff.tif", tiff, READ, COLOURS),
    ("turned-by-exif.jpg", turned_by_exif, READ, GRAY),  # EXIF is ignored, as torchvision does
    ("one-pixel.png", one_pixel, READ, GRAY[-1:, -1:]),
    ("png-called.jpg", tiff, READ, COLOURS),  # contents decide, not the name
    ("with space.jpg", jpeg, READ, GRAY),
    ("line\nbreak.jpg", jpeg, READ, GRAY),
    ("ünïcødé-图片.jpg", jpeg, READ, GRAY),
    (os.fsdecode(b"not-utf8-\xe9\xff.jpg"), jpeg, READ, GRAY),
    ("UPPER.JPG", jpeg, READ, GRAY),
    ("zero-bytes.jpg", lambda path: path.touch(), UNREADABLE, UNKNOWN),
    ("truncated.jpg", truncated_jpeg, UNREADABLE, "truncated"),
    ("text.jpg", lambda path: path.write_text("<html>404</html>"), UNREADABLE, UNKNOWN),
    ("floats.tif", floats, UNREADABLE, "floating-point"),
    ("broken.png", broken_png, UNREADABLE, "broken data"),
    ("bomb.png", bomb, UNREADABLE, "pixels"),
    ("large.png", large, UNREADABLE, "9500 x 9500 pixels are more than the 89,478,485 allowed"),
    ("dangling-link.jpg", dangling_link, UNREADABLE, "No such file"),
    ("postscript.jpg", postscript, UNREADABLE, UNKNOWN),
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

    def read(path):
        reads.append(path)
        if len(reads) <= times:
            raise error
        return read_image(path)

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


# --- files that cannot be read, and a folder that changes ----------------------------------------


def test_unreadable_permissions():
    """As an ordinary user, whoever runs the tests."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        jpeg(Path(folder) / "secret.jpg")
        os.chmod(Path(folder) / "secret.jpg", 0)
        dataset = open_dataset(folder)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(UnreadableImage, match="^Permission denied"):
                dataset.load(0)
        finally:
            os.seteuid(user)


def test_bomb_is_refused_without_its_memory(tmp_path):
    """The process may take 300 MB on top of what it has: the 1.6 GB are never asked for."""
    bomb(tmp_path / "bomb.png")
    code = """
import resource, sys
from odc.data.datasets import open_dataset
from odc.data.images import UnreadableImage
dataset = open_dataset(sys.argv[1])
pages = int(open("/proc/self/statm").read().split()[0]) if sys.platform == "linux" else 10**7
limit = pages * resource.getpagesize() + 300 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    dataset.load(0)
except UnreadableImage as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True,
                            text=True, cwd=ROOT)
    assert "pixels" in result.stdout, result.stderr


def test_reading_leaves_no_file_open(tmp_path):
    for name, make, answer, _ in TABLE:
        if answer == READ or name in ("truncated.jpg", "text.jpg", "broken.png"):
            make(tmp_path / name)
    dataset = open_dataset(str(tmp_path))
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        for i in range(len(dataset)):
            try:
                dataset.load(i)
            except UnreadableImage:
                pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_sixteen_bits_are_scaled_evenly(tmp_path):
    """0 stays black, 65535 is white, and each 8-bit level has 257 of the 16-bit ones."""
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / "levels.png")
    read = np.asarray(read_image(str(tmp_path / "levels.png")))[..., 0]
    assert np.array_equal(read, np.round(levels / 257).astype(np.uint8))
