"""An exported pair of GGUF files in llama.cpp, by way of `xllamacpp` and nothing else: this interpreter needs no torch.

    python -P llama_cpp.py JOB ANSWER

JOB: `model`, `mmproj`, `samples` (chats), `texts` (prompts to be tokenised), `greedy`, `banned` (words it shall not
say: it reports none that is half a letter), `threads`. ANSWER: the engine's version; `ids` of the texts; per sample the
prompt that its template writes, the number of prompt tokens, greedy tokens, and for each of these the most probable
tokens with their log-probabilities.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

TOP = 10


def main(job: dict[str, Any], answer: Path) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    params.mmproj.path = job["mmproj"]
    params.n_ctx, params.n_parallel, params.warmup, params.port = 4096, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    said: dict[str, Any] = {
        "engine": f"llama.cpp (xllamacpp {importlib.metadata.version('xllamacpp')})", "samples": [],
        "ids": [
            _post(server, "/tokenize", {"content": t, "add_special": True, "parse_special": True})["tokens"]
            for t in job["texts"]
        ],
    }  # fmt: skip
    for chat in job["samples"]:
        reply = _post(
            server, "/v1/chat/completions",
            {"messages": [_message(m) for m in chat], "max_tokens": job["greedy"], "temperature": 0,
             "logprobs": True, "top_logprobs": TOP, "cache_prompt": False, "reasoning_format": "none",
             "logit_bias": [[i, False] for i in job["banned"]]},
        )  # fmt: skip
        [choice] = reply["choices"]
        steps = (choice.get("logprobs") or {}).get("content") or []
        said["samples"].append(
            {
                "prompt": _post(server, "/apply-template", {"messages": [_message(m) for m in chat]})["prompt"],
                "prompt_tokens": reply["usage"]["prompt_tokens"],
                "greedy": [s["id"] for s in steps],
                "top": [[[t["id"], t["logprob"]] for t in s["top_logprobs"]] for s in steps],
                "finish": choice["finish_reason"],
            }
        )
    answer.write_text(json.dumps(said), encoding="utf-8")


def _post(server: Any, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(  # noqa: S310 (the server of this process)
        server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as reply:  # noqa: S310
            return json.load(reply)
    except urllib.error.HTTPError as e:
        sys.exit(f"llama.cpp answers {e.code} to {path}: {e.read().decode(errors='replace')[:2000]}")


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's form; a message of words alone as a string."""
    parts = message["content"]
    if all(p["type"] == "text" for p in parts):
        return {"role": message["role"], "content": "".join(p["text"] for p in parts)}
    return {"role": message["role"], "content": [_part(p) for p in parts]}


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    data = base64.b64encode(Path(part["path"]).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
