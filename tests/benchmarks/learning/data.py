"""Two sets of small images, made from packages of Debian, for the comparison of methods.

    python -m tests.benchmarks.learning.data glyphs data/glyphs
    python -m tests.benchmarks.learning.data photographs data/photographs

glyphs: the letters A to J, each drawn from many fonts; a set in the manner of notMNIST. Gray, 28 x
28. It takes all fonts that are installed; those named in README.md are enough. A fifth of the
families, by a hash of the first word of their names, is for val, so that no typeface is in both
splits. A font that is nearly the copy of another one is left out.

photographs: crops of photographs; which photograph a crop is of is its class. The photographs are
Debian's wallpapers (packages in README.md) and the two of scikit-learn, made 384 pixels high. Crops
are 32 x 32 and overlap by half. A photograph is divided into upright bands: 112 pixels for train,
then 48 for val, and so on. No crop crosses a border, so the splits show different parts of it.

Both write train/CLASS/NAME.png and val/CLASS/NAME.png and print their numbers.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
import sklearn.datasets
from PIL import Image, ImageDraw, ImageFont

LETTERS = "ABCDEFGHIJ"
GLYPH_SIZE, MARGIN = 28, 2  # pixels
LARGE = 128  # pixels at which a letter is drawn before it is made small
COPY = 0.02  # mean difference of two fonts' pixels, in 0..1, below which one copies the other

PHOTOGRAPHS = {
    name: f"usr/share/backgrounds/{file}" for name, file in (
        ("bird", "Kleiber_by_Lukas_Baubkus.jpg"), ("brook", "life_by_Aitzol_Berasategi.jpg"),
        ("brushes", "Picture_1A_by_freespace.jpg"), ("dragonfly", "Dragonfly_by_Bolly.jpg"),
        ("dandelions", "seeding_by_Clements_Engelhardt.jpg"),
        ("friends", "friends_by_Aitzol_Berasategi.jpg"),
        ("mountain", "picosdeeuropa_by_Aitzol_Berasategi.jpg"),
        ("pasture", "aitzgorri_by_Aitzol_Berasategi.jpg"),
        ("sunset", "sunset_by_Aitzol_Berasategi.jpg"), ("wine", "Wine_by_Jakkub_Mede.jpg"),
        ("blinds", "mate/nature/Blinds.jpg"), ("dune", "mate/nature/Dune.jpg"),
        ("garden", "mate/nature/Garden.jpg"), ("ladybird", "mate/nature/LadyBird.jpg"),
        ("meadow", "mate/nature/GreenMeadow.jpg"), ("wood", "mate/nature/Wood.jpg"))
} | {
    name: f"usr/share/wallpapers/{folder}/contents/images/2560x1600.jpg" for name, folder in (
        ("bywater", "BytheWater"), ("cups", "ColorfulCups"), ("evening", "EveningGlow"),
        ("forest", "Path"), ("facade", "Grey"), ("leaves", "FallenLeaf"), ("moss", "OneStandsOut"))
}
HEIGHT, CROP, STRIDE = 384, 32, 16  # pixels
TRAIN_BAND, VAL_BAND = 112, 48  # pixels, in turn


def draw_glyph(font, letter):
    """A letter, white on black, as large as fits between the margins: uint8 [28, 28], or None."""
    left, top, right, bottom = font.getbbox(letter)
    width, height = right - left, bottom - top
    side = max(width, height)
    if min(width, height) < LARGE / 16 or side > 8 * LARGE:
        return None
    canvas = Image.new("L", (side, side))
    corner = (side - width) // 2 - left, (side - height) // 2 - top
    ImageDraw.Draw(canvas).text(corner, letter, font=font, fill=255)
    inner = GLYPH_SIZE - 2 * MARGIN
    pixels = np.asarray(canvas.resize((inner, inner), Image.Resampling.BOX))
    if not 0.03 < pixels.mean() / 255 < 0.9:  # nothing is drawn, or a filled box
        return None
    return np.pad(pixels, MARGIN)


def draw_letters(path):
    """A font's family and its letters, uint8 [10, 28, 28]; None for a font without letters."""
    try:
        font = ImageFont.truetype(str(path), LARGE)
        images = [draw_glyph(font, letter) for letter in LETTERS]
    except (OSError, ValueError):
        return None
    if any(image is None for image in images):
        return None
    if len({image.tobytes() for image in images}) < len(LETTERS):
        return None
    return font.getname()[0] or path.stem, np.stack(images)


def make_glyphs(folder, fonts):
    """Write the set. Returns the images and the fonts of each split: {split: (images, fonts)}."""
    known = np.empty((0, len(LETTERS) * GLYPH_SIZE**2), np.float32)
    num_fonts = {"train": 0, "val": 0}
    for path in sorted(fonts.rglob("*")):
        drawn = draw_letters(path) if path.suffix.lower() in (".ttf", ".otf") else None
        if drawn is None:
            continue
        family, images = drawn
        row = images.reshape(1, -1).astype(np.float32) / 255
        if len(known) and np.abs(known - row).mean(axis=1).min() < COPY:
            continue
        known = np.concatenate([known, row])
        digest = hashlib.sha256(family.split()[0].encode()).digest()
        split = "val" if digest[0] % 5 == 0 else "train"
        name = "_".join(path.relative_to(fonts).with_suffix(".png").parts)
        for letter, image in zip(LETTERS, images):
            save(Image.fromarray(image), folder / split / letter / name)
        num_fonts[split] += 1
    return {split: (count * len(LETTERS), count) for split, count in num_fonts.items()}


def split_of(x):
    """The split that has the column x of a photograph."""
    return "train" if x % (TRAIN_BAND + VAL_BAND) < TRAIN_BAND else "val"


def make_photographs(folder, root):
    """Write the set. Returns the crops and the photographs of each split, as `make_glyphs`."""
    there = {name: root / file for name, file in PHOTOGRAPHS.items() if (root / file).exists()}
    if missing := PHOTOGRAPHS.keys() - there.keys():
        print(f"Not here: {', '.join(sorted(missing))}. Their packages are not installed, or have "
              "other pictures today.")
    images = {name: Image.open(path) for name, path in there.items()}
    for name in ("china", "flower"):
        images[name] = Image.fromarray(sklearn.datasets.load_sample_image(f"{name}.jpg"))
    num_crops = {"train": 0, "val": 0}
    for name, image in images.items():
        width = round(image.width * HEIGHT / image.height)
        image = image.convert("RGB").resize((width, HEIGHT), Image.Resampling.BOX)
        for x in range(0, width - CROP + 1, STRIDE):
            split = split_of(x)
            if split != split_of(x + CROP - 1):
                continue
            for y in range(0, HEIGHT - CROP + 1, STRIDE):
                path = folder / split / name / f"{y:03}_{x:04}.png"
                save(image.crop((x, y, x + CROP, y + CROP)), path)
                num_crops[split] += 1
    return {split: (count, len(images)) for split, count in num_crops.items()}


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=["glyphs", "photographs"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--root", type=Path, default=Path("/"),
                        help="folder in which the packages are installed or unpacked")
    args = parser.parse_args()
    if args.data == "glyphs":
        counts, sources = make_glyphs(args.folder, args.root / "usr/share/fonts"), "fonts"
    else:
        counts, sources = make_photographs(args.folder, args.root), "photographs"
    for split, (num_images, num_sources) in counts.items():
        print(f"{split}: {num_images:,} images of {num_sources} {sources}")


if __name__ == "__main__":
    main()
