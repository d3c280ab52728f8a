"""Reports of sections, and the clock of warnings."""

from unique_asr.longform.coverage import LongformReport, format_clock


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
