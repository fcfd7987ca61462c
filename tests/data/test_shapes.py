"""The built-in set: ten forms, light on dark, that vary in all that is not the form."""

import torch

from odc.data.datasets import open_dataset
from odc.data.shapes import FORMS


def test_both_splits_have_every_form_as_often_and_no_image_twice():
    pixels = []
    for split, count in (("train", 5000), ("val", 1000)):
        opened = open_dataset("shapes", split)
        assert len(opened) == count and opened.name == "shapes" and opened.classes == list(FORMS)
        assert opened.labels.bincount().tolist() == [count // 10] * 10
        assert opened.pixels.shape == (count, 32, 32, 3) and opened.pixels.dtype == "uint8"
        assert opened.load(3).size == (32, 32) and opened.name_of(3) == "3"
        assert not torch.equal(opened.labels, torch.arange(count) % 10)  # in a random order
        pixels.append(torch.from_numpy(opened.pixels))
    assert len(torch.cat(pixels).flatten(1).unique(dim=0)) == 6000
