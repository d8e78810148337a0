"""No training step makes the host wait for the device; tests/gpu counts on one, here the code paths are watched."""

import pytest

pytest.importorskip("monai")
pytest.importorskip("lightning")
torch = pytest.importorskip("torch")

from folders import nifti_folder  # noqa: E402
from steps import NoWaiting, build, everything, step  # noqa: E402

from noisyseg_fast.training import engine, methods  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", methods.METHODS)
def test_no_step_waits_for_the_device(name, monkeypatch):
    batch = everything(classes=3)
    batch["label"][:, :3] = 255 if methods.get(name).sparse else 0
    method = build(name, classes=3)
    for number in (0, 1):  # meta-gradients check themselves once
        step(method, batch, number)
    for optimizer in method.optimizers.values():
        monkeypatch.setattr(
            optimizer, "step", lambda: None
        )  # Adam reads its own counter, which is the host's
    for number in (2, 12, 19):
        with NoWaiting():
            method.training_step(batch, number)["loss"].backward()
            method.after_step(number)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.index_put((x > 0,), torch.zeros(3)),
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: torch.tensor([1.0]),
        lambda x: x.masked_select(x > 0),
    ],
)
def test_the_watch_sees_waiting(wait):
    with pytest.raises(AssertionError), NoWaiting():
        wait(torch.ones(3))


class Loss(torch.Tensor):
    """Notes when somebody reads it on the host."""

    reads = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in ("item", "__float__", "__bool__", "__int__", "tolist", "cpu", "numpy"):
            cls.reads += 1
        return super().__torch_function__(function, types, args, kwargs or {})


def test_the_engine_reads_the_losses_at_the_end_of_an_epoch(tmp_path, monkeypatch):
    plain = methods.get("ce")
    make = plain.training_step

    def watched(self, batch, number):
        return {name: value.as_subclass(Loss) for name, value in make(self, batch, number).items()}

    monkeypatch.setattr(plain, "training_step", watched)
    monkeypatch.setattr(Loss, "reads", 0)
    root = nifti_folder(tmp_path / "set", cases=8, raters=1)
    config = engine.Config(
        data=str(root), width=4, epochs=3, batch_size=1, device="cpu", out=str(tmp_path / "run")
    )
    history = engine.train(config, report=False).history
    assert len(history) == 3
    assert (
        Loss.reads == 6
    )  # the mean, and whether all is finite; not once for each of the 5 steps of an epoch
