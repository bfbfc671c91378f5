"""How this field ships its data: one row a layout, with the files as they are downloaded, what a user has to write, and
what must be read.

A layout is a function that writes its files into a folder and returns the data file's name. `options`: what a data entry
says beside `path`; `shown`: the first sample, as (role, parts) with media as their files' names; `count`: samples in all.
Names, fields and nesting are those of the downloads; words and pictures are ours.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import wave
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import PIL.Image

Shown = list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Case:
    """A layout of the table; `map`: the columns by which the same rows are read without knowing the layout."""

    name: str
    file: str
    rows: Any
    shown: Shown
    count: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    also: dict[str, Any] = field(default_factory=dict)
    map: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """The files in a folder, and which is the data file (or folder)."""
        for name, content in {self.file: self.rows, **self.also}.items():
            put(folder / name, content)
        return folder / self.file if Path(self.file).suffix else folder

    def entry(self, folder: Path) -> dict[str, Any]:
        """A data entry for the written files."""
        path = self.write(folder)
        named = {
            k: str(folder / v) if k in ("annotations", "media", "media_cache") else v for k, v in self.options.items()
        }
        return {"path": str(path), "media": str(folder), **named}


@cache
def png(colour: str = "red") -> bytes:
    """A small picture."""
    out = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), colour).save(out, "PNG")
    return out.getvalue()


@cache
def wav() -> bytes:
    """A short silence."""
    out = io.BytesIO()
    with wave.open(out, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(bytes(3_200))
    return out.getvalue()


def put(path: Path, content: Any) -> None:
    """A file by its ending: bytes and texts as they are, a list as JSON, lines, a Parquet file or a shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(content), path)
    elif path.suffix == ".tar":
        import tarfile

        with tarfile.open(path, "w") as tar:
            for name, data in content.items():
                raw = (
                    data
                    if isinstance(data, bytes)
                    else json.dumps(data).encode()
                    if name.endswith("json")
                    else data.encode()
                )
                info = tarfile.TarInfo(name)
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
    else:
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def qa(picture: str = "1.png", question: str = "what colour?", answer: str = "red") -> Shown:
    """A picture, a question, an answer."""
    return [("user", [picture, question] if picture else [question]), ("assistant", [answer])]


def cap(picture: str = "1.png", caption: str = "a red square") -> Shown:
    """A picture and its caption."""
    return [("user", [picture]), ("assistant", [caption])]


def llava(*words: str, speakers: tuple[str, str] = ("human", "gpt"), keys: tuple[str, str] = ("from", "value")) -> Any:
    """Turns of from and value."""
    return [{keys[0]: speakers[n % 2], keys[1]: w} for n, w in enumerate(words)]


def chat(*words: Any) -> Any:
    """Turns of role and content."""
    return llava(*words, speakers=("user", "assistant"), keys=("role", "content"))


B64 = base64.b64encode(png()).decode()
URL = f"data:image/png;base64,{B64}"
BYTES = {"bytes": png(), "path": None}
Q, A = "what colour?", "red"
PICTURES = {"1.png": png(), "2.png": png("blue")}
TAGGED = ("<image>\n" + Q, A)
COCO = "COCO_train2014_000000000009.jpg"
WEB = "https://x.org/1.png"
"""An address whose picture a media cache has: nothing is fetched."""
KEPT = hashlib.sha256(WEB.encode()).hexdigest()
CACHE: dict[str, Any] = {
    f"cache/{KEPT[:2]}/{KEPT}.png": png(),
    f"cache/{KEPT[:2]}/{KEPT}.json": {"url": WEB, "sha256": hashlib.sha256(png()).hexdigest(), "bytes": len(png())},
}
MCQ: Shown = [("user", ["[bytes]", "which?\nA. cat\nB. dog"]), ("assistant", ["dog"])]

