"""The pages of help: what they list, in which order, and how the YAML files are worded."""

import re

import pytest

from diffusion_cli import config
from diffusion_cli.cli import run
from diffusion_cli.config import COMMANDS, CONF, GROUPS, UNSWEPT
from diffusion_cli.config.catalogue import DESCRIBED

FRAGMENT = re.compile(
    r"# (of|that|in|where|or|which|and|told|taken|goes|so|what|whether|how)\b", re.IGNORECASE
)
PRIVATE = re.compile(r"#.*\b(told|tells|taken up|goes on|so many|data sets?|of which|whose)\b")


@pytest.fixture
def page(capsys):
    """The page that a command line prints, without its line breaks and as lines."""

    def printed(*words: str) -> tuple[str, list[str]]:
        assert run(words) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return " ".join(out.split()), out.splitlines()

    return printed


def test_help_shows_every_group_and_every_key_with_its_comment(page):
    for command in COMMANDS:
        text, lines = page(command, "--help")
        for key, value, comment in config.documented(CONF / f"{command}.yaml"):
            assert comment
            shown = f"{key}= {comment}; required" if value == "???" else f"{key}={value} {comment}"
            assert shown in text
        for group in config.defaults(command):
            assert f"{group} {GROUPS[group]}" in text
        assert [line for line in lines if len(line) > 100] == []


def test_help_lists_groups_by_need(page):
    for command in COMMANDS:
        _, lines = page(command, "--help")
        first = [line.split()[0] for line in lines[: lines.index("Keys")] if line[:3].strip()]
        listed = [word for word in first if word in GROUPS]
        launcher = [] if command in UNSWEPT else ["launcher"]
        assert listed == [*config.groups(command), *launcher]
        assert listed[: len(DESCRIBED[command])] == DESCRIBED[command]
    assert config.groups("train") == [
        "dataset", "model", "condition", "text", "augmentation", "schedule", "parameterization", "objective",
        "sampler", "optimizer", "lr_schedule", "trainer", "task", "experiment", "metric", "features", "logger",
        "callback", "reference", "time_sampling",
    ]  # fmt: skip
    folders = {folder.name for folder in CONF.iterdir() if folder.is_dir()}
    assert set(GROUPS) == folders - {"hydra"} | {"launcher"}


def test_help_describes_the_main_options_of_a_command(page):
    for command, groups in DESCRIBED.items():
        text, _ = page(command, "--help")
        for group in groups:
            for name, file in config.options(group).items():
                assert f"{name} {config.summary(file)}" in text


def test_group_help_describes_every_option_of_every_group_of_every_command(page):
    for command in COMMANDS:
        for group in config.groups(command):
            text, lines = page(command, f"{group}=help")
            assert GROUPS[group] in text
            for name, file in config.options(group).items():
                assert f"{name} {config.summary(file)}" in text
            assert [line for line in lines if len(line) > 100] == []


def test_group_help_marks_what_the_command_line_selects(page):
    assert "*ddpm " in page("edit", "edit=inpaint", "sampler=help")[0]
    assert "*unet_cifar10 " in page("train", "model=help", "dataset=cifar10")[0]
    text, _ = page("train", "logger=help", "schedule=help", "--help")
    assert "*csv " in text
    assert "*tensorboard " in text
    assert "*cosine " in text


def test_group_help_has_the_first_word_of_a_command_and_the_launcher(page):
    assert "*schedule " in page("plot", "help")[0]
    assert "slurm " in page("train", "launcher=help")[0]
    assert page("train", "-m", "hydra/launcher=help") == page("train", "launcher=help")


def test_group_help_lists_the_options_of_a_user(page, capsys, tmp_path):
    (tmp_path / "schedule").mkdir()
    text = (CONF / "schedule" / "cosine.yaml").read_text()
    (tmp_path / "schedule" / "mine.yaml").write_text(text.partition("\n")[2])
    assert "mine" in page("train", "--config-dir", str(tmp_path), "schedule=help")[0]
    (tmp_path / "schedule" / "help.yaml").write_text(text.replace("1000", "7"))
    assert (
        run(["train", "--config-dir", str(tmp_path), "schedule=help", "preview_steps=7", "--cfg", "job"]) == 0
    )
    assert "num_timesteps: 7\n" in capsys.readouterr().out


def test_help_survives_option_files_that_cannot_be_read(page, tmp_path):
    (tmp_path / "model" / "folder.yaml").mkdir(parents=True)
    (tmp_path / "model" / "binary.yaml").write_bytes(b"# \x1b[31mred \xff")
    (tmp_path / "model" / "empty.yaml").write_text("")
    text, _ = page("train", "--config-dir", str(tmp_path), "model=help")
    assert " binary \\x1b[31mred" in text
    assert " empty " in text
    assert " folder " not in text
    assert page("train", "--config-dir", str(tmp_path), "--help")


def test_only_groups_have_help(capsys):
    assert run(["sample", "model=help"]) == 2
    assert run(["plot", "launcher=help"]) == 2
    assert "unknown key" in capsys.readouterr().err


def test_help_follows_the_chosen_options(page):
    assert "sampler.variance=small" in page("sample", "sampler=ddpm", "--help")[0]
    _, lines = page("train", "experiment=edm_cifar10", "--help")
    assert any(line.startswith("model=ddpmpp_edm_cifar10  ") for line in lines)
    assert any(line.startswith("dataset=cifar10  ") for line in lines)
    text, _ = page("edit", "edit=inpaint", "--help")  # which brings a method and a sampler
    assert "restoration.num_resamples=" in text
    assert "sampler.variance=" in text
    assert " sampler=heun " in page("edit", "edit=inpaint", "sampler=heun", "--help")[0]


def test_help_marks_required_keys(page):
    text, _ = page("train", "dataset=folder", "--help")
    assert "dataset.path= folder" in text
    assert "; required dataset.masks=null" in text
    assert "?" not in text


def test_help_shows_the_keys_of_the_launcher(page):
    assert "*local slurm" in page("train", "--help")[0]
    assert "launcher.partition=null " in page("train", "launcher=slurm", "--help")[0]
    assert "launcher" not in page("plot", "--help")[0]


# --- Wording of the YAML files --------------------


def test_comments_of_yaml_files_are_phrases_that_stand_alone():
    lines = [
        f"{file.relative_to(CONF)}: {line.strip()}"
        for file in sorted(CONF.rglob("*.yaml"))
        for line in file.read_text().splitlines()
        if FRAGMENT.search(line) or PRIVATE.search(line)
    ]
    assert lines == []


def test_every_yaml_file_begins_with_a_description():
    for file in sorted(CONF.rglob("*.yaml")):
        lines = [line for line in file.read_text().splitlines() if not line.startswith("# @package")]
        description = config.summary(file)
        assert lines[0] == f"# {description}"
        assert re.match(r"[A-Z0-9]|v-prediction|unet_tiny|L_", description)
        assert not description.endswith(".")
