"""Every text of the page, in English and in Japanese.

The page is built once for each language, in one process: what two pages must share (loaded models, a training run)
lives outside the functions that build tabs.
"""

from __future__ import annotations

from dataclasses import dataclass

from opticnerve.types import OpticNerveError

LANGUAGES = {"en": "English", "ja": "日本語"}
Pairs = dict[str, tuple[str, str]]  # of texts, in the order of LANGUAGES

_PAGE: Pairs = {
    "title": ("opticnerve", "opticnerve"),
    "subtitle": ("Chat with models that see, and look into them.", "画像がわかるモデルと話し、その中をのぞく。"),
    "language": ("Language", "言語"),
    "tab_chat": ("Chat", "チャット"),
    "tab_compare": ("Compare", "比較"),
    "tab_runs": ("Runs", "学習結果"),
    "tab_train": ("Train", "学習"),
    "model": ("Model", "モデル"),
    "picture": ("Picture", "画像"),
    "picture_place": (
        "Drop or paste a picture here, or choose one",
        "ここに画像をドロップするか、貼り付けるか、選んでください",
    ),
    "settings": ("Settings", "設定"),
    "longest_answer": ("Longest answer (tokens)", "回答の最大の長さ(トークン)"),
    "temperature": ("Temperature", "温度"),
    "temperature_info": ("0 always takes the likeliest word.", "0 なら、いつも最も確率の高い語を選びます。"),
    "conversation": ("Conversation", "会話"),
    "conversation_place": ("Give a picture and ask about it.", "画像を入れて、質問してください。"),
    "question": ("Question", "質問"),
    "question_place": ("What is in the picture? Enter sends.", "画像には何が写っていますか? Enter で送信します。"),
    "send": ("Send", "送信"),
    "stop": ("Stop", "停止"),
    "new_conversation": ("New chat", "新しい会話"),
    "loading": (
        "Loading {model}; the first question waits for it…",
        "{model} を読み込んでいます。最初の質問は読み込みが終わるまで待ちます…",
    ),
    "thinking": ("Waiting for the first word…", "最初の語を待っています…"),
    "no_question": ("Write a question first.", "先に質問を書いてください。"),
    "long_question": (
        "The question has {found} characters; {most} are allowed. Shorten it.",
        "質問は {found} 文字です。{most} 文字までにしてください。",
    ),
    "no_answer": (
        "The model said nothing. Ask in another way, or raise the temperature.",
        "モデルは何も答えませんでした。聞き方を変えるか、温度を上げてください。",
    ),
    "too_many_bytes": (
        "This file has {found} bytes; {most} are allowed. Make the picture smaller.",
        "このファイルは {found} バイトです。{most} バイトまでの画像にしてください。",
    ),
    "too_many_pixels": (
        "This picture has {found} pixels; {most} in all are allowed. Make it smaller.",
        "この画像は {found} 画素です。全部で {most} 画素までの小さい画像にしてください。",
    ),
    "broken_picture": (
        "This file cannot be read as a picture: it is damaged, cut off or of another kind. Known kinds are {formats}.",
        "このファイルは画像として読めません。壊れているか、途中で切れているか、別の種類のファイルです。読める種類は "
        "{formats} です。",
    ),
    "look": ("Where does it look?", "どこを見ている?"),
    "look_method": ("Method", "方法"),
    "look_auto": ("the model's default", "モデルの標準"),
    "look_word": ("Word of the answer", "回答の語"),
    "look_drawing": ("Where it looks", "見ている場所"),
    "looking": (
        "Drawing the maps: the model reads the picture many times…",
        "地図を描いています。モデルが画像を何度も読みます…",
    ),
    "look_nothing": ("Ask about a picture first.", "先に画像について質問してください。"),
    "look_answer": (
        "Explained answer (the likeliest words, at most {most} tokens): {answer}",
        "説明する回答(最も確率の高い語、{most} トークンまで): {answer}",
    ),
    "look_told": (
        "Highest for “{word}”: {places}. Cells are as coarse as the model's tokens; attention alone can mislead, so "
        "occlusion stands beside it.",
        "「{word}」で最も高い場所: {places}。ます目の粗さはモデルのトークンと同じです。注意だけでは誤解のもとになる"
        "ので、遮蔽(occlusion)を並べています。",
    ),
    "look_peak": ("{method} at {x} from the left, {y} from the top", "{method} は左から {x}、上から {y}"),
    "compare_about": (
        "Two models, or two stages of one run, before the same picture and question. Both take the likeliest words.",
        "2 つのモデル、または 1 つの学習の 2 つの段階に、同じ画像と質問を見せます。どちらも最も確率の高い語を選びま"
        "す。",
    ),
    "model_a": ("Model A", "モデル A"),
    "model_b": ("Model B", "モデル B"),
    "answer_a": ("Answer of A", "A の回答"),
    "answer_b": ("Answer of B", "B の回答"),
    "ask_both": ("Ask both", "両方に聞く"),
    "waits": ("Waits for the other one.", "もう一方を待っています。"),
    "took": ("{seconds} s", "{seconds} 秒"),
}
_RUNS_AND_TRAINING: Pairs = {
    "runs_run": ("Run", "実行結果"),
    "runs_refresh": ("Look again", "再読み込み"),
    "runs_all": ("All runs in a table", "すべての実行を表で見る"),
    "runs_none": (
        "There is no run in {root} yet. Start one in the tab for training, or with `opticnerve train`.",
        "{root} にはまだ実行結果がありません。学習のタブか `opticnerve train` で始めてください。",
    ),
    "runs_gone": ("This run cannot be shown: {why}", "この実行結果は表示できません: {why}"),
    "runs_card": ("Card", "カード"),
    "runs_curves": ("Curves", "曲線"),
    "runs_answers": ("Answers", "回答"),
    "runs_no_card": (
        "There is no card yet: it is written when the first stage ends.",
        "カードはまだありません。最初のステージが終わると書かれます。",
    ),
    "runs_no_curves": ("No step has been trained yet.", "まだ1ステップも学習していません。"),
    "runs_no_answers": (
        "There are no answers yet: questions are asked when all stages are trained.",
        "回答はまだありません。すべてのステージの学習後に質問します。",
    ),
    "runs_finished": ("finished", "完了"),
    "runs_running": ("running", "実行中"),
    "runs_stopped": ("not finished", "未完了"),
    "runs_stage": ("Stage", "ステージ"),
    "runs_state": ("State", "状態"),
    "runs_progress": ("Steps", "ステップ"),
    "runs_score": ("Right", "正答率"),
    "runs_score_n": ("of {n} questions; 95 % interval {low} to {high}", "{n} 問中、95 % 区間 {low} 〜 {high}"),
    "runs_gap": ("Real minus blank picture", "本物の画像と無地の画像の差"),
    "runs_gap_n": ("real {real}, blank {blank}, of {n} questions", "本物 {real}、無地 {blank}、{n} 問"),
    "runs_perplexity": ("Perplexity on text alone", "文章だけのパープレキシティ"),
    "runs_time": ("Time", "時間"),
    "runs_memory": ("Peak memory", "最大メモリ"),
    "runs_written": ("Last written", "最終更新"),
    "runs_steps": ("{done} of {planned}", "{done} / {planned}"),
    "runs_steps_open": ("{done}", "{done}"),
    "runs_notes": ("Not everything in this folder can be read", "このフォルダには読めないものがあります"),
    "runs_loss": (
        "loss (nats per learned token); thin line: each step, thick line: smoothed",
        "損失（学習トークンあたりのナット）。細い線は各ステップ、太い線は平滑化した値",
    ),
    "runs_step": ("step", "ステップ"),
    "runs_curve_said": (
        "Stage {stage}: the smoothed loss goes from {first} to {last} in {steps} steps.",
        "ステージ {stage}: 平滑化した損失は {steps} ステップで {first} から {last} になりました。",
    ),
    "runs_curve_pace": ("{tokens} tokens/s", "{tokens} トークン/秒"),
    "runs_task": ("Questions", "質問集"),
    "runs_which": ("Show", "表示"),
    "runs_all_answers": ("all", "すべて"),
    "runs_wrong_answers": ("wrong", "誤答のみ"),
    "runs_right_answers": ("right", "正答のみ"),
    "runs_page": ("Page", "ページ"),
    "runs_previous": ("Previous", "前へ"),
    "runs_next": ("Next", "次へ"),
    "runs_shown": ("{first} to {last} of {n} answers", "{n} 件の回答のうち {first} 〜 {last} 件目"),
    "runs_none_shown": ("No answer of this kind.", "該当する回答はありません。"),
    "runs_question": ("Question", "質問"),
    "runs_said": ("Answer", "回答"),
    "runs_truth": ("Truth", "正解"),
    "runs_right": ("right", "正答"),
    "runs_wrong": ("wrong", "誤答"),
    "runs_unjudged": ("not judged", "判定なし"),
    "runs_no_picture": ("no picture kept", "画像は保存されていません"),
    "runs_picture_of": ("Picture to the question: {question}", "質問の画像: {question}"),
    "runs_seconds": ("{s} s", "{s} 秒"),
    "runs_minutes": ("{m} min {s} s", "{m} 分 {s} 秒"),
    "runs_hours": ("{h} h {m} min", "{h} 時間 {m} 分"),
    "train_intro": (
        "A training runs on this machine, one at a time, and goes on when the page is closed.",
        "学習はこのコンピュータで一度に一つだけ動き、ページを閉じても続きます。",
    ),
    "train_recipe": ("Recipe", "レシピ"),
    "train_recipe_info": ("Ready, or a YAML file in {root}", "付属のもの、または {root} の YAML"),
    "train_name": ("Name of the run", "実行の名前"),
    "train_name_info": ("A new folder in {root}", "{root} に作る新しいフォルダ"),
    "train_changes": ("Changes (may stay empty)", "変更（空でもかまいません）"),
    "train_changes_info": ("Such as stages.0.steps=50", "例: stages.0.steps=50"),
    "train_start": ("Start training", "学習を始める"),
    "train_stop": ("Save and stop", "保存して止める"),
    "train_resume": ("Go on with it", "続きから学習する"),
    "train_unfinished": ("A run that was stopped", "止まっている実行"),
    "train_idle": ("No training has been started from this page.", "このページから始めた学習はありません。"),
    "train_running": ("Training", "学習中"),
    "train_stopping": ("Stopping: the step is finished and saved first", "停止中: 今のステップを終えて保存しています"),
    "train_finished": ("Finished", "完了"),
    "train_stopped": ("Stopped", "停止"),
    "train_failed": (
        "Ended with an error; the last lines below say which",
        "エラーで終わりました。原因は下の出力の最後にあります",
    ),
    "train_stage": ("Stage {number} of {count}: {name}", "ステージ {number} / {count}: {name}"),
    "train_preparing": ("Loading and preparing", "読み込みと準備"),
    "train_after_steps": ("Stage done; saving and measuring", "ステージ終了。保存と測定をしています"),
    "train_step": ("Step {done} of {total}", "ステップ {done} / {total}"),
    "train_step_open": ("Step {done}", "ステップ {done}"),
    "train_loss": ("Loss (smoothed)", "損失（平滑化）"),
    "train_speed": ("Speed", "速さ"),
    "train_left": ("Left in this stage", "このステージの残り時間"),
    "train_log": ("Last lines of its output", "出力の最後の行"),
    "train_no_log": ("Nothing printed yet.", "まだ出力はありません。"),
    "train_started": ("Started {run}.", "{run} を始めました。"),
    "train_resumed": ("{run} goes on.", "{run} の続きを始めました。"),
    "train_asked": ("{run} was asked to save and stop.", "{run} に保存と停止を頼みました。"),
    "train_refused": ("Not done: {why}", "実行できません: {why}"),
    "train_pick_recipe": ("choose a recipe first", "レシピを選んでください"),
    "train_pick_run": ("choose a run first", "実行を選んでください"),
    "train_by_hand": ("The same in a terminal", "ターミナルでの同じ操作"),
}


def _by_language(pairs: Pairs) -> dict[str, dict[str, str]]:
    return {language: {key: pair[i] for key, pair in pairs.items()} for i, language in enumerate(LANGUAGES)}


TEXTS, RUN_TEXTS = _by_language(_PAGE), _by_language(_RUNS_AND_TRAINING)


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