LLAVA = [
    Case("LLaVA-Pretrain", "blip_laion_cc_sbu_558k.json",
         [{"id": "0045", "image": "1.png", "conversations": llava("Describe it.\n<image>", "a red square")}],
         [("user", ["Describe it.\n", "1.png"]), ("assistant", ["a red square"])]),
    Case("LLaVA-Pretrain, notes", "blip_laion_cc_sbu_558k_meta.json",
         [{"id": "0045", "image": "1.png", "blip_caption": "a red square", "url": "http://x.org/a.jpg"}], cap(),
         map={"caption": "blip_caption"}),
    Case("LLaVA-Instruct", "llava_instruct_150k.json",
         [{"id": "000", "image": "1.png", "conversations": llava(*TAGGED, "Sure?", "Yes.")}],
         [*qa(), ("user", ["Sure?"]), ("assistant", ["Yes."])]),
    Case("mix665k", "llava_v1_5_mix665k.json",
         [{"id": "000", "image": "1.png", "conversations": llava(*TAGGED)},
          {"id": "wgByO4Y_0", "model": "", "conversations": llava("Hi", "Hello")}], qa(), 2),
    Case("ShareGPT4V", "sharegpt4v_instruct_gpt4-vision_cap100k.json",
         [{"id": "0", "image": "coco/train2017/1.png", "conversations": llava(*TAGGED)}], qa(),
         also={"coco/train2017/1.png": png()}),
    Case("LLaVA-OneVision", "train-00000-of-00001.parquet",
         [{"id": "a", "image": BYTES, "conversations": llava(*TAGGED), "data_source": "x"},
          {"id": "b", "image": None, "conversations": llava("Hi", "Hello"), "data_source": "x"}], qa("[bytes]"), 2),
    Case("LLaVA-Video-178K", "0_30_s_academic_v0_1_cap_processed.json",
         [{"id": "v", "conversations": llava(*TAGGED), "data_source": "x", "video": "clip"}],
         qa("0.png"), options={"frames": 1}, also={"clip/0.png": png()}),
    Case("M4-Instruct", "m4_instruct_annotations.json",
         [{"sample_id": 0, "conversations": llava("<image> <image> Same?", "No"), "image": ["1.png", "2.png"],
           "choice_list": None, "metadata": {"dataset": "x", "split": "train", "question_type": "open-ended"}}],
         [("user", ["1.png", " ", "2.png", " Same?"]), ("assistant", ["No"])]),
    Case("Mantis-Instruct", "train-00000-of-00001.parquet",
         [{"id": "a", "images": [{"bytes": png(), "path": "1.png"}], "conversation": chat("<image> " + Q, A), "source": "x"}],
         [("user", ["[bytes]", " " + Q]), ("assistant", [A])], map={"messages": "conversation"}),
    Case("ALLaVA", "ALLaVA-Instruct-LAION-4V.json",
         [{"id": "a", "image": "1.png", "conversations": llava(*TAGGED), "url": "http://x.org/a.jpg"}], qa()),
    Case("InternVL", "internvl.jsonl",
         [{"id": 0, "image": "1.png", "width": 8, "height": 8, "conversations": llava(*TAGGED)}], qa()),
    Case("Qwen-VL", "qwen.json",
         [{"id": "identity_0", "conversations": llava(f"Picture 1: <img>1.png</img>\n{Q}", A, speakers=("user", "assistant"))}],
         [("user", ["Picture 1: ", "1.png", Q]), ("assistant", [A])]),
    Case("Qwen2.5-VL", "qwen25.json", [{"images": ["1.png", "2.png"], "conversations": llava("<image>\n<image>\nSame?", "No")}],
         [("user", ["1.png", "2.png", "Same?"]), ("assistant", ["No"])]),
    Case("Qwen's messages", "dashscope.jsonl",
         [{"messages": chat([{"image": "file://1.png"}, {"text": Q}], [{"text": A}])}], qa()),
]  # fmt: skip

