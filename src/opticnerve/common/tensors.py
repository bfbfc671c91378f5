"""Tensors on disk, written one after the other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, in the layout of that library's `save_file`, which would bring all that lies on a
    device into main memory, and hold it there until the last byte is written. Here it comes tensor by tensor, and what
    lies in main memory already is not copied. Tensors that share memory are written each by itself.

    Source: the format, https://github.com/huggingface/safetensors#format. Eight bytes say how long the header is,
    which is JSON; larger numbers first, so that each tensor lies on a multiple of the size of its numbers.

    Raises:
        OSError: the file cannot be written, or the disk is full.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            numbers = tensors[name].detach().cpu().contiguous().view(-1)
            file.write(numbers.view(torch.uint8).numpy().data)
