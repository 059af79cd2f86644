"""`diffuse import preset=`: a run from a file of weights."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.commands import import_run
from diffusion_cli.runs.load import load_model
from helpers.guided_diffusion import PublishedUNet

FLAGS = [
    "preset=improved", "preset.image_size=8", "preset.num_channels=32", "preset.channel_mult=[1,2]",
    "preset.num_res_blocks=1", "preset.attention_resolutions=[4]", "preset.num_heads=2", "preset.learn_sigma=true",
    "preset.diffusion_steps=50", "preset.noise_schedule=cosine",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a file of weights, as `torch.save(network.state_dict())` writes it."""
    monkeypatch.chdir(tmp_path)
    state = OrderedDict(PublishedUNet().state)
    vars(state)["_metadata"] = OrderedDict({"": {"version": 1}})
    torch.save(state, "model.pt")
    return tmp_path


def test_an_imported_file_samples(folder, capsys):
    assert run(["import", "source=model.pt", *FLAGS]) == 0
    shown = capsys.readouterr().out
    assert "outputs/model: UNetModel of improved-diffusion or guided-diffusion, images 3x8x8" in shown
    (words,) = [line.split()[1:] for line in shown.splitlines() if "diffuse sample" in line]
    assert words == [
        "sample",
        "run=model",
        "sampler=ddpm",
        "sampler.variance=learned",
        "sampler.spacing=linspace",
    ]
    assert run([*words, "num_samples=1", "steps=2", "device=cpu"]) == 0
    denoiser = load_model(Path("outputs/model"), "ema", torch.device("cpu")).denoiser
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 1.0], dtype=torch.float64)
    with torch.no_grad():
        eps = denoiser(x_t, t).eps
        published = PublishedUNet()(x_t, (50 * t - 1).float() * 1000 / 50)[:, :3]
    torch.testing.assert_close(eps, published, rtol=1e-4, atol=1e-4)


def test_a_network_without_a_null_class_is_not_guided_by_it(folder, capsys):
    torch.save(PublishedUNet(classes=5).state, "classes.pt")
    assert run(["import", "source=classes.pt", *FLAGS, "preset.class_cond=true"]) == 0
    words = ["sample", "run=classes", "num_samples=1", "steps=2", "device=cpu"]
    assert run([*words, "label=4"]) == 0
    capsys.readouterr()
    assert run([*words, "label=4", "guidance=cfg", "guidance.scale=2", "output=guided"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "never without a label" in line


def refused(capsys, *words: str) -> str:
    """The one line that a command prints before it fails."""
    capsys.readouterr()
    assert run([*words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not Path("outputs").exists()
    return line.removeprefix("diffuse: ")


class Harmful:
    """An object that would create a file when its pickle is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("harmed"),)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a": Harmful()}, "is not a file of tensors that torch.save wrote (names"),
        ({"state": {"a": torch.zeros(1)}}, "is not a state dict, which contains only tensors by their names"),
        ({"a": torch.zeros(1).expand(10**9)}, "has tensors larger than the file"),
        ({"a": torch.zeros(1, dtype=torch.int64)}, "a has no floating-point numbers"),
        (
            {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)},
            "has the tensor names of diffusers; load it in diffusers, save it there with save_pretrained",
        ),
        ({"a": torch.zeros(1)}, "out.2.weight is missing, so it has no weights of a UNetModel"),
    ],
)
def test_other_files_are_refused_and_run_no_code(folder, capsys, content, reason):
    torch.save(content, "other.pt")
    line = refused(capsys, "import", "source=other.pt", *FLAGS)
    assert line.startswith(f"source=other.pt: {reason}")
    assert not Path("harmed").exists()


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_other_protocols_of_pickle_are_refused_without_the_advice_of_torch(folder, capsys, protocol):
    torch.save(PublishedUNet().state | {"a": Harmful()}, "other.pt", pickle_protocol=protocol)
    line = refused(capsys, "import", "source=other.pt", *FLAGS)
    assert line.startswith("source=other.pt: is not a file of tensors that torch.save wrote (has ")
    assert "pickle" in line
    assert "weights_only" not in line
    assert not Path("harmed").exists()


def test_damaged_files_are_refused(folder, capsys):
    whole = Path("model.pt").read_bytes()
    place = whole.index(PublishedUNet().state["out.2.weight"].numpy().tobytes())
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    for content in (whole[: len(whole) // 2], b"", b"text", flipped):
        Path("damaged.pt").write_bytes(content)
        line = refused(capsys, "import", "source=damaged.pt", *FLAGS)
        assert line.startswith("source=damaged.pt: is not a file of tensors that torch.save wrote (")


def test_other_shapes_are_refused(folder, capsys):
    state = PublishedUNet().state
    torch.save(state | {"middle_block.0.out_layers.3.weight": torch.zeros(64, 64, 1, 1)}, "other.pt")
    assert "has shape" in refused(capsys, "import", "source=other.pt", *FLAGS)


def test_a_file_needs_a_preset_and_a_preset_a_file(folder, capsys):
    line = refused(capsys, "import", "source=model.pt")
    assert line.startswith("source=model.pt: is a file, which does not describe its network; name the flags")
    line = refused(capsys, "import", "source=none.pt", "preset=improved")
    assert line.startswith("source=none.pt: does not exist; give a file of weights")
    assert "is not a regular file" in refused(capsys, "import", f"source={folder}", "preset=improved")
    line = refused(capsys, "import", "source=model.pt", "preset=improved_cifar10")
    assert line.startswith("preset.num_channels=128: the weights have num_channels=32")
    line = refused(capsys, "import", "source=model.pt", "preset=improved", "preset.num_chanels=3")
    assert "did you mean preset.num_channels?" in line


@pytest.mark.parametrize(
    ("source", "name"), [("a/256x256_diffusion.pt", "256x256_diffusion"), ("b.safetensors", "b"), ("c.d/", "c.d")]
)  # fmt: skip
def test_the_run_has_the_name_of_the_file(source, name):
    assert import_run._name(source) == name
