"""Schedulers of diffusers: the same noise, prediction and sampler, and the way back."""

import json
from typing import Any

import pytest
import torch

from diffusion_cli.config import build, check_node
from diffusion_cli.convert import diffusers_scheduler as scheduler
from diffusion_cli.diffusion.schedules import Discrete
from diffusion_cli.errors import FormatError
from diffusion_cli.samplers import integrate

TABLES = [
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
]  # fmt: skip


diffusers: Any = pytest.importorskip("diffusers")


def config_of(name: str, **settings: Any) -> dict[str, Any]:
    """The scheduler_config.json that diffusers writes for a class, read again."""
    return json.loads(getattr(diffusers, name)(**settings).to_json_string())


def log_snr(alpha_bar: torch.Tensor) -> torch.Tensor:
    return torch.log(alpha_bar) - torch.log1p(-alpha_bar)


BETAS: list[dict[str, Any]] = [
    {},
    {"num_train_timesteps": 50, "beta_start": 0.001, "beta_end": 0.2},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 400},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100},
    {"trained_betas": [0.1, 0.15, 0.3], "num_train_timesteps": 3},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (name, settings)
        for name in TABLES
        for settings in BETAS
        if not (name == "PNDMScheduler" and "rescale_betas_zero_snr" in settings)
    ],
)
def test_the_noise_is_that_of_diffusers(name, settings):
    config = config_of(name, **settings)
    process = scheduler.read(config)
    assert check_node("schedule", process.schedule) == check_node("sampler", process.sampler) == []
    assert check_node("objective", process.objective) == []
    ours: Discrete = build(process.schedule)
    theirs = getattr(diffusers, name).from_config(config).alphas_cumprod.double()
    T = len(theirs)
    t = torch.arange(1, T + 1, dtype=torch.float64) / T
    torch.testing.assert_close(ours.timestep(t), torch.arange(T).double(), rtol=0, atol=1e-9)
    last = T - 1 if settings.get("rescale_betas_zero_snr") else T  # some schedulers replace the 0 by 2^-24
    torch.testing.assert_close(ours.log_snr(t)[:last], log_snr(theirs)[:last], rtol=0, atol=2e-3)
    # Their float32 loses digits where alpha_bar is close to 1; there the comparison above is the finer one.
    torch.testing.assert_close(ours(t)[0].square()[:last], theirs[:last], rtol=2e-4, atol=1e-7)


def test_sigmoid_betas_are_those_of_diffusers():
    process = scheduler.read(config_of("DDPMScheduler", beta_schedule="sigmoid"))
    theirs = diffusers.DDPMScheduler(beta_schedule="sigmoid").betas.double()
    torch.testing.assert_close(torch.tensor(process.schedule["betas"]).double(), theirs, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("DDPMScheduler", {"variance_type": "fixed_large"}, {"variance": "large", "spacing": "leading"}),
        ("DDPMScheduler", {"timestep_spacing": "trailing"}, {"variance": "small", "spacing": "trailing"}),
        ("DDIMScheduler", {"timestep_spacing": "linspace"}, {"eta": 0.0, "spacing": "linspace"}),
        ("DPMSolverMultistepScheduler", {}, {"order": 2, "eta": 0.0, "spacing": "linspace"}),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "solver_order": 3},
            {"order": 3, "eta": 1.0, "spacing": "karras"},
        ),
        ("UniPCMultistepScheduler", {"solver_type": "bh1"}, {"variant": "bh1", "order": 2}),
        ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}, {"eta": 0.0, "spacing": "log_snr"}),
        ("EulerAncestralDiscreteScheduler", {}, {"eta": 1.0, "spacing": "linspace"}),
        ("PNDMScheduler", {"skip_prk_steps": True}, {"spacing": "leading"}),
    ],
)  # fmt: skip
def test_the_sampler_has_the_settings_of_the_scheduler(name, settings, words):
    process = scheduler.read(config_of(name, **settings))
    assert words.items() <= process.sampler.items()


