"""The documents' code is run as it stands there."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from onnxopt.cli.run import run
from onnxopt.errors import OnnxoptError
from onnxopt.passbase.lookup import lookup
from onnxopt.pipeline.grammar import canonical, parse
from tests.helpers import apply, model
from tests.helpers import run as outputs_of

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WRITING = (ROOT / "docs" / "writing-a-pass.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(text) if kind == language]


def files(text: str) -> dict[str, str]:
    """Name -> content of the Python blocks that begin with `# file: NAME`."""
    found = {}
    for body in blocks(text, "python"):
        head, _, rest = body.partition("\n")
        assert head.startswith("# file: "), head
        found[head.removeprefix("# file: ")] = rest
    return found


def commands(text: str) -> list[tuple[list[str], int]]:
    """Words and expected exit code of every line of the sh blocks."""
    found = []
    for line in "".join(blocks(text, "sh")).splitlines():
        command, _, note = line.partition("  # exit code ")
        found.append((shlex.split(command), int(note or 0)))
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: the models of the checkout, and the files that the document has its reader write."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    for name, content in files(WRITING).items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_writing_a_pass_do_what_it_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for words, code in commands(WRITING):
        assert words[0] == "onnxopt"
        assert run([*words[1:], *(["--latency-seconds", "0"] if words[1] != "passes" else [])]) == code
        outputs.append(capsys.readouterr())
    hard, boast, shown, four, tenth, powers = outputs
    assert "verdict   passed" in hard.out
    assert "hard_gates" in hard.out
    said = next(line for line in WRITING.splitlines() if line.strip().startswith("error:")).strip().removesuffix("...")
    assert boast.err.startswith(said)
    assert boast.err.splitlines()[1] in WRITING
    assert "limit  largest |input| that is replaced" in shown.out
    assert "1 replaced" in four.out
    assert "its inputs exceed 0.1" in tenth.out
    assert "verdict   unchanged" in tenth.out
    assert "Make one power of a product of powers." in powers.out


def test_the_rule_of_writing_a_pass_does_what_it_says(folder: Path) -> None:
    rule = lookup("powers.py:FusePowers")
    target = model(
        """g (float[3] x, double w) => (float[3] y, double z) <float two = {2}, double zwei = {2}> {
        a = Pow(x, two) y = Mul(a, x) b = Pow(w, zwei) z = Mul(w, b) }"""
    )
    result = apply(rule(), target)
    assert [node.op for node in target.graph.nodes] == ["Pow", "Pow", "Mul"]
    assert [(skip.node, skip.reason) for skip in result.skipped] == [("z", "its type is not float32")]
    assert np.allclose(outputs_of(target, {"x": np.array([1, 2, 3], np.float32), "w": np.array(2.0)})["y"], [1, 8, 27])


def test_the_python_of_writing_a_pass_runs(folder: Path) -> None:
    done = subprocess.run([sys.executable, "use.py"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "verdict   passed" in done.stdout
    assert (folder / "gates.onnx").is_file()


@pytest.mark.parametrize(
    "path",
    ["README.md", "CHANGELOG.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))],
)
def test_links_and_paths_lead_somewhere(path: str) -> None:
    text = (ROOT / path).read_text()
    targets = [target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in target]
    for target in targets:
        assert (ROOT / path).parent.joinpath(target).exists(), target
    assert max(map(len, text.splitlines())) <= 200


def test_every_example_of_sparsity_is_a_pass_list() -> None:
    text = (ROOT / "docs" / "sparsity.md").read_text()
    examples = re.findall(r"`'?(prune_weights[:{][^`']*)'?`", text)
    assert len(examples) >= 10
    asked = {option for example in examples for option in re.findall(r"[:{](\w+)=", example)}
    for example in examples:
        assert canonical(parse(canonical(parse(example)))) == canonical(parse(example))
    assert {"sparsity", "pattern", "threshold", "relative", "scope", "criterion"} <= asked


def test_every_example_of_share_is_a_pass_list_and_every_option_has_one() -> None:
    text = (ROOT / "docs" / "compression.md").read_text()
    examples = re.findall(r"`(share:[^`]*|prune_weights[^`]*share)`", text)
    asked = {option for example in examples for option in re.findall(r"[:{](\w+)=", example)}
    for example in examples:
        assert canonical(parse(canonical(parse(example)))) == canonical(parse(example))
    assert {item.name for item in lookup("share").options()} <= asked | {"only"}


def test_every_example_of_pruning_runs_and_every_option_has_one() -> None:
    text = (ROOT / "docs" / "pruning.md").read_text()
    examples = re.findall(r"`(prune[:{][^`]*)`", text)
    asked = {option for example in examples for option in re.findall(r"[:{](\w+)=", example)}
    for example in examples:
        assert canonical(parse(canonical(parse(example)))) == canonical(parse(example))
    assert asked == {item.name for item in dataclasses.fields(lookup("prune"))}
    for words, _ in commands(text):
        assert (ROOT / words[1]).is_file()
        assert (ROOT / words[words.index("--data") + 1]).is_dir()
        assert canonical(parse(words[words.index("--passes") + 1]))


def test_pruning_names_every_criterion_scope_and_unit() -> None:
    text = (ROOT / "docs" / "pruning.md").read_text()
    fields = {item.name: item for item in dataclasses.fields(lookup("prune"))}
    for name in ("criterion", "scope", "of"):
        choices = fields[name].metadata["choices"]
        assert choices
        assert [choice for choice in choices if f"`{choice}`" not in text] == []


def test_the_report_in_pruning_shows_what_its_command_prints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "pruning.md").read_text()
    words = next(words for words, _ in commands(text) if "-v" in words)
    assert run([*words[1:], "--latency-seconds", "0", "--target", "x86"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    changes = blocks(text, "text")[1].split("\n  channels ")[1:]
    assert len(changes) >= 3
    for change in changes:
        if change.startswith("removed"):
            assert " ".join(change.split()) in printed
        else:
            assert " ".join(change.partition("; ")[2].split()) in printed  # how many go may change with the data


def test_every_example_of_dedup_is_a_pass_list_and_every_option_has_one() -> None:
    text = (ROOT / "docs" / "compression.md").read_text()
    examples = re.findall(r"`(dedup[:{][^`]*)`", text)
    asked = {option for example in examples for option in re.findall(r"[:{](\w+)=", example)}
    for example in examples:
        assert canonical(parse(canonical(parse(example)))) == canonical(parse(example))
    assert asked == {item.name for item in dataclasses.fields(lookup("dedup"))}


def test_the_commands_of_compression_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in commands((ROOT / "docs" / "compression.md").read_text()):
        assert run([*words[1:], "--latency-seconds", "0"]) == code
        assert "verdict" in capsys.readouterr().out


README = (ROOT / "README.md").read_text()


def rows(text: str, names: tuple[str, ...]) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.split()[:1] and line.split()[0] in names]


def test_the_readme_shows_what_its_command_prints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = blocks(README, "sh")[0].partition(".venv/bin/onnxopt ")[2]
    assert run([*shlex.split(command), "--latency-seconds", "0", "--target", "x86"]) == 0
    printed = capsys.readouterr().out
    names = ("file", "parameters", "nodes", "fuse_bn", "verdict", "written")
    assert rows(blocks(README, "text")[0], names)
    shown, now = ([row[:6] for row in rows(text, names)] for text in (blocks(README, "text")[0], printed))
    assert shown == now, "README.md is out of date: paste what its first command prints"


def test_ci_runs_the_second_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    filters = [line for line in script.splitlines() if line.startswith("command=$(awk ")]
    program = filters[0].split("'")[1]
    found = subprocess.run(
        ["awk", program, "README.md"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout == blocks(README, "sh")[1]
    assert found.stdout.rstrip().endswith("-m pytest")


def test_design_lists_the_dependencies_and_exit_codes_that_there_are() -> None:
    design = (ROOT / "docs" / "design.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        name = re.match(r"[\w-]+", requirement)
        assert name is not None
        assert f"| {name.group()} |" in design
    for error in OnnxoptError.__subclasses__():
        assert f"| {error.exit_code} |" in design


CLI = (ROOT / "docs" / "cli.md").read_text()


def test_the_commands_of_cli_run_and_print_what_it_shows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = ""
    for words, code in commands(CLI):
        assert words[0] == "onnxopt"
        looking = words[1] in ("inspect", "diff")
        assert run([*words[1:], *([] if looking else ["--latency-seconds", "0", "--target", "x86"])]) == code
        printed += capsys.readouterr().out
    shown = [line for block in blocks(CLI, "text") for line in block.splitlines()]
    assert len(shown) >= 6
    assert [line for line in shown if line not in printed.splitlines()] == []
    assert (folder / "newer.html").read_text().startswith("<!DOCTYPE html>")


def test_every_command_stands_in_cli() -> None:
    from onnxopt.cli.commands import root

    listed = CLI.partition("## Pass lists")[0]
    for name in root.commands:
        assert f"onnxopt {name}" in listed
