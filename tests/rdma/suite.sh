#!/usr/bin/env bash
# Everything that is tested over a real RDMA device: on this host's own, or in the virtual machine of
# run_in_vm.sh. The extension module must be built, as by `make build`.
#
#   STEP3RT_RDMA_HOST   this host's address on the RDMA network; default 127.0.0.1
#   STEP3RT_PYTHON      default .venv/bin/python
#
# `suite.sh build` only builds the Rust tests; it is done before the virtual machine is booted.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=python PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
python=${STEP3RT_PYTHON:-$PWD/.venv/bin/python}

# Names the executables of this very build: those of others, perhaps without RDMA, lie beside them.
executables=target/rdma-tests
if [ "${1:-}" = build ] || [ -z "${STEP3RT_IN_VM:-}" ]; then
    mkdir -p target
    # Not `tee /dev/stderr`, which opens it again: a log file would begin anew.
    cargo test -p step3rt-fabric --no-run --color never 2>&1 | tee >(cat >&2) |
        sed -nE 's/^ +Executable .*\((.*)\)$/\1/p' >"$executables"
    [ "${1:-}" = build ] && exit
fi

# Runs tests of one executable, one after the other, and sees that there were some.
tests() {
    local executable output
    executable=$(grep "/$1-[0-9a-f]*$" "$executables")
    output=$(mktemp)
    "$executable" --include-ignored --show-output --test-threads=1 "$2" | tee "$output"
    grep -q '^test result: .*ok.*\. [1-9][0-9]* passed' "$output"
    rm "$output"
}

step() {
    echo "== $1 [$(cut -d' ' -f1 /proc/uptime) s after boot]"
}

step "hostile and silent peers"
tests step3rt_fabric rdma::tests
step "the fabric's promises"
tests conformance rdma::
step "who is linked by it"
tests linking rdma::
step "new links in the place of present ones"
tests resets rdma::
step "killed and stopped processes"
tests peer_death rdma::
step "nothing is left behind, nothing allocated"
tests leaks rdma
tests no_allocation rdma
step "a link is measured"
"$python" -m step3rt bench link --fabric rdma --rounds 20 --json
step "generation"
"$python" -m pytest -m rdma -p no:cacheprovider tests/rdma
step "done"
