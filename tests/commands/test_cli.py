import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest

import repcon
from repcon import cli
from repcon.commands import help, outcome, pack, usage_errors
from repcon.runtime.console import console


def test_help_names_every_command(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_its_flags(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help-all"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert command in shown
    plain = [field for field in dataclasses.fields(cli.COMMANDS[command]) if "Annotated" not in str(field.type)]
    for field in plain:
        name = f"--{field.name.replace('_', '-')}"
        assert name in shown or dataclasses.is_dataclass(field.default) or "Config" in str(field.type), name


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_fits_a_screen(command, capsys, monkeypatch):
    monkeypatch.setattr(console, "_width", 80)
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and command in lines[0]
    assert len(lines) <= 30 and max(map(len, lines)) <= 80
    fields = {field.name for field in dataclasses.fields(cli.COMMANDS[command])}
    assert set(help.COMMON.get(command, ())) <= fields


SETTINGS = SimpleNamespace(out="a b", pack="p", store="s", html="", to="onnx", revision="")
FIGURES = {
    "images": 3, "total_crops": 6, "rows_checked": 6, "crops_asked_again": 0, "html": "a b/report.html",
    "file": "a b/student.onnx", "address": "hf://me/one", "commit": 40 * "0", "kind": "student",
    "student": "a b/student", "report": "a b/report.html", "transfer": {},
}  # fmt: skip


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_ends_with_what_it_made_where_and_the_next_one(command, capsys):
    outcome.show(command, SETTINGS, FIGURES)
    [line] = capsys.readouterr().out.splitlines()
    made, _, following = line.rpartition("next: ")
    assert ("a b" in made or "hf://me/one" in made or ": s; " in made) == (command != "inspect")
    words = shlex.split(following)
    others = {"report": "open it in a browser", "export": "onnxruntime.InferenceSession('a b/student.onnx')"}
    assert following == others[command] if command in others else words[0] == "repcon" and words[1] in cli.COMMANDS
    outcome.run_step(command, lambda settings: FIGURES, SETTINGS)
    assert capsys.readouterr().out.strip() == made.removesuffix("; ")


@pytest.mark.parametrize("field", ["estimate", "dry_run"])
def test_what_made_nothing_says_nothing_of_a_result(field, capsys):
    outcome.show("consolidate", SimpleNamespace(**{**vars(SETTINGS), field: True}), {})
    assert capsys.readouterr().out == ""


def test_of_several_processes_one_says_what_was_made(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    outcome.show("train", SETTINGS, FIGURES)
    assert capsys.readouterr().out == ""


def test_an_unknown_command_is_one_line(capsys):
    assert cli.main(["trian"]) == 1
    assert "no command 'trian'" in capsys.readouterr().err


def test_a_misspelt_flag_is_the_users_mistake(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    words = ["train", "--pack", "p", "--store", "s", "--out", "o", "--epchs", "3", "--json", str(figures)]
    assert cli.main(words) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error --epchs: repcon train has no such flag; did you mean --epochs? ")
    assert json.loads(figures.read_text())["error"] == line.removeprefix("error ")


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["train", "--pack", "p", "--store", "s"], ["--out", "Folder for the run"]),
        (["train", "--pack", "p", "--store", "s", "--out", "o", "--epochs", "many"], ["--epochs", "'many'"]),
        (["train", "--pack", "p", "--store", "s", "--out", "o", "--loader", "x"], ["'x'", "--loader", "'dali'"]),
        (["train", "--optim.lrr=3"], ["--optim.lrr", "did you mean --optim.lr?"]),
        (["pack"], ["OUT", "Folder that the pack is written to"]),
        (["pack", "a", "b", "--jpeg_qualty", "3"], ["--jpeg-qualty", "did you mean --jpeg-quality?"]),
    ],
)
def test_a_wrong_flag_is_one_line(words, wanted, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.main(words) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error ") and f"`repcon {words[0]} --help" in line and "│" not in line
    assert [text for text in wanted if text not in line] == []


def test_every_flag_of_the_parser_is_known(capsys):
    """`--help-all` lists what the parser takes; what no flag of it is, is refused before."""
    for command, kind in cli.COMMANDS.items():
        with pytest.raises(SystemExit):
            cli.main([command, "--help-all"])
        flags = re.findall(r"(?<![\w-])--[a-z][\w.-]*", re.sub(r"`[^`]*`", "", capsys.readouterr().out))
        assert flags
        usage_errors.require_known_flags(command, kind, flags)
    usage_errors.require_known_flags("train", cli.COMMANDS["train"], ["--heads.0.weight", "--init_weights.birds=1"])


def test_a_recipe_with_a_typo_names_file_and_key(tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text('pack = "p"\nstore = "s"\nout = "o"\nepoch = 3\n')
    assert cli.main(["train", "--recipe", str(recipe)]) == 1
    shown = capsys.readouterr().err
    assert "r.toml" in shown and "epoch" in shown


def test_flags_go_over_the_recipe_and_fill_what_it_leaves_open(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('store = "s"\nepochs = 3\nsize = 64\n[optim]\nlr = 0.5\n')
    words = ["--pack", "p", "--out", "o", "--epochs", "7", "--optim.weight-decay", "0"]
    settings = cli._settings("train", cli.COMMANDS["train"], words, str(recipe))
    assert (settings.pack, settings.store, settings.epochs, settings.size) == ("p", "s", 7, 64)
    assert (settings.optim.lr, settings.optim.weight_decay) == (0.5, 0.0)


def test_a_recipe_that_leaves_a_required_field_open_is_asked_for(tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text('store = "s"\n')
    assert cli.main(["train", "--recipe", str(recipe), "--out", "o"]) == 1
    assert "--pack" in capsys.readouterr().err


def test_a_mistake_ends_with_one_line_and_json_tells_it(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    code = cli.main(["pack", str(tmp_path / "absent"), str(tmp_path / "out"), "--json", str(figures)])
    assert code == 1
    assert "absent" in json.loads(figures.read_text())["error"]
    assert "Traceback" not in capsys.readouterr().out


def test_the_command_line_starts_without_the_heavy_imports():
    heavy = (
        "torch", "timm", "zarr", "matplotlib", "huggingface_hub", "onnx", "onnxruntime", "wandb", "mlflow", "numpy",
        "cattrs", "tomli_w",
    )  # fmt: skip
    probe = f"import sys, repcon.cli; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_json_into_a_folder_that_is_missing_is_refused_before_the_work(tmp_path, capsys):
    assert cli.main(["pack", str(tmp_path), str(tmp_path / "out"), "--json", str(tmp_path / "no/x.json")]) == 1
    assert "there is no such folder" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_json_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pack, "run", lambda settings: {"images": 1})
    assert cli.main(["pack", "a", "b", "--json", "/dev/full"]) == 1
    assert capsys.readouterr().err.strip() == "error --json /dev/full: No space left on device"
    monkeypatch.setattr(os, "access", lambda *given: False)
    assert cli.main(["pack", "a", "b", "--json", str(tmp_path / "x.json")]) == 1
    assert "cannot be written there; name another file" in capsys.readouterr().err.replace("\n", " ")


def test_what_the_system_refuses_is_one_line(tmp_path, capsys, monkeypatch):
    def refused(settings):
        (tmp_path / "nowhere" / "file").write_text("")

    monkeypatch.setattr(pack, "run", refused)
    figures = tmp_path / "figures.json"
    assert cli.main(["pack", "a", "b", "--json", str(figures)]) == 1
    told = f"{tmp_path}/nowhere/file: No such file or directory"
    assert capsys.readouterr().err.replace("\n", "") == f"error {told}"
    assert json.loads(figures.read_text()) == {"error": told}


def test_a_process_of_a_team_says_which_it_is(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(console, "quiet", True)
    assert cli.main(["trian"]) == 1
    assert "error (process 1) no command" in capsys.readouterr().err
    monkeypatch.delenv("RANK")
    assert cli.main(["trian"]) == 1
    assert "error (process ?) no command" in capsys.readouterr().err


def test_a_list_written_as_a_table_says_how_to_write_it(tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text('pack = "p"\nout = "o"\n[teachers]\nname = "a"\nmodel = "b"\n')
    assert cli.main(["precompute", "--recipe", str(recipe)]) == 1
    assert "[[teachers]]" in capsys.readouterr().err


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "repcon", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "precompute" in done.stdout


@pytest.mark.parametrize(("word", "meant"), [("pak", "pack"), ("ImagePack", "pack"), ("consolidat", "consolidate")])
def test_a_misspelt_command_says_what_was_meant(word, meant, capsys):
    if meant not in cli.COMMANDS:
        pytest.skip("there is no such command")
    assert cli.main([word]) == 1
    assert f"did you mean {meant}?" in capsys.readouterr().err.replace("\n", " ")
    assert cli.main(["xyzzy"]) == 1
    assert "did you mean" not in capsys.readouterr().err


def test_version_and_help(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"repcon {repcon.__version__}"
    assert cli.main(["help"]) == 0
    assert "precompute" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["help", "pack"])
    assert stop.value.code == 0 and "SOURCE" in capsys.readouterr().out


def test_teachers_by_flag_in_place_of_the_recipe_s(tmp_path, capsys):
    kind = cli.COMMANDS["precompute"]
    words = ["--teachers", "birds=runs/birds", "food=resnet18", "--pack", "p", "--out", "o"]
    settings = cli._settings("precompute", kind, list(words), None)
    assert [(one.name, one.model) for one in settings.teachers] == [("birds", "runs/birds"), ("food", "resnet18")]
    recipe = tmp_path / "r.toml"
    recipe.write_text('crops = 2\n[[teachers]]\nname = "a"\nmodel = "b"\nsize = 64\n')
    settings = cli._settings("precompute", kind, list(words), str(recipe))
    assert (len(settings.teachers), settings.teachers[0].size, settings.crops) == (2, 0, 2)
    for wrong, told in ((["birds"], "NAME=MODEL"), (["a=b", "a=c"], "two are called")):
        assert cli.main(["precompute", "--pack", "p", "--out", "o", "--teachers", *wrong]) == 1
        assert told in capsys.readouterr().err.replace("\n", " ")


def test_json_to_the_standard_output_is_all_that_stands_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "stderr", False)

    def run(settings):
        console.print("a table")
        return {"images": 1}

    monkeypatch.setattr(pack, "run", run)
    assert cli.main(["pack", "a", "b", "--json", "-"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"images": 1} and "a table" in shown.err


@pytest.mark.parametrize("words", [["train", "--help"], ["--version"], []])
def test_a_reader_that_has_seen_enough_is_no_error(words):
    """As `repcon train --help | head` and `| true`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "repcon", *words], stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("words", [["train", "--help"], ["inspect", "nowhere"]])
def test_closed_streams_are_no_error(words):
    """As a service may start it: no standard input, output or errors."""
    command = f"exec {sys.executable} -m repcon {' '.join(words)} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], timeout=60).returncode == (0 if "--help" in words else 1)
