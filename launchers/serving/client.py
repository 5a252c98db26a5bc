"""Ask a served base model one question, as the paper does DeepSeek-V3-Base. Standard library only.

python launchers/serving/client.py http://10.0.0.1:8000 "What is 12 + 34?" --template r1
"""

import argparse
import json
import urllib.request

from megatron_zero.config import TEMPLATES
from megatron_zero.data.templates import apply_template, stop_strings


def complete(server: str, prompt: str, *, max_tokens: int, stop: "list[str]") -> str:
    """One completion of `prompt` by the first model of an OpenAI-compatible server."""
    with urllib.request.urlopen(f"{server}/v1/models", timeout=60) as answer:
        model = json.load(answer)["data"][0]["id"]
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    body |= {"stop": stop, "include_stop_str_in_output": True} if stop else {}
    request = urllib.request.Request(
        f"{server}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=3600) as answer:
        return json.load(answer)["choices"][0]["text"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("server", help="as http://host:8000")
    parser.add_argument("question")
    parser.add_argument("--template", choices=TEMPLATES, default="r1")
    parser.add_argument("--max-tokens", type=int, default=3000)
    args = parser.parse_args()
    prompt, stop = apply_template(args.template, args.question), stop_strings(args.template)
    print(complete(args.server.rstrip("/"), prompt, max_tokens=args.max_tokens, stop=list(stop)))


if __name__ == "__main__":
    main()
