"""The command line of a configuration: what it accepts, what it refuses and in which words, and that it is quick."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megaprot.common.command_line import parse_config, run_command, run_command_module
from megaprot.common.config_keys import config_keys, nearest
from megaprot.common.config_yaml import config_to_yaml, load_yaml
from megaprot.common.errors import InputError, RunError


@dataclass(frozen=True)
class Model:
    """The model's shape."""

    hidden_size: int = 320
    """Width of the residual stream, all 100% of it."""
    num_layers: int = 6
    layout: tuple[int, ...] = ()
    betas: tuple[float, float] = (0.9, 0.98)


@dataclass(frozen=True)
class Split:
    """How sequences are split.

    Attributes:
        by: what is kept together.
    """

    by: Literal["random", "family", "off"] = "random"
    on_bad: Literal["skip", "fail"] = "fail"
    valid: float = 0.05


@dataclass(frozen=True)
class Config:
    """A command."""

    name: str = "run"
    shuffle: bool = False
    limit: int | None = None
    input: list[Path] = field(default_factory=list)
    """Files to read."""
    output: Path = Path("out")
    model: Model = field(default_factory=lambda: Model(num_layers=12))
    split: Split = field(default_factory=Split)


@dataclass
class Needy:
    """A command with a required key."""

    input: list[Path]
    count: int = 1


def parse(*argv: str, recipes: Path | None = None) -> Config:
    """Parse as the command `megaprot demo`."""
    return parse_config(Config, argv, program="megaprot demo", description="A demo.", recipes=recipes)


