"""Images/s a core of what a loader worker does: 500 x 375 JPEGs to 224 x 224 crops.

The peer: torchvision's transforms do the whole recipe in the worker, as usual. Also the half of
ours that runs on the device: on one core, or on the card of --device.
"""

import os
import random
import statistics
import tempfile

import torch
from PIL import Image
from torchvision import transforms

from odc.data import augmentation as augment
from odc.data.augmentation import Augmentation
from odc.data.datasets import open_dataset
from odc.data.loader import training_batches
from tests.benchmarks import timing

IMAGES = 64


def write_photographs(folder, count, seed=0):
    """Crops of 500 x 375 of the two photographs that scikit-learn ships, as JPEGs of quality 90."""
    from sklearn.datasets import load_sample_images

    generator, photographs = random.Random(seed), load_sample_images().images
    for i in range(count):
        pixels = photographs[i % 2]
        top, left = (generator.randrange(limit - edge)
                     for limit, edge in zip(pixels.shape, (375, 500)))
        crop = Image.fromarray(pixels[top : top + 375, left : left + 500])
        crop.save(os.path.join(folder, f"{i:03}.jpg"), quality=90)


def torchvision_recipe():
    """The whole recipe, image by image, in float32, as it is usually written."""
    return transforms.Compose([
        transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(),
        transforms.RandomRotation(2), transforms.ColorJitter(0.4, 0.4, 1.0, 0.5),
        transforms.RandomGrayscale(0.2), transforms.ToTensor(),
        transforms.Normalize(augment.MEAN, augment.STD)])


def main():
    device = timing.make_parser(__doc__).parse_args().device
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(folder, IMAGES)
        dataset, recipe = open_dataset(folder), torchvision_recipe()

        def worker():
            return next(iter(training_batches(dataset, Augmentation(), 224, IMAGES, seed=0,
                                              epoch=0)))

        def peer():
            names = [dataset.name_of(i) for i in torch.randint(IMAGES, (IMAGES,))]
            torch.stack([recipe(Image.open(os.path.join(folder, name))) for name in names])

        batch = worker()
        times = timing.interleave({
            "worker": worker, "torchvision's whole recipe": peer,
            "device half": lambda: augment.augment_batch(batch.images.to(device), batch.draws),
        }, rounds=9)
    speeds = {name: f"{IMAGES / statistics.median(seconds):.0f} images/s"
              for name, seconds in times.items()}
    timing.table("Input on one core, 500x375 JPEGs to 224", times, "worker", speeds, device)


if __name__ == "__main__":
    main()
