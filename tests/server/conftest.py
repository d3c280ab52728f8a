import pytest
from serving import Running, Script


@pytest.fixture
def script():
    return Script()


@pytest.fixture
def serve(tmp_path, script, monkeypatch):
    """Starts servers, which end with the test; nothing of an upload is left then."""
    monkeypatch.delenv("UNIQUE_ASR_API_KEY", raising=False)
    running = []

    def start(**changes):
        running.append(Running(tmp_path / "uploads", script, **changes))
        return running[-1]

    yield start
    script.gate.set()
    for server in running:
        server.stop()
        assert list(server.folder.iterdir()) == []


@pytest.fixture
def server(serve):
    return serve()