def refusal(*argv: str, recipes: Path | None = None) -> str:
    """Return the one sentence with which these arguments are refused."""
    with pytest.raises(InputError) as caught:
        parse(*argv, recipes=recipes)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """A folder of two recipes."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "esm2_8m.yaml").write_text("model:\n  hidden_size: 320\n  num_layers: 6\nsplit: {valid: 1e-2}\n")
    (folder / "esm2_650m.yaml").write_text("model:\n  hidden_size: 1280\n  num_layers: 33\n")
    return folder


def test_nothing_given_yields_the_defaults_of_instances_not_of_classes() -> None:
    assert parse() == Config()
    assert parse().model.num_layers == 12


def test_flags_set_nested_keys_and_convert_to_the_declared_types() -> None:
    config = parse("--model.hidden_size", "640", "--split.valid=1", "--output", "a/b", "--limit", "3", "--name", "007")
    assert config.model == Model(640, 12)
    assert config.split.valid == 1.0
    assert isinstance(config.split.valid, float)
    assert config.output == Path("a/b")
    assert config.limit == 3
    assert config.name == "007"


@pytest.mark.parametrize("flag", ["--split.on-bad", "--split.on_bad"])
def test_dash_and_underscore_read_the_same_in_flags(flag: str) -> None:
    assert parse(flag, "skip").split.on_bad == "skip"


def test_dash_and_underscore_read_the_same_in_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("split:\n  on-bad: skip\n")
    assert parse("--config", str(tmp_path / "a.yaml")).split.on_bad == "skip"


def test_list_keys_take_several_values_repeated_flags_and_yaml_lists() -> None:
    expected = [Path("a"), Path("-"), Path("b c")]
    assert parse("--input", "a", "-", "b c").input == expected
    assert parse("--input", "a", "-", "--input", "b c").input == expected
    assert parse("--input", "[a, '-', b c]").input == expected
    assert parse("--model.layout", "2", "4").model.layout == (2, 4)
    assert parse("--model.betas=[0.8, 0.9]").model.betas == (0.8, 0.9)


def test_a_true_or_false_flag_alone_means_true() -> None:
    assert parse("--shuffle", "--name", "x").shuffle is True
    assert parse("--shuffle", "false").shuffle is False


def test_null_is_taken_where_the_type_has_it_and_refused_elsewhere(tmp_path: Path) -> None:
    assert parse("--limit", "3", "--limit", "null").limit is None
    assert refusal("--model.num_layers", "null") == "--model.num_layers must be a whole number, but got null"
    (tmp_path / "a.yaml").write_text("name:\n")
    assert refusal("--config", str(tmp_path / "a.yaml")).startswith("'name' in ")


def test_negative_and_scientific_numbers_are_values() -> None:
    assert parse("--limit", "-3").limit == -3
    assert parse("--split.valid", "1e-4").split.valid == 1e-4


def test_recipes_merge_in_order_and_flags_win_wherever_they_stand(recipes: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model:\n  num_layers: 7\n")
    mine = str(tmp_path / "mine.yaml")
    config = parse("--model.hidden_size", "64", "--config", "esm2_8m", "--config", mine, recipes=recipes)
    assert config.model == Model(64, 7)
    assert config.split.valid == 0.01  # 1e-2 is a number here, text to plain YAML 1.1
    assert parse("--config", mine, "esm2_8m", recipes=recipes).model.num_layers == 6


def test_a_recipes_name_wins_over_a_folder_of_that_name(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "esm2_8m").mkdir()
    assert parse("--config", "esm2_8m", recipes=recipes).model.num_layers == 6


def test_words_of_yaml_1_1_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("split:\n  by: off\nname: 2024-01-01\n")
    config = parse("--config", str(tmp_path / "a.yaml"))
    assert (config.split.by, config.name) == ("off", "2024-01-01")


def test_dotted_keys_and_empty_files_and_sections_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model.hidden_size: 8\nsplit:\n")
    (tmp_path / "b.yaml").write_text("# nothing\n")
    assert parse("--config", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")).model.hidden_size == 8


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--model.hiden_size", "--model.hidden_size"),
        ("--hidden-size", "--model.hidden_size"),
        ("--modle.num_layers", "--model.num_layers"),
        ("--split.bye", "--split.by"),
        ("--confg", "--config"),
        ("--outputs", "--output"),
    ],
)
def test_an_unknown_flag_is_answered_with_the_nearest_right_one(flag: str, meant: str) -> None:
    assert f"did you mean {meant}?" in refusal(flag, "3")


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz_.", min_size=1, max_size=20))
def test_the_nearest_of_a_known_name_is_itself_and_of_any_name_a_known_one(name: str) -> None:
    keys = config_keys(Config)
    assert nearest(name, keys) in keys
    assert all(nearest(known, keys) == known for known in keys)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model:\n  hiden_size: 3\n", "unknown key 'model.hiden_size' in FILE; did you mean 'model.hidden_size'?"),
        ("modle:\n  hidden_size: 3\n", "unknown key 'modle' in FILE; did you mean 'model'?"),
        ("model: 3\n", "'model' in FILE is a section; write its keys below it, not the value 3"),
        ("model:\n  hidden_size: big\n", "'model.hidden_size' in FILE must be a whole number, but got 'big'"),
        ("model:\n  hidden_size: 1e6\n", "'model.hidden_size' in FILE must be a whole number, but got 1000000.0"),
        ("model:\n  hidden_size: true\n", "'model.hidden_size' in FILE must be a whole number, but got true"),
        ("shuffle: 1\n", "'shuffle' in FILE must be true or false, but got 1"),
        ("name: 5\n", "'name' in FILE must be text, but got 5"),
        ("split:\n  by: clan\n", "'split.by' in FILE must be one of random, family, off, but got 'clan'"),
        ("input: a.fasta\n", "'input' in FILE must be a list of values, each a path, but got 'a.fasta'"),
        ("model:\n  layout: [1, x]\n", "in FILE must be a list of values, each a whole number, but got [1, 'x']"),
        ("model:\n  betas: [1]\n", "in FILE must be a list of 2 values, each a number, but got [1]"),
        ("- a\n- b\n", "FILE holds no 'key: value' lines at its top"),
        ("model: [1\n", "FILE is not valid YAML (line 2"),
        ('model:\n  hidden_size: "640"\n', "'model.hidden_size' in FILE must be a whole number, but got '640'"),
        ("? [a]\n: 3\n", "FILE is not valid YAML (line 1: found unhashable key)"),
        ("limit: 010\n", "'limit' in FILE must be a whole number or null, but got '010'"),
        ("limit: 1:30\n", "'limit' in FILE must be a whole number or null, but got '1:30'"),
        ("name: a\nname: b\n", "FILE is not valid YAML (line 2: key 'name' is written twice)"),
        ("name: !!python/object:os.system x\n", "FILE is not valid YAML (line 1"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence_naming_file_and_key(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    assert sentence.replace("FILE", str(file)) in refusal("--config", str(file))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(range(256)))
    assert "is not a YAML text file" in refusal("--config", str(tmp_path / "weights.bin"))


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--model.hidden_size", "abc"], "--model.hidden_size must be a whole number, but got 'abc'"),
        (["--model.hidden_size", "1.5"], "--model.hidden_size must be a whole number, but got 1.5"),
        (["--limit", "x"], "--limit must be a whole number or null, but got 'x'"),
        (["--split.by", "famly"], "--split.by must be one of random, family, off, but got 'famly'"),
        (["--name"], "--name takes one value (text), but got none"),
        (["--name", "a", "b"], "--name takes one value (text), but got 'a', 'b'"),
        (["--input"], "--input takes one or more values"),
        (["--model", "3"], "--model is a section, not a key; give its keys, such as --model.hidden_size"),
        (["stray"], "unexpected argument 'stray'"),
        (["-n", "3"], "unknown flag '-n'; flags start with two dashes"),
        (["--name", "caf\udce9"], r"the argument 'caf\udce9' is no UTF-8 text"),
        (["--config"], "--config takes a file or a recipe's name, but got none"),
    ],
)
def test_wrong_flags_are_refused_in_one_sentence(argv: list[str], sentence: str) -> None:
    assert sentence in refusal(*argv)


def test_a_missing_recipe_is_answered_with_the_nearest_and_the_list(recipes: Path, tmp_path: Path) -> None:
    sentence = refusal("--config", "esm2_650", recipes=recipes)
    assert "did you mean esm2_650m? (recipes: esm2_650m, esm2_8m)" in sentence
    assert "there is no file 'none.yaml'" in refusal("--config", "none.yaml")
    assert "is a folder" in refusal("--config", str(tmp_path))


def test_a_required_key_that_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="--input is required"):
        parse_config(Needy, [], program="p", description="d")
    assert parse_config(Needy, ["--input", "a"], program="p", description="d") == Needy([Path("a")])
    with pytest.raises(SystemExit):  # a file to fill in
        parse_config(Needy, ["--print_config"], program="p", description="d")
    assert capsys.readouterr().out == "input: null\ncount: 1\n"


def test_print_config_prints_yaml_that_reads_back_to_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, recipes: Path
) -> None:
    argv = ["--config", "esm2_650m", "--input", "a", "--name", "1e-4", "--model.layout", "1", "2", "--limit", "null"]
    with pytest.raises(SystemExit) as stopped:
        parse(*argv, "--print_config", recipes=recipes)
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    assert parse("--config", str(tmp_path / "printed.yaml")) == parse(*argv, recipes=recipes)
    assert yaml.safe_load(printed)["model"] == {  # a reader of plain YAML agrees
        "hidden_size": 1280,
        "num_layers": 33,
        "layout": [1, 2],
        "betas": [0.9, 0.98],
    }


@pytest.mark.parametrize("text", ["\x85", "a\x85b", "a\u2028 b", "a\u2029", "a\n b\n", "\r", "\t", "\ufeff"])
def test_line_ends_and_control_characters_come_back(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(Config(name=text)), encoding="utf-8")
    assert parse("--config", str(file)).name == text
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["name"] == text


@given(
    name=st.text(max_size=12) | st.sampled_from(["1e-4", "null", "~", "off", "true", "1_0", "2024-01-01", "=", ".inf"]),
    valid=st.floats(allow_nan=False),
    limit=st.none() | st.integers(),
    layout=st.lists(st.integers(), max_size=3).map(tuple),
)
def test_any_configuration_survives_being_written_as_yaml(
    tmp_path: Path, name: str, valid: float, limit: int | None, layout: tuple[int, ...]
) -> None:
    config = Config(name=name, limit=limit, model=Model(layout=layout), split=Split(valid=valid))
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config), encoding="utf-8")
    assert parse("--config", str(file)) == config


@given(st.floats(allow_nan=False) | st.integers() | st.booleans() | st.none() | st.text(max_size=8))
def test_the_strict_reader_reads_what_plain_yaml_writes(tmp_path: Path, value: object) -> None:
    file = tmp_path / "value.yaml"
    file.write_text(yaml.safe_dump({"value": value}, allow_unicode=True), encoding="utf-8")
    assert load_yaml(file) == {"value": value}


def test_help_lists_every_key_with_type_default_and_docstring(
    capsys: pytest.CaptureFixture[str], recipes: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("--help", recipes=recipes)
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"--{name} VALUE" in text for name in config_keys(Config))
    for expected in (
        "A demo.",
        "esm2_650m, esm2_8m",
        "Width of the residual stream, all 100% of it. (a whole number; default: 320)",
        "what is kept together. (one of random, family, off; default: random)",
        "--model.num_layers VALUE (a whole number; default: 12)",
        "The model's shape:",
    ):
        assert expected in text


def test_errors_become_one_line_with_their_exit_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends_with(error: BaseException) -> int:
        def function() -> None:
            raise error

        return run_command("megaprot demo", function)

    assert ends_with(InputError("a is wrong; do b")) == 2
    assert ends_with(RunError("it broke")) == 1
    assert capsys.readouterr().err == "megaprot demo: error: a is wrong; do b\nmegaprot demo: error: it broke\n"
    assert ends_with(KeyboardInterrupt()) == 130
    assert run_command("megaprot demo", lambda: None) == 0
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback
        ends_with(ZeroDivisionError())


@pytest.mark.parametrize(
    ("rank", "local_rank", "said_input_error"), [("0", "0", True), ("1", "1", False), ("4", "0", True)]
)
def test_among_several_processes_wrong_input_is_said_once_a_node(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rank: str,
    local_rank: str,
    said_input_error: bool,
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)

    def wrong_input() -> None:
        raise InputError("a is wrong")

    def failed_run() -> None:
        raise RunError("lost")

    assert run_command("megaprot demo", wrong_input) == 2
    assert ("a is wrong" in capsys.readouterr().err) == said_input_error
    assert run_command("megaprot demo", failed_run) == 1  # what failed on one rank only that rank can say
    assert "lost" in capsys.readouterr().err


def test_a_command_module_is_run_with_its_configuration(recipes: Path) -> None:
    seen: list[Config] = []
    module = ModuleType("demo", "Describe the demo.\n\nMore.")
    module.__dict__.update(CONFIG=Config, RECIPES=recipes, run=seen.append)
    assert run_command_module("megaprot demo", module, ["--config", "esm2_650m"]) == 0
    assert [config.model.num_layers for config in seen] == [33]
    assert run_command_module("megaprot demo", module, ["--nope"]) == 2


def test_importing_the_command_line_loads_neither_jsonargparse_nor_yaml_nor_torch() -> None:
    check = "import sys, megaprot.common.command_line; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert not {"jsonargparse", "yaml", "torch", "numpy"} & set(done.stdout.split())
