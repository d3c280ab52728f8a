"""Recordings that are URIs: fetched with limits, named without secrets, and what is done is not fetched again."""

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath

import fsspec
import pytest
from command_line import DATA, FakeTranscriber, names

import unique_asr
from unique_asr import remote
from unique_asr.application.jobs import OutputError, find_recordings, plan
from unique_asr.audio import AudioError, AudioFile, load_audio
from unique_asr.remote import FetchLimits, RemoteError, fetch, full_place, is_uri, read_facts, shown_name
from unique_asr.writers import read_transcript

TALK = (DATA / "nomads.opus").read_bytes()


class Handler(BaseHTTPRequestHandler):
    """Serves nomads.opus under every name but some that go wrong."""

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.send_facts()

    def send_facts(self):
        for name, value in self.server.facts.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self):
        self.server.asked.append(self.path)
        content = self.server.content
        name = Path(self.path.partition("?")[0]).name
        if name in ("none.opus", "forbidden.opus"):
            self.send_error({"none.opus": 404, "forbidden.opus": 403}[name])
            return
        self.send_response(200)
        if name != "endless.opus":
            self.send_header("Content-Length", str(2 * len(content) if name == "short.opus" else len(content)))
        self.send_facts()
        if name == "stalled.opus":
            self.wfile.write(TALK[:100])
            self.wfile.flush()
            self.server.closing.wait(20)
            return
        try:
            self.wfile.write(content)
            while name == "endless.opus":
                self.wfile.write(TALK)
        except OSError:
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def web(monkeypatch):
    """A server on this machine: `address`, `asked` for which paths, and the `content` and `facts` that it gives."""
    monkeypatch.setenv("NO_PROXY", "*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.asked, server.closing = True, [], threading.Event()
    server.content, server.facts = TALK, {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.address = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def bucket():
    """A folder of recordings in fsspec's memory, which stands for s3:// and the like."""
    system = fsspec.filesystem("memory")
    for name in ("a.opus", "b.MP3", "notes.txt", "2024/a.opus", "2024/05/c.opus"):
        system.pipe(f"/talks/{name}", TALK)
    yield "memory://talks"
    system.rm("/talks", recursive=True)


def uris(found):
    return [(file.uri, str(file.place)) for file in found]


def test_what_is_a_uri():
    assert all(map(is_uri, ("https://a/b.mp3", "s3://b/k", "S3://b/k", "zip://a.wav::https://h/a.zip")))
    assert not any(map(is_uri, ("a.mp3", "/a//b.mp3", "a:b.mp3", "file:///a.mp3", Path("s3://b/k"), None)))


def test_a_file_uri_is_a_path(tmp_path):
    path = tmp_path / "a b.opus"
    path.write_bytes(TALK)
    assert find_recordings(path.as_uri()) == [path]
    assert AudioFile(path.as_uri()).path == path


def test_names_hold_no_secrets():
    assert shown_name("https://me:word@host:8/a/talk.mp3?X-Amz-Signature=abc#t=1") == "https://host:8/a/talk.mp3"
    assert shown_name("ftp://me:word@host/a?b.mp3") == "ftp://host/a?b.mp3"
    one, two = (shown_name(f"https://host/download?id={number}") for number in (1, 2))
    assert one != two
    assert one.startswith("https://host/download?")
    assert "id=" not in one


def test_places():
    assert full_place("s3://bucket/2024/a b.wav") == PurePosixPath("bucket/2024/a b.wav")
    assert full_place("https://me:word@host:8/a%20b/../c%2Fd.mp3?x=1") == PurePosixPath("host:8/a b/c/d.mp3")
    assert full_place("https://host/../..") == PurePosixPath("host")


def test_python_and_the_library(web, tiny):
    assert AudioFile(f"{web.address}/talk.opus").duration == pytest.approx(9.06, abs=0.02)
    assert len(load_audio(f"{web.address}/talk.opus")) == len(load_audio(DATA / "nomads.opus"))
    _, info = unique_asr.transcribe(f"{web.address}/talk.opus?key=secret", tiny)
    assert info.audio == f"{web.address}/talk.opus"
    audios = [f"{web.address}/none.opus?key=secret"]
    ((_, transcript),) = unique_asr.transcribe_batch(audios, tiny)
    assert transcript.info.audio == f"{web.address}/none.opus"
    assert transcript.info.warnings == [f"{web.address}/none.opus: no such file"]


def test_a_copy_leaves_nothing_behind(web, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with fetch(f"{web.address}/talk.opus") as copy:
        path = copy.path
        assert path.read_bytes() == TALK
        assert names(tmp_path) == []
    audio = AudioFile(f"{web.address}/talk.opus")
    before = len(os.listdir("/proc/self/fd"))
    assert len(list(audio.blocks(2.0))) == len(list(audio.blocks(2.0))) == 5
    del audio
    assert len(os.listdir("/proc/self/fd")) < before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none.opus", "no such file"),
        ("forbidden.opus", "cannot be fetched (HTTP 403 Forbidden)"),
        ("short.opus", "cannot be fetched ("),
    ],
)
def test_what_cannot_be_fetched_is_told_in_one_line(web, name, reason):
    with pytest.raises(AudioError) as raised:
        AudioFile(web.address.replace("//", "//me:word@") + f"/{name}?key=secret")
    message = str(raised.value)
    assert message.startswith(f"{web.address}/{name}: {reason}")
    assert not any(secret in message for secret in ("\n", "word", "secret"))


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("http://127.0.0.1:1/a.mp3", "cannot be fetched (Cannot connect to host 127.0.0.1:1"),
        ("nosuch://bucket/a.mp3", "cannot be fetched (Protocol not known: nosuch)"),
        ("memory://none.mp3", "no such file"),
    ],
)
def test_what_is_not_there(uri, reason, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(AudioError) as raised:
        AudioFile(uri)
    assert str(raised.value).startswith(f"{uri}: {reason}")


@pytest.mark.parametrize("uri", ["http://[::1/x.wav", "https://", "https:///x.wav"])
def test_an_address_without_a_host(uri, talk, command):
    code, _, err = command(f"audio={uri}")
    assert (code, err) == (1, "error: audio: a URI has no host, or a wrong one; give https://HOST/FILE\n")
    with pytest.raises(AudioError, match="has no host"):
        AudioFile(uri)


def test_limits(web, bucket, monkeypatch):
    small = FetchLimits(max_megabytes=len(TALK) / 1e6 - 0.001)
    for uri in (f"{web.address}/talk.opus", f"{web.address}/endless.opus", f"{bucket}/a.opus"):
        with pytest.raises(AudioError, match=r"is larger than .* MB; fetch.max_megabytes=N allows more"):
            AudioFile(uri, limits=small)
    assert AudioFile(f"{bucket}/a.opus", limits=FetchLimits(len(TALK) / 1e6)).duration > 9
    with pytest.raises(RemoteError, match=r"not fetched within 0.3 s; fetch.max_seconds=N allows more"):
        fetch(f"{web.address}/stalled.opus", FetchLimits(max_seconds=0.3))
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.3)
    with pytest.raises(RemoteError, match=r"nothing came for 0.3 s|cannot be fetched"):
        fetch(f"{web.address}/stalled.opus")


