#!/usr/bin/env bash
# Builds the wheel, installs it into an empty environment with nothing but what it needs, and tries it there.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip=(install --quiet --disable-pip-version-check)

"$python" -m venv "$work/build"
"$work/build/bin/pip" "${pip[@]}" build
"$work/build/bin/python" -m build --outdir "$work/dist" . > "$work/build.log" || { cat "$work/build.log"; exit 1; }

"$python" -m venv "$work/empty"
"$work/empty/bin/pip" "${pip[@]}" --constraint constraints.txt "$work"/dist/*.whl
"$work/empty/bin/python" -m zipfile --list "$work"/dist/*.whl > "$work/files"
for file in msft_store/store.py msft_store/integrations/dcp/storage.py msft_store/py.typed msft_store/__init__.pyi \
            trainer/__init__.pyi trainer/training/loop.py trainer/algorithms/msft.py licenses/LICENSE; do
    grep -q "$file" "$work/files" || { echo "the wheel lacks $file"; exit 1; }
done

cp tests/support/smoke.py "$work"
cd "$work"
PATH="$work/empty/bin:$PATH"
python smoke.py
msft-store --store store check --read-data
# Meanwhile another process has compiled all loops of the codec into the installation.
python -c 'from msft_store.codec.codecs import compiled_kernels; assert compiled_kernels(wait=True)'
ls "$work"/empty/lib/python*/site-packages/msft_store/codec/__pycache__/msft_store-*.all > /dev/null

# What an extra is needed for says so, without a traceback.
wants() {
    local extra=$1
    shift
    if "$@" 2> message; then echo "$* worked without its extra"; exit 1; fi
    grep -q "msft-store\[$extra\]" message && ! grep -q Traceback message || { cat message; exit 1; }
}
wants remote msft-store --store store push s3://nowhere/run
wants report msft-store --store store inspect --plot lineage.png
wants report msft-store completion bash
wants trainer msft-train --help
msft-train --version
echo "the wheel works in an empty environment"
