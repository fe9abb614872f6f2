#!/bin/sh
# try_wheel.sh PYTHON WHEEL: the wheel in an environment of its own, which has PYTHON's other packages behind its own,
# in an empty folder outside the source and, where unshare can take it away, without a network.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
try=$(mktemp -d)
trap 'rm -rf "$try"' EXIT
unset PYTHONPATH

"$1" -m venv "$try/venv"
bin=$try/venv/bin
"$bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --no-index "$2"
packages='import sysconfig; print(sysconfig.get_path("purelib"))'
"$1" -c "$packages" > "$("$bin/python" -c "$packages")/requirements.pth"

offline=
if unshare --map-root-user --net true 2>/dev/null; then offline='unshare --map-root-user --net'; fi
run() { $offline "$bin/python" "$@"; }
mkdir "$try/empty"
cd "$try/empty"
run "$root/tests/smoke.py"
run -m lambda_kernels.info
run "$bin/lambda-maml" --help
run "$root/tests/whole_way.py" "$root/examples"
