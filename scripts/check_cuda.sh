#!/usr/bin/env bash
# What a machine with a GPU makes of this package, in at most nine minutes: the tests that need one, and the benchmarks.
#
#   scripts/check_cuda.sh --download wheels    with a network: the wheels for Python 3.12 on Linux x86_64
#   scripts/check_cuda.sh wheels               without one: needs Python, torch and numpy; installs the rest from there
#   scripts/check_cuda.sh                      in an environment that has everything
#
# It leaves check_cuda.json (tests by name, benchmark rows, card, driver, versions) and check_cuda.log in $OUT, or in the
# current folder. What time does not suffice for is counted as not reached: ONLY=tests and ONLY=bench give one of the two
# all of it, LIMIT says how many seconds there are (540), and words after the folder go to pytest, as in
# check_cuda.sh wheels -k runs. PYTHON is the interpreter (python3), PYTHON_VERSION that of the wheels (3.12).
# SCCLR_TEST_DEVICE=cpu goes through all of it in small without a GPU.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
device=${SCCLR_TEST_DEVICE:-cuda}
torchvisions="0.26 0.27 0.28 0.29" # of torch 2.11 to 2.14: the minor version of torch and 15
beside="lightly lightly-utils aenum python-dateutil six pytorch-lightning torchmetrics lightning-utilities kornia kornia-rs"

