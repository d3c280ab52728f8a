"""CI has a browser where one can be had, and then skips no test of the page."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest
def test_here(): pass
def test_skipped(): pytest.skip("no chromium")
"""


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize(
    ("lines", "outcome"),
    [(TESTS, "1 failed, 1 passed"), ("import pytest\npytest.skip('no gradio', allow_module_level=True)", "1 error")],
)
def test_a_skipped_test_fails_where_they_are_required(required, lines, outcome, tmp_path):
    shutil.copy(ROOT / "tests" / "app" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(lines)
    environment = {**os.environ, "UNIQUE_ASR_REQUIRE_PAGE_TESTS": "1" if required else ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (outcome in done.stdout) == required, done.stdout
    assert ("required here" in done.stdout) == required
    assert ("1 skipped" in done.stdout) != required


# A stand-in for Python: says whether the browser starts, and what `playwright install` would do.
PYTHON = """
case "$*" in
    tests/app/chromium.py) [ -e "$STATE/starts" ];;
    "-m playwright install chromium") echo download >> "$STATE/log"; {download};;
    "-m playwright install-deps chromium") echo libraries >> "$STATE/log"; {libraries};;
esac
"""
STARTS = 'touch "$STATE/starts"'


@pytest.fixture
def install(tmp_path):
    """Runs .ci/install_chromium on a machine of our own; gives its exit code, its lines and what it tried."""

    def run(uid=0, starts=False, download="false", libraries="false", apt="exit 100"):
        programs = {
            "id": f"echo {uid}",
            "python": PYTHON.replace("{download}", download).replace("{libraries}", libraries),
            "timeout": 'shift; exec "$@"',
            "dirname": f"echo {ROOT / '.ci'}",
        }
        if apt is not None:
            programs["apt-get"] = f'echo "apt-get $*" >> "$STATE/log"; {apt}'
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "touch").symlink_to(shutil.which("touch"))
        for name, script in programs.items():
            (folder / name).write_text(f"#!{shutil.which('bash')}\n{script}\n")
            (folder / name).chmod(0o755)
        if starts:
            (tmp_path / "starts").touch()
        environment = {"PATH": str(folder), "STATE": str(tmp_path), "PYTHON": str(folder / "python")}
        command = [shutil.which("bash"), ROOT / ".ci" / "install_chromium"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        log = (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []
        return done.returncode, (done.stdout + done.stderr).splitlines(), log

    return run


APT = ["apt-get update", "apt-get install --yes --no-install-recommends chromium"]


def test_a_chromium_that_starts_is_left_alone(install):
    assert install(starts=True, download=STARTS) == (0, [], [])


@pytest.mark.parametrize("uid", [0, 1000])
def test_playwright_installs_its_own(uid, install):
    code, lines, log = install(uid, download=STARTS)
    assert (code, len(lines), log) == (0, 1, ["download"])


def test_its_libraries_are_installed_by_root(install):
    code, lines, log = install(download="true", libraries=STARTS)
    assert (code, len(lines), log) == (0, 1, ["download", "libraries"])


@pytest.mark.parametrize("download", ["false", "true"])
def test_debians_chromium_is_installed_where_playwrights_does_not_start(download, install):
    code, lines, log = install(download=download, apt=f'[ "$1" = update ] || {STARTS}')
    assert (code, len(lines)) == (0, 1)
    assert log == ["download", *["libraries"][: download == "true"], *APT]


@pytest.mark.parametrize(
    ("machine", "tried"),
    [
        ({}, ["download", "apt-get update"]),  # no network
        ({"apt": None}, ["download"]),
        ({"uid": 1000}, ["download"]),
        ({"uid": 1000, "download": "true"}, ["download"]),  # it does not start without its libraries
        ({"apt": "true"}, ["download", *APT]),  # what is installed does not start
    ],
)
def test_where_there_is_none_to_be_had_it_is_said_in_one_line(machine, tried, install):
    code, lines, log = install(**machine)
    assert code == 1
    assert lines[1:] == [
        "note: no Chromium starts here and none can be installed: tests of the page in a browser are skipped"
    ]
    assert log == tried
