"""A few samples under the names, and in the forms, that the ready recipes expect of public data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny


def llava(image: str | None, question: str, answer: str) -> dict[str, Any]:
    """One entry of LLaVA's JSON."""
    says = f"<image>\n{question}" if image else question
    entry: dict[str, Any] = {"id": image or "words", "conversations": [
        {"from": "human", "value": says}, {"from": "gpt", "value": answer}]}  # fmt: skip
    return entry | ({"image": image} if image else {})


def data_folders(root: Path) -> dict[str, str]:
    """Environment variable → folder: a few samples under the names and in the forms that the recipes expect."""
    question, answer = "What is in the picture?", "two cats on a sofa"
    conversations = [llava("coco/train2017/1.png", question, answer), llava(None, "Hello?", "Hello.")]
    captions = [{"image": "val2014/1.png", "caption": answer, "image_id": "coco_1"}]
    japanese = [llava(f"{i:05}.png", "写真を説明してください。", "ソファの上の二匹の猫") for i in range(60)]
    folders = {name: root / name.lower() for name in (
        "LLAVA_PRETRAIN", "LLAVA_INSTRUCT", "LLAVA_NEXT", "LLAVA_PRETRAIN_JA", "LLAVA_INSTRUCT_JA", "COCO_CAPTIONS",
        "VISUAL_GENOME", "VQAV2", "LIBRISPEECH")}  # fmt: skip
    files = {
        "LLAVA_PRETRAIN/blip_laion_cc_sbu_558k.json": [llava("1.png", question, answer)],
        "LLAVA_INSTRUCT/llava_v1_5_mix665k.json": conversations,
        "LLAVA_NEXT/llava_next_raw_format_processed.json": conversations,
        "LLAVA_PRETRAIN_JA/llava_pretrain_blip_laion_cc_sbu_558k_ja.jsonl": japanese,
        "LLAVA_INSTRUCT_JA/llava_v1_5_instruct_620k_ja_v2.jsonl": conversations,
        "COCO_CAPTIONS/coco_karpathy_train.json": captions,
        "VISUAL_GENOME/vg_caption.json": captions,
        **{f"LIBRISPEECH/{split}.jsonl": [transcript("1.wav", answer)] for split in ("train-960", "test-clean")},
    }
    pictures = ["coco/train2017/1.png", "val2014/1.png", "images/1.png", *(f"images/{i:05}.png" for i in range(60))]
    for folder in folders.values():
        for name in pictures:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            tiny.picture(0, size=8).save(folder / name)
    for name, entries in files.items():
        variable, _, file = name.partition("/")
        lines = [json.dumps(e, ensure_ascii=False) for e in entries]
        text = "\n".join(lines) if file.endswith("l") else f"[{', '.join(lines)}]"
        (folders[variable] / file).write_text(text, encoding="utf-8")
    vqav2(folders["VQAV2"] / "data")
    silence(folders["LIBRISPEECH"] / "1.wav")
    return {name: str(folder) for name, folder in folders.items()}


def transcript(sound: str, words: str) -> dict[str, Any]:
    parts = [{"type": "audio", "audio": sound}, {"type": "text", "text": "Transcribe the speech."}]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": words}]}


def silence(file: Path, seconds: int = 1) -> None:
    import wave

    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(bytes(2 * 16_000 * seconds))


def vqav2(folder: Path) -> None:
    """A Parquet file with the columns of `lmms-lab/VQAv2`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    tiny.picture(0, size=8).save(folder / "cats.png")
    people = [{"answer": "2", "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)]
    row = {
        "question_type": "how many", "multiple_choice_answer": "2", "answers": people, "image_id": 1,
        "answer_type": "number", "question_id": 1000, "question": "How many cats?",
        "image": {"bytes": (folder / "cats.png").read_bytes(), "path": "cats.png"},
    }  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row]), folder / "validation-00000-of-00068.parquet")