@pytest.mark.parametrize(
    ("name", "settings", "remark"),
    [
        ("DDIMScheduler", {"set_alpha_to_one": False}, "set_alpha_to_one=false"),
        ("DDIMScheduler", {"steps_offset": 1}, "steps_offset=1"),
        ("DDPMScheduler", {"clip_sample_range": 2.0}, "clip_sample_range=2.0"),
        ("DDPMScheduler", {"thresholding": True, "sample_max_value": 1.5}, "thresholding=true"),
        ("PNDMScheduler", {}, "skip_prk_steps=false"),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, "final_sigmas_type=sigma_min"),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}, "lambda_min_clipped=-5.1"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "shift=3.0"),
        ("UniPCMultistepScheduler", {"lower_order_final": False}, "lower_order_final=false"),
        ("UniPCMultistepScheduler", {"solver_order": 3}, "lower_order_final=true"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "lower_order_final=true"),
        (
            "DPMSolverMultistepScheduler",
            {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
            "lower_order_final=false",
        ),
    ],
)
def test_settings_that_change_images_are_named(name, settings, remark):
    (found,) = (text for text in scheduler.read(config_of(name, **settings)).remarks if remark in text)
    assert found.startswith(remark)


def test_settings_without_an_effect_are_not_named():
    config = config_of("DPMSolverMultistepScheduler", lower_order_final=False)
    assert scheduler.read(config).remarks == ()


def test_clipping_is_that_of_the_scheduler():
    clips = {
        name: scheduler.read(config_of(name, **settings)).clip
        for name, settings in [
            ("DDPMScheduler", {}), ("DDIMScheduler", {}), ("EulerDiscreteScheduler", {}),
        ]
    }  # fmt: skip
    assert clips == {"DDPMScheduler": True, "DDIMScheduler": "keep_eps", "EulerDiscreteScheduler": False}
    assert scheduler.read(config_of("DDIMScheduler", clip_sample=False)).clip is False


def test_the_steps_of_a_flow_are_those_of_diffusers():
    process = scheduler.read(config_of("FlowMatchEulerDiscreteScheduler"))
    schedule, theirs = build(process.schedule), diffusers.FlowMatchEulerDiscreteScheduler()
    sampler = build(process.sampler, schedule)
    theirs.set_timesteps(7)
    times = sampler.grid(7)
    torch.testing.assert_close(schedule.timestep(times[:-1]).float(), theirs.timesteps, rtol=1e-6, atol=0)

    def network(x, timestep):
        return torch.sin(3 * x) + timestep / 1000

    def denoise(x, t):
        from diffusion_cli.diffusion.denoiser import Prediction

        c_skip, c_out, _, c_noise = build(process.parameterization)(schedule, t)
        x0 = c_skip * x + c_out * network(x, c_noise)
        alpha, sigma = schedule(t)
        return Prediction(x0, (x - alpha * x0) / sigma, sigma)

    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    *_, ours = integrate(sampler, denoise, x, times, lambda: x)
    for timestep in theirs.timesteps:
        x = theirs.step(network(x, timestep.double()), timestep, x, return_dict=False)[0]
    torch.testing.assert_close(ours, x, rtol=1e-6, atol=1e-6)


def test_the_noise_of_the_sdes_is_that_of_diffusers():
    process = scheduler.read(config_of("ScoreSdeVeScheduler", snr=0.2, correct_steps=2))
    schedule, theirs = build(process.schedule), diffusers.ScoreSdeVeScheduler(snr=0.2, correct_steps=2)
    theirs.set_timesteps(11)
    theirs.set_sigmas(11)
    ours = schedule(theirs.timesteps.double())[1].float()
    torch.testing.assert_close(ours, theirs.sigmas, rtol=2e-4, atol=0)
    assert (process.sampler["snr"], process.sampler["corrector_steps"]) == (0.2, 2)
    preserving = scheduler.read({"_class_name": "ScoreSdeVpScheduler", "beta_max": 20})
    assert preserving.schedule["_target_"].endswith(".VP")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"_class_name": "LCMScheduler"}, "scheduler LCMScheduler has no equivalent"),
        ({}, "scheduler null has no equivalent"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "laplace"}, "beta_schedule=laplace"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "variance_type=learned"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, "needs a network with a variance head"),
        ({"_class_name": "DDPMScheduler", "num_train_timesteps": 10**12}, "num_train_timesteps="),
        ({"_class_name": "DDPMScheduler", "num_train_timesteps": "1000"}, "num_train_timesteps=1000"),
        ({"_class_name": "DDPMScheduler", "beta_end": 2.0}, "beta_end=2.0"),
        ({"_class_name": "DDPMScheduler", "trained_betas": [0.1]}, "trained_betas has 1 numbers, not 1000"),
        ({"_class_name": "DDPMScheduler", "rescale_betas_zero_snr": True}, "prediction_type=epsilon is undefined"),
        ({"_class_name": "DDPMScheduler", "prediction_type": "flow_prediction"}, "contradicts use_flow_sigmas"),
        ({"_class_name": "DDPMScheduler", "new_trick": 3}, "new_trick is not a known setting"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type=continuous"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas="),
    ],
)  # fmt: skip
def test_settings_without_an_equivalent_are_refused(config, reason):
    with pytest.raises(FormatError, match=reason):
        scheduler.read(config)


