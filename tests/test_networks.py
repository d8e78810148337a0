"""COPLE-Net and the networks by name."""

import re

import pytest

pytest.importorskip("monai")
torch = pytest.importorskip("torch")

from noisyseg_fast.training import networks  # noqa: E402
from noisyseg_fast.training.cople import COPLENet, by_slices  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def count(network):
    return sum(p.numel() for p in network.parameters())


def test_coplenet_is_the_published_one():
    network = COPLENet(1, 2)
    assert count(network) == 10_521_666  # HiLab-git/COPLE-Net at in_chns 1, class_num 2
    names = set(network.state_dict())
    # Names of every kind of module in the published code.
    assert {
        "in_conv.conv_conv.0.weight",
        "in_conv.conv_conv.7.se_layers.3.bias",
        "down4.conv.conv_conv.5.running_var",
        "bridge0.conv.0.weight",
        "bridge3.conv.1.weight",
        "up1.conv1x1.weight",
        "up4.conv.conv_conv.4.weight",
        "aspp.conv_1.weight",
        "aspp.conv_4.bias",
        "aspp.conv_1x1.1.running_mean",
        "out_conv.weight",
    } <= names
    shapes = {name: tuple(v.shape) for name, v in network.state_dict().items()}
    assert shapes["down1.conv.conv_conv.0.weight"] == (64, 64, 3, 3)
    assert shapes["up1.conv1x1.weight"] == (128, 512, 1, 1)
    assert shapes["up4.conv.conv_conv.0.weight"] == (32, 32, 3, 3)
    assert shapes["aspp.conv_1.weight"] == (128, 512, 1, 1)
    assert shapes["aspp.conv_2.weight"] == (128, 512, 3, 3)
    assert [getattr(network.aspp, f"conv_{i}").dilation for i in (1, 2, 3, 4)] == [
        (1, 1), (2, 2), (4, 4), (6, 6),
    ]  # fmt: skip
    dropout = [getattr(network, f"down{i}").conv.conv_conv[3].p for i in (1, 2, 3, 4)]
    assert dropout == [0.0, 0.3, 0.4, 0.5]


def test_squeeze_and_excitation_gates_with_relu_and_adds():
    block = COPLENet(width=4).in_conv.conv_conv[7]
    x = torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        block.se_layers[3].weight.zero_()
        block.se_layers[3].bias.copy_(torch.tensor([-1.0, 0.0, 1.0, 3.0]))
    assert torch.allclose(block(x), x * torch.tensor([1.0, 1.0, 2.0, 4.0]).view(1, 4, 1, 1))


@pytest.mark.parametrize("left_out", ["aspp", "dual_pooling", "bridge"])
def test_ablations_change_the_network_and_run(left_out):
    assert count(COPLENet(width=4, **{left_out: False})) != count(COPLENet(width=4))
    assert COPLENet(2, 3, 4, **{left_out: False})(torch.zeros(1, 2, 32, 32)).shape == (1, 3, 32, 32)


def test_sizes_that_are_no_multiples_of_16_are_padded_and_cropped():
    torch.manual_seed(0)
    network = COPLENet(width=4).eval()
    x = torch.randn(1, 1, 37, 50)
    padded = torch.nn.functional.pad(x, (0, 14, 0, 11))
    assert torch.equal(network(x), network(padded)[:, :, :37, :50])


def test_volumes_go_slice_by_slice():
    torch.manual_seed(0)
    network = COPLENet(width=4, slice_axis=-1).eval()
    volume = torch.randn(2, 1, 16, 32, 3)
    whole = network(volume)
    for k in range(3):
        assert torch.allclose(whole[..., k], network(volume[..., k]), atol=1e-5)
    published = COPLENet(width=4).eval()  # slices first
    published.load_state_dict(network.state_dict())
    assert torch.allclose(published(volume.movedim(-1, 2)).movedim(2, -1), whole, atol=1e-5)
    conv = torch.nn.Conv2d(1, 2, 3, padding=1)
    assert torch.allclose(by_slices(conv, volume)[..., 1], conv(volume[..., 1]), atol=1e-6)


@pytest.mark.parametrize("name", networks.NETWORKS)
@pytest.mark.parametrize("dims", [2, 3])
def test_networks(name, dims):
    network = networks.build(name, dims, 2, 3, 16 if name == "vnet" else 8).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 2, *(2 * max(8, networks.get(name).divisor),) * dims)).shape == (
            1, 3, *(2 * max(8, networks.get(name).divisor),) * dims,
        )  # fmt: skip


def test_2d_networks_on_volumes():
    network = networks.build("unet-2d", 3, 1, 2, 4)
    assert network(torch.zeros(1, 1, 32, 32, 5)).shape == (1, 2, 32, 32, 5)
    assert networks.build("unet-2d", 2, 1, 2, 4)(torch.zeros(1, 1, 32, 32)).shape == (1, 2, 32, 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: networks.get("enet"), "unknown network 'enet'; choose from unet, basicunet"),
        (lambda: networks.build("vnet", 2, 1, 1, 8), "width must be 16 for network vnet, which has no other"),
        (
            lambda: networks.build("vnet", 2, 3, 1, 16),
            "vnet takes images of 1, 2, 4, 8 or 16 channels, not 3",
        ),
        (
            lambda: networks.build("segresnet", 2, 1, 1, 12),
            "width must be a multiple of 8 for network segresnet",
        ),
        (lambda: COPLENet(width=5), "width must be an even number from 4 up for COPLE-Net, got 5"),
    ],
)
def test_what_a_network_cannot_do_is_told(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_coplenet_in_half_precision_and_channels_last():
    torch.manual_seed(0)
    network = COPLENet(width=4).eval()
    x = torch.randn(1, 1, 32, 32)
    expected = network(x)
    last = network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert torch.allclose(last, expected, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network(x)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), expected, atol=0.1 * expected.abs().max().item() + 0.05)


def test_coplenet_compiles_without_graph_breaks():
    network = COPLENet(width=4).eval()
    x = torch.randn(1, 1, 20, 32)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), network(x), atol=1e-4)
