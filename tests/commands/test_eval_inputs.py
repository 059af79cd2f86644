"""`diffuse eval` with settings that it refuses."""

import pytest
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.config import CONF, EvalConfig, build, load
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics import Metric, ModelMetric
from helpers.evaluation import other_forms


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["samples=/nowhere", "dataset=digits"], "samples=/nowhere: does not exist"),
        (
            ["samples={plain}", "metric=bits_per_dim", "dataset=digits"],
            "metric=bits_per_dim: applies only to a run's model",
        ),
        (
            ["samples={plain}", "label=3", "dataset=digits"],
            "label=3: applies only to a run's model, and samples=",
        ),
        (
            ["samples={plain}", "steps=3", "dataset=digits"],
            "steps=3: applies only to a run's model, and samples=",
        ),
        (
            ["samples={plain}", "run=a", "dataset=digits"],
            "run=a: sets the reference dataset, and so does dataset=; leave one of them out",
        ),
        (["samples={plain}", "compare=[a,b]"], "has no effect on compare="),
        (
            ["run=a", "metric=memorization", "reference.split=val"],
            "reference.split=val: metric=memorization",
        ),
        (
            ["run=a", "num_samples=65", "metric.fid.infinity=15"],
            "metric.fid.infinity=15: needs subsets of at least 65",
        ),
        (["samples={plain}", "num_samples=91", "dataset=digits"], "num_samples=91: samples="),
        (
            ["samples={plain}", "features=inception", "features.weights=x.pth", "metric=is"],
            "features.weights=x.pth",
        ),
        (["samples={plain}"], "features=auto: plain has 1 channel(s) and no classes"),
        (
            ["samples={broken}", "dataset=digits", "force=true"],
            "cannot use 1 of the images; repair or remove b.png",
        ),
        (["samples={colour}", "dataset=digits"], "samples="),
        (["run=a", "reference=images", "reference.path=/nowhere"], "reference.path=/nowhere: does not exist"),
        (["run=a", "reference.stats=/nowhere.npz"], "reference.stats=/nowhere.npz: cannot be read"),
        (
            ["run=a", "metric=is", "reference.stats=x.npz"],
            "reference.stats=x.npz: used only by fid, sfid and fd_dinov2",
        ),
        (
            ["run=a", "metric=bits_per_dim", "num_samples=100"],
            "num_samples=100: applies only to samples, and metric=bits_per_dim uses none; "
            "replace it by: "
            "metric.bound.num_images=<number> metric.flow_likelihood.num_images=<number>",
        ),
        (
            ["run=a", "metric=bound", "steps=9"],
            "steps=9: applies only to samples, and metric=bound uses none",
        ),
        (
            ["run=a", "metric=bound", "label.age=[10,50]"],
            "label={age: [10, 50]}: applies only to samples, and metric=bound uses none",
        ),
        (
            ["run=a", "metric=inversion", "sampler=ddpm"],
            "sampler=DDPM: applies only to samples, and metric=inversion",
        ),
        (
            ["run=a", "metric=latents", "repeats=2"],
            "repeats=2: applies only to samples, and metric=latents uses none",
        ),
        (["run=a", "metric=[bound,fid]", "num_samples=9"], "num_samples=9: 9 images are fewer than the 65"),
        (
            ["run=a", "metric=bound", "processes=2"],
            "processes=2: applies only to samples, and metric=bound uses none",
        ),
        (["run=a", "metric=sfid"], "metric=sfid: needs feature maps of Inception"),
        (
            ["run=a", "metric=lpips", "metric.lpips.weights=/x.pth"],
            "metric.lpips.weights=/x.pth: no such file",
        ),
        (["compare=[none,nobody]"], "compare=none: has no metrics.json"),
        (["compare=[a]"], "compare=['a']: must be a list of 2 or more values"),
        (["metric.fid.bootstrap=3", "run=a"], "metric.fid.bootstrap=3: is too small"),
    ],
)
def test_wrong_input_gets_one_line(eval_runs, images, tmp_path, capsys, words, line):
    other_forms(images, tmp_path)
    for name in ("broken", "colour"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "a.png")
    (tmp_path / "broken" / "b.png").write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "colour" / "a.png")
    places = {name: tmp_path / name for name in ("plain", "broken", "colour")}
    filled = [word.format(**places) if word.startswith("samples") else word for word in words]
    few = [] if any(word.startswith("features=") for word in filled) else ["features.steps=20"]
    if "features=auto" not in line and not any(word.startswith("features=") for word in filled):
        few = ["features=classifier", *few]
    assert run(["eval", f"output_dir={eval_runs}/o", f"cache_dir={eval_runs}/cache", *few, *filled]) == 2
    err = [text for text in capsys.readouterr().err.splitlines() if text.startswith("diffuse:")]
    assert len(err) == 1
    assert line in err[0]


@pytest.mark.parametrize("file", sorted(CONF.glob("metric/*.yaml")), ids=lambda file: file.stem)
def test_the_keys_of_a_metric_give_its_kind(file):
    checked = load("eval", [f"metric={file.stem}", "run=x"])
    assert isinstance(checked, EvalConfig)
    for name, node in checked.metric.items():
        metric = build(node)
        assert (name in checked.model_metrics) == isinstance(metric, ModelMetric)
        assert checked.splits.get(name) == (metric.split if isinstance(metric, Metric) else None)


def test_every_setting_that_a_mode_does_not_use_is_refused_at_once():
    with pytest.raises(UsageError) as refused:
        load(
            "eval",
            ["samples=there", "dataset=digits", "sampler=ddpm", "guidance=cfg", "steps=3", "label=null"],
        )
    assert sorted(problem.key for problem in refused.value.problems) == ["guidance", "sampler", "steps"]
    with pytest.raises(
        UsageError, match=r"^sampler.eta=1.0: applies only to samples, and metric=bound uses none"
    ):
        load("eval", ["metric=bound", "sampler.eta=1.0"])