TOOLS = [
    Case("LLaMA-Factory, messages", "mllm_demo.json", [{"messages": chat("<image>" + Q, A), "images": ["1.png"]}], qa()),
    Case("LLaMA-Factory, conversations", "sharegpt.json",
         [{"conversations": llava("<image>" + Q, A), "images": ["1.png"], "system": "Be brief."}],
         [("system", ["Be brief."]), *qa()]),
    Case("LLaMA-Factory, video", "mllm_video_demo.json", [{"messages": chat("<video>" + Q, A), "videos": ["clip"]}],
         qa("0.png"), options={"frames": 1}, also={"clip/0.png": png()}),
    Case("LLaMA-Factory, audio", "mllm_audio_demo.json", [{"messages": chat("<audio>" + Q, A), "audios": ["a.wav"]}],
         qa("a.wav"), also={"a.wav": wav()}),
    Case("Alpaca", "alpaca_en_demo.json",
         [{"instruction": Q, "input": "", "output": A, "images": ["1.png"]},
          {"instruction": "Add.", "input": "1 + 1", "output": "2", "system": "S", "history": [["Hi", "Hello"]]}], qa(), 2),
    Case("LLaMA-Factory, RLHF-V", "rlhf_v.json",
         [{"conversations": llava("<image>" + Q), "chosen": {"from": "gpt", "value": A},
           "rejected": {"from": "gpt", "value": "blue"}, "images": ["1.png"]}], qa()),
    Case("ms-swift", "swift.jsonl", [{"messages": chat("<image>" + Q, A), "images": ["1.png"]}], qa()),
    Case("ms-swift, before 2", "swift1.jsonl",
         [{"query": "Sure?", "response": "Yes.", "history": [[Q, A]], "images": ["1.png"]}],
         [*qa(), ("user", ["Sure?"]), ("assistant", ["Yes."])], map={"instruction": "query", "output": "response"}),
    Case("ms-swift, preferences", "swift2.jsonl",
         [{"messages": chat("<image>" + Q, A), "rejected_response": "blue", "images": ["1.png"]}], qa()),
    Case("ms-swift, objects", "swift3.jsonl",
         [{"messages": chat("<image>Where is the <ref-object>?", "<bbox>"), "images": ["1.png"],
           "objects": {"ref": ["cup"], "bbox": [[1, 2, 3, 4]]}}],
         qa(question="Where is the cup?", answer="[125, 250, 375, 500]"), options={"boxes": {"style": "plain"}}),
    Case("TRL, messages", "trl.jsonl", [{"images": ["1.png"], "messages": chat(Q, A)}], qa()),
    Case("TRL, prompt and completion", "trl1.jsonl", [{"images": ["1.png"], "prompt": Q, "completion": A}], qa()),
    Case("TRL, both as messages", "trl2.jsonl",
         [{"images": ["1.png"], "prompt": chat(Q), "completion": [{"role": "assistant", "content": A}]}], qa()),
    Case("TRL, vision DPO", "train-00000-of-00001.parquet",
         [{"images": [BYTES], "prompt": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": Q}]}],
           "chosen": [{"role": "assistant", "content": [{"type": "text", "text": A}]}],
           "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "blue"}]}]}], qa("[bytes]")),
    Case("TRL, DPO without a prompt", "dpo.jsonl",
         [{"image": "1.png", "chosen": chat(Q, A), "rejected": chat(Q, "blue")}], qa()),
    Case("TRL, DPO with a prompt", "dpo1.jsonl", [{"image": "1.png", "prompt": chat(Q), "chosen": A, "rejected": "blue"}], qa()),
    Case("TRL, DPO of several pictures", "dpo2.jsonl",
         [{"images": ["1.png", "2.png"], "chosen": chat(Q, A), "rejected": chat(Q, "blue")}],
         [("user", ["1.png", "2.png", Q]), ("assistant", [A])]),
    Case("OpenAI fine-tuning, what a server was asked", "asked.jsonl",
         [{"model": "demo", "temperature": 0, "max_tokens": 9, "stream": False, "stop": ["\n"],
           "messages": chat([{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": Q}], A)}], qa("[bytes]")),
    Case("OpenAI fine-tuning", "openai.jsonl",
         [{"messages": [{"role": "developer", "content": "S"},
                        *chat([{"type": "text", "text": Q}, {"type": "image_url", "image_url": {"url": URL, "detail": "low"}}], A)]}],
         [("system", ["S"]), ("user", [Q, "[bytes]"]), ("assistant", [A])]),
    Case("RLAIF-V", "RLAIF-V-Dataset_000.parquet",
         [{"ds_name": "x", "image": {"bytes": png(), "path": "llava1.5.jpg"}, "question": Q, "chosen": A, "rejected": "blue",
           "origin_dataset": "x", "origin_split": '{"model": "x"}', "idx": "0", "image_path": "data/x_004.jpg"}], qa("[bytes]")),
    Case("RLHF-V", "RLHF-V-Dataset.parquet",
         [{"ds_name": "x", "image": BYTES, "text": json.dumps({"question": Q, "chosen": A, "rejected": "blue"}), "idx": 0,
           "image_path": "x.jpg"}], qa("[bytes]"),
         map={"question": "text.question", "chosen": "text.chosen", "rejected": "text.rejected"}),
    Case("PaliGemma", "paligemma.jsonl", [{"image": "1.png", "prefix": "caption en", "suffix": "a red square"}],
         qa(question="caption en", answer="a red square"), map={"question": "prefix", "answer": "suffix"}),
    Case("Florence-2", "florence.jsonl", [{"image": "1.png", "prefix": "<OD>", "suffix": "square<loc_1><loc_2>"}],
         qa(question="<OD>", answer="square<loc_1><loc_2>"), map={"question": "prefix", "answer": "suffix"}),
    Case("the_cauldron", "train-00000-of-00001.parquet",
         [{"images": [BYTES], "texts": [{"user": Q, "assistant": A, "source": "x"}, {"user": "Sure?", "assistant": "Yes.", "source": "x"}]}],
         [*qa("[bytes]"), ("user", ["Sure?"]), ("assistant", ["Yes."])]),
    Case("FineVision", "train-00000-of-00001.parquet",
         [{"images": [BYTES], "texts": [{"user": Q, "assistant": A}], "source": "x", "relevance_ratings": [5],
           "relevance_min": 5, "image_correspondence_ratings": [4], "formatting_ratings": [5]},
          {"images": [], "texts": [{"user": "Hi", "assistant": "Hello"}], "source": "x", "relevance_ratings": [5],
           "relevance_min": 5, "image_correspondence_ratings": [], "formatting_ratings": [5]}], qa("[bytes]"), 2),
    Case("Docmatix", "train-00000-of-00001.parquet",
         [{"images": [BYTES], "texts": [{"user": Q, "assistant": A, "source": "PDF 1"}]}], qa("[bytes]")),
    Case("M3IT", "m3it.jsonl", [{"instruction": "Look.", "inputs": Q, "outputs": A, "image_base64_str": [B64], "meta": {}}],
         qa("[bytes]", "Look.\n" + Q),
         map={"input": "inputs", "output": "outputs", "images": "image_base64_str"}),
]  # fmt: skip

VQA2 = {"info": {"year": 2017}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {"url": "x"}, "data_subtype": "train2014",
        "questions": [{"image_id": 9, "question": Q, "question_id": 90}]}  # fmt: skip
VQA2_ANSWERS = {"info": {}, "license": {}, "data_subtype": "train2014", "data_type": "mscoco", "annotations": [
    {"question_type": "what", "multiple_choice_answer": A, "image_id": 9, "answer_type": "other", "question_id": 90,
     "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate((A, A, "pink"))]}]}  # fmt: skip
QUESTIONS = [
    Case("VQAv2", "v2_OpenEnded_mscoco_train2014_questions.json", VQA2, qa(COCO),
         options={"annotations": "v2_mscoco_train2014_annotations.json"},
         also={COCO: png(), "v2_mscoco_train2014_annotations.json": VQA2_ANSWERS}),
    Case("OK-VQA", "OpenEnded_mscoco_train2014_questions.json", VQA2, qa(COCO),
         options={"annotations": "mscoco_train2014_annotations.json"},
         also={COCO: png(), "mscoco_train2014_annotations.json": VQA2_ANSWERS}),
    Case("VQAv2 on the hub", "train-00000-of-00001.parquet",
         [{"question_type": "what", "multiple_choice_answer": A, "answers": [{"answer": A, "answer_id": 1}], "image_id": 9,
           "answer_type": "other", "question_id": 90, "question": Q, "image": BYTES}], qa("[bytes]")),
    Case("TextVQA", "TextVQA_0.5.1_train.json",
         {"dataset_type": "train", "dataset_name": "textvqa", "dataset_version": "0.5.1",
          "data": [{"question": Q, "image_id": "9f0c", "image_classes": ["x"], "flickr_300k_url": "https://x.org/a.jpg",
                    "image_width": 8, "answers": [A, A, "pink"], "question_tokens": ["what"], "question_id": 1}]},
         qa("9f0c.jpg"), options={"columns": {"image": "{image_id}.jpg"}}, also={"9f0c.jpg": png()}),
    Case("DocVQA", "train_v1.0.json",
         {"dataset_name": "docvqa", "dataset_split": "train", "dataset_version": "1.0",
          "data": [{"questionId": 337, "question": Q, "image": "documents/1.png", "docId": 279, "answers": [A]}]}, qa(),
         also={"documents/1.png": png()}),
    Case("InfographicVQA", "infographicsVQA_train_v1.0.json",
         {"dataset_name": "infographicVQA", "data": [{"questionId": 1, "question": Q, "image_local_name": "1.png",
          "image_url": "https://x.org/b.jpeg", "ocr_output_file": "1.json", "answers": [A]}]}, qa()),
    Case("ST-VQA", "train_task_1.json",
         {"task_name": "Task 1", "data": [{"file_path": "coco-text/1.png", "file_name": "1.png", "question_id": 0,
          "question": Q, "answers": [A], "set_name": "train"}]}, qa(), also={"coco-text/1.png": png()}),
    Case("OCR-VQA", "dataset.json",
         {"0761183272": {"imageURL": "http://x.org/a.jpg", "title": "x", "split": 1, "questions": [Q, "Sure?"], "answers": [A, "Yes"]}},
         qa("0761183272.jpg"), 2, options={"columns": {"image": "{id}.jpg"}, "ignore": ["imageURL"]}, also={"0761183272.jpg": png()}),
    Case("ChartQA", "train_augmented.json", [{"imgname": "1.png", "query": Q, "label": A}], qa(),
         map={"image": "imgname", "question": "query", "answer": "label"}),
    Case("ChartQA on the hub", "train-00000-of-00001.parquet",
         [{"image": BYTES, "query": Q, "label": [A], "human_or_machine": 0}], qa("[bytes]"),
         map={"question": "query", "answer": "label"}),
    Case("GQA", "train_balanced_questions.json",
         {"02930152": {"semantic": [{"operation": "select"}], "imageId": "2354786", "question": Q, "answer": A, "fullAnswer": "It is red.",
                       "isBalanced": True, "groups": {"global": None}, "types": {"detailed": "x"}}},
         qa("2354786.jpg"), options={"columns": {"image": "{imageId}.jpg"}}, also={"2354786.jpg": png()}),
    Case("A-OKVQA", "aokvqa_v1p0_train.json",
         [{"split": "train", "image_id": 9, "question_id": "x", "question": "which?", "choices": ["cat", "dog"],
           "correct_choice_idx": 1, "direct_answers": ["dog"], "difficult_direct_answer": False, "rationales": ["so"]}],
         qa("000000000009.jpg", "which?", "dog"),
         options={"columns": {"image": "{image_id:012d}.jpg", "answer": "correct_choice_idx"}}, also={"000000000009.jpg": png()}),
    Case("A-OKVQA on the hub", "train-00000-of-00001.parquet",
         [{"image": BYTES, "question": "which?", "choices": ["cat", "dog"], "correct_choice_idx": 1, "direct_answers": "['dog']"}],
         qa("[bytes]", "which?", "dog"), map={"answer": "correct_choice_idx"}),
    Case("AI2D", "test-00000-of-00001.parquet", [{"question": "which?", "options": ["cat", "dog"], "answer": "1", "image": BYTES}],
         MCQ, options={"columns": {"answer": "{answer:place}"}}),
    Case("ScienceQA", "train-00000-of-00001.parquet",
         [{"image": BYTES, "question": "which?", "choices": ["cat", "dog"], "answer": 1, "hint": "Look.", "task": "closed choice",
           "grade": "grade2", "subject": "x", "topic": "y", "lecture": "So it is.", "solution": "It barks."},
          {"image": None, "question": "which?", "choices": ["cat", "dog"], "answer": 1, "hint": "", "task": "closed choice",
           "grade": "grade2", "subject": "x", "topic": "y", "lecture": "", "solution": ""}],
         [("user", ["[bytes]", "Look.\nwhich?\nA. cat\nB. dog"]), ("assistant", ["dog"])], 2,
         options={"columns": {"question": "{hint}\n{question}\n{choices}"}}),
    Case("ScienceQA, with its lecture", "train-00000-of-00001.parquet",
         [{"image": BYTES, "question": "which?", "choices": ["cat", "dog"], "answer": 1, "hint": "", "lecture": "So it is.", "solution": "It barks."}],
         [("user", ["[bytes]", "So it is.\nwhich?\nA. cat\nB. dog"]), ("assistant", ["dog"])],
         options={"columns": {"question": "{lecture}\n{hint}\n{question}\n{choices}"}}),
    Case("ScienceQA, problems.json", "problems.json",
         {"1": {"question": "which?", "choices": ["cat", "dog"], "answer": 1, "hint": "", "image": "image.png", "split": "train"},
          "2": {"question": "which?", "choices": ["cat", "dog"], "answer": 0, "hint": "", "image": None, "split": "train"}},
         qa("image.png", "which?", "dog"), 2, options={"columns": {"image": "{split}/{id}/{image}"}},
         also={"train/1/image.png": png()}),
    Case("MMMU", "dev-00000-of-00001.parquet",
         [{"id": "dev_1", "question": "<image 1> which?", "options": "['cat', 'dog']", "explanation": "", "image_1": BYTES,
           "image_2": None, "img_type": "['x']", "answer": "B", "topic_difficulty": "Easy", "question_type": "multiple-choice"}],
         [("user", ["[bytes]", " which?\nA. cat\nB. dog"]), ("assistant", ["dog"])]),
    Case("MMBench", "mmbench_dev.tsv",
         f"index\tquestion\thint\tA\tB\tC\tanswer\tcategory\timage\tsource\n1\twhich?\t\tcat\tdog\t\tB\tx\t{B64}\ty\n", MCQ),
    Case("SEED-Bench", "SEED-Bench.jsonl",
         [{"answer": "B", "choice_a": "cat", "choice_b": "dog", "data_id": "x", "data_type": "image", "question": "which?",
           "question_id": "1", "image": "1.png"}],
         [("user", ["1.png", "which?\nA. cat\nB. dog"]), ("assistant", ["dog"])], map={"A": "choice_a", "B": "choice_b"}),
    Case("POPE", "coco_pope_adversarial.json",
         '{"question_id": 1, "image": "1.png", "text": "Is it red?", "label": "yes"}\n'
         '{"question_id": 2, "image": "1.png", "text": "Is it blue?", "label": "no"}\n',
         qa(question="Is it red?", answer="yes"), 2, map={"question": "text", "answer": "label"}),
    Case("MME on the hub", "test-00000-of-00001.parquet",
         [{"question_id": "x/1.png", "image": BYTES, "question": Q, "answer": "Yes", "category": "color"}],
         qa("[bytes]", answer="Yes"), options={"ignore": ["question_id"]}),
    Case("RealWorldQA", "test-00000-of-00001.parquet", [{"image": BYTES, "question": Q, "answer": A}], qa("[bytes]")),
    Case("VizWiz", "train.json",
         [{"image": "1.png", "question": Q, "answers": [{"answer": A, "answer_confidence": "yes"}], "answer_type": "other", "answerable": 1}],
         qa()),
    Case("CLEVR", "CLEVR_train_questions.json",
         {"info": {"split": "train"}, "questions": [{"split": "train", "image_filename": "1.png", "question": Q, "answer": A,
          "question_index": 0, "program": [], "image_index": 0, "question_family_index": 1}]}, qa()),
    Case("Visual Genome", "question_answers.json",
         [{"id": 1, "qas": [{"question": Q, "answer": A, "image_id": 1, "qa_id": 2}, {"question": "Sure?", "answer": "Yes", "image_id": 1, "qa_id": 3}]}],
         qa(), 2, options={"columns": {"image": "{id}.png"}}),
    Case("SLAKE", "train.json",
         [{"img_id": 1, "img_name": "1.png", "question": Q, "answer": A, "q_lang": "en", "answer_type": "OPEN", "triple": ["x"], "qid": 0}], qa()),
    Case("LRV-Instruction", "filter_cap1.json", [{"image_id": "77", "question": Q, "answer": A, "task": "x"}], qa("77.jpg"),
         options={"columns": {"image": "{image_id}.jpg"}}, also={"77.jpg": png()}),
    Case("VideoInstruct-100K", "VideoInstruct100K.json", [{"q": Q, "a": A, "video_id": "clip"}], qa("0.png"),
         options={"frames": 1, "columns": {"question": "q", "answer": "a", "video": "video_id"}}, also={"clip/0.png": png()}),
    Case("NExT-QA", "train.csv",
         "video,frame_count,width,height,question,answer,qid,type,a0,a1\nclip,1,8,8,which?,1,6,CW,cat,dog\n",
         [("user", ["0.png", "which?\nA. cat\nB. dog"]), ("assistant", ["dog"])], options={"frames": 1}, also={"clip/0.png": png()},
         map={"A": "a0", "B": "a1", "answer": "{answer:place}"}),
]  # fmt: skip

CAPTIONS = [
    Case("COCO captions", "captions_train2017.json",
         {"info": {}, "licenses": [], "images": [{"id": 9, "file_name": "1.png", "coco_url": "http://x.org/1.png"}],
          "annotations": [{"image_id": 9, "id": 1, "caption": "a red square"}, {"image_id": 9, "id": 2, "caption": "red"}]}, cap(), 2),
    Case("STAIR", "stair_captions_v1.2_train.json",
         {"images": [{"id": 9, "file_name": "1.png"}], "annotations": [{"image_id": 9, "id": 1, "caption": "赤い四角", "tokenized_caption": "赤い 四角"}]},
         cap(caption="赤い四角")),
    Case("Karpathy's splits", "dataset_coco.json",
         {"images": [{"filepath": "val2014", "sentids": [1, 2], "filename": "1.png", "imgid": 0, "split": "train", "cocoid": 9,
                      "sentences": [{"tokens": ["a"], "raw": "a red square", "imgid": 0, "sentid": 1}, {"raw": "red", "sentid": 2}]},
                     {"filepath": "val2014", "filename": "2.png", "imgid": 1, "split": "test", "sentences": [{"raw": "blue"}]}],
          "dataset": "coco"}, cap(), 2, options={"hub_split": "train"}, also={"val2014/1.png": png(), "val2014/2.png": png()}),
    Case("Karpathy's splits as rows", "train.parquet",
         [{"filepath": "val2014", "sentids": [1, 2], "filename": "1.png", "imgid": 0, "split": "train", "cocoid": 9,
           "sentences": ["a red square", "red"], "url": "http://x.org/1.png"}], cap(), 2, also={"val2014/1.png": png()},
         map={"image": "{filepath}/{filename}", "captions": "sentences"}),
    Case("Flickr8k, token file", "Flickr8k.token.txt", "1.png#0\ta red square\n1.png#1\tA square , red .\n", cap(), 2),
    Case("Flickr8k, captions.txt", "captions.txt", 'image,caption\n1.png,a red square\n2.png,"blue, all of it"\n', cap(), 2),
    Case("Flickr30k, results.csv", "results.csv", "image_name| comment_number| comment\n1.png| 0| a red square\n1.png| 1| red\n", cap(), 2),
    Case("Flickr30k, token file", "results_20130124.token", "1.png#0\ta red square\n1.png#1\tred\n", cap(), 2),
    Case("Flickr30k on the hub", "test-00000-of-00001.parquet",
         [{"image": BYTES, "caption": ["a red square", "red"], "sentids": ["1", "2"], "split": "test", "img_id": "0", "filename": "1.jpg"}],
         cap("[bytes]"), 2),
    Case("TextCaps", "TextCaps_0.1_train.json",
         {"dataset_type": "train", "data": [{"caption_id": 1, "caption_str": "a red square", "reference_strs": ["x"], "image_id": "9f",
          "image_classes": ["x"], "image_name": "9f", "image_path": "train/9f.jpg", "image_width": 8}]}, cap("9f.jpg"), also={"9f.jpg": png()},
         map={"image": "{image_id}.jpg", "caption": "caption_str"}),
    Case("MiniGPT-4", "filter_cap.json", {"annotations": [{"image_id": "2", "caption": "a blue square"}]}, cap("2.png", "a blue square"),
         options={"columns": {"image": "{image_id}.png"}}),
    Case("open_clip", "cc12m.csv", "filepath\ttitle\n1.png\ta red square\n", cap(), map={"caption": "title"}),
    Case("CC3M", "Train_GCC-training.tsv", f"a red square\t{WEB}\n", cap(f"{KEPT}.png"), options={"media_cache": "cache"}, also=CACHE),
    Case("CC3M, with a header", "cc3m.tsv", f"caption\turl\na red square\t{WEB}\n", cap(f"{KEPT}.png"),
         options={"media_cache": "cache"}, also=CACHE, map={"image": "url"}),
    Case("CC12M", "cc12m.parquet", [{"url": WEB, "caption": "a red square"}], cap(f"{KEPT}.png"),
         options={"media_cache": "cache"}, also=CACHE, map={"image": "url"}),
    Case("LAION", "part-00000.parquet", [{"URL": WEB, "TEXT": "a red square", "WIDTH": 8, "HEIGHT": 8, "similarity": 0.3}], cap(f"{KEPT}.png"),
         options={"media_cache": "cache"}, also=CACHE, map={"image": "URL", "caption": "TEXT"}),
    Case("DataComp", "shard_000.parquet", [{"uid": "0", "url": WEB, "text": "a red square", "original_width": 8, "clip_b32_similarity_score": 0.3}],
         cap(f"{KEPT}.png"), options={"media_cache": "cache"}, also=CACHE, map={"image": "url", "caption": "text"}),
    Case("Clotho", "clotho_captions_development.csv",
         "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\na.wav,one,two,three,four,five\n", cap("a.wav", "one"), 5,
         also={"a.wav": wav()}, map={"captions": [f"caption_{n}" for n in range(1, 6)]}),
    Case("Common Voice", "train.tsv", "client_id\tpath\tsentence\tage\nx\ta.wav\thello there\t\n", cap("a.wav", "hello there"),
         also={"a.wav": wav()}, map={"audio": "path", "caption": "sentence"}),
    Case("webdataset, json", "0.tar", {"a.png": png(), "a.json": {"caption": "a red square"}}, cap("[bytes]")),
    Case("webdataset, txt and a null caption", "0.tar", {"a.png": png(), "a.json": {"caption": None, "url": "http://x.org/a"}, "a.txt": "a red square"},
         cap("[bytes]")),
    Case("imagefolder", "metadata.csv", "file_name,caption\n1.png,a red square\n", cap()),
    Case("class folders", "red/a.png", png(), cap("a.png", "blue"), 2, also={"blue/a.png": png()}, options={"path": "."}),
    Case("pictures with texts", "set/1.txt", "a red square", cap(), options={"path": "set"}, also={"set/1.png": png()}),
]  # fmt: skip

CASES = [*LLAVA, *TOOLS, *QUESTIONS, *CAPTIONS]
Writer = Callable[[Path], Path]
