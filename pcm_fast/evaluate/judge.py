"""A language model as judge, behind any endpoint that speaks OpenAI's chat completions."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx2

from pcm_fast.evaluate.log import JsonLog

Verdict = Literal["first", "second", "tie"]

INSTRUCTIONS = """\
You compare two answers to the same message. The person who wrote the message wants the answer to be: {preference}.
Judge by all of these wishes together, as one, and by whether the answer is a sensible reply at all. Do not let \
length, or which answer comes first, count for itself. A tie is fine where neither is better.

Message:
{prompt}

Answer A:
{first}

Answer B:
{second}

Give your reason in one sentence. Then write a last line: "Verdict: A", "Verdict: B" or "Verdict: tie"."""
VERDICT = re.compile(r"verdict\W*\b(?:a\s+)?(tie|a|b)\b", re.IGNORECASE)
MEANINGS: dict[str, Verdict] = {"a": "first", "b": "second", "tie": "tie"}
TRANSIENT = (408, 409, 425, 429)
REFUSALS = (401, 403, 404)
ATTEMPTS = 4


class JudgeError(Exception):
    """No verdict on one pair of answers, after all attempts."""


@dataclass(frozen=True)
class Comparison:
    """Two answers to one question.

    Attributes:
        method, opponent: who gave them.
        prompt_id, prompt: the user message.
        preference: the dimensions, joined by "+".
        answer, other: of the method and of the opponent.
    """

    method: str
    opponent: str
    prompt_id: str
    prompt: str
    preference: str
    answer: str
    other: str

    @property
    def key(self) -> str:
        """Names the comparison in a file."""
        return f"{self.method} | {self.opponent} | {self.prompt_id} | {self.preference}"

    def swapped(self, seed: int) -> bool:
        """Whether the opponent's answer is shown first: a coin for each comparison."""
        return random.Random(f"{seed} {self.key}").random() < 0.5


class Judge:
    """Asks an endpoint which of two answers is better.

    Attributes:
        url: of the API, such as "http://localhost:8000/v1".
        model: as the endpoint calls it.
    """

    def __init__(
        self, url: str, model: str, key: str | None = None, pause: Callable[[float], None] = time.sleep
    ) -> None:
        """A judge.

        Args:
            url: starts with http:// or https://.
            model: name of the model.
            key: sent as a bearer token; None sends none.
            pause: waits so many seconds between attempts.
        """
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"judge-url: expected an address that starts with http:// or https://, got {url!r}")
        if not model:
            raise ValueError("judge-model: expected the name of a model, got none")
        self.url, self.model, self._pause = url.rstrip("/"), model, pause
        self._refusal = ""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._client = httpx2.Client(headers=headers, timeout=120.0)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def verdict(self, preference: str, prompt: str, first: str, second: str) -> Verdict:
        """Which of two answers is better under a preference.

        What may pass (no connection, too many requests, an error of the server, a reply without a verdict) is tried
        four times.

        Raises:
            JudgeError: none of the attempts gave a verdict.
            RuntimeError: the endpoint refuses, or has refused, such requests altogether (a wrong key, no such model).
        """
        if self._refusal:  # to another thread
            raise RuntimeError(self._refusal)
        text = INSTRUCTIONS.format(preference=preference, prompt=prompt, first=first, second=second)
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 0}
        reason = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                self._pause(2.0**attempt)
            try:
                response = self._client.post(f"{self.url}/chat/completions", json=body)
            except httpx2.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            if response.status_code in TRANSIENT or response.status_code >= 500:
                reason = f"status {response.status_code}"
                continue
            if response.status_code != 200:
                refusal = f"status {response.status_code}: {response.text:.200}"
                if response.status_code not in REFUSALS:
                    raise JudgeError(refusal)
                self._refusal = f"judge: {self.url} refuses {self.model!r} with {refusal}"
                raise RuntimeError(self._refusal)
            found = VERDICT.findall(_content(response))
            if found:
                return MEANINGS[found[-1].lower()]
            reason = "a reply without a verdict"
        raise JudgeError(reason)


def _content(response: httpx2.Response) -> str:
    """The text of a chat completion; "" if the response is none."""
    try:
        return str(response.json()["choices"][0]["message"]["content"])
    except (ValueError, LookupError, TypeError):
        return ""


def judge_all(
    judge: Judge,
    comparisons: Sequence[Comparison],
    path: Path,
    seed: int,
    workers: int,
    advance: Callable[[int], None],
) -> tuple[dict[str, float], dict[str, str]]:
    """Judge comparisons, in random order of the two answers; verdicts that are in the file already stay.

    Args:
        judge: who judges.
        comparisons: what is judged.
        path: the file of verdicts, JSON lines.
        seed: of the order of the answers.
        workers: requests that are under way at once.
        advance: called with the number of comparisons that are done.

    Returns:
        By key of the comparison the method's score (1, 0.5 for a tie, 0); and for those that failed, why. A failure is
        neither a win nor a tie, and is tried again in the next run.

    Raises:
        RuntimeError: the endpoint refuses such requests altogether.
    """
    log = JsonLog(path, {"judge": judge.model, "instructions": INSTRUCTIONS, "seed": seed})
    known = {(entry["key"], entry["answer"], entry["other"]): entry["score"] for entry in log.records}
    scores: dict[str, float] = {}
    failures: dict[str, str] = {}
    missing = []
    for comparison in comparisons:
        score = known.get((comparison.key, comparison.answer, comparison.other))
        if score is None:
            missing.append(comparison)
        else:
            scores[comparison.key] = score
            advance(1)
    with log, ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(_score, judge, comparison, seed): comparison for comparison in missing}
        try:
            for future in as_completed(futures):
                comparison = futures[future]
                try:
                    scores[comparison.key] = future.result()
                except JudgeError as error:
                    failures[comparison.key] = str(error)
                else:
                    log.append(_record(comparison, scores[comparison.key]))
                advance(1)
        finally:
            for future in futures:
                future.cancel()
    return scores, failures


def _score(judge: Judge, comparison: Comparison, seed: int) -> float:
    swapped = comparison.swapped(seed)
    first, second = (comparison.other, comparison.answer) if swapped else (comparison.answer, comparison.other)
    wishes = comparison.preference.replace("+", ", ")
    verdict = judge.verdict(wishes, comparison.prompt, first, second)
    if verdict == "tie":
        return 0.5
    return float((verdict == "second") == swapped)


def _record(comparison: Comparison, score: float) -> dict[str, Any]:
    return {"key": comparison.key, "answer": comparison.answer, "other": comparison.other, "score": score}
