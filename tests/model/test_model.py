"""The Python API gives what the commands give, and its examples run."""

import doctest
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion_cli as diffuse
from diffusion_cli.cli import run
from diffusion_cli.metrics import read_history
from diffusion_cli.model import functions, loaded
from diffusion_cli.samplers import DDIM, DPMSolverMultistep
from diffusion_cli.training import CosineDecay

FP32 = ["precision=fp32"]


def files(folder: Path) -> np.ndarray:
    """The images in a folder, [N, H, W], in the order of their seeds."""
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("[0-9]*.png"))])


@pytest.mark.slow
def test_the_api_imports_torch_only_when_it_is_used():
    before, after = "assert 'torch' not in sys.modules", "assert 'torch' in sys.modules"
    code = f"import sys, diffusion_cli as d; d.UsageError; {before}; d.load; {after}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_samples_equal_those_of_the_command(here):
    words = ["label=[0,1]", "guidance=cfg", "guidance.scale=2", "num_samples=6", "steps=3", "seed=5", *FP32]
    assert run(["sample", "run=outputs/class_conditional", "output=made", *words]) == 0
    model = diffuse.load("outputs/class_conditional")
    images = model.sample(
        6, steps=3, seed=5, label=[0, 1], guidance="cfg", guidance_scale=2.0, overrides=FP32
    )
    assert images.dtype == torch.uint8
    assert np.array_equal(images[:, 0].numpy(), files(here / "made"))
    few = model.sample(
        6, steps=3, seed=5, label=["0", "1"], guidance="cfg", guidance_scale=2.0, batch_size=4, overrides=FP32
    )
    assert (few.int() - images.int()).abs().max() <= 1


def test_a_sampler_made_by_hand_equals_the_named_one(here):
    model = diffuse.load("outputs/denoiser")
    sampler = diffuse.option("sampler", "dpmpp_2m", model.denoiser.schedule, spacing="karras")
    by_name = model.sample(2, steps=4, sampler="dpmpp_2m", overrides=["sampler.spacing=karras", *FP32])
    assert torch.equal(model.sample(2, steps=4, sampler=sampler, overrides=FP32), by_name)
    assert not torch.equal(model.sample(2, steps=4, sampler="dpmpp_2m", overrides=FP32), by_name)


def test_a_sampler_made_of_its_class_is_the_one_of_the_command(here):
    model = diffuse.load("outputs/denoiser")
    by_name = model.sample(2, steps=4, sampler="dpmpp_2m", overrides=FP32)
    sampler = DPMSolverMultistep(model.denoiser.schedule)
    assert torch.equal(model.sample(2, steps=4, sampler=sampler, overrides=FP32), by_name)


def test_an_option_takes_what_only_a_command_has_as_arguments():
    schedule = diffuse.option("lr_schedule", "cosine", warm_up_steps=0, decay_steps=None)
    assert vars(schedule) == vars(CosineDecay())


def test_edits_equal_those_of_the_command(here):
    model = diffuse.load("outputs/denoiser")
    images = model.sample(2, steps=2)
    (here / "mine").mkdir()
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 1:7] = True
    Image.fromarray((mask * 255).byte().numpy()).save(here / "mask.png")
    for number, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(here / "mine" / f"{number}.png")
    words = ["edit=inpaint", "edit.mask=mask.png", "restoration=replacement", "input=mine", "steps=3", *FP32]
    assert run(["edit", "run=outputs/denoiser", "output=made", *words]) == 0
    edited = model.edit("inpaint", images, mask=mask, restoration="replacement", steps=3, overrides=FP32)
    assert np.array_equal(edited[:, 0].numpy(), files(here / "made"))
    assert torch.equal(edited[:, :, ~mask], images[:, :, ~mask])
    assert not torch.equal(edited, images)
    each = torch.stack([mask, mask.flip(0)])
    edited = model.edit("inpaint", images, mask=each, restoration="replacement", steps=3, overrides=FP32)
    assert torch.equal(edited[:, 0][~each], images[:, 0][~each])
    assert (edited[:, 0] != images[:, 0])[each].any()