def test_progress(web):
    told = []
    monitored = FetchLimits(max_seconds=0.5)
    with pytest.raises(RemoteError):
        fetch(f"{web.address}/stalled.opus", monitored, lambda *values: told.append(values))
    assert told[-1] == ("fetch", 1e-4, len(TALK) / 1e6)


def test_a_full_disk(web, mount, monkeypatch):
    disk = mount("disk", "size=16k")
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    with pytest.raises(RemoteError, match=f"the disk of {disk} is full; TMPDIR=FOLDER names another place"):
        fetch(f"{web.address}/talk.opus")


def test_folders_and_globs(bucket):
    assert uris(find_recordings(bucket)) == [
        ("memory:///talks/a.opus", "a.opus"),
        ("memory:///talks/b.MP3", "b.MP3"),
    ]
    assert uris(find_recordings(f"{bucket}/**/*.opus")) == [
        ("memory:///talks/2024/05/c.opus", "2024/05/c.opus"),
        ("memory:///talks/2024/a.opus", "2024/a.opus"),
        ("memory:///talks/a.opus", "a.opus"),
    ]
    assert uris(find_recordings("https://host/a*[b].mp3?c*")) == [("https://host/a*[b].mp3?c*", "a*[b].mp3")]
    for wrong in (f"{bucket}/*.flac", "memory://talks/2023/*"):
        with pytest.raises(AudioError, match="no file matches"):
            find_recordings(wrong)


