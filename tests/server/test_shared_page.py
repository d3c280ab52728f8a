"""The page and the server in one process: one queue, one model in memory."""

import threading

import httpx
from gradio_client import Client, handle_file
from serving import TALK, TEXT, wait_for


def test_page_and_server_share_queue_and_model(serve, script, tmp_path):
    script.wait_at = 1
    server = serve(page=True, jobs=str(tmp_path / "jobs"), examples=[])
    page = Client(server.url, verbose=False)
    first = page.submit(
        *([handle_file(str(TALK))], None, "", "default", "unique", 512, 8, "", "", "", False, False, False),
        api_name="/transcribe",
    )
    assert script.reached.wait(20)
    answers = []
    second = threading.Thread(
        target=lambda: answers.append(server.client().audio.transcriptions.create(model="default", file=TALK))
    )
    second.start()
    wait_for(lambda: server.queue.waiting == 1)
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "running": 1, "waiting": 1}
    script.gate.set()
    second.join(20)
    assert answers[0].text == TEXT
    assert "Segment 3" in str(first.result(timeout=30))
    assert script.made == ["default"]
    page.close()
