"""Greedy text from an exported folder: vLLM's and transformers', as JSON on the last line."""

import json
import os
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}

# begun differently, so that even a model that does not listen goes on differently
PROMPTS = ["What is 3+4?\n", "What is 9+9?\n9+9=", "What is 5", "5+1=6. \\boxed{"]


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vllm import LLM, SamplingParams

    path = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    engine = LLM(path, dtype="float32", enforce_eager=True, max_model_len=128)
    greedy = SamplingParams(temperature=0, max_tokens=40)
    texts: dict[str, list[str]] = {"transformers": []}
    outputs = engine.generate(PROMPTS, greedy, use_tqdm=False)
    texts["vllm"] = [output.outputs[0].text for output in outputs]
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(ids, do_sample=False, max_new_tokens=40)[0, ids.size(1) :]
        texts["transformers"].append(tokenizer.decode(out, skip_special_tokens=True))
    print("RESULT " + json.dumps(texts))


if __name__ == "__main__":
    main()
