"""Model cards of models in memory: what they state of the data, and what they leave out."""

import pytest

from diffusion_cli.export import Diffusers
from diffusion_cli.report.card import exported_files, model_card
from diffusion_cli.runs.schema import InitInfo
from helpers.exports import KL, autoencoder, denoiser

INIT = InitInfo(
    source="/private/weights", kind="DDPMPipeline of diffusers", step=None, weights=None, sha256="", taken=1, total=1,
    fresh=[],
)  # fmt: skip


def test_the_source_of_the_first_weights_is_named_without_its_path(tmp_path):
    model = denoiser(
        latent=KL, init=INIT, dataset={"_target_": "diffusion_cli.data.Folder", "path": "/private/cats"}
    )
    card = model_card(tmp_path, model, Diffusers(), weights="ema", source="x")
    started = "The training started from the weights of another program (DDPMPipeline of diffusers)"
    assert f"1 training images of cats, of shape 1x8x8. {started}" in card.text
    assert "in latents of shape 2x4x4" in card.text
    assert "private" not in card.text
    assert "No evaluation of these weights is stored" in card.text
    assert card.picture is None


def test_the_card_of_an_autoencoder_marks_an_export(tmp_path):
    assert exported_files(tmp_path / "README.md") is None
    (tmp_path / "config.json").write_text("{}")
    model_card(tmp_path, autoencoder(), Diffusers(), weights="raw", source="x").write(tmp_path)
    assert exported_files(tmp_path / "README.md") == {"README.md", "config.json"}
    assert "Autoencoder for samples of shape 1x8x8." in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "# Mine",
        "<!-- diffusers docs -->",
        "<!-- diffuse 1.0 is great -->",
        "see <!-- diffuse 1.0: a -->",
        "\xff",
    ],
)
def test_a_card_of_another_program_marks_no_export(tmp_path, text):
    (tmp_path / "README.md").write_text(text, encoding="latin-1")
    assert exported_files(tmp_path / "README.md") is None
