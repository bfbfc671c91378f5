"""Every text of the page, in English and in Japanese.

The page is built once for each language, in one process: what two pages must share (loaded models, a training run)
lives outside the functions that build tabs.
"""

from __future__ import annotations

from dataclasses import dataclass

from opticnerve.types import OpticNerveError
from opticnerve.ui.i18n_runs import TEXTS as RUN_TEXTS

LANGUAGES = {"en": "English", "ja": "日本語"}

TEXTS: dict[str, dict[str, str]] = {
    "en": {
        "title": "opticnerve",
        "subtitle": "Chat with models that see, and look into them.",
        "language": "Language",
        "tab_chat": "Chat",
        "tab_compare": "Compare",
        "tab_runs": "Runs",
        "tab_train": "Train",
        "model": "Model",
        "picture": "Picture",
        "picture_place": "Drop or paste a picture here, or choose one",
        "settings": "Settings",
        "longest_answer": "Longest answer (tokens)",
        "temperature": "Temperature",
        "temperature_info": "0 always takes the likeliest word.",
        "conversation": "Conversation",
        "conversation_place": "Give a picture and ask about it.",
        "question": "Question",
        "question_place": "What is in the picture? Enter sends.",
        "send": "Send",
        "stop": "Stop",
        "new_conversation": "New chat",
        "loading": "Loading {model}; the first question waits for it…",
        "thinking": "Waiting for the first word…",
        "no_question": "Write a question first.",
        "long_question": "The question has {found} characters; {most} are allowed. Shorten it.",
        "no_answer": "The model said nothing. Ask in another way, or raise the temperature.",
        "too_many_bytes": "This file has {found} bytes; {most} are allowed. Make the picture smaller.",
        "too_many_pixels": "This picture has {found} pixels; {most} in all are allowed. Make it smaller.",
        "broken_picture": "This file cannot be read as a picture: it is damaged, cut off or of another kind. Known "
        "kinds are {formats}.",
        "look": "Where does it look?",
        "look_method": "Method",
        "look_auto": "the model's default",
        "look_word": "Word of the answer",
        "look_drawing": "Where it looks",
        "looking": "Drawing the maps: the model reads the picture many times…",
        "look_nothing": "Ask about a picture first.",
        "look_answer": "Explained answer (the likeliest words, at most {most} tokens): {answer}",
        "look_told": "Highest for “{word}”: {places}. Cells are as coarse as the model's tokens; attention alone can "
        "mislead, so occlusion stands beside it.",
        "look_peak": "{method} at {x} from the left, {y} from the top",
        "compare_about": "Two models, or two stages of one run, before the same picture and question. Both take the "
        "likeliest words.",
        "model_a": "Model A",
        "model_b": "Model B",
        "answer_a": "Answer of A",
        "answer_b": "Answer of B",
        "ask_both": "Ask both",
        "waits": "Waits for the other one.",
        "took": "{seconds} s",
    },
    "ja": {
        "title": "opticnerve",
        "subtitle": "画像がわかるモデルと話し、その中をのぞく。",
        "language": "言語",
        "tab_chat": "チャット",
        "tab_compare": "比較",
        "tab_runs": "学習結果",
        "tab_train": "学習",
        "model": "モデル",
        "picture": "画像",
        "picture_place": "ここに画像をドロップするか、貼り付けるか、選んでください",
        "settings": "設定",
        "longest_answer": "回答の最大の長さ(トークン)",
        "temperature": "温度",
        "temperature_info": "0 なら、いつも最も確率の高い語を選びます。",
        "conversation": "会話",
        "conversation_place": "画像を入れて、質問してください。",
        "question": "質問",
        "question_place": "画像には何が写っていますか? Enter で送信します。",
        "send": "送信",
        "stop": "停止",
        "new_conversation": "新しい会話",
        "loading": "{model} を読み込んでいます。最初の質問は読み込みが終わるまで待ちます…",
        "thinking": "最初の語を待っています…",
        "no_question": "先に質問を書いてください。",
        "long_question": "質問は {found} 文字です。{most} 文字までにしてください。",
        "no_answer": "モデルは何も答えませんでした。聞き方を変えるか、温度を上げてください。",
        "too_many_bytes": "このファイルは {found} バイトです。{most} バイトまでの画像にしてください。",
        "too_many_pixels": "この画像は {found} 画素です。全部で {most} 画素までの小さい画像にしてください。",
        "broken_picture": "このファイルは画像として読めません。壊れているか、途中で切れているか、別の種類の"
        "ファイルです。読める種類は {formats} です。",
        "look": "どこを見ている?",
        "look_method": "方法",
        "look_auto": "モデルの標準",
        "look_word": "回答の語",
        "look_drawing": "見ている場所",
        "looking": "地図を描いています。モデルが画像を何度も読みます…",
        "look_nothing": "先に画像について質問してください。",
        "look_answer": "説明する回答(最も確率の高い語、{most} トークンまで): {answer}",
        "look_told": "「{word}」で最も高い場所: {places}。ます目の粗さはモデルのトークンと同じです。注意だけでは"
        "誤解のもとになるので、遮蔽(occlusion)を並べています。",
        "look_peak": "{method} は左から {x}、上から {y}",
        "compare_about": "2 つのモデル、または 1 つの学習の 2 つの段階に、同じ画像と質問を見せます。"
        "どちらも最も確率の高い語を選びます。",
        "model_a": "モデル A",
        "model_b": "モデル B",
        "answer_a": "A の回答",
        "answer_b": "B の回答",
        "ask_both": "両方に聞く",
        "waits": "もう一方を待っています。",
        "took": "{seconds} 秒",
    },
}


@dataclass(frozen=True)
class Translations:
    """The texts of one language: `words("send")` is the text of a key; `words("took", seconds=3)` fills in a blank."""

    language: str

    def __post_init__(self) -> None:
        if self.language not in LANGUAGES:
            raise OpticNerveError(f"the page speaks {' and '.join(LANGUAGES)}; there is no {self.language!r}")

    def __call__(self, key: str, **values: object) -> str:
        """The text of `key`.

        Raises:
            KeyError: no text has that key.
        """
        own = TEXTS[self.language]
        text = own[key] if key in own else RUN_TEXTS[self.language][key]
        return text.format(**values) if values else text


def preferred(accept_language: str) -> str:
    """The language to speak to a browser that sends this `Accept-Language` header; English where neither is named.

    Source: RFC 9110, section 12.5.4.
    """
    best, weight = "en", 0.0
    for entry in accept_language.split(","):
        name, _, parameters = entry.strip().partition(";")
        language = name.strip().lower().partition("-")[0]
        if language not in LANGUAGES:
            continue
        key, _, value = parameters.strip().partition("=")
        try:
            quality = float(value) if key.strip() == "q" else 1.0
        except ValueError:
            quality = 0.0
        if quality > weight:
            best, weight = language, quality
    return best
