"""The pages say what is there: links, the tree, the command reference, and commands that parse."""

import importlib
import re
import runpy
import shlex
import subprocess

import click
import pytest

PAGES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/architecture.md",
    "docs/families.md",
    "docs/log.md",
    "docs/results.md",
    "docs/server.md",
    "docs/walkthrough.md",
    "docs/wheels.md",
)


@pytest.fixture(params=PAGES)
def page(request, root):
    return root / request.param


def _blocks(text: str) -> list[str]:
    """The lines of all code blocks, continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    return "".join(blocks).replace("\\\n", " ").splitlines()


def _commands(text: str, *names: str) -> list[list[str]]:
    """Words of every command in the code blocks of `text` that starts with one of `names`."""
    found = []
    for line in _blocks(text):
        bare = re.sub(r"^(\$ |ssh device '|\.venv/bin/)|'$", "", line)
        for part in re.split(r" && | \| ", bare):
            if re.match(rf"({'|'.join(map(re.escape, names))}) ", part):
                found.append(shlex.split(part, comments=True))
    return found


def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_every_path_that_a_page_names_exists(page, root):
    folders = "artifacts|prep|runtime|tests|bench|docs|examples"
    text = page.read_text("utf-8")
    for path in re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", text):
        assert (root / path).exists(), path


def test_every_make_target_that_a_page_names_exists(page, root):
    targets = re.findall(r"^([\w-]+):", (root / "Makefile").read_text("utf-8"), re.M)
    text = page.read_text("utf-8")
    named = [words[1] for words in _commands(text, "make")]
    assert {*named, *re.findall(r"`make ([\w-]+)`", text)} <= {*targets}


def test_lines_are_at_most_100_characters(page):
    text = page.read_text("utf-8")
    prose = re.sub(r"^```.*?^```|^\|.*?$", "", text, flags=re.M | re.S)
    assert [line for line in prose.splitlines() if len(line) > 100] == []
    assert [line for line in _blocks(text) if len(line) > 119] == []


# -- commands --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def groups():
    pytest.importorskip("torch")
    from smoe.prep.cli import cli as prep
    from smoe.runtime.cli import cli as runtime

    return {"smoe": runtime, "smoe-prep": prep}


def test_the_command_reference_is_what_help_prints(root, groups):
    made = runpy.run_path(str(root / "docs" / "make_commands.py"))["page"]()
    assert (root / "docs" / "commands.md").read_text("utf-8") == made, "run: make docs"


def test_every_command_of_a_block_parses(page, groups):
    for program, *arguments in _commands(page.read_text("utf-8"), *groups):
        group = groups[program]
        context = click.Context(group, info_name=program, **group.context_settings)
        if arguments == ["--version"]:
            continue
        name, command, rest = group.resolve_command(context, arguments)
        command.make_context(name, rest, parent=context)  # a UsageError says what is wrong


def test_every_option_in_a_sentence_exists(page, groups):
    for words in re.findall(r"`((?:smoe|smoe-prep) [a-z][^`]*)`", page.read_text("utf-8")):
        program, name, *rest = words.split()
        command = groups[program].commands[name]
        options = {option for parameter in command.params for option in parameter.opts}
        given = {word.split("=")[0] for word in rest if re.match("--?[a-z]", word)}
        assert given <= options, words


def test_every_bench_of_a_page_exists_and_takes_its_options(page):
    pytest.importorskip("bench.harness")
    from bench.__main__ import MODULES
    from bench.harness import BENCHES

    for module in MODULES:
        importlib.import_module(f"bench.{module}")
    for words in re.findall(r"python -m bench ([^`#\n]+)", page.read_text("utf-8")):
        soak, (name, *rest) = words.startswith("soak "), words.removeprefix("soak ").split()
        if name in ("NAME", "tables"):
            continue
        assert BENCHES[name].soak == soak, words
        flags = {"--json", *(flag for option in BENCHES[name].options for flag in option.flags)}
        assert {word for word in rest if word.startswith("--")} <= flags, words


def test_every_script_that_a_page_runs_exists(page, root):
    for script in re.findall(r"python ((?:bench|tests|docs)/\S+\.py)", page.read_text("utf-8")):
        assert (root / script).is_file(), script


# -- the README ------------------------------------------------------------------------------------


def test_the_readme_fits_150_lines(root):
    assert len((root / "README.md").read_text("utf-8").splitlines()) <= 150


def test_the_figures_of_the_readme_are_those_of_the_results(root):
    rows = [
        line for line in (root / "README.md").read_text("utf-8").splitlines() if " MB (" in line
    ]
    results = (root / "docs" / "results.md").read_text("utf-8").splitlines()
    assert len(rows) == 3 and {*rows} <= {*results}


def test_the_python_of_the_readme_runs(root, capsys):
    code = re.search(
        r"^```python\n(.*?)^```", (root / "README.md").read_text("utf-8"), re.M | re.S
    )[1]
    bundle = root / "tests" / "golden" / "v3.smoe"
    code = code.replace('"model.smoe"', repr(str(bundle))).replace("context=2048", "context=128")
    exec(compile(code, "<README>", "exec"), {})
    assert "model: " in capsys.readouterr().out


# -- the tree --------------------------------------------------------------------------------------


def _tree(text: str) -> dict[str, str]:
    """Path to caption, of every line of the tree in docs/architecture.md."""
    block = text.split("```tree\n")[1].split("```")[0]
    captions, folders = {}, []
    for line in block.splitlines():
        indent, name, caption = re.match(r"( *)(\S+)\s+(.+)", line).groups()
        folders = [*folders[: len(indent) // 2], name]
        captions["".join(folders)] = caption
    return captions


def test_the_tree_is_what_git_tracks(root):
    tree = _tree((root / "docs" / "architecture.md").read_text("utf-8"))
    for path, caption in tree.items():
        assert (root / path).exists(), path
        assert (root / path).is_dir() == path.endswith("/"), path
        assert len(caption) > 10, path
    done = subprocess.run(["git", "-C", root, "ls-files"], capture_output=True, text=True)
    if not done.stdout:
        pytest.skip("not a git checkout: what belongs to the project cannot be told")
    tracked = done.stdout.split()
    tops = {path.split("/")[0] + "/" * ("/" in path) for path in tracked if path[0] != "."}
    modules = {
        path for path in tracked if re.match(r"(artifacts|prep|runtime|bench)/.*\.py$", path)
    }
    assert tops <= tree.keys()
    assert {path for path in modules if "/__" not in path} <= tree.keys()


# -- words -----------------------------------------------------------------------------------------


def test_no_page_speaks_of_how_the_work_was_parcelled_out(page):
    words = r"\b(part \d|bars?\b|issue \d|task sheet|reviewer|second reader)"
    text = page.read_text("utf-8")
    assert not re.findall(words, text, re.I)
