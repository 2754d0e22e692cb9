import re
import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "datasets" / "README.md"]
TOOLS = sorted((ROOT / "tools").glob("*.py"))


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_the_readme_loop_runs_and_says_what_it_does(capsys):
    (code,) = blocks(ROOT / "README.md", "python")
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"episode {e}" for e in range(1, 5)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    named = set(re.findall(r"(?:tools|configs|examples|benchmarks)/[\w/]+\.\w+", page.read_text()))
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_every_tool_explains_itself(tool, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [tool.name, "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(tool), run_name="__main__")
    assert caught.value.code == 0
    assert "usage:" in capsys.readouterr().out
    assert tool.name in (ROOT / "README.md").read_text() + (ROOT / "docs/datasets.md").read_text()


@pytest.mark.parametrize("target", ["demo", "compare", "test", "test-all"])
def test_make_targets_name_files_that_exist(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    named = re.findall(r"(?:tools|configs)/[\w/$}{#]+\.\w+", done.stdout)
    assert not [name for name in named if "$" not in name and not (ROOT / name).exists()]