requirements() { # what the package and its tests need, but torch and torchvision, which must fit the driver
    "$python" - "$here/pyproject.toml" << 'END'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    needed = tomllib.load(file)["project"]["dependencies"]
print(*(line for line in needed if not line.startswith("torch")), "pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "hatchling", "editables")
END
}

download() {
    local folder=$1 version=${PYTHON_VERSION:-3.12} tags=() n
    for n in 2_39 2_35 2_34 2_31 2_28 2_27 2_26 2_24 2_17 2014 2_12 2010 2_5 1; do tags+=(--platform "manylinux${n/2_/_2_}_x86_64"); done
    local get=("$python" -m pip download -q --disable-pip-version-check --only-binary=:all: --python-version "$version"
        --implementation cp "${tags[@]}" --find-links "$folder" --dest "$folder")
    mkdir -p "$folder"
    "$python" -m pip wheel -q --no-deps -w "$folder" 'antlr4-python3-runtime==4.9.3' # published as source only
    # shellcheck disable=SC2046
    "${get[@]}" $(requirements)
    for n in $torchvisions; do "${get[@]}" --no-deps "torchvision==$n.*" || echo "no torchvision $n for Python $version"; done
    for n in $beside; do "${get[@]}" --no-deps "$n" || echo "no $n for Python $version: its benchmark will be left out"; done
    echo "$folder: $(find "$folder" -name '*.whl' | wc -l) wheels, $(du -sm "$folder" | cut -f1) MiB; those that the machine has may be deleted"
}

install() { # from the folder of wheels $1 into an environment that sees the packages of the machine
    local wheels site
    wheels=$(cd "$1" && pwd)
    "$python" -m venv --system-site-packages "$scratch/venv" 2> /dev/null ||
        "$python" -m venv --without-pip --system-site-packages "$scratch/venv"
    site=$(find "$scratch/venv/lib" -maxdepth 2 -name site-packages)
    # If the machine's Python is itself in an environment, the new one would not see that.
    "$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' > "$site/machine.pth"
    python=$scratch/venv/bin/python
    local get=("$python" -m pip install -q --disable-pip-version-check --no-index --find-links "$wheels")
    # shellcheck disable=SC2046
    "${get[@]}" $(requirements)
    if ! "$python" -c 'import torchvision' 2> /dev/null; then
        "${get[@]}" --no-deps "torchvision==0.$("$python" -c 'import torch; print(int(torch.__version__.split(".")[1]) + 15)').*"
    fi
    "${get[@]}" --no-deps --no-build-isolation -e "$here"
    # shellcheck disable=SC2086
    for n in $beside; do "${get[@]}" --no-deps "$n" 2> /dev/null || echo "$n is not among the wheels"; done
}

if [ "${1:-}" = --download ]; then
    download "${2:?give a folder: scripts/check_cuda.sh --download wheels}"
    exit
fi

out=$(cd "${OUT:-.}" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
[ $# -eq 0 ] || install "$1"
if [ "$device" = cuda ] && ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA device here, by torch $("$python" -c 'import torch; print(torch.__version__)'): nothing was tested"
    exit 1
fi

small=$([ "$device" = cuda ] || echo --small)
export SCCLR_TEST_DEVICE=$device WANDB_MODE=disabled PYTHONUNBUFFERED=1
cd "$here"
only=${ONLY:-tests,bench}
limit=$((${LIMIT:-540} - 25)) # to stop what still runs, and to write
: > "$out/check_cuda.log"
if [[ $only == *tests* ]]; then
    left=$(((limit - SECONDS) * ($([[ $only == tests ]] && echo 10 || echo 6)) / 10))
    echo "== tests (at most $left seconds)"
    workers=$(($(nproc) < 8 ? $(nproc) : 8)) # most of a test is work of the host
    # Of the machine's plugins for pytest, only the one that is asked for.
    PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 timeout -s INT -k 20 "$left" "$python" -m pytest -v -m cuda -o addopts=--strict-markers \
        -p xdist.plugin -n $workers --dist load --durations 12 -p no:cacheprovider --basetemp "$scratch/tests" \
        tests/test_cuda_runs.py tests/test_cuda.py "${@:2}" 2>&1 |
        tee -a "$out/check_cuda.log" | grep -E '^(FAILED|ERROR|E  )|^=.* in |s (call|setup)' || true
fi
if [[ $only == *bench* ]]; then
    left=$((limit - SECONDS))
    echo "== benchmarks (at most $left seconds)"
    # shellcheck disable=SC2086
    timeout -s INT -k 20 "$left" "$python" scripts/bench_cuda.py --device "$device" $small --seconds $((left - 60)) \
        --only pairs,probe,steps,views --probe-images 200000 --out "$scratch/bench.json" 2>&1 | tee -a "$out/check_cuda.log" || true
fi

"$python" - "$out" "$scratch/bench.json" "$SECONDS" "$only" << 'END'
import json, re, sys
from pathlib import Path

out, bench, seconds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
tests = {"passed": [], "failed": [], "skipped": [], "error": [], "unfinished": []}
log = (out / "check_cuda.log").read_text()
for line in log.splitlines():
    if found := re.match(r"\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|SKIPPED|ERROR) (tests/\S+::.+)", line):
        tests[found[1].lower()].append(found[2].rstrip())
    elif line.startswith("tests/") and "::" in line:  # it has begun
        tests["unfinished"].append(line.rstrip())
done = {name for kind in ("passed", "failed", "skipped", "error") for name in tests[kind]}
tests["unfinished"] = [name for name in tests["unfinished"] if name not in done]
measured = json.loads(bench.read_text()) if bench.exists() else {"machine": None, "rows": [], "notes": ["no benchmark"]}
(out / "check_cuda.json").write_text(json.dumps({"seconds": seconds, "tests": tests, **measured}, indent=1))
card = (measured["machine"] or {}).get("gpu") or "CPU"
counts = ", ".join(f"{len(names)} {kind}" for kind, names in tests.items())
if chosen := re.search(r"\[(\d+) items?\]", log):
    counts += f", {int(chosen[1]) - len(done) - len(tests['unfinished'])} not reached"
print(f"{card}: tests {counts}; {len(measured['rows'])} measurements; {seconds} s; {out / 'check_cuda.json'}")
missing = ("tests" in sys.argv[4] and not tests["passed"]) or ("bench" in sys.argv[4] and not measured["rows"])
sys.exit(bool(tests["failed"] or tests["error"]) or missing)
END