def test_settings_of_early_versions_are_read():
    early = {
        "_class_name": "DDPMScheduler",
        "tensor_format": "pt",
        "timestep_values": None,
        "new_trick": None,
    }
    assert scheduler.read(early | {"predict_epsilon": True}) == scheduler.read(config_of("DDPMScheduler"))
    assert scheduler.read(early | {"predict_epsilon": False}).parameterization == kind("X0")


def test_another_process_has_the_objective_and_the_sampler_that_suit_it():
    process = scheduler.read(config_of("DDPMScheduler", clip_sample_range=2.0))
    flow = scheduler.changed(process, node("FlowMatching"), kind("Flow"))
    suited = scheduler.read(config_of("FlowMatchEulerDiscreteScheduler"))
    assert (flow.objective, flow.sampler, flow.clip) == (suited.objective, suited.sampler, suited.clip)
    assert flow.remarks == ()
    cosine = scheduler.changed(process, node("Cosine"))
    assert (cosine.objective, cosine.sampler) == (process.objective, process.sampler)
    assert cosine.remarks == process.remarks != ()
    learned = scheduler.read({"_class_name": "DDPMScheduler"}, learns_variance=True)
    assert scheduler.changed(learned, parameterization=kind("V")).objective == learned.objective


def test_a_variance_head_gives_the_hybrid_loss_and_a_null_class_its_dropout():
    config = {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
    process = scheduler.read(config, learns_variance=True, label_dropout=0.1)
    assert process.objective["_target_"].endswith(".Hybrid")
    assert process.objective["label_dropout"] == 0.1
    assert process.sampler["variance"] == "learned"


# --- The way back ------------------------------------------------------------------------


def node(name: str, **options: Any) -> dict[str, Any]:
    return {"_target_": f"diffusion_cli.diffusion.schedules.{name}", **options}


def kind(name: str) -> dict[str, Any]:
    return {"_target_": f"diffusion_cli.diffusion.parameterizations.{name}"}


def alpha_bar_of(schedule: Discrete) -> list[float]:
    t = torch.arange(1, schedule.num_timesteps + 1, dtype=torch.float64) / schedule.num_timesteps
    return schedule(t)[0].square().tolist()


WRITTEN = [
    node("Linear", num_timesteps=100, beta_start=1e-4, beta_end=0.02, zero_terminal_snr=False),
    node("ScaledLinear", num_timesteps=1000, beta_start=0.00085, beta_end=0.012, zero_terminal_snr=False),
    node("Cosine", num_timesteps=60, offset=0.008, max_beta=0.999, zero_terminal_snr=False),
    node("Cosine", num_timesteps=60, offset=0.02, max_beta=0.999, zero_terminal_snr=False),
    node("Sigmoid", num_timesteps=60, start=-3.0, end=3.0, tau=1.0, max_beta=0.999, zero_terminal_snr=False),
    node("Betas", betas=[0.1, 0.2, 0.4], zero_terminal_snr=False),
]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("schedule", WRITTEN, ids=str)
def test_a_written_scheduler_has_the_noise_and_reads_back(name, schedule):
    ours: Discrete = build(schedule)
    alpha_bar = alpha_bar_of(ours)
    config = scheduler.write(schedule, kind("V"), name, alpha_bar=alpha_bar)
    theirs = getattr(diffusers, name).from_config(config)
    torch.testing.assert_close(
        theirs.alphas_cumprod.double(), torch.tensor(alpha_bar).double(), rtol=2e-4, atol=1e-7
    )
    again = scheduler.read(config)
    assert again.parameterization == kind("V")
    assert again.remarks == ()
    t = torch.arange(1, len(alpha_bar) + 1, dtype=torch.float64) / len(alpha_bar)
    torch.testing.assert_close(build(again.schedule).log_snr(t), ours.log_snr(t), rtol=1e-9, atol=1e-9)


def test_named_betas_are_written_by_name():
    names = [
        scheduler.write(schedule, kind("Eps"), alpha_bar=[0.9, 0.5]).get("beta_schedule")
        for schedule in WRITTEN
    ]
    assert names == ["linear", "scaled_linear", "squaredcos_cap_v2", None, None, None]


def test_rescaled_timesteps_are_refused_where_they_differ():
    of_1000 = WRITTEN[0] | {"num_timesteps": 1000, "rescale_timesteps": True}
    assert scheduler.write(of_1000, kind("Eps"))["num_train_timesteps"] == 1000
    with pytest.raises(FormatError, match="rescale_timesteps=true with 100 timesteps has no equivalent"):
        scheduler.write(WRITTEN[0] | {"rescale_timesteps": True}, kind("Eps"))


@pytest.mark.parametrize("name", [name for name in TABLES if name != "PNDMScheduler"])
@pytest.mark.parametrize("schedule", WRITTEN, ids=str)
def test_zero_terminal_snr_is_written_and_sampled_from(name, schedule):
    schedule = schedule | {"zero_terminal_snr": True}
    ours: Discrete = build(schedule)
    config = scheduler.write(schedule, kind("V"), name, alpha_bar=alpha_bar_of(ours))
    theirs = getattr(diffusers, name).from_config(json.loads(json.dumps(config)))
    assert theirs.alphas_cumprod[-1] <= 2**-24
    theirs.set_timesteps(3)
    x = torch.linspace(-2, 2, 16).reshape(1, 1, 4, 4) * theirs.init_noise_sigma
    for timestep in theirs.timesteps:
        v = torch.sin(3 * theirs.scale_model_input(x, timestep))
        x = theirs.step(v, timestep, x, return_dict=False)[0]
    assert x.isfinite().all()
    again = scheduler.read(config)
    assert check_node("schedule", again.schedule) == []
    t = torch.arange(1, ours.num_timesteps + 1, dtype=torch.float64) / ours.num_timesteps
    torch.testing.assert_close(build(again.schedule).log_snr(t), ours.log_snr(t), rtol=1e-9, atol=1e-9)


def test_pndm_is_refused_with_zero_terminal_snr():
    schedule = WRITTEN[0] | {"zero_terminal_snr": True}
    with pytest.raises(FormatError, match="PNDMScheduler divides by alpha, which is 0"):
        scheduler.write(schedule, kind("V"), "PNDMScheduler", alpha_bar=[0.5, 0.0])


def test_a_last_beta_of_1_is_zero_terminal_snr():
    config = {"_class_name": "DDIMScheduler", "trained_betas": [0.1, 0.4, 1.0], "num_train_timesteps": 3}
    schedule = build(scheduler.read(config | {"prediction_type": "v_prediction"}).schedule)
    torch.testing.assert_close(torch.tensor(alpha_bar_of(schedule)), torch.tensor([0.9, 0.54, 0.0]))
    with pytest.raises(FormatError, match="prediction_type=epsilon is undefined with a last beta of 1"):
        scheduler.read(config)
    with pytest.raises(FormatError, match="trained_betas: only the last may be 1"):
        scheduler.read(config | {"prediction_type": "sample", "trained_betas": [0.1, 1.0, 1.0]})


def test_flows_and_variance_exploding_processes_are_written():
    config = scheduler.write(
        node("Rectified", grid_t_min=0.001), kind("Flow"), "FlowMatchEulerDiscreteScheduler"
    )
    assert diffusers.FlowMatchEulerDiscreteScheduler.from_config(config).timesteps[0] == 999
    schedule = node("VE", sigma_min=0.01, sigma_max=50.0, grid_t_min=1e-5)
    config = scheduler.write(schedule, kind("Score"), "ScoreSdeVeScheduler")
    assert scheduler.read(config).schedule == schedule
    schedule = node("VP", beta_min=0.1, beta_max=20.0, grid_t_min=1e-3)
    assert scheduler.read(scheduler.write(schedule, kind("Eps"), "ScoreSdeVpScheduler")).schedule == schedule


@pytest.mark.parametrize(
    ("schedule", "parameterization", "name", "reason"),
    [
        (node("SubVP"), "Eps", "DDIMScheduler", "SubVP has no equivalent in diffusers"),
        (node("VE"), "Score", "DDIMScheduler", "ScoreSdeVeScheduler needs parameterization=score"),
        (node("Rectified"), "V", "FlowMatchEulerDiscreteScheduler", "needs parameterization=flow"),
        (WRITTEN[0], "EDMPreconditioning", "DDIMScheduler", "has no prediction_type"),
        (WRITTEN[0], "Flow", "FlowMatchEulerDiscreteScheduler", "is not that of this scheduler"),
        (WRITTEN[0], "Eps", "LCMScheduler", "LCMScheduler is unknown"),
    ],
)
def test_a_process_that_no_scheduler_has_is_refused(schedule, parameterization, name, reason):
    with pytest.raises(FormatError, match=reason):
        scheduler.write(schedule, kind(parameterization), name)
