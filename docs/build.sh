#!/usr/bin/env bash
# Builds the site from docs/ into build/site; every warning is an error.
#   pip install -r tests/requirements.txt -r docs/requirements.txt   # and torch-rope itself
#   docs/build.sh [options of sphinx-build]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
rm -rf build/site
python -m sphinx --fresh-env --fail-on-warning --keep-going "$@" docs build/site
python docs/check_search.py build/site
echo "The site is in build/site/index.html"
