#!/usr/bin/env bash
# Tests and measures vaekl on a GPU in one command, under nine minutes:
#
#   bench/gpu.sh OUTDIR          on a machine with a GPU; needs no network
#   bench/gpu.sh --dry OUTDIR    the same steps on any machine, each in its smallest form
#
# PYTHON (python3) is the interpreter; it has torch, triton, numpy and pytest, and setuptools to
# install vaekl into it. Without scipy or numba the tests that need them are skipped, without
# matplotlib there are no plots. COMMIT names what is measured where git cannot say. BUDGET (520) is
# the limit in seconds for all steps together. All but the first get no more than is left of it:
# where compiling is slow, the suite, the device tests and training steps leave bench less time.
#
# OUTDIR gets summary.txt (the machine, the table of steps), suite.log, gpu.log (device tests and
# sanitizers), bench.log, and bench/ (JSON and plots): nine files. All are written as it goes.
#
# Most of a first run goes to Triton, which compiles each kernel variant on first use. The suite
# has 542 of them (counted on a CPU; 250 took 83 s to compile for sm_90, one after another), hence
# several pytest workers where pytest-xdist is there.
set -uo pipefail

dry=
if [[ ${1-} == --dry ]]; then
    dry=yes
    shift
fi
if (($# != 1)) || [[ $1 == -* ]]; then
    echo "usage: bench/gpu.sh [--dry] OUTDIR" >&2
    exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
python=${PYTHON:-python3}
python=$(command -v "$python") || { echo "no such interpreter: ${PYTHON:-python3}" >&2; exit 2; }
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
# A dry run shows that each step runs, on machines that may be slow and busy: it has time.
patience=1
[[ $dry ]] && patience=20
budget=${BUDGET:-$((520 * patience))}
commit=${COMMIT:-$(
    git -c safe.directory="$root" -C "$root" describe --always --dirty --abbrev=12 2>/dev/null
)}
commit=${commit:-unknown}
failed=0

# A folder of its own to work in: Python looks for packages in the current one first.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 2

export PYTHONUNBUFFERED=1 PIP_ROOT_USER_ACTION=ignore
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # what torch's deterministic mode, in the tests, asks for
export PATH=$PATH:/usr/local/cuda/bin
unset TRITON_INTERPRET PYTEST_ADDOPTS

# row NAME SECONDS STATUS SUMMARY: a line of the table, printed as steps end.
row() {
    printf '%-10s %7s  %-8s %s\n' "$@" | tee -a "$work/table"
    cat "$work/machine" "$work/table" >"$out/summary.txt"
}

# within SECONDS: no more than is left of the budget.
within() {
    local left=$((budget - SECONDS)) most=$(($1 * patience))
    echo $((most < left ? most : left))
}

# step NAME LOG SECONDS COMMAND...: runs it within a limit, its output added to LOG.
step() {
    local name=$1 log=$2 limit start=$SECONDS status last
    limit=$(within "$3")
    shift 3
    if ((limit < 5)); then
        row "$name" 0 "no time" "the budget of $budget s is spent"
        failed=1
        return 1
    fi
    echo "-- $name" >>"$log"
    # SIGINT lets pytest say what failed so far.
    timeout --signal=INT --kill-after=10 "$limit" "$@" >>"$log" 2>&1 </dev/null
    status=$?
    # The last line with words in it.
    last=$(sed "0,/^-- $name\$/d" "$log" | grep '[[:alnum:]]' | tail -n 1)
    last=$(sed 's/^=* *//; s/ *=*$//' <<<"${last:0:100}")
    case $status in
    0) row "$name" $((SECONDS - start)) ok "$last" ;;
    124 | 137) row "$name" $((SECONDS - start)) timeout "limit $limit s; $last" ;;
    *) row "$name" $((SECONDS - start)) "exit $status" "$last" ;;
    esac
    ((status == 0)) || failed=1
    return "$status"
}

has() {
    "$python" -c "import $1" 2>/dev/null
}

