#!/bin/sh
# package.sh PYTHON FILE: install a wheel or an sdist into a new environment and use it there, away from the
# checkout. Only what it depends on is borrowed from PYTHON's environment, so that nothing large is fetched.
set -eu
python=$1
file=$(realpath "$2")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
unset PYTHONPATH
"$python" -m venv "$place/env"
bin=$place/env/bin
"$bin/pip" install --quiet --disable-pip-version-check --no-deps "$file"
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
  >"$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
cd "$place"
from=$("$bin/python" -c 'import trueline; print(trueline.__file__)')
case $from in "$bin"/../* | "$place"/env/*) ;; *) echo "$file: not what was imported, but $from" && exit 1 ;; esac
"$bin/trueline" --help >help
"$bin/trueline" methods >methods
"$bin/trueline" generate "What is the moon?" --principle "Talk like a pirate." >said
grep -qiE 'arr|matey|ahoy|aye' said || { echo "$file: not a pirate's words:" && cat said && exit 1; }
printf '{"prompt": "What is the moon?"}\n{"prompt": "Who bakes bread?"}\n' >prompts.jsonl
"$bin/trueline" distil --principle "Talk like a pirate." --prompts prompts.jsonl --output pirate \
  --steps 1 --batch-size 2 >/dev/null 2>&1
test -s pirate/adapter_model.safetensors && test -s pirate/README.md
"$bin/trueline" eval preference --ratio 0,2 --limit 4 --output runs >/dev/null 2>&1
"$bin/trueline" report runs --output page >/dev/null && test -s page/report.html
"$bin/python" -c 'from trueline.server.app import build_app; from importlib.resources import files
assert (files("trueline") / "assets/page/index.html").is_file() and (files("trueline") / "py.typed").is_file()'
echo "$(basename "$file"): installed, asked, distilled, measured and reported"
