"""Weights of improved-diffusion and guided-diffusion."""

from typing import Any

import pytest
import torch
import yaml

from diffusion_cli.config import CONF, build, load
from diffusion_cli.convert.guided_diffusion import GuidedDiffusion
from diffusion_cli.errors import FormatError, UsageError
from helpers.convert import agree, built
from helpers.guided_diffusion import PublishedUNet

SMALL: dict[str, Any] = {"image_size": 8, "num_channels": 32}
NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "improved": (
        {},
        {
            "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [4], "num_heads": 2,
            "learn_sigma": True,
        },
    ),
    "guided": (
        {
            "multiples": (1, 2, 2), "blocks": 2, "strides": (1, 2), "heads": None, "head_channels": 16,
            "new_order": True, "updown": True, "classes": 5,
        },
        {
            "channel_mult": [1, 2, 2], "num_res_blocks": 2, "attention_resolutions": [32, 8, 4],
            "num_head_channels": 16,
            "use_new_attention_order": True, "resblock_updown": True, "class_cond": True, "learn_sigma": True,
        },
    ),
    "guided, earlier order": (
        {"heads": None, "head_channels": 16, "updown": True},
        {
            "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [4], "num_head_channels": 16,
            "resblock_updown": True, "learn_sigma": True,
        },
    ),
    "guided, narrower first level": (
        {"multiples": (0.5, 0.5, 1), "channels": 64, "strides": (4,), "updown": True, "classes": 5},
        {
            "num_channels": 64, "channel_mult": [0.5, 0.5, 1], "num_res_blocks": 1, "attention_resolutions": [2],
            "num_heads": 2, "resblock_updown": True, "class_cond": True, "learn_sigma": True,
        },
    ),
    "additive": (
        {"multiples": (1, 1, 2), "strides": (4,), "heads": 1, "scale_shift": False, "outputs": 3},
        {
            "channel_mult": [1, 1, 2], "num_res_blocks": 1, "attention_resolutions": [2], "num_heads": 1,
            "use_scale_shift_norm": False,
        },
    ),
}  # fmt: skip
"""Settings of the restated network, and the same flags."""


@pytest.mark.parametrize("name", NETWORKS)
def test_output_equals_that_of_the_restated_network(name, tmp_path):
    settings, flags = NETWORKS[name]
    theirs = PublishedUNet(**settings)
    torch.save(theirs.state, tmp_path / "model.pt")
    model = GuidedDiffusion(**SMALL | flags).read(tmp_path / "model.pt")
    ours = built(model.network, model.weights())
    x, timesteps = torch.randn(3, 3, 8, 8), torch.tensor([0.25, 17.0, 731.0])
    y = torch.tensor([0, 4, 2]) if theirs.classes else None
    agree(ours(x, timesteps, y), theirs(x, timesteps, y))
    assert model.network.num_classes == (5 if theirs.classes else None)
    assert model.network.null_class == (not theirs.classes)


def test_the_order_of_the_attention_weights_matters():
    """The two orders give other outputs, so that the test above can find a wrong one."""
    x, timesteps = torch.randn(1, 3, 8, 8), torch.ones(1)
    outputs = [PublishedUNet(new_order=new)(x, timesteps) for new in (False, True)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2 * outputs[0].abs().max()


def preset(name: str, *words: str) -> GuidedDiffusion:
    return build(load("import", ["source=x", f"preset={name}", *words]).model_dump()["preset"])


def test_the_class_conditional_model_of_improved_diffusion_gets_plain_timesteps():
    """Its published flags have --rescale_timesteps False; the other models use the default, true."""
    names = ("improved_imagenet64_cond", "improved_imagenet64", "improved_cifar10", "improved_lsun_bedroom")
    rescaled = [preset(name).process().schedule.get("rescale_timesteps", False) for name in names]
    assert rescaled == [False, True, True, False]


@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    [
        ("guided_imagenet64", 1000, 296),
        ("guided_imagenet128", 1000, 422),
        ("guided_imagenet256", 1000, 554),
        ("guided_imagenet512", 1000, 559),
        ("improved_cifar10", None, 52.5),
        ("improved_imagenet64_cond", 1000, 270),
    ],
)
def test_published_networks_have_their_size(name, classes, millions):
    """Dhariwal and Nichol 2021, Table 4; Nichol and Dhariwal 2021, Sec. 4 and README."""
    flags = preset(name)
    node = {"_target_": "diffusion_cli.networks.UNet", **flags.options.model_dump()}
    with torch.device("meta"):
        network = build(node, (3, flags.image_size, flags.image_size), classes)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == pytest.approx(1e6 * millions, rel=0.015)  # rounded in the papers


