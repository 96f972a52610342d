"""The judge, against a server in this process that answers as it is told."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("httpx2")

from pcm_fast.evaluate.judge import ATTEMPTS, Comparison, Judge, JudgeError, judge_all


class Endpoint:
    """Replies are what ``reply(prompt, count)`` gives: text of the model, or (status, body)."""

    def __init__(self):
        self.reply = lambda prompt, count: "Verdict: tie"
        self.seen = []
        lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.seen.append((self.path, self.headers.get("Authorization"), body))
                    count = len(endpoint.seen)
                given = endpoint.reply(body["messages"][0]["content"], count)
                if isinstance(given, str):
                    given = 200, json.dumps({"choices": [{"message": {"content": given}}]})
                data = given[1].encode()
                self.send_response(given[0])
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint():
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


@pytest.fixture
def pauses():
    return []


@pytest.fixture
def judge(endpoint, pauses):
    judge = Judge(endpoint.url + "/", "arbiter", "secret", pauses.append)
    yield judge
    judge.close()


def comparisons(count):
    return [
        Comparison("pcm", "soup", f"p{n}", f"Question {n}?", "concise+friendly", f"good {n}", f"bad {n}")
        for n in range(count)
    ]


def prefers_good(prompt, count):
    return "Reason.\nVerdict: A" if prompt.index("good") < prompt.index("bad") else "Reason.\n**Verdict:** B"


def test_the_request(endpoint, judge):
    assert judge.verdict("concise, friendly", "Why {this}?", "first answer", "second answer") == "tie"
    ((path, authorization, body),) = endpoint.seen
    assert path == "/v1/chat/completions"
    assert authorization == "Bearer secret"
    assert body["model"] == "arbiter"
    text = body["messages"][0]["content"]
    assert "concise, friendly" in text
    assert "Why {this}?" in text
    assert text.index("first answer") < text.index("second answer")


def test_no_key_no_header(endpoint):
    Judge(endpoint.url, "arbiter").verdict("concise", "Why?", "a", "b")
    assert endpoint.seen[0][1] is None


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Verdict: A", "first"),
        ("B is bad.\nverdict: **b**", "second"),
        ("Verdict: a tie", "tie"),
        ('"Verdict: A" or "Verdict: B"? Hm.\nVerdict: B.', "second"),
        ("Verdict - Tie", "tie"),
    ],
)
def test_verdicts_are_read(endpoint, judge, text, expected):
    endpoint.reply = lambda prompt, count: text
    assert judge.verdict("concise", "Why?", "a", "b") == expected


@pytest.mark.parametrize(
    "failure",
    [(500, "oops"), (429, "slow down"), (200, "no JSON"), (200, '{"choices": []}'), "A, clearly", "Verdict: Both"],
)
def test_what_may_pass_is_tried_again(endpoint, judge, pauses, failure):
    endpoint.reply = lambda prompt, count: failure if count < ATTEMPTS else "Verdict: B"
    assert judge.verdict("concise", "Why?", "a", "b") == "second"
    assert pauses == [2.0, 4.0, 8.0]


def test_a_judge_that_never_answers(endpoint, judge):
    endpoint.reply = lambda prompt, count: (503, "")
    with pytest.raises(JudgeError, match="status 503"):
        judge.verdict("concise", "Why?", "a", "b")
    assert len(endpoint.seen) == ATTEMPTS


def test_no_connection(endpoint, pauses):
    endpoint.server.shutdown()
    endpoint.server.server_close()
    with pytest.raises(JudgeError, match="ConnectError"):
        Judge(endpoint.url, "arbiter", pause=pauses.append).verdict("concise", "Why?", "a", "b")


def test_a_refusal_ends_everything(endpoint, judge, tmp_path):
    endpoint.reply = lambda prompt, count: (401, '{"error": "wrong key"}')
    with pytest.raises(RuntimeError, match=r"judge: http://.* refuses 'arbiter' with status 401: .*wrong key"):
        judge_all(judge, comparisons(50), tmp_path / "verdicts.jsonl", 0, 2, lambda count: None)
    assert len(endpoint.seen) <= 2


def test_one_request_that_is_refused(endpoint, judge, tmp_path):
    endpoint.reply = lambda prompt, count: (400, "too long") if "Question 1?" in prompt else prefers_good(prompt, count)
    asked = comparisons(3)
    scores, failures = judge_all(judge, asked, tmp_path / "verdicts.jsonl", 0, 2, lambda count: None)
    assert failures == {asked[1].key: "status 400: too long"}
    assert len(scores) == 2
    assert len(endpoint.seen) == 3


def test_order_is_random_and_does_not_count(endpoint, judge, tmp_path):
    endpoint.reply = prefers_good
    done = []
    scores, failures = judge_all(judge, comparisons(40), tmp_path / "verdicts.jsonl", 5, 4, done.append)
    assert failures == {}
    assert set(scores.values()) == {1.0}
    assert sum(done) == 40
    first = [body["messages"][0]["content"] for _, _, body in endpoint.seen]
    swapped = sum(text.index("bad") < text.index("good") for text in first)
    assert 8 <= swapped <= 32
    endpoint.reply = lambda prompt, count: "Verdict: A"  # one who always takes the first answer
    scores, _ = judge_all(judge, comparisons(40), tmp_path / "others.jsonl", 5, 4, lambda count: None)
    assert sum(scores.values()) == 40 - swapped


def test_ties_and_failures_are_no_wins(endpoint, judge, tmp_path):
    replies = {"Question 0?": "Verdict: tie", "Question 1?": (500, "")}
    endpoint.reply = lambda prompt, count: next(
        (reply for question, reply in replies.items() if question in prompt), prefers_good(prompt, count)
    )
    asked = comparisons(4)
    scores, failures = judge_all(judge, asked, tmp_path / "verdicts.jsonl", 0, 2, lambda count: None)
    assert scores == {asked[0].key: 0.5, asked[2].key: 1.0, asked[3].key: 1.0}
    assert failures == {asked[1].key: "status 500"}


def test_only_what_has_no_verdict_is_judged_again(endpoint, judge, tmp_path):
    path, asked = tmp_path / "verdicts.jsonl", comparisons(6)
    endpoint.reply = lambda prompt, count: (500, "") if "Question 1?" in prompt else prefers_good(prompt, count)
    judge_all(judge, asked[:3], path, 0, 2, lambda count: None)
    endpoint.seen.clear()
    endpoint.reply = prefers_good
    scores, failures = judge_all(judge, asked, path, 0, 2, lambda count: None)
    assert failures == {}
    assert len(scores) == 6
    assert len(endpoint.seen) == 4  # number 1 and the three new ones


def test_bad_arguments():
    with pytest.raises(ValueError, match="judge-url: expected an address that starts with http"):
        Judge("localhost:8000", "arbiter")
    with pytest.raises(ValueError, match="judge-model: expected the name of a model, got none"):
        Judge("http://localhost:8000", "")
