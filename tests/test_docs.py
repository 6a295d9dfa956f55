"""The documents say what is there: the README's tree, its commands, the command reference, the
log's commands."""

import re
import subprocess
import sys

import pytest

COMMANDS = {
    "smoe.runtime": ("run", "chat", "bench", "info", "verify"),
    "smoe.prep": ("build", "inspect", "profile", "pack", "export", "verify", "simulate", "plan"),
}


def _tree(readme: str) -> list[tuple[str, str]]:
    """(path, caption) of every line of the README's tree."""
    block = readme.split("```tree\n")[1].split("```")[0]
    found, folders = [], []
    for line in block.splitlines():
        indent, name, caption = re.match(r"( *)(\S+)\s+(.+)", line).groups()
        folders = [*folders[: len(indent) // 2], name]
        found.append(("".join(folders), caption))
    return found


def test_the_tree_is_the_disk(root):
    tree = _tree((root / "README.md").read_text("utf-8"))
    for path, caption in tree:
        assert (root / path).exists(), path
        assert (root / path).is_dir() == path.endswith("/"), path
        assert len(caption) > 10, path
    listed = {path for path, _ in tree}
    tracked = subprocess.run(
        ["git", "-C", root, "ls-files"], capture_output=True, text=True
    ).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout: what belongs to the project cannot be told")
    tops = {t.split("/")[0] + ("/" if "/" in t else "") for t in tracked} - {
        ".gitignore",
        ".ci/",
        "LICENSE",
    }
    assert tops <= listed, tops - listed
    modules = {
        t
        for t in tracked
        if re.fullmatch(r"(artifacts|prep|runtime|bench)/\w+\.py", t) and "__" not in t
    }
    assert modules <= listed, modules - listed


def _help(module: str, command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *([command] if command else []), "--help"],
        capture_output=True, text=True, check=True, env={"COLUMNS": "100", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    return done.stdout.rstrip()


@pytest.mark.parametrize("module", COMMANDS)
def test_the_command_reference_is_what_help_prints(root, module):
    if module == "smoe.prep":
        pytest.importorskip("torch")
    written = (root / "docs" / "commands.md").read_text("utf-8")
    for command in COMMANDS[module]:
        assert f"```\n{_help(module, command)}\n```" in written, f"{module} {command}: make docs"
    listed = re.findall(r"^  (\w+)  ", _help(module, "").split("Commands:")[1], re.M)
    assert set(listed) == set(COMMANDS[module])


DOCUMENTS = (
    "README.md",
    "docs/log.md",
    "docs/walkthrough.md",
    "docs/families.md",
    "docs/wheels.md",
)


def test_every_link_leads_somewhere(root):
    for document in DOCUMENTS:
        text = re.sub(r"```.*?```", "", (root / document).read_text("utf-8"), flags=re.S)
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            assert link.startswith("https://") or ((root / document).parent / link).exists(), (
                document,
                link,
            )


def test_every_command_that_the_documents_give_exists(root):
    for document in DOCUMENTS:
        text = (root / document).read_text("utf-8")
        for script in re.findall(r"python ((?:bench|tests)/\S+\.py)", text):
            assert (root / script).is_file(), script
        for target in re.findall(r"\bmake ([\w-]+)", text):
            if target not in ("it",):
                assert re.search(rf"^{target}:", (root / "Makefile").read_text(), re.M), target


def test_paths_in_the_log_exist(root):
    text = (root / "docs" / "log.md").read_text("utf-8")
    for path in re.findall(r"`((?:artifacts|prep|runtime|tests|bench|docs)/[\w./-]+\.\w+)`", text):
        assert (root / path).exists(), path