facts='
import platform, shutil, subprocess, sys
from importlib import metadata
import torch
print("commit", sys.argv[1], "| Python", platform.python_version(), "|", platform.platform())
have = {str(d.metadata["Name"]).lower(): d.version for d in metadata.distributions()}
names = "torch triton numpy scipy setuptools pytest pytest-xdist pytest-benchmark".split()
print(", ".join(f"{name} {have.get(name)}" for name in names))
for tool in ("nvidia-smi", "rocm-smi"):
    if shutil.which(tool):
        print(subprocess.run([tool], capture_output=True, text=True).stdout)
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))
else:
    sys.exit(0 if sys.argv[2] else "torch sees no CUDA or ROCm device: see bench/gpu.sh --dry")
'

rm -f "$out"/{suite,gpu,bench}.log
date -u '+%Y-%m-%d %H:%M:%S UTC' >"$work/machine"
row step seconds status summary
budget=$((SECONDS + 60 * patience)) step machine "$work/machine" 60 "$python" -c "$facts" "$commit" "$dry" || exit 1

# Without network, dependencies or isolation; where that fails, links do what installing would.
step install "$work/machine" 60 "$python" -m pip install --disable-pip-version-check --no-index \
    --no-deps --no-build-isolation ${dry:+--dry-run} -e "$root"
if ! has vaekl.kernels; then
    mkdir "$work/vaekl"
    ln -s "$root"/vaekl/* "$work/vaekl/"
    ln -s "$root/kernels" "$work/vaekl/kernels"
    export PYTHONPATH=$work
fi

# Warnings are shown and do not fail: these need not be the versions that vaekl is developed with.
pytest=("$python" -m pytest -c "$root/pyproject.toml" -W default -p no:cacheprovider
    -p no:benchmark -q --color=no --tb=short --durations=5)
parallel=()
if has xdist; then
    workers=$(nproc)
    parallel=(-n $((workers < 8 ? workers : 8)))
fi
if has pytest_timeout; then
    pytest+=(--timeout 100)
    # A worker stuck in a compiler must end; the others go on.
    ((${#parallel[@]})) && parallel+=(--timeout-method thread)
fi
few=()
if [[ $dry ]]; then
    few=(-k "known_answers or named_tuple")
    ((${#parallel[@]})) && parallel=(-n 1)
fi

suite=("$root"/tests/{values/test_values,noise/test_{noise,determinism},gradients/test_gradcheck}.py
    "$root"/tests/{contract/test_{bad_input,contract,nn},pytorch/test_{modes,autocast,transforms}}.py)
step suite "$out/suite.log" 210 "${pytest[@]}" "${parallel[@]}" "${few[@]}" "${suite[@]}"

step gpu "$out/gpu.log" 150 "${pytest[@]}" "$root/tests/gpu"

step training "$out/bench.log" 60 "$python" "$root/bench/training.py" --commit "$commit" \
    --out "$out/bench/training-gpu.json" --seconds "$([[ $dry ]] && echo 0.1 || echo 5)"

# The sanitizers, last, are left their time.
sanitizers=0
[[ -z $dry ]] && command -v compute-sanitizer >/dev/null && sanitizers=130
if [[ -f $root/bench/run.py ]]; then
    device=(--device cuda)
    [[ $dry ]] && device=(--device cpu --quick)
    limit=$((budget - SECONDS - sanitizers))
    ((limit > 300)) && limit=300
    seconds=$((limit > 40 ? limit - 30 : 10))
    [[ $dry ]] && seconds=1
    step bench "$out/bench.log" "$limit" "$python" "$root/bench/run.py" --out "$out/bench" \
        "${device[@]}" --seconds "$seconds" --commit "$commit"
else
    row bench - skipped "no bench/run.py"
fi

# Without torch's cache every tensor is an allocation of its own, so its end is known.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
tools=(memcheck racecheck)
[[ $dry ]] && tools=(memcheck)
for tool in "${tools[@]}"; do
    small=("${pytest[@]}" "$root/tests/gpu/test_gpu.py" -k small_cases)
    if [[ $dry ]]; then
        step "$tool" "$out/gpu.log" 30 "${small[@]}"
    elif command -v compute-sanitizer >/dev/null; then
        options=(--target-processes all --error-exitcode 9)
        # torch itself makes calls that fail, to ask what the driver can do.
        [[ $tool == memcheck ]] && options+=(--report-api-errors no)
        step "$tool" "$out/gpu.log" 60 \
            compute-sanitizer --tool "$tool" "${options[@]}" "${small[@]}"
    else
        row "$tool" - skipped "no compute-sanitizer"
    fi
done
exit "$failed"
