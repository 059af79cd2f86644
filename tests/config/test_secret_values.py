"""Secrets are refused before anything is stored, and are not shown."""

import pytest

from diffusion_cli.cli import run
from diffusion_cli.config.secret_values import secrets_in

STORED = "which config.yaml would store; set FSSPEC_HTTPS, or use the login of the provider"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://me:hush@host/z.zip", "contains a password"),
        ("zip://*.png::https://me:hush@host/z.zip", "contains a password"),
        ("mysql+pymysql://me:hush@host/db", "contains a password"),
        ("https://host/z.zip?token=hush", "contains the secret token=..."),
        ("https://host/z.zip?a=1&access_token=hush", "contains the secret access_token=..."),
        ("https://host/z.zip?se=2030&sig=hush", "contains the secret sig=..."),
        ("https://host/z.zip?X-Amz-Date=1&X-Amz-Signature=hush", "contains the secret X-Amz-Signature=..."),
        ("https://host/z.zip?key=hush", "contains the secret key=..."),
    ],
)
def test_a_secret_in_any_url_is_a_problem_without_its_value(url, problem):
    for key, config in {
        "dataset.path": {"dataset": {"path": url}},
        "dataset.masks": {"dataset": {"masks": url}},
        "input": {"input": ["a.png", url]},
        "logger.mlflow.tracking_uri": {"logger": {"mlflow": {"tracking_uri": url}}},
    }.items():
        (found,) = secrets_in(config)
        assert (found.key, found.problem) == (key, f"{problem}, which config.yaml would store")
        assert "hush" not in str(found)


@pytest.mark.parametrize(
    "value",
    [
        "s3://bucket/photos", "https://me@host/z.zip", "https://host:80/a@b.zip", "hf://datasets/o/n@main/a.zip",
        "https://host/z.zip?version=2&monkey=3&design=4", "https://host/z.zip?token=", "photos?token=1/*.png",
        "sqlite:///C:/runs/mlflow.db", "a:b@c", 3, None,
    ],
)  # fmt: skip
def test_other_values_are_no_secrets(value):
    assert (
        secrets_in({"dataset": {"path": value, "mask_token": 1}, "logger": {"mine": {"api_key": None}}}) == []
    )


@pytest.mark.parametrize(
    "words",
    [
        ["train"],
        ["data", "action=fetch"],
        pytest.param(["train", "-m", "optimizer.lr=1e-3,2e-3"], marks=pytest.mark.slow),
    ],
)
def test_a_command_refuses_a_url_with_a_secret(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    url = "dataset.path=https://host/z.zip?token=hush"
    assert run([*words, "dataset=folder", url]) == 2
    error = capsys.readouterr().err
    assert set(error.splitlines()) == {f"diffuse: dataset.path: contains the secret token=..., {STORED}"}
    assert not list(tmp_path.iterdir())
