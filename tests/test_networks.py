"""COPLE-Net and the networks by name."""

import re

import pytest

pytest.importorskip("monai")
torch = pytest.importorskip("torch")

from noisyseg_fast.training import networks  # noqa: E402
from noisyseg_fast.training.cople import COPLENet, by_slices  # noqa: E402
from noisyseg_fast.training.vnet import VNet  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


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
    network = networks.build(name, dims, 2, 3, 16 if name == "monai_vnet" else 8).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 2, *(2 * max(8, networks.get(name).divisor),) * dims)).shape == (
            1, 3, *(2 * max(8, networks.get(name).divisor),) * dims,
        )  # fmt: skip


@pytest.mark.parametrize("dims", [2, 3])
def test_scse_unet_is_the_basicunet_with_its_blocks_squeezed_and_excited(dims):
    torch.manual_seed(0)
    network, plain = (networks.build(name, dims, 1, 2, 4).eval() for name in ("scse_unet", "basicunet"))
    blocks = [m for m in network.modules() if isinstance(m, networks.SpatialChannelSE)]
    assert len(blocks) == 9  # five levels down, four up
    x = torch.randn(1, 1, *(32,) * dims)
    for block in blocks:  # both gates at a half: x / 2 + x / 2
        for p in block.parameters():
            torch.nn.init.zeros_(p)
    plain.load_state_dict({n: v for (n, _), v in zip(
        plain.state_dict().items(),
        (v for n, v in network.state_dict().items() if ".channel." not in n and ".spatial." not in n),
        strict=True,
    )})  # fmt: skip
    torch.testing.assert_close(network(x), plain(x))
    torch.nn.init.ones_(blocks[-1].spatial.bias)
    assert not torch.allclose(network(x), plain(x))


def test_scse_adds_a_gate_of_channels_and_a_gate_of_pixels():
    torch.manual_seed(0)
    block, x = networks.SpatialChannelSE(2, 4), torch.randn(2, 4, 5, 6)
    squeeze, _, excite, _ = block.channel.fc
    channel = excite(squeeze(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
    pixel = (torch.einsum("bchw,c->bhw", x, block.spatial.weight[0, :, 0, 0]) + block.spatial.bias).sigmoid()
    torch.testing.assert_close(block(x), x * channel + x * pixel[:, None])
    assert squeeze.out_features == 2


def test_2d_networks_on_volumes():
    network = networks.build("unet-2d", 3, 1, 2, 4)
    assert network(torch.zeros(1, 1, 32, 32, 5)).shape == (1, 2, 32, 32, 5)
    assert networks.build("unet-2d", 2, 1, 2, 4)(torch.zeros(1, 1, 32, 32)).shape == (1, 2, 32, 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: networks.get("enet"), "unknown network 'enet'; choose from unet, basicunet"),
        (lambda: networks.build("monai_vnet", 2, 1, 1, 8), "width must be 16 for network monai_vnet, which"),
        (
            lambda: networks.build("monai_vnet", 2, 3, 1, 16),
            "monai_vnet takes images of 1, 2, 4, 8 or 16 channels, not 3",
        ),
        (
            lambda: networks.build("segresnet", 2, 1, 1, 12),
            "width must be a multiple of 8 for network segresnet",
        ),
        (
            lambda: networks.build("scse_unet", 2, 1, 1, 1),
            "width must be at least 2 for network scse_unet, got",
        ),
        (lambda: VNet(1), "spatial_dims must be 2 or 3, got 1"),
        (lambda: VNet(norm="layer"), "norm must be one of batch, group, instance, none, got 'layer'"),
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


# ---- V-Net and two heads --------------------------------------------------------------------------


def test_vnet_is_the_left_atrium_scripts():
    network = VNet(3, 1, 2)  # one class, both heads
    assert count(network) == 9_448_866  # networks/vnet_sdf.py of DTML, batch norm
    shapes = {name: tuple(v.shape) for name, v in network.state_dict().items()}
    assert shapes["block_one.conv.0.weight"] == (16, 1, 3, 3, 3)
    assert shapes["block_three.conv.6.weight"] == (64, 64, 3, 3, 3)
    assert shapes["block_four_dw.conv.0.weight"] == (256, 128, 2, 2, 2)
    assert shapes["block_five.conv.7.running_var"] == (256,)
    assert shapes["block_five_up.conv.0.weight"] == (256, 128, 2, 2, 2)
    assert shapes["block_eight.conv.4.weight"] == (32,)
    assert shapes["out_conv.weight"] == (2, 16, 1, 1, 1)
    assert count(networks.build("vnet", 3, 1, 2)) == count(network)


def test_vnet_adds_its_skips():
    torch.manual_seed(0)
    network = VNet(2, 1, 1, 4, norm="none").eval()
    x = torch.randn(1, 1, 16, 32)
    for level in ("eight", "seven", "six", "five"):
        last = getattr(network, f"block_{level}_up").conv[0]
        torch.nn.init.zeros_(last.weight), torch.nn.init.zeros_(last.bias)
    expected = network.out_conv(network.block_nine(network.block_one(x)))
    assert torch.allclose(network(x), expected, atol=1e-6)
    torch.nn.init.ones_(network.block_eight_up.conv[0].weight)
    assert not torch.allclose(network(x), expected, atol=1e-6)


@pytest.mark.parametrize("norm", ["batch", "group", "instance", "none"])
@pytest.mark.parametrize("dims", [2, 3])
def test_vnet_norms(norm, dims):
    kinds = (
        torch.nn.modules.batchnorm._BatchNorm,
        torch.nn.GroupNorm,
        torch.nn.modules.instancenorm._InstanceNorm,
    )
    kind = dict(zip(("batch", "group", "instance"), kinds, strict=True)).get(norm)
    network = VNet(dims, 2, 3, 4, norm=norm)
    assert sum(isinstance(m, kinds) for m in network.modules()) == (0 if kind is None else 29)
    assert kind is None or all(isinstance(m, kind) for m in network.modules() if isinstance(m, kinds))
    assert network(torch.randn(2, 2, *(32,) * dims)).shape == (2, 3, *(32,) * dims)


def test_vnet_drops_whole_channels_in_training_alone():
    torch.manual_seed(0)
    network, x = VNet(2, 1, 1, 4, norm="none"), torch.randn(1, 1, 32, 32)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))
    assert isinstance(VNet(3, 1, 1, 4).dropout, torch.nn.Dropout3d)


@pytest.mark.parametrize("name", ["unet", "basicunet", "segresnet", "vnet", "coplenet"])
def test_a_second_head_on_any_network(name):
    torch.manual_seed(0)
    inner = networks.build(name, 2, 1, 4, 8).eval()
    logits, maps = networks.TwoHeads(inner)(x := torch.randn(1, 1, 32, 32))
    both = inner(x)
    assert torch.equal(logits, both[:, :2])
    assert torch.equal(maps, both[:, 2:].tanh())


def test_the_first_share_of_foreground_leaves_the_maps_alone():
    network = networks.TwoHeads(networks.build("vnet", 2, 1, 2, 4))
    before = network.network.out_conv.bias[1].item()
    networks.start_at(network, 0.1)
    bias = network.network.out_conv.bias
    assert bias[0].sigmoid().item() == pytest.approx(0.1)
    assert bias[1].item() == before
