"""The judge's client against an endpoint that fails as endpoints do, over real HTTP."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("openai")

from megatron_zero import judge


class Endpoint(ThreadingHTTPServer):
    """Replies with the question in capitals; refuses `long`; fails while `failures` are left."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.models, self.failures, self.delay_s = ["tiny"], 0, 0.0
        self.asked: Counter = Counter()
        self.keys: set[str] = set()
        self.now = self.most = 0
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_GET(self) -> None:
        self.send(200, {"data": [{"id": m, "object": "model"} for m in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, server = body["messages"][-1]["content"], self.server
        with server.lock:
            server.asked[text] += 1
            server.keys.add(self.headers["Authorization"])
            fails = server.failures > 0
            server.failures -= fails
            server.now += 1
            server.most = max(server.most, server.now)
        time.sleep(server.delay_s)
        with server.lock:
            server.now -= 1
        assert body["temperature"] == 0 and body["model"] == "tiny"
        if fails:
            return self.send(503, {"error": {"message": "busy"}})
        if text == "long":
            return self.send(400, {"error": {"message": "context length"}})
        message = {"role": "assistant", "content": text.upper()}
        self.send(200, {"choices": [{"index": 0, "message": message}]})

    def send(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def endpoint():
    with Endpoint() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(judge.CLIENT, "max_retries", 1)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def chats(*texts: str) -> list[judge.Messages]:
    return [[{"role": "user", "content": text}] for text in texts]


def test_replies_come_in_order_once_each_and_are_kept(endpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    path = tmp_path / "new" / "replies.jsonl"
    texts = [f"question {i % 30}" for i in range(40)]
    endpoint.delay_s = 0.02
    replies = judge.ask_judge(chats(*texts), path, url=endpoint.url, concurrency=3)
    assert replies == [text.upper() for text in texts]
    assert set(endpoint.asked.values()) == {1} and len(endpoint.asked) == 30
    assert endpoint.most == 3 and endpoint.keys == {"Bearer secret"}
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == 30
    assert {r["messages"][0]["content"].upper() for r in records} == {r["reply"] for r in records}
    assert "secret" not in path.read_text()
    judge.ask_judge(chats(*texts, "another"), path, url=endpoint.url)
    assert set(endpoint.asked.values()) == {1} and len(endpoint.asked) == 31


def test_a_busy_endpoint_is_asked_again_and_a_dead_one_is_given_up(endpoint, tmp_path) -> None:
    path = tmp_path / "replies.jsonl"
    endpoint.failures = 1
    assert judge.ask_judge(chats("a"), path, url=endpoint.url) == ["A"]
    assert endpoint.asked == {"a": 2}
    endpoint.failures = 100
    with pytest.raises(ValueError, match=r"--judge='http.*busy.* 1 replies are kept in .*replies"):
        judge.ask_judge(chats("a", *"bcdefghij"), path, url=endpoint.url, concurrency=1)
    assert endpoint.asked["b"] == 2  # one retry, and then what has not begun is left
    assert len(endpoint.asked) < 5
    endpoint.failures = 0
    path.write_text(path.read_text() + '{"model": "tiny", "mess')  # killed while it wrote
    assert judge.ask_judge(chats("a", "b", "c"), path, url=endpoint.url) == ["A", "B", "C"]
    assert endpoint.asked["a"] == 2, "it was judged before"
    assert len(list(map(json.loads, path.read_text().splitlines()))) == 3


def test_a_refused_request_is_none_and_is_made_again(endpoint, tmp_path) -> None:
    path = tmp_path / "replies.jsonl"
    for _ in range(2):
        assert judge.ask_judge(chats("long", "x"), path, url=endpoint.url) == [None, "X"]
    assert endpoint.asked == {"long": 2, "x": 1}
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == 2
    (error,) = [r["error"] for r in records if r["reply"] is None]
    assert "context length" in error


def test_a_wrong_address_or_model_is_found_before_anything_is_asked(endpoint, tmp_path) -> None:
    path = tmp_path / "replies.jsonl"
    with pytest.raises(ValueError, match=r"--judge='http://127.0.0.1:9/v1': Connection error"):
        judge.ask_judge(chats("a"), path, url="http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match=r"--judge-model='big': must be .* served: tiny"):
        judge.ask_judge(chats("a"), path, url=endpoint.url, model="big")
    endpoint.models = ["tiny", "other"]
    with pytest.raises(ValueError, match=r"--judge-model='': must be .* served: tiny, other"):
        judge.ask_judge(chats("a"), path, url=endpoint.url)
    assert not endpoint.asked
    assert judge.ask_judge(chats("a"), path, url=endpoint.url, model="tiny") == ["A"]
