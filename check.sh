#!/usr/bin/env bash
# Lint, types and tests of a checkout, with the tools of the "test" extra.
# `./check.sh lint` stops before the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

ruff check .
ruff format --check .
pyright --pythonpath "$(command -v python)"
if [[ "${1:-}" != lint ]]; then
  python -m pytest -n 2 --dist loadfile -m "not parity and not realdata"
fi
