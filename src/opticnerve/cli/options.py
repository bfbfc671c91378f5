"""Arguments and options that several commands have, with the words of their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

JsonFlag = Annotated[bool, Option("--json", help="Print the result as JSON on stdout, all else on stderr.")]
TrustFlag = Annotated[bool, Option("--trust-remote-code", help="Run parts that the model names by dotted path.")]
MODEL_HELP = "A run's folder, a stage's folder, a merged folder, a hub name, `starter` or `starter-receipts`."
RECIPE_HELP = "A recipe (YAML), or the name of a packaged one: starter, starter-contrastive, llava-1.5-7b, …"
OVERRIDES_HELP = "Changes to the recipe, such as [cyan]stages.0.steps=50[/] or [cyan]precision=fp32[/]."
ModelArgument = Annotated[str, Argument(help=MODEL_HELP)]
Overrides = Annotated[list[str] | None, Argument(help=OVERRIDES_HELP, metavar="[KEY=VALUE]...")]
AnswerTokens = Annotated[int, Option(min=1, help="The longest answer, in tokens.")]
MediaOption = Annotated[Path | None, Option(help="The folder that pictures' paths start from.")]
