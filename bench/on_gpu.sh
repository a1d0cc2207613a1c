#!/usr/bin/env bash
# Everything that only a GPU can show, in one command and without a network:
#
#   bench/on_gpu.sh [--stages LIST] [--minutes N] [--wheels DIR] [--out DIR] [--python PYTHON]
#                   [--device cuda|cpu] [--dry-run] [--no-install]
#
#   --stages    some of tests,sanitizer,rope,moe,decode,load,matmul-quick,matmul-full (default: all, in that order)
#   --minutes   what all of it may take (default: 60); what there was no time for is named in the results
#   --wheels    a folder of wheels (or sdists) of other kernels, installed without their dependencies
#   --out       where results go (default: bench/results/<device>)
#   --python    an interpreter that has torch and triton (default: python3)
#   --dry-run   every stage at tiny sizes; with --device cpu the rehearsal that the tests run
#   --no-install  use --python as it is, with ropewalk installed in it
#
# Into the output folder go <stage>.log, *.json and *.png. Exits with 1 if any stage failed.
set -uo pipefail
here=$PWD
cd "$(dirname "$0")/.." || exit 1
# from_here PATH: what a relative path means where the script was called
from_here() { case $1 in /*) echo "$1" ;; *) echo "$here/$1" ;; esac; }

all_stages=tests,sanitizer,rope,moe,decode,load,matmul-quick,matmul-full
stages=$all_stages minutes=60 wheels='' out='' python=python3 device=cuda dry='' install=1
while [ $# -gt 0 ]; do
    case $1 in
        --stages) stages=$2; shift ;;
        --minutes) minutes=$2; shift ;;
        --wheels) wheels=$(from_here "$2"); shift ;;
        --out) out=$(from_here "$2"); shift ;;
        --python) case $2 in */*) python=$(from_here "$2") ;; *) python=$2 ;; esac; shift ;;
        --device) device=$2; shift ;;
        --dry-run) dry=1 ;;
        --no-install) install='' ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' bench/on_gpu.sh; exit 0 ;;
        *) echo "on_gpu.sh: unknown option $1 (see --help)" >&2; exit 2 ;;
    esac
    shift
done
for stage in ${stages//,/ }; do
    case ,$all_stages, in
        *",$stage,"*) ;;
        *) echo "on_gpu.sh: --stages: expected some of $all_stages, found $stage" >&2; exit 2 ;;
    esac
done
limit=$((minutes * 60))
left() { echo $((limit - SECONDS)); }

