from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from dit.perceptual import PerceptualDistance
from sample.weights import load_perceptual, read_weights

BACKBONE = "test_resnet"  # timm's smallest


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return timm.create_model(BACKBONE, pretrained=False).eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory, classifier):
    path = tmp_path_factory.mktemp("perceptual") / "weights.pth"
    torch.save(classifier.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def distance(weights):
    return load_perceptual(BACKBONE, weights)


def linear_file(path, channels, key="lin{}.model.1.weight", value=None):
    gen = torch.Generator().manual_seed(1)
    stages = {
        key.format(k): torch.rand(1, c, 1, 1, generator=gen) if value is None else value
        for k, c in enumerate(channels)
    }
    torch.save(stages, path)
    return path


def videos(b=2, f=3, h=40, w=48):
    gen = torch.Generator().manual_seed(2)
    return [torch.rand(b, 3, f, h, w, generator=gen) * 2 - 1 for _ in range(2)]


def test_it_is_the_distance_of_unit_features(distance, classifier):
    first, second = videos()
    # The paper's equation, from the whole classifier's own stages.
    normalise = (
        torch.tensor(classifier.pretrained_cfg["mean"]).view(3, 1, 1),
        torch.tensor(classifier.pretrained_cfg["std"]).view(3, 1, 1),
    )

    def stages(frame):
        x = ((frame + 1) / 2 - normalise[0]) / normalise[1]
        x = classifier.act1(classifier.bn1(classifier.conv1(x)))
        yield x
        x = classifier.maxpool(x)
        for k in (1, 2, 3, 4):
            x = getattr(classifier, f"layer{k}")(x)
            yield x

    expected = torch.zeros(2)
    for frame in range(3):
        for a, b in zip(stages(first[:, :, frame]), stages(second[:, :, frame])):
            a, b = (z / z.norm(dim=1, keepdim=True).clamp(min=1e-10) for z in (a, b))
            expected += (a - b).square().mean(dim=(1, 2, 3)) / 3
    torch.testing.assert_close(distance(first, second), expected.detach(), rtol=1e-4, atol=1e-6)


def test_equal_videos_have_no_distance_and_order_does_not_matter(distance):
    first, second = videos()
    assert distance(first, first).tolist() == [0, 0]
    torch.testing.assert_close(distance(first, second), distance(second, first))
    alone = torch.cat([distance(first[k : k + 1], second[k : k + 1]) for k in range(2)])
    torch.testing.assert_close(distance(first, second), alone, rtol=1e-4, atol=1e-7)


def test_gradients_reach_the_video_and_nothing_else(distance):
    first, second = videos(b=1, f=1, h=32, w=32)
    second.requires_grad_()
    distance(first, second).sum().backward()
    assert second.grad is not None
    assert second.grad.isfinite().all()
    assert second.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    assert not distance.train().net.training
    flat = torch.full((1, 3, 1, 32, 32), -1.0, requires_grad=True)  # dead positions among them
    distance(torch.zeros_like(flat), flat).sum().backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_autocast_changes_nothing(distance):
    first, second = videos(b=1, f=1)
    plain = distance(first, second)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = distance(first, second)
    assert mixed.dtype == torch.float32
    assert torch.equal(plain, mixed)


def test_linear_weights_of_a_constant_are_a_sum_over_channels(distance, weights, tmp_path):
    first, second = videos()
    path = tmp_path / "lin.pth"
    even = {f"lin{k}.model.1.weight": torch.ones(1, c) / c for k, c in enumerate(distance.channels)}
    torch.save(even, path)
    learned = load_perceptual(BACKBONE, weights, path)
    torch.testing.assert_close(learned(first, second), distance(first, second))


@pytest.mark.parametrize(
    "key", ["lin{}.model.0.weight", "lins.{}.model.1.weight", "x.lin{}.weight"]
)
def test_linear_weights_are_found_under_the_names_they_go_by(distance, weights, tmp_path, key):
    usual = linear_file(tmp_path / "usual.pth", distance.channels)
    other = linear_file(tmp_path / "other.pth", distance.channels, key)
    a, b = (load_perceptual(BACKBONE, weights, path)(*videos(f=1)) for path in (usual, other))
    assert torch.equal(a, b)


def test_weight_files_of_every_kind_give_the_same(classifier, distance, tmp_path):
    expected, state = distance(*videos(f=1)), classifier.state_dict()
    files = {
        "plain.safetensors": lambda p: save_file(state, p),
        "nested.pt": lambda p: torch.save({"state_dict": state, "epoch": 3}, p),
        "module.bin": lambda p: torch.save({f"module.{k}": v for k, v in state.items()}, p),
        "head.pth": lambda p: torch.save({**state, "classifier.6.bias": torch.zeros(3)}, p),
        "no-counters.pth": lambda p: torch.save(
            {k: v for k, v in state.items() if "num_batches" not in k}, p
        ),
    }
    for name, write in files.items():
        write(tmp_path / name)
        assert torch.equal(load_perceptual(BACKBONE, tmp_path / name)(*videos(f=1)), expected), name


def test_vgg16_is_tapped_where_lpips_does_and_has_torchvisions_names():
    from torchvision.models import vgg16

    distance = PerceptualDistance("vgg16")
    assert distance.channels == [64, 128, 256, 512, 512]
    assert distance.min_size == 16
    assert distance.net.feature_info.module_name() == [f"features.{k}" for k in (3, 8, 15, 22, 29)]
    with torch.device("meta"):
        theirs = {k: v.shape for k, v in vgg16(weights=None).state_dict().items()}
    for key, value in distance.net.state_dict().items():
        assert theirs[key.replace("features_", "features.")] == value.shape
    # LPIPS's own scaling layer.
    assert distance.mean.flatten().tolist() == pytest.approx([-0.030, -0.088, -0.188])
    assert distance.std.flatten().tolist() == pytest.approx([0.458, 0.448, 0.450])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 3, 2, 40, 40), (1, 3, 3, 40, 40)), r"expected two alike \(b 3 f h w\)"),
        (((1, 4, 2, 40, 40), (1, 4, 2, 40, 40)), r"expected two alike \(b 3 f h w\)"),
        (((3, 2, 40, 40), (3, 2, 40, 40)), r"expected two alike \(b 3 f h w\)"),
        (((1, 3, 2, 16, 40), (1, 3, 2, 16, 40)), "16x40, too small .* at least 32x32"),
    ],
)
def test_videos_that_do_not_fit_are_refused(distance, shapes, message):
    first, second = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        distance(first, second)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("vgg61", "timm has no such network; the nearest are vgg"),
        ("", "timm has no such network"),
        ("vit_tiny_patch16_224", "takes pictures of one size only"),
        ("swin_tiny_patch4_window7_224", "takes pictures of one size only"),
    ],
)
def test_backbones_that_cannot_be_used_are_named(weights, backbone, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_perceptual(backbone, weights)
    assert "\n" not in str(caught.value)


def bad_weights(folder: Path, what: str, state: dict[str, torch.Tensor]) -> Path:
    path = folder / ("x.safetensors" if what == "safetensors" else "x.pth")
    if what == "a folder":
        path.mkdir()
    elif what in ("no zip", "safetensors"):
        path.write_bytes(b"no weights at all")
    elif what == "empty":
        path.touch()
    elif what == "cut short":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif what == "code":
        torch.save(torch.nn.Linear(2, 2), path)
    elif what == "a list":
        torch.save([1, 2], path)
    elif what == "lacking":
        torch.save({k: v for k, v in state.items() if "layer2" not in k}, path)
    elif what == "another shape":
        torch.save(state | {"layer1.0.conv1.weight": torch.zeros(5, 3, 3, 3)}, path)
    elif what == "deeper":
        torch.save(state | {"layer3.7.conv1.weight": torch.zeros(5, 3, 3, 3)}, path)
    elif what == "nan":
        torch.save(
            state | {"layer1.0.conv1.weight": state["layer1.0.conv1.weight"] * torch.nan}, path
        )
    return path


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("missing", FileNotFoundError, "no such file"),
        ("a folder", FileNotFoundError, "is a folder"),
        ("no zip", ValueError, "not a file of weights"),
        ("safetensors", ValueError, "not a file of weights"),
        ("empty", ValueError, "not a file of weights"),
        ("cut short", ValueError, "not a file of weights"),
        ("code", ValueError, "not a file of weights"),
        ("a list", ValueError, "holds no tensors by name"),
        ("lacking", ValueError, r"lacks layer2.* of \d+ tensors missing.*test_resnet"),
        ("another shape", ValueError, r"layer1.0.conv1.weight is \(5, 3, 3, 3\), expected"),
        ("deeper", ValueError, "which test_resnet lacks"),
        ("nan", ValueError, "layer1.0.conv1.weight has values that are NaN"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(classifier, tmp_path, what, error, message):
    path = bad_weights(tmp_path, what, classifier.state_dict())
    with pytest.raises(error, match=message) as caught:
        load_perceptual(BACKBONE, path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_linear_weights_that_do_not_fit_are_one_line(distance, weights, tmp_path):
    path, right = tmp_path / "lin.pth", distance.channels
    for channels, value, message in (
        (right[:-1], None, "for 4 stages, but test_resnet has 5"),
        ([*right[:-1], 7], None, "lin4 has 7 channels, but test_resnet has 96"),
        (right[:1] * 5, torch.tensor(-1.0).expand(1, right[0], 1, 1), "lin0 has negative"),
    ):
        linear_file(path, channels, value=value)
        with pytest.raises(ValueError, match=message) as caught:
            load_perceptual(BACKBONE, weights, path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="for 0 stages"):
        load_perceptual(BACKBONE, weights, weights)


def test_read_weights_leaves_out_what_is_no_tensor(tmp_path):
    torch.save({"model": {"a": torch.ones(2), "step": 7}}, tmp_path / "x.pt")
    assert {k: v.tolist() for k, v in read_weights(tmp_path / "x.pt").items()} == {"a": [1, 1]}
