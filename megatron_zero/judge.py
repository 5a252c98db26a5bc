"""A language model behind an OpenAI-compatible endpoint as a judge; every reply is kept.

One line per request in a file: what was asked, of which model, and the reply. What is in it is
never asked again, so an interrupted analysis goes on where it stopped, and equal requests are made
once. `vllm serve` of a chat model is such an endpoint.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Optional

import openai

from megatron_zero.checks import fail
from megatron_zero.observability.run_dir import write_atomically

Messages = list[dict[str, str]]
# Of an attempt; of a request that fails for the moment: connection, time-out, 408, 409, 429, 5xx.
CLIENT = {"timeout": 120, "max_retries": 5}
REPLY = {"temperature": 0, "max_completion_tokens": 512}


def ask_judge(
    requests: Sequence[Messages], path: Path, *, url: str, model: str = "", concurrency: int = 16
) -> list[Optional[str]]:
    """The replies, in order; None where the endpoint refuses a request, as one that is too long.

    Args:
        requests: chats; equal ones are made once.
        path: the file of replies, continued; requests that were refused are made again.
        url: with its version, as in http://localhost:8000/v1. A key that it wants is taken from
            OPENAI_API_KEY.
        model: "": the one that is served.
        concurrency: requests at once.

    Raises:
        ValueError: the endpoint does not answer, does not serve the model or stops answering.
    """
    # without what a crash cut off
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    records = [record for record in map(json.loads, lines) if record["reply"] is not None]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records).encode())
    replies = {_key(r["model"], r["messages"]): r["reply"] for r in records}
    api_key, pool = os.environ.get("OPENAI_API_KEY") or "none", ThreadPoolExecutor(concurrency)
    client = openai.OpenAI(base_url=url, api_key=api_key, **CLIENT)
    try:
        served = [served.id for served in client.with_options(max_retries=1).models.list()]
        model = model or (served[0] if len(served) == 1 else "")
        if model not in served:
            fail("--judge-model", model, f"must be one that is served: {', '.join(served)}")
        asked = {_key(model, messages): messages for messages in requests}
        create = partial(client.chat.completions.create, model=model, **REPLY)
        missing = [key for key in asked if key not in replies]
        new = {pool.submit(create, messages=asked[key]): key for key in missing}
        with path.open("a", encoding="utf-8") as file:
            for future in as_completed(new):
                record = {"model": model, "messages": asked[new[future]], "reply": None}
                try:
                    record["reply"] = future.result().choices[0].message.content or ""
                except openai.BadRequestError as error:
                    record["error"] = str(error)
                replies[new[future]] = record["reply"]
                print(json.dumps(record), file=file, flush=True)
    except openai.OpenAIError as error:
        fail("--judge", url, f"{error} {len(replies)} replies are kept in {path}")
    finally:
        pool.shutdown(cancel_futures=True)
    return [replies[_key(model, messages)] for messages in requests]


def _key(model: str, messages: Messages) -> str:
    return json.dumps([model, messages])