def test_where_transcripts_go(bucket):
    jobs = plan(find_recordings(f"{bucket}/**/*.opus"), "out")
    assert [str(job.base) for job in jobs] == ["out/2024/05/c", "out/2024/a", "out/a"]
    (job,) = plan(find_recordings("https://host/talks/my%20talk.mp3?sig=1"))
    assert (str(job.base), job.name) == ("my talk", "https://host/talks/my%20talk.mp3")
    assert job.audio == "https://host/talks/my%20talk.mp3?sig=1"
    same = ["s3://b/1/audio.mp3", "s3://b/2/audio.mp3"]
    with pytest.raises(OutputError, match="list them in a file, audio=@FILE"):
        plan(find_recordings(same))
    with pytest.raises(OutputError, match=r"output\.dir=s3://b/out: is not a folder"):
        plan(find_recordings(same[0]), "s3://b/out")


def test_a_list_of_names(tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("# an archive\ns3://b/1/audio.mp3\n\ns3://b/2/audio.mp3\ntalks/a [1].wav\n")
    jobs = plan(find_recordings(f"@{listed}"), "out")
    assert [str(job.base) for job in jobs] == ["out/b/1/audio", "out/b/2/audio", "out/a [1]"]
    listed.write_text("# nothing\n")
    with pytest.raises(AudioError, match="the list names no recording"):
        find_recordings(f"@{listed}")
    with pytest.raises(AudioError, match=r"audio=@none.txt: the list cannot be read \(No such file"):
        find_recordings("@none.txt")


def test_command_line(web, talk, command):
    uri = f"{web.address}/some/lecture.opus?key=secret"
    code, out, err = command(f"audio={uri}", "output.format=[txt,json]")
    assert code == 0
    assert names() == ["lecture.json", "lecture.txt", "talk.opus"]
    assert f"Fetching {web.address}/some/lecture.opus ..." in err
    info = read_transcript("lecture.json").info
    assert info.audio == f"{web.address}/some/lecture.opus"
    assert info.duration == pytest.approx(9.06, abs=0.02)
    assert "secret" not in out + err + Path("lecture.json").read_text()
    asked = len(web.asked)
    assert "keeping lecture.txt" in command(f"audio={uri}", "output.format=[txt,json]")[2]
    assert command(f"audio={uri}", "output.format=srt")[0] == 0  # from the .json
    assert len(web.asked) == asked
    assert command(f"audio={uri}", "output.overwrite=true", "end=5")[0] == 0
    assert len(web.asked) == asked + 1


def change(content):
    """A recording of the same size."""
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


MONDAY, TUESDAY = ({"Last-Modified": f"{day}:00 GMT"} for day in ("Mon, 02 Nov 2026 10:00", "Tue, 03 Nov 2026 10:00"))


def test_facts(web, bucket):
    web.facts = {"ETag": 'W/"1"', **MONDAY}
    facts = {"size": len(TALK), "etag": '"1"', "modified": MONDAY["Last-Modified"]}
    assert read_facts(f"{web.address}/talk.opus") == facts
    assert fetch(f"{web.address}/talk.opus").facts == facts
    assert read_facts(f"{bucket}/a.opus") == fetch(f"{bucket}/a.opus").facts
    assert set(read_facts(f"{bucket}/a.opus")) == {"size", "modified"}
    assert read_facts(f"{bucket}/none.opus") == {}
    assert len(web.asked) == 1


@pytest.mark.parametrize(
    ("before", "after", "fetched"),
    [
        ({}, {}, 1),
        (MONDAY, MONDAY, 1),
        (MONDAY, TUESDAY, 2),
        (MONDAY, {}, 1),
        ({"ETag": '"1"', **MONDAY}, {"ETag": '"1"', **TUESDAY}, 1),
        ({"ETag": '"1"', **MONDAY}, {"ETag": '"2"', **MONDAY}, 2),
    ],
)
def test_a_uri_is_fetched_again_if_its_server_tells_of_a_change(web, talk, command, before, after, fetched):
    """Whether it has changed is then seen by its content."""
    web.facts = before
    uri = f"{web.address}/lecture.opus"
    assert command(f"audio={uri}?key=old")[0] == 0
    info = read_transcript("lecture.json").info
    assert info.file["uri"] == uri
    web.facts = after
    code, _, err = command(f"audio={uri}?key=new", "output.format=all")
    assert (code, "keeping lecture.txt" in err) == (0, True)
    assert len(web.asked) == fetched
    web.content = change(TALK)
    code, _, err = command(f"audio={uri}")
    if fetched == 1:
        assert (code, "keeping lecture.txt" in err) == (0, True)
    else:
        assert code == 1
        assert f"lecture.json: was made from another recording ({uri}); output.overwrite=true replaces it" in err
    assert command(f"audio={uri}", "output.overwrite=true")[0] == 0


def test_a_uri_of_another_size_or_place_is_another_and_its_copy_is_not(web, talk, command):
    uri = f"{web.address}/lecture.opus"
    command(f"audio={uri}")
    Path("lecture.opus").write_bytes(TALK)
    assert "keeping lecture.txt" in command("audio=lecture.opus")[2]
    assert "was made from another recording" in command(f"audio={web.address}/other/lecture.opus")[2]
    web.content = TALK + b"more"
    assert "was made from another recording" in command(f"audio={uri}")[2]
    web.server_close()
    web.shutdown()
    assert "keeping lecture.txt" in command(f"audio={uri}")[2]  # nobody says that it has changed


def test_an_interrupted_uri_goes_on_if_its_content_is_the_same(web, talk, command):
    uri = f"{web.address}/lecture.opus"
    assert command(f"audio={uri}", stop=3, error=RuntimeError("no"))[0] == 1
    web.content = change(TALK)
    assert "lecture.partial.jsonl: was made from another recording" in command(f"audio={uri}", "resume=true")[2]
    web.content, web.facts = TALK, TUESDAY
    assert command(f"audio={uri}", "resume=true")[0] == 0
    assert FakeTranscriber.decoded == [0, 1, 2, 2, 3]


def test_names_of_uris_beside_those_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("talk.opus", "other.txt"):
        Path(name).touch()

    def bases(*audios):
        return [str(job.base) for job in plan(find_recordings(audios))]

    assert bases("https://host/Talk.mp3", "talk.opus") == ["Talk.mp3", "talk.opus"]
    assert bases("https://host/talk.json") == ["talk.json"]
    assert bases("https://host/other.mp3", "other.txt") == ["other.mp3", "other.txt"]
    with pytest.raises(OutputError, match=r"https://host/talk.opus and talk.opus would both be written"):
        bases("https://host/talk.opus", "talk.opus")
    (job,) = plan(find_recordings(f"https://host/{'a' * 300}.mp3?{'b' * 5000}"))
    job.check_outputs()
    job.check_writable()
    job.path("txt").touch()
    job.check_outputs()
    Path(job.path("srt")).mkdir()
    with pytest.raises(OutputError, match="Is a directory"):
        job.check_outputs()


def test_one_that_cannot_be_fetched_does_not_stop_the_others(web, talk, command):
    code, _, err = command(f"audio=[{web.address}/none.opus,{web.address}/a.opus]", "fetch.max_megabytes=1")
    assert code == 1
    assert f"error: {web.address}/none.opus: no such file" in err
    assert "a.txt" in names()
    code, _, err = command(f"audio={web.address}/b.opus", "fetch.max_megabytes=0.001")
    assert code == 1
    assert "is larger than 0.001 MB; fetch.max_megabytes=N allows more" in err


@pytest.mark.parametrize("option", ["fetch.max_megabytes=0", "fetch.max_seconds=soon", "fetch.max_seconds=true"])
def test_limits_that_are_none(talk, command, option):
    code, _, err = command("audio=talk.opus", option)
    assert code == 2
    assert err.startswith(f"error: {option.replace('true', 'True')}: give a positive number")
