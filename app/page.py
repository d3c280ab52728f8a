"""The page: what is shown, and what happens on each click."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from unique_asr.app.comparison import COLUMNS, DENSE, SPARSE, compare
from unique_asr.app.limits import Limits
from unique_asr.app.store import FAILED, STOPPED, Record, Store
from unique_asr.app.visitors import identify
from unique_asr.app.worker import Live, Worker, make_attention_config

from unique_asr.application.display import format_time
from unique_asr.application.limits import Refusal
from unique_asr.audio import check_vad, parse_time
from unique_asr.subtitles import build_cues
from unique_asr.transcript import Segment

REFRESH_SECONDS = 0.3  # how often a running job is shown anew
HEADERS = ["Start", "End", "Text", "Confidence"]


class View(NamedTuple):
    """A value for each output component of the page, in their order."""

    status: Any
    text: Any
    segments: Any
    player: Any
    files: Any
    comparison: Any
    differences: Any
    measures: Any
    plot: Any
    jobs: Any


class Page:
    """The handlers of the page, and `build`, which lays out its components around them."""

    def __init__(
        self,
        store: Store,
        worker: Worker,
        limits: Limits,
        models: Sequence[str],
        examples: Sequence[Path] = (),
        shared: bool = False,
    ) -> None:
        self.shared = shared  # whether every browser sees the jobs of all others
        self.store, self.worker, self.limits = store, worker, limits
        self.models, self.examples = list(models), [str(path) for path in examples]
        self._watching: dict[str | None, object] = {}  # what each open page shows; a newer choice ends the older one

    # Handlers

    def transcribe(
        self,
        uploads: list[str] | None,
        recorded: str | None,
        path: str | None,
        model: str,
        attention: str,
        budget: float,
        page_size: float,
        prompt: str | None,
        hotwords: str | None,
        language: str | None,
        vad: bool,
        reads: bool,
        compare: bool,
        request: gr.Request,
    ) -> Iterator[View]:
        """Make a job of each recording and show them one after the other until they end, or refuse in one line."""
        if model not in self.models:
            raise _error(f"model={model}: this page offers {', '.join(self.models)}")
        settings = {
            "model": model,
            "attention": attention,
            "budget": int(budget or 0),
            "page_size": int(page_size or 0),
            "prompt": (prompt or "").strip(),
            "vad": bool(vad),
            "reads": bool(reads) and attention == "unique",
            "compare": bool(compare) and attention == "unique",
        }
        records: list[Record] = []
        try:
            make_attention_config(settings, self.worker.options)
            settings |= _check_told((language or "").strip(), (hotwords or "").strip(), settings["prompt"], model)
            if vad:
                check_vad()
            self.worker.check_room()
            recordings, uploaded = self.limits.choose(uploads, recorded, path)
            for recording in recordings:
                record = self._submit(recording, settings, uploaded, identify(request))
                records.append(record)
        except ValueError as error:
            if not records:
                raise _error(str(error)) from error
            reason = str(error)
        except OSError as error:
            reason = f"{self.store.folder}: the recording cannot be kept there ({error.strerror})"
            if not records:
                raise _error(reason) from error
        note = ""
        if left := [recording.name for recording in recordings[len(records) :]]:
            note = f"{reason} Not taken: {', '.join(left)}"
            gr.Warning(note, duration=None)
        for record in records:
            if not (yield from self.show(record.id, request, note)):
                return

    def _submit(self, recording: Path, settings: dict[str, Any], uploaded: bool, browser: str) -> Record:
        """Make a job of a recording. Raises Refusal if the queue is full, OSError if it cannot be kept."""
        self.worker.check_room()  # before it is copied
        record = self.store.create(recording, recording.name, settings, uploaded, browser)
        try:
            self.worker.submit(record)
        except Refusal:
            self.store.discard(record)
            raise
        return record

    def show(self, id: str | None, request: gr.Request, note: str = "") -> Generator[View, None, bool]:
        """Show a job as it changes while it waits or runs, then as it is on disk.

        Args:
            note: stands below its status.

        Returns:
            Whether it was shown to its end, and no other job was chosen meanwhile.
        """
        state, status, count, mine = None, None, None, object()
        self._watching[request.session_hash] = mine
        while id and (live := self.worker.live(id)) is not None:
            if (state, status, count) != (live.record.state, live.status, len(live.segments)):
                first, more, begun = status is None, count != len(live.segments), state != live.record.state
                state, status, count = live.record.state, live.status, len(live.segments)
                yield self._live_view(live, first, more, begun, identify(request), note)
            live.finished.wait(REFRESH_SECONDS)
            if self._watching.get(request.session_hash) is not mine:
                yield View(*[gr.skip()] * len(View._fields))  # gradio shows the last view again when a handler ends
                return False
        yield self._final_view(self.store.load(id), identify(request), note)
        return self._watching.get(request.session_hash) is mine

    def show_latest(self, request: gr.Request) -> Iterator[View]:
        """Show this browser's job at work, else its last one: what a page that is opened or reloaded begins with."""
        records = self._find_jobs(identify(request))
        running = [record.id for record in records if self.worker.live(record.id)]
        yield from self.show(running[-1] if running else records[0].id if records else None, request)

    def stop(self, id: str | None) -> None:
        """End this job and no other; what it has written is kept."""
        if not self.worker.stop(id or ""):
            gr.Info("This job is not running.")

    def leave(self, request: gr.Request) -> None:
        """Stop watching for a page that is closed; its job goes on."""
        self._watching.pop(request.session_hash, None)

    def go_on(self, id: str | None, request: gr.Request) -> Iterator[View]:
        """Resume a job that was stopped or failed, where it broke off."""
        record = self.store.load(id)
        if record is None or record.state not in (STOPPED, FAILED):
            raise _error("Only a job that was stopped or failed can be continued.")
        try:
            self.worker.submit(record)
        except Refusal as error:
            raise _error(str(error)) from error
        yield from self.show(record.id, request)

    def jump(self, event: gr.SelectData) -> Any:
        """Put the player where the clicked segment begins."""
        return gr.Audio(playback_position=parse_time(event.row_value[0]))

    # Views

    def _live_view(self, live: Live, first: bool, more: bool, begun: bool, browser: str, note: str) -> View:
        """Only what has changed: all of it at first, the text if there is more, the list of jobs when one begins."""
        segments = list(live.segments)
        empty = None if first else gr.skip()
        return View(
            status=_status(f"{live.record.title}: {live.status}", note),
            text=_text(segments) if more else gr.skip(),
            segments=_rows(segments) if more else gr.skip(),
            player=gr.Audio(value=live.record.audio, subtitles=None) if first else gr.skip(),
            files=empty,
            comparison=gr.Column(visible=False) if first else gr.skip(),
            differences=empty,
            measures=empty,
            plot=gr.HTML(visible=False) if first else gr.skip(),
            jobs=self._choices(browser, live.record) if begun else gr.skip(),
        )

    def _final_view(self, record: Record | None, browser: str, note: str) -> View:
        if record is None:
            empty = dict.fromkeys(View._fields) | {"status": "No job yet.", "text": "", "segments": []}
            hidden = {"comparison": gr.Column(visible=False), "plot": gr.HTML(visible=False)}
            return View(**empty | hidden | {"jobs": self._choices(browser)})
        transcript, dense = self.store.read_transcript(record), self.store.read_transcript(record, "dense")
        segments = transcript.segments if transcript else self.store.read_segments(record)
        differences = measures = None
        if transcript and dense:
            differences, measures = compare(dense, transcript)
        audio = self.store.find_audio(record)
        plot = self.store.plot_path(record)
        return View(
            status=_status(f"{record.title}: {record.state}. {record.message}", note),
            text=_text(segments),
            segments=_rows(segments),
            player=gr.Audio(value=str(audio), subtitles=_subtitles(segments)) if audio else None,
            files=[str(path) for path in self.store.find_files(record)] or None,
            comparison=gr.Column(visible=measures is not None),
            differences=differences,
            measures=measures,
            plot=gr.HTML(plot.read_text(encoding="utf-8"), visible=True) if plot.exists() else gr.HTML(visible=False),
            jobs=self._choices(browser, record),
        )

    def _find_jobs(self, browser: str) -> list[Record]:
        """The jobs of this browser, or all of them if they are shared; the newest first."""
        return [record for record in self.store.list() if self.shared or (browser and record.browser == browser)]

    def _choices(self, browser: str, selected: Record | None = None) -> Any:
        """The list of past jobs, the selected one in any case; in front of each title when it was made."""
        records, choices = self._find_jobs(browser), []
        if selected and selected.id not in [record.id for record in records]:
            records.insert(0, selected)
        for record in records:
            made = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.created))
            choices.append((f"{made}  {record.title} ({record.state})", record.id))
        return gr.Dropdown(choices=choices, value=selected.id if selected else None)

    # Layout

    def build(self) -> gr.Blocks:
        """Lay out the components and connect them to the handlers."""
        options = self.worker.options["attention"]
        with gr.Blocks(title="unique_asr", analytics_enabled=False) as blocks:
            gr.Markdown("# unique_asr\nTranscribes recordings of any length; jobs are kept on disk.")
            with gr.Row():
                with gr.Column(scale=1):
                    with gr.Tab("File"):
                        uploads = gr.File(label="Audio or video", file_count="multiple", elem_id="upload")
                        if self.examples:
                            gr.Examples([[[path]] for path in self.examples], uploads)
                    with gr.Tab("Microphone"):
                        recorded = gr.Audio(label="Microphone", sources=["microphone"], type="filepath")
                    with gr.Tab("Path", visible=bool(self.limits.folders)):
                        path = gr.Textbox(label="File in an allowed folder", placeholder="talks/monday.mp3")
                    with gr.Accordion("Settings", open=False):
                        model = gr.Dropdown(self.models, value=self.models[0], label="Model")
                        attention = gr.Radio(["unique", "dense"], value="unique", label="Attention")
                        budget = gr.Number(options["budget"] or 512, label="Budget (tokens a step reads)", precision=0)
                        page_size = gr.Number(options["page_size"], label="Page size (tokens)", precision=0)
                        prompt = gr.Textbox(label="Instruction in place of the model's own", lines=2)
                        hotwords = gr.Textbox(label="Hotwords, for models that can be told (separated by commas)")
                        language = gr.Textbox(label="Language, for models that can be told (fr or French; empty: any)")
                        vad = gr.Checkbox(label="Drop what is not speech (voice activity detection)")
                        reads = gr.Checkbox(label="Plot which part of the audio each token read")
                        compared = gr.Checkbox(label="Transcribe densely as well, and compare")
                    with gr.Row():
                        start = gr.Button("Transcribe", variant="primary", elem_id="transcribe")
                        stop = gr.Button("Stop", variant="stop", elem_id="stop")
                        go_on = gr.Button("Continue", elem_id="continue")
                    jobs = gr.Dropdown([], label="Past jobs", allow_custom_value=True, elem_id="jobs")
                with gr.Column(scale=2):
                    status = gr.Textbox(label="Status", interactive=False, elem_id="status", lines=2)
                    player = gr.Audio(label="Recording", interactive=False, type="filepath", elem_id="player")
                    text = gr.Textbox(
                        label="Transcript", interactive=False, elem_id="text", lines=8, max_lines=20, buttons=["copy"]
                    )
                    table = gr.Dataframe(
                        headers=HEADERS,
                        type="array",
                        label="Segments: a click moves the player",
                        interactive=False,
                        wrap=True,
                        column_widths=["15%", "15%", "53%", "17%"],
                        elem_id="segments",
                    )
                    files = gr.File(label="Downloads", file_count="multiple", interactive=False, elem_id="files")
                    plot = gr.HTML(label="Which part of the audio each token read", visible=False, elem_id="plot")
                    with gr.Column(visible=False, elem_id="comparison") as comparison:
                        measures = gr.Dataframe(
                            headers=COLUMNS, type="array", label="Dense and sparse", interactive=False
                        )
                        differences = gr.HighlightedText(
                            label="Differences", color_map={DENSE: "orange", SPARSE: "blue"}, combine_adjacent=True
                        )
            outputs = [status, text, table, player, files, comparison, differences, measures, plot, jobs]
            inputs = [uploads, recorded, path, model, attention, budget, page_size]
            inputs += [prompt, hotwords, language, vad, reads, compared]
            # A handler only watches its job: the worker does one at a time, however many watch.
            watching = {"outputs": outputs, "concurrency_limit": None, "show_progress": "hidden"}
            start.click(self.transcribe, inputs, api_name="transcribe", **watching)
            go_on.click(self.go_on, jobs, api_name="continue", **watching)
            jobs.input(self.show, jobs, api_name="show", trigger_mode="multiple", **watching)
            blocks.load(self.show_latest, None, api_name="latest", **watching)
            blocks.unload(self.leave)
            stop.click(self.stop, jobs, None, api_name="stop", queue=False)
            table.select(self.jump, None, player, api_visibility="private", queue=False)
        return blocks


def _text(segments: Sequence[Segment]) -> str:
    return "\n".join(f"[{format_time(segment.start)}] {segment.text.strip()}" for segment in segments)


def _rows(segments: Sequence[Segment]) -> list[list[str]]:
    return [
        [
            format_time(segment.start),
            format_time(segment.end),
            segment.text.strip(),
            "" if segment.confidence is None else f"{segment.confidence:.2f}",
        ]
        for segment in segments
    ]


def _subtitles(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    return [{"text": cue.text, "timestamp": [cue.start, cue.end]} for cue in build_cues(segments)]


def _check_told(language: str, hotwords: str, prompt: str, model: str) -> dict[str, str | None]:
    """What the model is told, as it takes it. Raises ValueError if it cannot be told."""
    if not (language or hotwords or prompt):
        return {"language": None, "hotwords": None}
    from unique_asr.transcribers import check_hotwords, check_language, check_prompt  # takes seconds

    check_prompt(prompt, model)
    return {"language": check_language(language, model), "hotwords": check_hotwords(hotwords, model)}


def _status(line: str, note: str) -> str:
    return f"{line}\n{note}" if note else line


def _error(message: str) -> gr.Error:
    return gr.Error(message, print_exception=False)
