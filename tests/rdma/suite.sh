#!/usr/bin/env bash
# Everything that is tested over a real RDMA device: on this host's own, or in the virtual machine of
# run_in_vm.sh. The tests and the extension module must be built; `make test-rdma` does both.
#
#   STEP3RT_RDMA_HOST   this host's address on the RDMA network; default 127.0.0.1
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=python PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
python=${STEP3RT_PYTHON:-$PWD/.venv/bin/python}

# The newest executable of a test target: cargo leaves those of earlier builds beside it.
built() {
    ls -t target/debug/deps/"$1"-* | grep -v '\.d$' | head -n 1
}

step() {
    echo "== $1 [$(cut -d' ' -f1 /proc/uptime) s after boot]"
}

step "hostile and silent peers"
"$(built step3rt_fabric)" --include-ignored --test-threads=1 rdma::tests
step "the fabric's promises"
"$(built conformance)" --include-ignored --test-threads=1 rdma::
step "who is linked by it"
"$(built linking)" --include-ignored rdma::
step "killed and stopped processes"
"$(built peer_death)" --include-ignored --test-threads=1 rdma::
step "nothing is left behind, nothing allocated"
"$(built leaks)" --include-ignored rdma
"$(built no_allocation)" --include-ignored rdma
step "generation"
"$python" -m pytest -m rdma -p no:cacheprovider tests/rdma
step "done"
