"""Settings that follow the data, those of the demonstration, and those of a run that continues."""

import pytest
import torch

from odc import distributed, settings
from odc.data.images import ImageSet
from odc.data.datasets import open_dataset
from tests.processes import run_processes

CPU = torch.device("cpu")


def chosen(arguments, dataset, saved=None, device=CPU, pretrained=None):
    """The settings of train.py with these arguments and images, where 800 are learned a second."""
    args = settings.parse(arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "images_per_second", lambda *rest: 800)
        settings.resolve_defaults(args, dataset, saved, device, pretrained)
    return args


def made_up(num_images, side=32, labels=None):
    """An ImageSet of so many images in memory, of which none is drawn."""
    pixels = torch.zeros(1, side, side, dtype=torch.uint8).expand(num_images, -1, -1)
    return ImageSet("folder", "train", "somewhere", pixels=pixels.numpy(), labels=labels)


def test_a_small_set_has_its_own_settings():
    args = chosen(["--data", "somewhere"], made_up(6000, 28))
    assert (args.num_clusters, args.min_cluster_size) == (150, 5)  # 40 images a cluster
    assert (args.arch, args.image_size, args.batch_size) == ("narrow", 28, 64)
    assert (args.lr, args.initial, args.recluster_interval) == (0.06, "pixels", 10)


@pytest.mark.parametrize("num_images, expected", [
    (60, (2, 200, 4)), (20_000, (500, 52, 2)), (60_000, (1000, 14, 1)), (199_999, (1000, 10, 1))])
def test_clusters_epochs_and_crops_follow_the_number_of_images(num_images, expected):
    args = chosen(["--data", "somewhere"], made_up(num_images))
    assert (args.num_clusters, args.epochs, args.crops) == expected
    assert args.min_cluster_size * args.num_clusters <= num_images


def test_a_gpu_takes_larger_images():
    small, large = made_up(3000, 32), made_up(3000, 300)
    data = ["--data", "somewhere"]
    args = chosen(data, large)
    assert (args.image_size, args.arch) == (64, "narrow")
    if torch.cuda.is_available():
        args = chosen(data, large, device=torch.device("cuda"))
        assert (args.image_size, args.arch) == (224, "resnet18")
        assert chosen(data, small, device=torch.device("cuda")).image_size == 32


def test_images_that_all_face_one_way_are_not_mirrored(capsys):
    images = made_up(50)
    images.mirror_ratio = lambda: 1.3
    assert chosen(["--data", "somewhere"], images).augmentation == "unmirrored"
    assert "Crops are not mirrored, as mirror images lie 1.3 times" in capsys.readouterr().out
    for arguments in (["--augmentation", "small"], ["--epochs", "0"]):
        assert chosen(["--data", "somewhere", *arguments], images).augmentation == "small"
    assert chosen(["--data", "somewhere"], made_up(50)).augmentation == "small"


def test_what_is_given_wins(capsys):
    args = chosen(["--data", "somewhere", "--num-clusters", "7", "--neck", "recipe",
                   "--crops", "2"], made_up(6000))
    assert (args.num_clusters, args.neck, args.crops) == (7, "recipe", 2)
    assert chosen(["--data", "somewhere", "--epochs", "0"], made_up(6000)).recluster_interval == 1
    told = capsys.readouterr().out
    assert "preset small, but --crops 2 --neck recipe --num-clusters 7" in told


@pytest.mark.parametrize("arguments, num_images, preset", [
    (["--data", "somewhere", "--preset", "recipe"], 6000, "recipe"),
    (["--data", "somewhere"], 200_000, "recipe"), ([], 5000, "demo")])
def test_which_preset_applies_when(arguments, num_images, preset, capsys):
    args = vars(chosen(arguments, made_up(num_images)))
    assert args.items() >= (settings.PRESETS[preset] | {"preset": preset}).items()
    assert f"{num_images:,} images, preset {preset}\n" in capsys.readouterr().out


def test_help_shows_the_three_values_of_each_setting(capsys):
    with pytest.raises(SystemExit):
        settings.parse(["--help"])
    text = capsys.readouterr().out
    assert "(224 | - | 32)" in text and "(recipe | plain | plain)" in text
    assert max(map(len, text.splitlines())) <= 80 and len(text.splitlines()) <= 100


def test_a_run_continues_with_its_settings():
    saved = dict(settings=vars(chosen(["--data", "here", "--lr", "0.5"], made_up(6000))),
                 progress={}, log_position=0)
    args = chosen(["--data", "/there", "--epochs", "9"], made_up(6000), saved)
    assert (args.data, args.lr, args.epochs, args.num_clusters) == ("/there", 0.5, 9, 150)


def image_size_where_one_process_measures_other_images():
    images = made_up(100)
    images.typical_side = lambda: (32, 48)[distributed.rank()]
    return chosen(["--data", "somewhere"], images).image_size


def test_processes_agree_on_the_size_of_images():
    """Files are measured. A machine that cannot read some of them would measure others."""
    assert run_processes(image_size_where_one_process_measures_other_images, 2) == [32, 32]


def test_images_of_files_are_measured(folder):
    images = open_dataset(str(folder))
    assert images.typical_side() == 36 and images.mirror_ratio() > 0