def test_the_device_of_a_model_has_the_words_of_the_command_line(here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(diffuse.UsageError, match="device=cuda: torch sees no GPU here"):
        diffuse.load("outputs/denoiser", device="gpu")


def test_an_edit_with_many_results_has_an_axis_for_them(here):
    way = diffuse.load("outputs/denoiser").edit("interpolate", steps=2, overrides=["edit.seeds=[0,1]"])
    assert way.shape[0] == 1
    assert way.shape[2:] == (1, 8, 8)
    assert way.shape[1] > 1


def test_numbers_equal_those_of_the_command(here):
    words = [
        "metric=kid",
        "features=classifier",
        "num_samples=60",
        "steps=2",
        "metric.kid.subset_size=30",
        *FP32,
    ]
    assert run(["eval", "run=outputs/denoiser", *words]) == 0
    (stored,) = read_history(here / "outputs" / "denoiser" / "metrics.json")
    results = diffuse.load("outputs/denoiser").evaluate(
        ["kid"], num_samples=60, steps=2, overrides=[*words[1:2], *words[4:]]
    )
    (wanted,) = stored["results"]
    assert results[wanted["name"]].value == wanted["value"]
    assert results[wanted["name"]].protocol["sampling"] == wanted["protocol"]["sampling"]
    assert len(read_history(here / "outputs" / "denoiser" / "metrics.json")) == 1


def test_a_prediction_agrees_with_the_noised_images(here):
    model = diffuse.load("outputs/denoiser")
    x_t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    prediction = model.denoise(x_t, 0.4)
    alpha, sigma = model.denoiser.schedule(torch.tensor(0.4, dtype=torch.float64))
    torch.testing.assert_close(alpha * prediction.x0 + sigma * prediction.eps, x_t, rtol=0, atol=1e-5)
    torch.testing.assert_close(prediction.score, -prediction.eps / sigma)
    each = model.denoise(x_t, torch.tensor([0.4, 0.4, 0.7]))
    torch.testing.assert_close(each.x0[:2], prediction.x0[:2], rtol=0, atol=1e-5)


def test_images_go_to_the_space_of_the_model_and_back(here):
    model = diffuse.load("outputs/denoiser")
    images = torch.arange(128, dtype=torch.uint8).view(2, 1, 8, 8)
    assert torch.equal(model.decode(model.encode(images)), images)
    latents = diffuse.load("outputs/latents")
    assert latents.encode(images).shape == (2, 2, 4, 4)
    assert latents.decode(latents.encode(images)).shape == images.shape


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda m: m.sample(0), "num_samples=0: must be greater than 0"),
        (lambda m: m.sample(sampler="dimm"), "sampler=dimm: unknown option; did you mean ddim?"),
        (lambda m: m.sample(label=3), "label=3: the model is not class-conditional"),
        (lambda m: m.sample(overrides=["stps=3"]), "stps=3: unknown key; did you mean steps?"),
        (lambda m: m.denoise(torch.zeros(1, 1, 8, 8), 1.5), "t=1.5: must be one time in (0, 1], or one per image"),
        (lambda m: m.denoise(torch.zeros(1, 1, 9, 9), 0.5), "x_t=float32 [1, 1, 9, 9]: must be float [B, 1, 8, 8]"),
        (lambda m: m.denoise(torch.zeros(1, 1, 8, 8), 0.5, [1]), "y: the model is not class-conditional"),
        (lambda m: m.edit("img2img", torch.zeros(1, 1, 8, 8)), "images=float32 [1, 1, 8, 8]: must be uint8"),
        (
            lambda m: m.edit("img2img", torch.zeros(1, 1, 8, 4).byte()),
            "images=(1, 8, 4): must have shape (1, 8, 8); resize or convert them",
        ),
        (lambda m: m.edit("inpaint", torch.zeros(1, 1, 8, 8).byte(), mask=torch.ones(8, 8)), "must be bool [8, 8]"),
        (lambda m: m.sample(1, overrides="eta=1"), "overrides=eta=1: must be a list"),
        (lambda m: m.evaluate("fid"), "metrics=fid: must be a list; write ['fid']"),
        (lambda m: diffuse.load("outputs/denoiser", step=-1), "step=-1: must be"),
        (lambda m: diffuse.load("outputs/denoiser", device="tpu"), "device=tpu: must be auto, cpu or cuda"),
        (lambda m: diffuse.train("task=classifier", "max_steps=1"), "task=classifier: trains no denoiser"),
        (lambda m: diffuse.option("task", "autoencoder"), "group=task: option autoencoder has no class"),
        (lambda m: diffuse.load("outputs/class_conditional").denoise(torch.zeros(1, 1, 8, 8), 0.5, [10]), "0 to 9"),
        (lambda m: diffuse.load("outputs/classifier"), "was trained with task=classifier"),
        (lambda m: diffuse.option("samplr", "ddim"), "group=samplr: unknown group; did you mean sampler?"),
        (lambda m: diffuse.option("sampler", "ddmi"), "sampler=ddmi: unknown option; did you mean"),
        (lambda m: diffuse.option("lr_schedule", "cosine", warm_up_steps=0), "decay_steps: required"),
        (lambda m: diffuse.option("dataset", "array", "data"), "path: required; give path="),
        (lambda m: diffuse.option("optimizer", "adamw", lr=-1), "optimizer.lr=-1: must be greater than 0"),
        (lambda m: diffuse.option("sampler", "ddim", None, etta=1), "sampler.etta=1: unknown key; did you mean eta?"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_as_on_the_command_line(here, mistake, message):
    model = diffuse.load("outputs/denoiser")
    with pytest.raises(diffuse.UsageError) as caught:
        mistake(model)
    assert message in str(caught.value)


HALF, NOTHING = torch.zeros(8, 4, dtype=torch.bool), torch.zeros(8, 8, dtype=torch.bool)
NOT_SET = "cannot be set for a loaded model; leave it out"
MISUSES = {
    "m.sample(sampler=option('sampler', 'ddim', option('schedule', 'edm')))": (
        "sampler: was built with schedule EDM, but the model has Cosine; build it with model.denoiser.schedule"
    ),
    "m.sample(sampler=option('sampler', 'ddim', option('schedule', 'cosine', num_timesteps=10)))": (
        "sampler: was built with schedule Cosine, but the model has Cosine with other settings"
    ),
    "m.sample(1, sampler=sampler(m), overrides=['sampler.eta=1'])": (
        "overrides=sampler.eta=1: has no effect on a sampler object; set it in option(...)"
    ),
    "m.sample(1, sampler=DDIM)": "sampler=DDIM: must be the name of an option",
    "m.evaluate(['kid'], sampler=sampler(m))": "sampler=DDIM: must be the name of an option",
    "m.edit('img2img', im, sampler=sampler(m))": "sampler=DDIM: must be the name of an option",
    "m.sample(1, sampler=None)": "sampler=null: unknown option",
    "m.sample(num_samples=None)": "num_samples=null: must be an integer",
    "m.sample(1, steps=object())": "steps=object: must be a number or text",
    "m.sample(1, overrides=['output=x'])": f"overrides=output: {NOT_SET}",
    "m.sample(1, overrides=['strip=true'])": f"overrides=strip: {NOT_SET}",
    "m.edit('img2img', im, overrides=['input=val'])": f"overrides=input: {NOT_SET}",
    "m.sample(1, overrides=None)": "overrides=null: must be a list of texts",
    "m.sample(1, overrides=[1])": "overrides=1: must be text",
    "m.evaluate(None)": "metrics=null: must be a list of texts",
    "m.edit(None, im)": "edit=null: unknown option",
    "m.edit('img2img', 'val')": "images=val: must be uint8 [B, 1, 8, 8]",
    "m.edit('anomaly', im, overrides=['edit.truth=x'])": "edit.truth=x: scores results of diffuse edit; leave it out",
    "m.edit('img2img')": "images: missing; give a tensor uint8 [B, 1, 8, 8]",
    "m.edit('interpolate')": "images: missing; give a tensor uint8 [B, 1, 8, 8], or edit.seeds=[0,1] in overrides",
    "m.edit('inpaint', im, mask='m.png')": "mask=m.png: must be bool [8, 8]",
    "m.edit('inpaint', im, mask=HALF)": "mask=bool [8, 4]: must be bool [8, 8], the size of the images",
    "m.edit('inpaint', im, mask=NOTHING)": "mask: has no true element; set the pixels to paint to true",
    "m.edit('img2img', im, mask=NOTHING)": "mask=bool [8, 8]: has no effect on edit=img2img; leave it out",
    "m.denoise(x, 'a')": "t=a: must be one time in (0, 1], or one per image",
    "m.denoise(x, None)": "t: missing; give one time in (0, 1], or one per image",
    "m.denoise('x', 0.5)": "x_t=x: must be float [B, 1, 8, 8]",
    "m.denoise(None, 0.5)": "x_t: missing; give float [B, 1, 8, 8]",
    "m.denoise(im, 0.5)": "x_t=uint8 [1, 1, 8, 8]: must be float [B, 1, 8, 8]; use encode",
    "m.decode('x')": "x=x: must be float [B, 1, 8, 8]",
    "m.encode(None)": "images: missing; give uint8 [B, 1, 8, 8]",
    "c.denoise(x, 0.5, 'a')": "y=a: must be a list with one class per image, by index (0 to 9) or name",
    "c.denoise(x, 0.5, ['a'])": "y=a: unknown class",
    "option('schedule', None)": "schedule=None: unknown option",
    "option(None, 'x')": "group=None: unknown group",
    "option('sampler', 'ddim')": 'sampler=ddim: needs schedule; write option("sampler", "ddim", schedule)',
    "option('sampler', 'ddim', 'cosine')": (
        'schedule=cosine: must be Schedule; write option("sampler", "ddim", schedule)'
    ),
    "option('sampler', 'ddim', None)": "schedule=null: must be Schedule",
    "option('model', 'unet_tiny')": (
        'model=unet_tiny: needs shape and conditions; write option("model", "unet_tiny", shape, conditions)'
    ),
    "option('model', 'unet_tiny', 8, 24)": "shape=8: must be tuple[int, ...]",
    "option('model', 'unet_tiny', (1, 8, 8), None, 3)": "3 positional arguments, but the class takes 2",
    "option('optimizer', 'adamw')": "lr: required; give lr=",
    "diffuse.load('nothing')": "run=nothing: does not exist; the newest runs in outputs are: ",
    "diffuse.load('denoisr')": "run=denoisr: does not exist; did you mean denoiser?",
    "diffuse.load('outputs/denoiser/checkpoints/last.ckpt')": (
        "run=outputs/denoiser/checkpoints/last.ckpt: is a file; give the run's folder, outputs/denoiser"
    ),
    "diffuse.load('outputs')": "run=outputs: has no checkpoints/last.ckpt; the newest runs in outputs are: ",
    "m.sample(1, steps=1, guidance='auto')": (
        "guidance=auto: needs a weaker model; set guidance.run= or guidance.step="
    ),
    "m.sample(1, steps=1, guidance='auto', overrides=['guidance.run=classifier'])": (
        "guidance.run=classifier: was trained with task=classifier; give a run of task=diffusion"
    ),
    "c.sample(1, steps=1, guidance='classifier', overrides=['guidance.run=denoiser'])": (
        "guidance.run=denoiser: was trained with task=diffusion; give a run of task=classifier"
    ),
    "diffuse.train(SMALL, 'latent.run=denoiser')": (
        "latent.run=denoiser: was trained with task=diffusion; give a run of task=autoencoder"
    ),
    "m.sample(1, steps=5000)": (
        "steps=5000: exceeds the 1000 timesteps of the schedule; use 1 to 1000, "
        "or set sampler.spacing=karras, log_snr or time, which have no such limit"
    ),
    "diffuse.load('outputs/denoiser', device=None)": "device=null: must be auto, cpu or cuda",
    "diffuse.load('outputs/denoiser', weights=None)": "weights=null: must be ema or raw",
    "diffuse.train(['max_steps=0'])": "max_steps=0: must be greater than 0",
    "diffuse.train(1)": "overrides=1: must be a list of texts",
    "diffuse.evaluate(im, ['fid'], ['dataset=nope'])": "dataset=nope: unknown option",
    "diffuse.evaluate(x, ['fid'], 'dataset=digits')": (
        "samples=float32 [1, 1, 8, 8]: must be uint8 [N, 1, 8, 8]; convert them"
    ),
    "diffuse.evaluate(None, ['fid'])": "samples: missing; give a path, or uint8 [N, C, H, W]",
}


def test_misuses_are_one_line_each(here):
    names = {
        "m": diffuse.load("outputs/denoiser"), "c": diffuse.load("outputs/class_conditional"), "diffuse": diffuse,
        "option": diffuse.option, "sampler": lambda m: DDIM(m.denoiser.schedule), "DDIM": DDIM,
        "im": torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "x": torch.zeros(1, 1, 8, 8), "HALF": HALF,
        "NOTHING": NOTHING, "SMALL": ["dataset=digits", "model=unet_tiny", "max_steps=1"],
    }  # fmt: skip
    answers = {}
    for call in MISUSES:
        with pytest.raises(diffuse.UsageError) as caught:
            eval(call, names)
        answers[call] = str(caught.value)
    assert {call: line for call, line in answers.items() if MISUSES[call] not in line} == {}


def test_a_sampler_may_have_a_schedule_of_its_own_with_the_same_settings(here):
    model = diffuse.load("outputs/denoiser")
    sampler = diffuse.option("sampler", "ddim", diffuse.option("schedule", "cosine"))
    assert torch.equal(
        model.sample(1, steps=2, sampler=sampler, overrides=FP32), model.sample(1, steps=2, overrides=FP32)
    )


def test_no_labels_are_no_label(here):
    model = diffuse.load("outputs/class_conditional")
    assert torch.equal(model.sample(2, steps=2, label=[]), model.sample(2, steps=2, label="none"))


def test_names_of_classes_are_labels_of_a_prediction(here):
    model = diffuse.load("outputs/class_conditional")
    x_t = torch.zeros(2, 1, 8, 8)
    assert torch.equal(model.denoise(x_t, 0.5, ["3", 1]).x0, model.denoise(x_t, 0.5, [3, 1]).x0)


def test_images_in_memory_are_measured_as_those_in_a_file(here):
    images = diffuse.load("outputs/denoiser").sample(30, steps=1)
    np.save("images.npy", images.numpy())
    words = ["dataset=digits", "features=classifier", "metric.kid.subset_size=20"]
    in_memory, in_file = (diffuse.evaluate(each, ["kid"], words) for each in (images, "images.npy"))
    assert in_memory["kid_classifier"].value == in_file["kid_classifier"].value


@pytest.mark.parametrize(
    "name", ["naïve", "123", "true", "null", "a, b", "it's", "back\\slash", "a=b", "\\'"]
)
def test_a_run_may_have_any_name(here, name):
    shutil.copytree("outputs/denoiser", here / "outputs" / name)
    model = diffuse.load(Path("outputs", name))
    assert model.sample(1, steps=1).shape == (1, 1, 8, 8)
    assert diffuse.load(name).folder == model.folder


def test_settings_of_the_model_cannot_be_overridden(here):
    model = diffuse.load("outputs/denoiser")
    for word in ("weights=raw", "step=3", "run=other", "device=cpu"):
        with pytest.raises(diffuse.UsageError, match="cannot be set for a loaded model"):
            model.sample(1, overrides=[word])


def test_gradients_flow_through_what_follows_the_model(here):
    model = diffuse.load("outputs/denoiser")
    weight = torch.ones(1, requires_grad=True)
    (model.denoise(torch.zeros(1, 1, 8, 8), 0.5).x0 * weight).sum().backward()
    (model.encode(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)) * weight).sum().backward()
    assert weight.grad is not None


def test_the_examples_run(here, monkeypatch):
    shutil.copytree("outputs/denoiser", "outputs/demo")
    (here / "pictures").mkdir()
    for number, image in enumerate(diffuse.load("outputs/demo").sample(20, steps=2)):
        Image.fromarray(image[0].numpy()).save(here / "pictures" / f"{number:02d}.png")
    results = [
        doctest.testmod(module, extraglobs={"load": diffuse.load}, optionflags=doctest.ELLIPSIS)
        for module in (functions, loaded)
    ]
    assert sum(result.attempted for result in results) > 12
    assert sum(result.failed for result in results) == 0
