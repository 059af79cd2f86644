"""Text of a command line is taken as it is typed, by the types of the keys."""

import shlex
from pathlib import Path

import pytest

from diffusion_cli.cli import run
from diffusion_cli.config import CONF, as_pasted, as_text, as_typed, expand, load
from diffusion_cli.system.compat import parse_override

TEXTS = [
    "2024_05", "123", "1e3", "0x10", "True", "007", "été", "日本", "my photos (2)", "a=b", "a&b", "C#", "it's", "'tis",
    "[2024] x", "[2024]", "[a", "a]", "{a", "a{1}b", 'a"b', "a;b", "$HOME", "C:\\a", "-1", "1:2", "a: b", "nan",
]  # fmt: skip


def value_of(command: str, words: list[str], *names: str):
    found = load(command, words).model_dump()
    for name in names:
        found = found[name]
    return found


def read(command: str, word: str, *others: str):
    """The value that a word gives to its key."""
    return parse_override(as_typed(command, [word, *others])[0]).value()


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_read_as_it_is_typed(text):
    for key in ("run", "output", "output_dir"):
        assert read("sample", f"{key}={text}") == text
    for key in ("run", "name", "latent.run", "data_dir", "launcher.account"):
        assert read("train", f"{key}={text}") == text
    assert read("train", f"dataset.path={text}", "dataset=folder") == text
    assert read("edit", f"dataset.path={text}") == text
    assert read("eval", f"dataset.path={text}") == text
    assert read("eval", f"metric.clip_score.prompt={text}") == text
    typed = as_typed("sample", [f"run={text}"])
    assert as_typed("sample", typed) == typed


def test_text_arrives_as_it_is_typed():
    assert value_of("sample", ["run=2024_05"], "run") == "2024_05"
    assert value_of("train", ["dataset=folder", "dataset.path=2024_05"], "dataset", "path") == "2024_05"
    assert value_of("train", ["latent.run=1e3"], "latent", "run") == "1e3"
    assert value_of("eval", ["dataset.path=123"], "dataset", "path") == "123"
    assert value_of("sample", ["run=null"], "run") is None


def test_a_tilde_before_no_user_is_a_file():
    assert value_of("train", ["dataset=folder", "dataset.path=~nobody-here"], "dataset", "path") == str(
        Path.cwd() / "~nobody-here"
    )


@pytest.mark.parametrize("text", [*TEXTS, "a,b", "null", "x [1], y", " a", "choice(1)", "it's, too"])
def test_a_printed_word_can_be_pasted(text):
    (word,) = shlex.split(as_text("run", text))
    assert read("sample", word) == text
    (again,) = shlex.split(as_pasted(as_typed("sample", [word])[0]))
    assert read("sample", again) == text


def test_a_plain_printed_word_has_no_quotes():
    assert as_text("run", "outputs/demo-1.5") == "run=outputs/demo-1.5"
    assert as_text("run", "my runs/x") == "'run=my runs/x'"
    assert as_pasted("steps=10") == "steps=10"
    assert as_pasted("run='outputs/x'") == "run=outputs/x"


def test_null_is_no_text_where_a_key_may_be_unset():
    assert read("sample", "run=null") is None
    assert read("sample", "run='null'") == "null"
    assert read("train", "data_dir=null") == "null"


def test_lists_of_text_are_read_as_they_are_typed():
    assert read("edit", "input=[x (1).png,1e3,été.png]") == ["x (1).png", "1e3", "été.png"]
    assert read("edit", "input=2024_05") == "2024_05"
    assert read("edit", "edit.mask=[0,0,4,4]") == [0, 0, 4, 4]
    assert read("edit", "edit.mask=2024_05") == "2024_05"
    assert [job[0] for job in expand("sample", ["run=2024_05,1e3"]).jobs] == ["run='2024_05'", "run='1e3'"]


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("a,b", ["a", "b"]),
        ("a{1,2},b", ["a{1,2}", "b"]),
        ("a[1,2],b", ["a[1,2]", "b"]),
        ("a],b", ["a]", "b"]),
        ("a},b", ["a}", "b"]),
        ("'a,b',c", ["a,b", "c"]),
        ("it's,that's", ["it's", "that's"]),
    ],
)
def test_commas_in_brackets_braces_and_quotes_separate_no_values(word, values):
    jobs = expand("sample", [f"run={word}"]).jobs
    assert [parse_override(job[0]).value() for job in jobs] == values


def test_a_bracket_in_a_quoted_item_ends_no_list():
    assert read("edit", "input=[a,'b],c',d]") == ["a", "b],c", "d"]


@pytest.mark.parametrize(
    ("text", "count"), [("1e5", 100_000), ("2.5e3", 2500), ("1_000", 1000), ("1E+2", 100), ("8.0", 8)]
)
def test_counts_are_read_in_scientific_notation(text, count):
    assert read("train", f"max_steps={text}") == count
    assert read("train", f"stage_steps=[{text}]") == [count]
    assert read("train", f"lr_schedule.warm_up_steps={text}") == count
    assert read("sample", f"step={text}") == count


def test_a_count_in_scientific_notation_arrives_where_others_follow_from_it():
    assert value_of("train", ["max_steps=1e5"], "lr_schedule", "decay_steps") == 100_000


@pytest.mark.parametrize("text", ["1.5", "1e-3", "1e400", "1e"])
def test_other_numbers_are_no_counts(capsys, text):
    assert run(["sample", f"steps={text}"]) == 2
    assert "must be an integer" in capsys.readouterr().err


def test_numbers_and_choices_are_not_text():
    assert value_of("train", ["optimizer.lr=1e-3"], "optimizer", "lr") == 1e-3
    assert value_of("train", ["precision=32"], "precision") == "fp32"
    assert value_of("sample", ["clip_x0=false"], "clip_x0") is False


@pytest.mark.parametrize("name", ["año", "run (copy)", "a,b", "C#", "it's", "a=b", "x[1]", "日本"])
def test_a_folder_of_options_may_have_any_name(monkeypatch, capsys, tmp_path, name):
    folder = tmp_path / name
    (folder / "my" / "sampler").mkdir(parents=True)
    text = (CONF / "sampler" / "ddim.yaml").read_text()
    (folder / "my" / "sampler" / "half.yaml").write_text(text.replace("eta: 0.0", "eta: 0.5"))
    monkeypatch.chdir(folder)
    assert run(["sample", "--config-dir", "my", "sampler=half", "--cfg", "job"]) == 0
    assert "eta: 0.5" in capsys.readouterr().out


def test_messages_show_text_without_quotes(capsys):
    assert run(["edit", "edit=img2img", "edit.mask=été"]) == 2
    assert capsys.readouterr().err.startswith("diffuse: edit.mask=été: applies only to edit=inpaint")
    assert run(["sample", "run=a,b"]) == 2
    assert capsys.readouterr().err.startswith("diffuse: run=a,b: several values")