# An environment of our own that sees the machine's packages. Where pip cannot install from here (no pip, no
# setuptools), a folder of links stands for the package: folders at the root are ropewalk.<folder>.
if [ "$install" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
    machine=$("$python" -c "$purelib")
    "$python" -m venv --system-site-packages "$work/venv" >"$work/log" 2>&1 ||
        "$python" -m venv --system-site-packages --without-pip "$work/venv" >>"$work/log" 2>&1
    if [ -x "$work/venv/bin/python" ]; then
        python=$work/venv/bin/python
        # --system-site-packages does not show the packages of a python that is itself in an environment, and a
        # new environment may bring an old setuptools.
        echo "import sys; sys.path.insert(0, '$machine')" >"$("$python" -c "$purelib")/machine.pth"
    fi
    pip=("$python" -m pip --quiet --disable-pip-version-check install --no-index --no-deps --no-build-isolation)
    if [ "$wheels" ]; then
        for wheel in "$wheels"/*.whl "$wheels"/*.tar.gz; do
            [ -e "$wheel" ] || continue
            "${pip[@]}" "$wheel" >>"$work/log" 2>&1 || echo "on_gpu.sh: not installed: $(basename "$wheel")"
        done
    fi
    if ! "${pip[@]}" -e . >>"$work/log" 2>&1; then
        mkdir -p "$work/links/ropewalk"
        ln -s "$PWD"/src/ropewalk/* "$PWD"/kernels/rope "$PWD"/kernels/norm "$PWD"/kernels/gptq "$PWD"/kernels/cpu "$PWD"/loader "$PWD"/patches "$PWD"/bench "$work/links/ropewalk/"
        if [ "${python#"$work"}" != "$python" ]; then
            echo "$work/links" >"$("$python" -c "$purelib")/ropewalk.pth"
        else
            export PYTHONPATH=$work/links${PYTHONPATH:+:$PYTHONPATH}
        fi
        echo "on_gpu.sh: pip could not install ropewalk here; using links ($(tail -n 1 "$work/log"))"
    fi
fi
name=$("$python" - "$device" <<'END'
import re, sys
import ropewalk.cli
name = sys.argv[1]
if name != "cpu":
    import torch
    name = torch.cuda.get_device_name()
print(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))
END
) || { echo "on_gpu.sh: expected torch, a $device device and ropewalk in $python, found otherwise" >&2; exit 1; }
out=${out:-bench/results/$name}
mkdir -p "$out"

workers=$(($(getconf _NPROCESSORS_ONLN) * 3 / 4))
if [ "$workers" -lt 1 ]; then workers=1; fi
xdist=()
if "$python" -c 'import xdist' 2>/dev/null; then xdist=(-n "$workers"); fi

failed=()
# step STAGE COMMAND…: run within the time that is left, keep what it prints
step() {
    local stage=$1 status
    shift
    if [ "$(left)" -le 5 ]; then
        echo "on_gpu.sh: no time left for: $*" | tee -a "$out/$stage.log"
        return
    fi
    printf '\n$ %s\n' "$*" >>"$out/$stage.log"
    timeout -k 10 "$(left)" "$@" 2>&1 | tee -a "$out/$stage.log"
    status=${PIPESTATUS[0]}
    if [ "$status" -ne 0 ]; then
        failed+=("$stage: exit $status from $*")
    fi
}
# bench STAGE NAME SECONDS ARGUMENTS…: one benchmark with its JSON and plot, ending in time for the next
bench() {
    local stage=$1 file=$2 share=$3
    shift 3
    if [ "$share" -gt "$(left)" ]; then share=$(left); fi
    step "$stage" "$python" -m ropewalk bench "$@" --device "$device" --stop-after "$((share > 20 ? share - 15 : share))" \
        --out "$out/$file.json" --plot "$out/$file.png"
}

models="llama-2-13b codellama-34b mpt-30b mixtral-8x7b"
all_m="1 2 4 8 16 32 64 128 512 2048 8192"
some_m="1 16 64 512" all_bits="4 3 2 8" all_groups="32 -1 64 128"
quick="8192x8192 5120x5120 13824x5120 8192x22016"
quick_m="1 8 16 64 2048"
rope_shapes="llama-2-13b codellama-34b mixtral-8x7b"
rope_m="1 16 512 4096 16384"
moe_shapes=mixtral-8x7b moe_m="1 2 4 16 64 512 2048"
# The first one gets most of the time: compiling a step takes a minute, for each length of context.
decode_models="llama-2-13b mixtral-8x7b codellama-34b mpt-30b"
contexts="128 1024 4096 16384" batches="1 4 16" tokens=64 load_shape=llama-2-13b
seconds=0.1
if [ "$dry" ]; then
    models=128x64 all_m="1 3" some_m=1 all_bits=2 all_groups="32 -1" quick=128x64 quick_m=1 rope_shapes=4x2x16 rope_m="1 5" seconds=0.002
    moe_shapes=4x64x96 moe_m="1 5" decode_models=tiny-mixtral contexts="8 140" tokens=2
fi
models_at=$(mktemp -d "${TMPDIR:-/tmp}/ropewalk-models.XXXXXX")
# among NAME…: compare with these only; with nobody in a rehearsal
among() {
    peers=(--peers)
    if [ ! "$dry" ]; then peers+=("$@"); fi
}

for stage in ${stages//,/ }; do
    echo "== $stage, $(left) s left"
    : >"$out/$stage.log"
    # shellcheck disable=SC2086 # lists of words are what is meant
    case $stage in
        tests)
            if [ "$dry" ]; then
                step tests "$python" -m pytest -q --collect-only tests/test_ops.py
                step tests "$python" -m ropewalk.bench.gpu_check --device "$device" --small
            else
                # Nearly all of their time is compiling.
                step tests env OMP_NUM_THREADS=1 "$python" -m pytest -q -p no:cacheprovider "${xdist[@]}" tests/test_*triton*.py \
                    tests/test_few_tokens.py tests/test_layout.py tests/test_apply_rotary.py tests/test_place.py
                step tests "$python" -m ropewalk.bench.gpu_check --device "$device" --workers "$workers"
            fi
            ;;
        sanitizer)
            if [ "$dry" ] || ! command -v compute-sanitizer >/dev/null; then
                echo "on_gpu.sh: sanitizer skipped: ${dry:+dry run, }compute-sanitizer is$([ "$(command -v compute-sanitizer)" ] || echo ' not') on PATH" | tee -a "$out/sanitizer.log"
                continue
            fi
            if ! compute-sanitizer --error-exitcode 9 "$python" -c 'import torch; torch.zeros(1, device="cuda")' >>"$out/sanitizer.log" 2>&1; then
                echo "on_gpu.sh: sanitizer skipped: compute-sanitizer does not run on this device" | tee -a "$out/sanitizer.log"
                continue
            fi
            # torch's caching allocator would hide what is beyond a tensor's end. The kernels are compiled before, by all
            # processors. API errors are no faults of ours: cuda-bindings asks older drivers for what they do not have.
            step sanitizer "$python" -m ropewalk.bench.gpu_check --small --workers "$workers"
            for tool in memcheck racecheck; do
                step sanitizer env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 \
                    "$python" -m ropewalk.bench.gpu_check --small
            done
            ;;
        rope)
            among transformers transformers-compiled liger flash-attn vllm conch
            bench rope rope 120 rope --shapes $rope_shapes --m $rope_m --seconds $seconds "${peers[@]}"
            ;;
        moe)
            among transformers-grouped transformers-eager transformers-batched torch-all-experts marlin-one-by-one
            bench moe moe 180 moe --shapes $moe_shapes --m $moe_m --pack 4b-g128 4b-g32-act --seconds $seconds \
                --plot-share "$out/moe-share.png" "${peers[@]}"
            ;;
        decode)
            among ropewalk-compiled torch-fp16 torch-fp16-compiled gptqmodel
            share=480
            for model in $decode_models; do
                bench decode "decode-$model" "$share" decode --shapes "$model" --pack 4b-g128 --context $contexts \
                    --tokens $tokens --seconds $seconds --models "$models_at" "${peers[@]}"
                if [ "$share" = 480 ] && [ ! "$dry" ]; then
                    bench decode "decode-$model-batch" 240 decode --shapes "$model" --pack 4b-g128 --batch $batches \
                        --tokens $tokens --seconds $seconds --models "$models_at" "${peers[@]}"
                fi
                share=180
                rm -rf "$models_at"
            done
            ;;
        load)
            if [ "$dry" ]; then
                echo "on_gpu.sh: load skipped: dry run (it starts a process for every loader)" | tee -a "$out/load.log"
                continue
            fi
            among transformers-fp16 safetensors
            bench load load 240 load --shapes "$load_shape" --runs 3 --models "$models_at" "${peers[@]}"
            rm -rf "$models_at"
            ;;
        matmul-quick)
            among torch-fp16 torch-int4 marlin humming exllamav2
            bench matmul-quick matmul-quick 240 matmul --shapes $quick --m $quick_m --bits 4 3 --group-size 128 \
                --no-desc-act --desc-act --seconds $seconds "${peers[@]}"
            if [ "$dry" ]; then continue; fi
            # These build or tune themselves for minutes.
            among torch-fp16 marlin gptqmodel conch gemlite
            bench matmul-quick matmul-quick-slow-starters 300 matmul --shapes $quick --m $some_m --bits 4 --group-size 128 \
                --no-desc-act --desc-act --seconds $seconds "${peers[@]}"
            ;;
        matmul-full)
            among torch-fp16 torch-int4 marlin humming exllamav2
            # First every size at 4 bits, then the other bits and groups with what time is left, shared evenly.
            set -- $models
            count=$((2 * $#))
            for model in $models; do
                bench matmul-full "matmul-$model" "$(($(left) / count))" matmul --shapes $model --m $all_m --bits 4 \
                    --group-size 128 --no-desc-act --desc-act --seconds $seconds "${peers[@]}"
                count=$((count - 1))
            done
            among torch-fp16 marlin humming
            for model in $models; do
                bench matmul-full "matmul-$model-settings" "$(($(left) / count))" matmul --shapes $model --m $some_m \
                    --bits $all_bits --group-size $all_groups --no-desc-act --desc-act --seconds $seconds "${peers[@]}"
                count=$((count - 1))
            done
            ;;
    esac
done
rm -rf "$models_at"
echo "== results in $out, ${SECONDS} s"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'on_gpu.sh: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
