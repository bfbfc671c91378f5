#!/usr/bin/env bash
# The core of the suite with the lowest and the newest of all that pyproject.toml allows, and with the locked versions on
# each supported Python; prints a table, which stands in docs/reliability.md. Needs a package index, and the interpreters
# (uv finds pyenv's and the system's, and fetches others where it can).
#
#   scripts/versions.sh                     # all; half an hour on two quiet cores
#   scripts/versions.sh newest 3.13         # some: lowest, newest, or a version of Python
#   PYTEST="-x -k delta" scripts/versions.sh lowest
#
# Environments stay in .venv-versions/ and are brought up to date by the next call.
set -uo pipefail
cd "$(dirname "$0")/.."
UV=$(command -v uv || echo "$PWD/.uv/bin/uv")
[ -x "$UV" ] || { make -s .uv/bin/uv; UV=$PWD/.uv/bin/uv; }
# Behind its shims pyenv shows uv only the version that is chosen.
command -v pyenv >/dev/null && export PYENV_VERSION=$(pyenv versions --bare | paste -sd:)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$PWD/src"

CORE="tests/test_private_names.py tests/models tests/train/test_loop.py tests/data tests/inference tests/language tests/ops tests/encoders"
TOOLS="pytest pytest-timeout pytest-xdist hypothesis httpx sentencepiece"  # always the newest, beside what is there
EXTRAS="audio,captions,serve,starter,video"  # not `ui`: gradio holds others back
PACKAGES="transformers torch torchvision peft accelerate timm datasets tokenizers pydantic numpy pillow"

make_environment() { # name, folder
    case $1 in
    lowest | newest)
        local python=3.11 resolution=lowest-direct
        [ "$1" = newest ] && python=3.13 resolution=highest
        "$UV" venv -q --allow-existing --python $python "$2" &&
            "$UV" pip install -q --python "$2" --upgrade --resolution $resolution ".[$EXTRAS]" &&
            "$UV" pip install -q --python "$2" $TOOLS
        ;;
    *) UV_PROJECT_ENVIRONMENT=$2 "$UV" sync -q --locked --python "$1" ;;
    esac
}

row() { # name, folder, the last line of pytest
    "$2/bin/python" - "$1" "$3" $PACKAGES <<'PYTHON'
import importlib.metadata, platform, re, sys
name, last, *packages = sys.argv[1:]
counts = {k: n for n, k in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
failed = int(counts.get("failed", 0)) + int(counts.get("error", counts.get("errors", 0)))
cells = [name, platform.python_version(), *map(importlib.metadata.version, packages)]
cells += [counts.get("passed", "0"), str(failed) if counts else "no result", counts.get("skipped", "0")]
print("| " + " | ".join(cells) + " |")
PYTHON
}

ROWS="" STATUS=0
for name in ${@:-lowest newest 3.11 3.12 3.13}; do
    folder=$PWD/.venv-versions/$name
    echo "== $name"
    if ! make_environment "$name" "$folder"; then
        ROWS+="| $name | cannot be installed |"$'\n' STATUS=1
        continue
    fi
    log=$folder/pytest.log
    # One test worker a core, a file's tests on one worker, as in .ci/run. With other versions, libraries warn each other of
    # other things: no error here.
    "$folder/bin/python" -m pytest -q -p no:cacheprovider -W default -n "${WORKERS:-2}" --dist loadfile $CORE ${PYTEST:-} 2>&1 | tee "$log"
    [ "${PIPESTATUS[0]}" = 0 ] || STATUS=1
    ROWS+=$(row "$name" "$folder" "$(tail -n 1 "$log")")$'\n'
done

echo
echo "| versions | Python | ${PACKAGES// / | } | passed | failed | skipped |"
echo "|---|---|$(sed -E 's/[^ ]+ ?/---|/g' <<<"$PACKAGES")---|---|---|"
echo -n "$ROWS"
exit $STATUS
