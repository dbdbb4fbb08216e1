#!/bin/bash
# Checks the kernels on one Hopper GPU: tests with bounded waits first (a hang becomes an error),
# then compute-sanitizer on small sizes, then the real builds. Arguments go to the last pytest.
set -u
cd "$(dirname "$0")/../.."
export PYTHONPATH=python PYTHONUNBUFFERED=1
status=0
step() {
  echo "== $*"
  timeout "${LIMIT:-150}" "$@" || { echo "FAILED ($?): $*"; status=1; }
}
gpu_tests=(python3 -m pytest -q -m gpu -p no:cacheprovider tests/kernels)
STEP3RT_TEST_WAIT_LIMIT_NS=2000000000 step "${gpu_tests[@]}" -x
if [ $status = 0 ]; then
  cases=$(python3 -c "from tests.kernels.sanitize import CASES; print(*CASES)") || exit 1
  # Each in a process of its own: one that does not end is named, and keeps none of the others from it.
  for case in $cases; do
    sanitize=(--error-exitcode 9 python3 -m tests.kernels.sanitize "$case")
    step compute-sanitizer --tool memcheck "${sanitize[@]}"
    # racecheck follows a barrier's arrivals by thread: docs/kernels.md
    step compute-sanitizer --tool racecheck "${sanitize[@]}" --every-lane-arrives
  done
  step "${gpu_tests[@]}" "$@"
fi
exit $status
