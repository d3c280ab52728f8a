"""Reports of sections, and the clock of warnings."""

from unique_asr.longform.coverage import LongformReport, format_clock
from unique_asr.transcript import Word


def test_reports_of_sections_are_merged():
    report = LongformReport(stop_reason="loop", passes=2, longest=40, warnings=["first"], skipped=[(1.0, 3.0)])
    later = LongformReport(passes=1, broken=1, longest=50, warnings=["second"], skipped=[(3.0, 4.0), (8.0, 9.0)])
    later.timings["decode"] = 2.0
    report.merge(later)
    assert (report.stop_reason, report.passes, report.broken, report.longest) == ("loop", 3, 1, 50)
    assert report.warnings == ["first", "second"]
    assert report.skipped == [(1.0, 4.0), (8.0, 9.0)], "neighbours are one"
    assert report.timings["decode"] == 2.0


def test_clock():
    assert [format_clock(seconds) for seconds in (5.4, 65, 3725)] == ["0:05", "1:05", "1:02:05"]


def report_confidence(*segments):
    """A report about (words, their confidence) of segments, one word a second."""
    report, second = LongformReport(), 0
    for count, confidence in segments:
        report.add_confidence([Word("word", second + i, second + i + 1, confidence) for i in range(count)])
        second += count
    report.close_stretch()
    return report


def test_stretches_of_low_confidence_are_named():
    report = report_confidence((30, 0.9), (12, 0.3), (12, 0.4), (25, 0.35), (5, 0.1), (40, 0.8))
    assert report.describe_unsure(60.0, ["English"]) == (
        "1:30-2:19: low confidence (35 %), the text may not be what was said; the model knows English only"
    )
    assert report.describe_unsure(0.0, []).endswith("the text may not be what was said")


def test_few_unsure_words_among_sure_ones_are_no_stretch():
    assert report_confidence((30, 0.9), (4, 0.2)).describe_unsure(0.0, []) is None
    assert report_confidence((5, 0.2), (30, 0.9)).describe_unsure(0.0, []) is None
    assert report_confidence((2, 0.2)).describe_unsure(0.0, []) is None
    assert report_confidence().describe_unsure(0.0, []) is None


def test_a_short_recording_is_judged_too():
    assert report_confidence((5, 0.3)).describe_unsure(0.0, []).startswith("0:00-0:05: low confidence (30 %)")


def test_many_stretches_are_one_line():
    line = report_confidence(*[(20, 0.3), (20, 0.9)] * 5).describe_unsure(0.0, [])
    assert line.startswith("0:00-0:20, 0:40-1:00, 1:20-1:40 and 2 more: low confidence (30 %)")
