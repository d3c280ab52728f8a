# ruff: noqa: E402  (what follows needs Playwright and gradio)
"""The page in a real browser, driven by Playwright."""

import re

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
pytest.importorskip("gradio", reason="the page needs gradio")

from chromium import start_chromium
from test_page import DATA, Script, configuration
from unique_asr.app.cli import launch

expect = playwright.expect
expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        try:
            browser = start_chromium(driver)
        except playwright.Error as error:
            pytest.skip(f"no chromium starts (.ci/install_chromium installs one): {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def script():
    return Script()


@pytest.fixture
def tab(browser, script, tmp_path):
    """An open page; nothing on it may raise an error."""
    (tmp_path / "talks").mkdir()
    blocks = launch(configuration(tmp_path), script.load, block=False)
    context = browser.new_context()
    tab = context.new_page()
    errors = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(blocks.local_url)
    yield tab
    script.gate.set()
    context.close()
    blocks.close()
    assert errors == []


def upload(tab, name="nomads.opus"):
    if tab.locator("#upload [aria-label='Clear']").is_visible():
        tab.locator("#upload [aria-label='Clear']").click()
    tab.locator("#upload input[type=file]").set_input_files(str(DATA / name))
    expect(tab.locator("#upload")).to_contain_text(name.partition(".")[0])
    expect(tab.locator("#upload a[download]")).to_be_visible()  # it has arrived
    tab.locator("#transcribe").click()


def text(tab):
    return tab.locator("#text textarea")


def wait_for_status(tab, word):
    tab.wait_for_function("word => document.querySelector('#status textarea')?.value.includes(word)", arg=word)


def test_upload_live_text_refresh_and_download(tab, script):
    script.gate.clear()
    upload(tab)
    expect(text(tab)).to_have_value("[00:00.0] Segment 0 is sparse.")
    wait_for_status(tab, "Transcribing")
    tab.reload()
    expect(text(tab)).to_have_value("[00:00.0] Segment 0 is sparse.")  # it is still at work
    script.gate.set()
    wait_for_status(tab, "done")
    tab.reload()
    wait_for_status(tab, "done")
    assert len(text(tab).input_value().splitlines()) == 9
    with tab.expect_download() as download:
        tab.locator("#files a[download='nomads.srt']").click()
    assert "00:00:08,000 --> 00:00:09,000\nSegment 8 is sparse." in download.value.path().read_text()


def test_stop_and_continue(tab, script):
    script.gate.clear()
    upload(tab)
    expect(text(tab)).to_have_value("[00:00.0] Segment 0 is sparse.")
    tab.locator("#stop").click()
    wait_for_status(tab, "stopped")
    assert len(text(tab).input_value().splitlines()) == 1
    script.gate.set()
    tab.locator("#continue").click()
    wait_for_status(tab, "done")
    assert len(text(tab).input_value().splitlines()) == 9


def test_past_jobs_are_listed_and_shown(tab):
    upload(tab)
    wait_for_status(tab, "nomads.opus: done")
    upload(tab, "repose.opus")
    wait_for_status(tab, "repose.opus: done")
    tab.locator("#jobs input").click()
    tab.get_by_role("option").filter(has_text="nomads.opus (done)").click()
    wait_for_status(tab, "nomads.opus: done")


def test_player_follows_the_segments(tab):
    upload(tab)
    wait_for_status(tab, "done")
    tab.locator("#segments").get_by_text("Segment 6 is sparse.").first.click()
    expect(tab.locator("#player #time")).to_have_text("0:06")
    tab.locator("#player [aria-label='Play']").click()
    expect(tab.locator("#player [data-testid='subtitle-display']")).to_contain_text(
        re.compile("Segment [67] is sparse.")
    )


def test_the_plot_of_what_was_read_is_shown(tab):
    tab.get_by_text("Settings").click()
    tab.get_by_label("Plot which part of the audio each token read").check()
    upload(tab)
    wait_for_status(tab, "done")
    expect(tab.locator("#plot svg")).to_contain_text("audio that was read")
    upload(tab, "repose.opus")
    wait_for_status(tab, "repose.opus: done")
    expect(tab.locator("#plot svg")).to_contain_text("0:15")  # it is that of this recording
    expect(tab.locator("#files a[download='repose.reads.svg']")).to_be_visible()


def test_another_browser_does_not_see_the_job(browser, tab):
    upload(tab)
    wait_for_status(tab, "nomads.opus: done")
    second_tab = tab.context.new_page()
    second_tab.goto(tab.url)
    wait_for_status(second_tab, "nomads.opus: done")
    other = browser.new_context()
    theirs = other.new_page()
    theirs.goto(tab.url)
    wait_for_status(theirs, "No job yet.")
    upload(theirs, "repose.opus")
    wait_for_status(theirs, "repose.opus: done")
    tab.reload()
    wait_for_status(tab, "nomads.opus: done")
    other.close()


def test_stop_ends_a_waiting_job_at_once(tab, script):
    script.gate.clear()
    upload(tab)
    expect(text(tab)).to_have_value("[00:00.0] Segment 0 is sparse.")
    second = tab.context.new_page()
    second.goto(tab.url)
    wait_for_status(second, "nomads.opus")
    upload(second, "repose.opus")
    wait_for_status(second, "repose.opus: Waiting")
    expect(second.locator("#jobs input")).to_have_value(re.compile(r"repose\.opus"))  # what Stop is about
    second.locator("#stop").click()
    wait_for_status(second, "repose.opus: stopped")
    assert "nomads.opus: Transcribing" in tab.locator("#status textarea").input_value()


def test_files_that_the_queue_does_not_take_are_named(tab, script, tmp_path):
    script.gate.clear()
    copies = [tmp_path / f"talk {number}, 100 % (é).opus" for number in range(12)]
    for copy in copies:
        copy.write_bytes((DATA / "nomads.opus").read_bytes())
    tab.locator("#upload input[type=file]").set_input_files([str(copy) for copy in copies])
    expect(tab.locator("#upload a[download]")).to_have_count(12)
    tab.locator("#transcribe").click()
    expect(tab.locator("body")).to_contain_text(
        "At most 8 jobs may wait, and 8 do; try again later. Not taken: talk 9, 100"
    )
    script.gate.set()
    wait_for_status(tab, "talk 8, 100 % (é).opus: done")
    with tab.expect_download() as download:
        tab.locator("#files a[download='talk 8, 100 % (é).vtt']").click()
    assert download.value.path().read_text().startswith("WEBVTT")


def test_a_refusal_is_shown(tab):
    tab.locator("#transcribe").click()
    expect(tab.locator("body")).to_contain_text("Give files, the microphone or a path")