def test_the_process_is_that_of_the_flags():
    process = preset("improved_cifar10").process()
    schedule = build(process.schedule)
    t = torch.tensor([1 / 4000, 1.0], dtype=torch.float64)
    torch.testing.assert_close(schedule.timestep(t), torch.tensor([0, 3999 / 4], dtype=torch.float64))
    assert process.objective["vlb_weight"] == 0.001
    assert process.sampler["variance"] == "learned"
    assert preset("improved_cifar10_vlb").process().objective["_target_"].endswith("VLB")
    assert preset("guided").process().objective["_target_"].endswith("Simple")
    assert preset("guided").process().sampler["variance"] == "large"
    other = preset("guided", "preset.sigma_small=true", "preset.predict_xstart=true").process()
    assert other.sampler["variance"] == "small"
    assert other.parameterization["_target_"].endswith("X0")
    assert other.objective["_target_"].endswith("Target")
    for option in sorted((CONF / "preset").glob("*.yaml")):
        part = preset(option.stem).process()
        for node in (part.schedule, part.parameterization, part.objective, part.sampler):
            build(node, *[build(part.schedule)] * ("samplers" in node["_target_"]))
    assert yaml.safe_load((CONF / "preset" / "guided.yaml").read_text())["diffusion_steps"] == 1000


GUIDED = NETWORKS["guided"]
CHANGES = {
    "num_channels=64": "the weights have num_channels=32, by time_embed.0.weight; set preset.num_channels=32",
    "class_cond=False": "the weights have class_cond=true, by label_emb.weight; set preset.class_cond=true",
    "learn_sigma=False": "the weights have learn_sigma=true, by out.2.weight; set preset.learn_sigma=true",
    "use_scale_shift_norm=False": "the weights have use_scale_shift_norm=true, by input_blocks.1.0.emb_layers.1.weight",
    "resblock_updown=False": "the weights have resblock_updown=true, by input_blocks.*.op.weight",
    "num_res_blocks=3": "would have 12 input_blocks, but the weights have 9",
    "channel_mult=[1, 1, 2]": "gives input_blocks.4.0.in_layers.2.weight 32 channels, but it has 64",
    "attention_resolutions=[8]": "the weights have attention_resolutions=[8,4], by input_blocks.4.1.qkv.weight",
    "num_head_channels=24": "does not divide the 32 channels of an attention layer",
    "image_size=6": "must be a multiple of 4 for 3 levels",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_flag_that_contradicts_the_weights_is_named(change):
    flag, _, value = change.partition("=")
    state = PublishedUNet(**GUIDED[0]).state
    with pytest.raises(UsageError) as caught:
        GuidedDiffusion(**SMALL | GUIDED[1] | {flag: yaml.safe_load(value)}).network(state)
    (line,) = caught.value.lines
    assert line.startswith(f"preset.{flag}={value.lower().replace(' ', '')}")
    assert CHANGES[change] in line


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            {"image_size": 96},
            "preset.channel_mult=null: is null, but only image_size=32, 64, 128, 256, 512 have",
        ),
        (
            {"channel_mult": [2, 3]},
            "preset.channel_mult=[2,3]: gives [256,384] channels, which are not multiples",
        ),
        ({"num_channels": 48}, "preset.num_channels=48: must give the first level a multiple of 32 channels"),
    ],
)
def test_flags_without_an_equivalent_are_refused(flags, line):
    with pytest.raises(UsageError) as caught:
        GuidedDiffusion(**flags)
    assert str(caught.value).startswith(line)


def changed(state: dict[str, torch.Tensor], **tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A state dict with other tensors, or without those that are None; `__` stands for a dot."""
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in (state | named).items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"time_embed__0__weight": None}, "time_embed.0.weight is missing, so it has no weights of a UNetModel"),
        ({"middle_block__1__norm__bias": None}, "middle_block.1.norm.bias is missing"),
        ({"other": torch.zeros(2)}, "other is not part of the network"),
        ({"out__2__weight": torch.zeros(())}, "out.2.weight has shape []"),
        ({"out__2__positional_embedding": torch.zeros(2, 2)}, "is a classifier with attention pooling"),
        ({"out__2__weight": torch.zeros(7, 32, 3, 3)}, "has 3 input channels and 7 output channels"),
        ({"middle_block__1__qkv__weight": torch.zeros(192, 64)}, "middle_block.1.qkv.weight has shape [192, 64]"),
    ],
)  # fmt: skip
def test_other_tensors_are_refused(tensors, reason):
    state = changed(PublishedUNet(**GUIDED[0]).state, **tensors)
    flags = GuidedDiffusion(**SMALL, **GUIDED[1])
    with pytest.raises(FormatError) as caught:
        flags.weights(flags.network(state), state)
    assert reason in str(caught.value)
