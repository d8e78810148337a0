"""The nnU-Net v2 trainers: the loss as nnU-Net calls it, and, where nnU-Net is installed, real runs of it."""

import json
import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from noisyseg_fast import nr_dice_loss, pixel_loss, reference  # noqa: E402
from noisyseg_fast.compat import nnunet  # noqa: E402


def test_the_folder_that_nnunet_is_told():
    command = [sys.executable, "-m", "noisyseg_fast.compat.nnunet"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (Path(printed.strip()) / "noisyseg_trainers.py").is_file()


def test_labels_with_an_ignored_one():
    z = torch.randn(2, 3, 8, 9, generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, 4, (2, 1, 8, 9), generator=torch.Generator().manual_seed(1)).to(torch.int16)
    loss = nnunet.Loss(partial(nr_dice_loss, include_background=False), ignore_label=3)
    keep = y[:, 0] != 3
    expected = reference.nr_dice_loss(
        z, y[:, 0].clamp(max=2).long(), activation="softmax", include_background=False, mask=keep
    )
    torch.testing.assert_close(loss(z, y), expected)
    y[:, 0][~keep] = 0  # not what an ignored pixel means
    assert not torch.isclose(nnunet.Loss(loss.function)(z, y), expected)


def test_regions_with_an_ignored_channel():
    z = torch.randn(2, 2, 8, 9, generator=torch.Generator().manual_seed(0))
    y = (torch.rand(2, 3, 8, 9, generator=torch.Generator().manual_seed(1)) > 0.5).to(torch.int16)
    got = nnunet.Loss(partial(pixel_loss, kind="gce"), regions=True, ignore_label=9)(z, y)
    expected = pixel_loss(z, y[:, :2].float(), kind="gce", activation="sigmoid", mask=y[:, 2] == 0)
    torch.testing.assert_close(got, expected)
    other = y.clone()
    other[:, :2][:, :, y[0, 2] == 1] = 1
    assert not torch.isclose(got, nnunet.Loss(partial(pixel_loss, kind="gce"), regions=True)(z, y[:, :2]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """nnU-Net's three folders with a small data set of ten images, preprocessed; its environment."""
    pytest.importorskip("nnunetv2")
    import nibabel

    root = tmp_path_factory.mktemp("nnunet")
    data = root / "raw" / "Dataset501_Balls"
    random = np.random.default_rng(0)
    for i in range(10):
        grid = np.indices((40, 48, 12)) - random.uniform(10, 30, 3).reshape(3, 1, 1, 1) * [
            [[[1]]],
            [[[1]]],
            [[[0.3]]],
        ]
        mask = (np.sqrt((grid**2 * np.array([1, 1, 4]).reshape(3, 1, 1, 1)).sum(0)) < 8).astype(np.uint8)
        image = (mask + 0.3 * random.standard_normal(mask.shape)).astype(np.float32)
        for folder, name, array in (
            ("imagesTr", f"case_{i:02}_0000", image),
            ("labelsTr", f"case_{i:02}", mask),
        ):
            path = data / folder / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, np.diag([1, 1, 3, 1])), path)
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "ball": 1},
        "numTraining": 10,
        "file_ending": ".nii.gz",
    }
    (data / "dataset.json").write_text(json.dumps(content))
    environment = os.environ | {
        "nnUNet_raw": str(root / "raw"),
        "nnUNet_preprocessed": str(root / "preprocessed"),
        "nnUNet_results": str(root / "results"),
        "nnUNet_extTrainer": str(nnunet.FOLDER),
        "nnUNet_n_proc_DA": "0",
        "nnUNet_def_n_proc": "1",
        "OMP_NUM_THREADS": "1",
    }
    code = (
        "from nnunetv2.experiment_planning.plan_and_preprocess_api import *\n"
        "extract_fingerprints([501], num_processes=1)\n"
        "plan_experiments([501])\n"
        "preprocess([501], configurations=['2d'], num_processes=[1])\n"
    )
    run(code, environment | {"nnUNet_n_proc_DA": "1"})
    return root, environment


def run(code, environment, check=True):
    result = subprocess.run(
        [sys.executable, "-c", "if __name__ == '__main__':\n" + textwrap.indent(code, "    ")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if check:
        assert result.returncode == 0, result.stdout[-1500:] + result.stderr[-3000:]
    return result


TRAIN = """
import numpy, torch
torch.set_num_threads(1)
from nnunetv2.run.run_training import get_trainer_from_args
def make():
    numpy.random.seed(0); torch.manual_seed(0)
    trainer = get_trainer_from_args("501", "2d", 0, "{trainer}", device=torch.device("cpu"))
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = {epochs}, 2, 1
    trainer.save_every = 1
    trainer.configuration_manager.configuration["batch_size"] = 2
    trainer.configuration_manager.configuration["patch_size"] = [32, 32]
    return trainer
"""


@pytest.mark.parametrize("name", ["nnUNetTrainerNRDice", "nnUNetTrainerGCE"])
def test_nnunet_trains_with_our_losses(folders, name):
    _, environment = folders
    code = TRAIN.format(trainer=name, epochs=1) + (
        "trainer = make()\n"
        "trainer.run_training()\n"
        "from noisyseg_fast.compat.nnunet import Loss\n"
        "assert isinstance(trainer.loss.loss, Loss)\n"
        "print('FUNCTION', trainer.loss.loss.function.func.__name__)\n"
        "print('LOSS', trainer.logger.local_logger.my_fantastic_logging['train_losses']\n"
        "      if hasattr(trainer.logger, 'local_logger') else 0)\n"
    )
    output = run(code, environment).stdout
    assert f"FUNCTION {'nr_dice_loss' if 'NRDice' in name else 'pixel_loss'}" in output


def test_mcpm_needs_clean_cases_and_learns_from_them(folders):
    root, environment = folders
    prepared = root / "preprocessed" / "Dataset501_Balls"
    listed = prepared / "clean_cases.json"
    listed.unlink(missing_ok=True)
    start = TRAIN.format(trainer="nnUNetTrainerMCPM", epochs=1)
    refused = run(start + "make().run_training()\n", environment, check=False)
    assert refused.returncode and "clean_cases.json: no such file" in refused.stderr
    listed.write_text(json.dumps([f"case_{i:02}" for i in range(3)]))
    code = start + (
        "trainer = make()\n"
        "trainer.initialize()\n"
        "before = [p.clone() for p in trainer.ours.weigher.parameters()]\n"
        "trainer.run_training()\n"
        "assert any(not torch.equal(a, b) for a, b in zip(before, trainer.ours.weigher.parameters()))\n"
        "clean = set(trainer.clean_batches.data_loader.indices)\n"
        "noisy = set(trainer.dataloader_train.data_loader.indices)\n"
        "assert clean and noisy and not clean & noisy, (clean, noisy)\n"
        "assert clean <= {'case_00', 'case_01', 'case_02'}\n"
        "import os\n"
        "path = os.path.join(trainer.output_folder, 'checkpoint_final.pth')\n"
        "other = make(); other.load_checkpoint(path)\n"
        "for a, b in zip(trainer.ours.state_dict().values(), other.ours.state_dict().values()):\n"
        "    assert torch.equal(a, b)\n"
        "assert other.ours.optimizers['weigher'].state_dict()['state']\n"
    )
    run(code, environment)
